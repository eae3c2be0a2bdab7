"""A work directory: what is in it, when it may be continued, and opening one for inference.

config.json  tokenizer.model (or tokenizer.bundle.json)  data/  checkpoints/  metrics.jsonl  summary.json
events.out.tfevents.*
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import jax

from llada import config as config_lib
from llada import mesh as mesh_lib
from llada import processes
from llada.config import Config, MeshConfig
from llada.data import rows, sources, tokenizer_files
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.files import write_atomically
from llada.model import transformer
from llada.training.checkpoint import Checkpoints, only_imported


class Run(NamedTuple):
    """A trained model, ready to be used: `llada.load(workdir)`."""

    config: Config
    params: transformer.Parameters
    tokenizer: Tokenizer
    step: int
    mesh: jax.sharding.Mesh

    def hidden(self, tokens_BL, lengths_B=None):
        """Hidden states of the model: see `transformer.hidden`."""
        return transformer.hidden(self.config.model, self.params, tokens_BL, lengths_B)

    def logits(self, tokens_BL, lengths_B=None):
        """`logits_BLV`, float32: see `transformer.logits`."""
        return transformer.logits(self.config.model, self.params, tokens_BL, lengths_B)


def require_same(config: Config) -> None:
    """UserError, on all, unless every process was given the same experiment."""
    theirs = config_lib.from_config_dict(processes.from_first(config_lib.to_dict(config)))
    with processes.agreement():
        if theirs != config:
            changed = "; ".join(config_lib.differences(theirs, config)[:4]) or "in keys that may change between calls"
            raise UserError(f"its configuration is not that of process 0 ({changed}); run the same command everywhere")


def prepare(workdir: Path, config: Config) -> tuple[Tokenizer, rows.Corpus]:
    """Make `workdir` this experiment's, with tokenizer and corpus; continue what is there. UserError if that fails.

    Of several processes the first does this, the others wait for it and then open what it made.
    """

    def opened() -> tuple[Tokenizer, rows.Corpus]:
        tokenizer = tokenizer_for(workdir, config)
        return tokenizer, corpus_for(workdir, config, tokenizer)

    with processes.agreement():
        if processes.is_first():
            claim(workdir, config)
            made = opened()
    processes.require_shared(workdir, "--workdir")
    with processes.agreement():
        if not processes.is_first():
            directory = _rows_directory(workdir, config)
            if not (directory / "metadata.json").exists():
                raise UserError(f"no corpus in --config.data.directory={directory}, where process 0 has made one")
            made = opened()
    digests = processes.gather(made[1].metadata.digest)
    if len(set(digests)) > 1:
        raise UserError(f"--config.data.directory={config.data.directory} does not hold the same corpus on all hosts")
    return made


def claim(workdir: Path, config: Config) -> None:
    """Make `workdir` this experiment's, or continue it. UserError if it is another's, or cannot be written."""
    path = workdir / "config.json"
    if path.exists():
        changed = config_lib.differences(config_lib.load(path), config, begun=not only_imported(workdir))
        if changed:
            raise UserError(
                f"--workdir={workdir} belongs to another experiment ({'; '.join(changed[:4])}"
                f"{'; ...' if len(changed) > 4 else ''}); give a new --workdir or the old values"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(config_lib.to_dict(config), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; choose another") from error


def tokenizer_for(workdir: Path, config: Config) -> Tokenizer:
    """The run's tokenizer: the workdir's copy, else `data.tokenizer`, else one trained on the training documents."""
    path = tokenizer_files.in_workdir(workdir)
    if path is not None:
        tokenizer = tokenizer_files.load(path)
        given = config.data.tokenizer
        # A file that has moved is no matter: the workdir's copy counts.
        if given and os.path.exists(given) and tokenizer_files.load(given).sha256 != tokenizer.sha256:
            raise UserError(f"--config.data.tokenizer={given} is not the tokenizer that {workdir} was begun with")
    elif config.data.tokenizer is not None:
        tokenizer = tokenizer_files.load(config.data.tokenizer)
        write_atomically(workdir / tokenizer.file_name, tokenizer.content)
    else:
        fraction = config.data.holdout_fraction
        texts = (text for text in sources.documents(config.data.source) if not sources.is_holdout(text, fraction))
        path = workdir / SentencePieceTokenizer.file_name
        tokenizer = SentencePieceTokenizer.train(texts, config.model.vocab_size, path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, more than model.vocab_size={config.model.vocab_size}; "
            f"set --config.model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def corpus_for(workdir: Path, config: Config, tokenizer: Tokenizer) -> rows.Corpus:
    """The run's rows, tokenised once and kept under `data.directory`, or else `workdir/data`."""
    d, directory = config.data, _rows_directory(workdir, config)
    return rows.prepare(directory, d.source, tokenizer, d.sequence_length, d.holdout_fraction)


def _rows_directory(workdir: Path, config: Config) -> Path:
    return Path(config.data.directory or workdir / "data")


def read_config(workdir: Path) -> Config:
    """The experiment of an existing workdir; UserError if there is none."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no config.json; give the workdir of a run of llada train")
    return config_lib.load(path)


def saved_tokenizer(workdir: Path, checkpoints: Checkpoints, step: int) -> Tokenizer:
    """The tokenizer of an existing run: the workdir's file, else the copy in the checkpoint of `step`."""
    path = tokenizer_files.in_workdir(workdir)
    return tokenizer_files.load(path) if path else tokenizer_files.parse(checkpoints.tokenizer(step), f"step {step}")


def load(workdir: str | os.PathLike, step: int | None = None, mesh: MeshConfig | None = None) -> Run:
    """Open a workdir for inference, at `step` or the latest checkpoint, on this machine's devices.

    UserError where there is no run, no checkpoint, or no such step. `mesh` defaults to all devices on the data axis.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    device_mesh = mesh_lib.make(mesh or MeshConfig())
    checkpoints = Checkpoints(workdir)
    step = checkpoints.resolve(step)
    tokenizer = saved_tokenizer(workdir, checkpoints, step)
    params = checkpoints.restore_parameters(config, device_mesh, step)
    checkpoints.close()
    return Run(config, params, tokenizer, step, device_mesh)
