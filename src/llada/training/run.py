"""A trained model, ready for use: `llada.load(workdir)`, and the config and rows of an existing run."""

import os
from pathlib import Path
from typing import NamedTuple

import jax

from llada import accounting, processes
from llada import config as config_lib
from llada import mesh as mesh_lib
from llada.config import Config, MeshConfig
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.model import transformer
from llada.paths import user_path
from llada.training import run_item
from llada.training.checkpoint import Checkpoints
from llada.training.corpus import (
    Corpus,
    corpus_digest,
    has_rows,
    matches,
    open_corpus,
    remark,
    require_digest,
    rows_directory,
    saved_tokenizer,
)


class Run(NamedTuple):
    """Config, parameters, tokenizer, step and mesh, with the model's functions.

    `workdir` is where it comes from, `corpus_digest` of the rows that it was trained on, where that is known.
    """

    config: Config
    params: transformer.Parameters
    tokenizer: Tokenizer
    step: int
    mesh: jax.sharding.Mesh
    workdir: Path | None = None
    corpus_digest: str | None = None

    def __repr__(self) -> str:
        """One line, without the parameters."""
        count = accounting.parameters(self.config.model).total
        return f"Run({self.config.objective.name}, {count:,} parameters, step {self.step}, workdir={self.workdir})"

    def hidden(self, tokens_BL, lengths_B=None):
        """Hidden states of the model: see `transformer.hidden`."""
        return transformer.hidden(self.config.model, self.params, tokens_BL, lengths_B)

    def logits(self, tokens_BL, lengths_B=None):
        """`logits_BLV`, float32: see `transformer.logits`."""
        return transformer.logits(self.config.model, self.params, tokens_BL, lengths_B)

    def generate(self, prompt: str = "", **options) -> str:
        """The text that continues `prompt`; options as in `generation.Request`, such as gen_length, temperature, seed.

        UserError for what the model or its context cannot do.
        """
        return self._generated(prompt=prompt, **options)

    def infill(self, text: str, **options) -> str:
        """`text` with its marks [MASK:N] filled by N tokens each; options as in `generation.Request`."""
        return self._generated(infill=text, **options)

    def log_likelihood(self, prompt: str, answer: str, **options):
        """`likelihood.LogLikelihood` of `answer` after `prompt`, in nats; options as in `LikelihoodConfig`.

        Spaces that end the prompt count to the answer: see `canvas.encode_pair`.
        """
        from llada.inference import canvas, likelihood  # sampling and scoring are not needed to train

        pair = likelihood.Pair(*canvas.encode_pair(self.tokenizer, prompt, answer))
        settings = likelihood.LikelihoodConfig(**options)
        with jax.set_mesh(self.mesh):
            return likelihood.log_likelihoods(self.config.model, self.params, [pair], self.tokenizer.special, settings)[
                0
            ]

    def _generated(self, **request) -> str:
        from llada.inference import generation

        with jax.set_mesh(self.mesh):
            requests = [generation.Request(**request)]
            return generation.generate(self.config, self.params, self.tokenizer, requests)[0].text


def read_config(workdir: str | os.PathLike) -> Config:
    """The experiment of an existing workdir; UserError if there is none."""
    path = user_path(workdir, "--workdir") / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no config.json; give the workdir of a run of llada train")
    return config_lib.load(path)


def load(
    workdir: str | os.PathLike, step: int | None = None, mesh: MeshConfig | None = None, dtype: str = "float32"
) -> Run:
    """Open a workdir for inference, at `step` or the latest checkpoint, its parameters in `dtype` sharded over `mesh`.

    UserError where there is no run, no checkpoint, or no such step, and for a mesh that the model does not divide over.
    `mesh` defaults to all devices, of all processes, on the data axis. Of several processes all must call it.
    """
    workdir = user_path(workdir, "--workdir")
    with processes.agreement():
        config = read_config(workdir)
        device_mesh = mesh_lib.make(mesh or MeshConfig())
        mesh_lib.check_parameters(config, device_mesh)
    with Checkpoints(workdir) as checkpoints:

        def read(step: int | None) -> Run:
            return _open(workdir, checkpoints, config, device_mesh, step, dtype)

        return run_item.newest_again(checkpoints.directory, read, step)


def _open(
    workdir: Path, checkpoints: Checkpoints, config: Config, mesh: jax.sharding.Mesh, step: int | None, dtype: str
) -> Run:
    with processes.agreement():
        step = checkpoints.resolve(step)
    step = processes.from_first(step)
    with processes.agreement():
        item = checkpoints.item(step)
        tokenizer, digest = saved_tokenizer(workdir, item), corpus_digest(workdir, item)
    params = checkpoints.restore_parameters(config, mesh, step, dtype)
    return Run(config, params, tokenizer, step, mesh, workdir, digest)


def describe(workdir: str | os.PathLike, step: int | None = None) -> Run:
    """As `load`, without parameters and on one device of this process: for what needs config and tokenizer only."""
    workdir = user_path(workdir, "--workdir")
    config = read_config(workdir)
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.resolve(step)
        item = checkpoints.item(step)
    tokenizer, digest = saved_tokenizer(workdir, item), corpus_digest(workdir, item)
    return Run(config, {}, tokenizer, step, mesh_lib.make(MeshConfig()), workdir, digest)


def corpus_of_run(workdir: Path, config: Config, tokenizer: Tokenizer, digest: str | None) -> Corpus:
    """The rows that a run was trained on (`Run.corpus_digest`), opened where they are and never prepared.

    They lie where the config says, in the workdir, or in the sweep that the workdir belongs to. UserError where there
    are none, DataError where they are others.
    """
    configured = rows_directory(workdir, config)
    directories = list(dict.fromkeys([configured, workdir / "data", workdir.absolute().parent.parent / "data"]))
    for directory in directories:
        if has_rows(directory, config):
            corpus = open_corpus(directory, config)
            if corpus.metadata.digest == digest or (digest is None and matches(corpus, config, tokenizer)):
                remark(directory, corpus)
                return corpus
    if has_rows(configured, config):
        require_digest(workdir, configured, open_corpus(configured, config), digest)
    raise UserError(
        f"no rows of {workdir} in {' or '.join(map(str, directories[:2]))}; llada train --workdir={workdir} makes them "
        f"from data.source={config.data.source}, or finds them with --config.data.directory=DIR"
    )
