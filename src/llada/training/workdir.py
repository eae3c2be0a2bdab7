"""A work directory: what is in it, when it may be continued, and opening one for inference.

config.json  tokenizer.model (or tokenizer.bundle.json)  data/  checkpoints/  metrics.jsonl  summary.json
events.out.tfevents.*
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from llada import config as config_lib
from llada import json_files, processes
from llada import mesh as mesh_lib
from llada.config import Config, MeshConfig
from llada.data import rows, sources, tokenizer_files
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer import Tokenizer
from llada.errors import DataError, UserError
from llada.files import write_atomically
from llada.model import transformer
from llada.paths import user_path
from llada.training import run_item
from llada.training.checkpoint import Checkpoints
from llada.training.run_item import RunItem


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

    def opened(item: RunItem | None = None) -> tuple[Tokenizer, rows.Corpus]:
        tokenizer = tokenizer_for(workdir, config)
        return tokenizer, corpus_for(workdir, config, tokenizer, item and _corpus_digest(workdir, item))

    with processes.agreement():
        if processes.is_first():
            item = newest(workdir)
            claim(workdir, config, item)
            if item is None:
                _write_config(workdir, config)
            else:
                _give_tokenizer(workdir, item)
            made = opened(item)
            if item is not None:  # once its corpus is known to be the same
                _write_config(workdir, config)
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


def newest(workdir: Path) -> RunItem | None:
    """What the newest checkpoint says about itself; None where there is none. UserError where it cannot be used."""
    directory = workdir / "checkpoints"
    steps = run_item.saved_steps(directory)
    return run_item.read(directory, steps[-1]) if steps else None


def claim(workdir: Path, config: Config, item: RunItem | None) -> None:
    """UserError unless `workdir` is this experiment's, or free; `item` is its newest checkpoint's.

    What an experiment is, is settled once there is a checkpoint: before, other values replace those of earlier calls,
    and what was made by them is cleared away.
    """
    path = workdir / "config.json"
    old = config_lib.load(path) if path.exists() else None
    if item is not None:
        if old is not None and not config_lib.differences(old, config, begun=item.begun):
            run_item.require_same(item, config, workdir / "checkpoints")
        _refuse_another(workdir, config_lib.differences(item.config, config, begun=item.begun))
    elif old is not None and (workdir / "summary.json").exists():
        _refuse_another(workdir, config_lib.differences(old, config))
    elif old is not None:
        _clear(workdir, old, config)


def _write_config(workdir: Path, config: Config) -> None:
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json_files.dumps(config_lib.to_dict(config), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; choose another") from error


def _refuse_another(workdir: Path, changed: list[str]) -> None:
    if changed:
        raise UserError(
            f"--workdir={workdir} belongs to another experiment ({'; '.join(changed[:4])}"
            f"{'; ...' if len(changed) > 4 else ''}); give a new --workdir or the old values. To go on from its "
            f"weights with other values: llada import --source={workdir} --workdir=NEW --config.KEY=VALUE (and another "
            "--config.seed, so that other rows are read)"
        )


def _clear(workdir: Path, old: Config, config: Config) -> None:
    """Before the first checkpoint: take away what other values of `data` or the vocabulary's size have made here."""

    def made_by(c: Config):
        return c.model.vocab_size, dataclasses.replace(c.data, directory=None, unique_tokens=None)

    if made_by(old) == made_by(config):
        return
    for name in ("metadata.json", "train.npy", "holdout.npy"):
        (workdir / "data" / name).unlink(missing_ok=True)
    path = tokenizer_files.in_workdir(workdir)
    if path is not None:  # set aside: it may have been put there by hand
        path.replace(path.with_name(f"{path.name}.replaced"))


def _give_tokenizer(workdir: Path, item: RunItem) -> None:
    """The checkpoint's tokenizer for a workdir that has lost its own. UserError where it has another."""
    if tokenizer_files.in_workdir(workdir) is None:
        saved = tokenizer_files.parse(item.tokenizer, f"the tokenizer in the checkpoint of step {item.step}")
        write_atomically(workdir / saved.file_name, saved.content)
    _own_tokenizer(workdir, item)


def _own_tokenizer(workdir: Path, item: RunItem) -> Tokenizer | None:
    """The workdir's file, if there is one. UserError where it is not the tokenizer of the checkpoint."""
    path = tokenizer_files.in_workdir(workdir)
    if path is None:
        return None
    tokenizer = tokenizer_files.load(path)
    if tokenizer.sha256 != hashlib.sha256(item.tokenizer).hexdigest():
        raise UserError(
            f"{path} is not the tokenizer of the checkpoint of step {item.step}, which holds a copy of its own; "
            f"move {path} away to use that"
        )
    return tokenizer


def tokenizer_for(workdir: Path, config: Config) -> Tokenizer:
    """The run's tokenizer: the workdir's copy, else `data.tokenizer`, else one trained on the training documents."""
    path = tokenizer_files.in_workdir(workdir)
    given = config.data.tokenizer and user_path(config.data.tokenizer, "--config.data.tokenizer")

    def fitted(tokenizer: Tokenizer, remark=lambda line: None) -> Tokenizer:
        masks = config.objective.name == "diffusion"
        return tokenizer_files.fitted(tokenizer, config.model.vocab_size, masks, remark)

    if path is not None:
        tokenizer = fitted(tokenizer_files.load(path))
        # A file that has moved is no matter: the workdir's copy counts.
        if given and given.exists() and fitted(tokenizer_files.load(given)).sha256 != tokenizer.sha256:
            raise UserError(f"--config.data.tokenizer={given} is not the tokenizer that {workdir} was begun with")
    elif given is not None:
        tokenizer = fitted(tokenizer_files.load(given), lambda line: print(line, file=sys.stderr))
        tokenizer_files.require_exportable(tokenizer, f"--config.data.tokenizer={given}")
        write_atomically(workdir / tokenizer.file_name, tokenizer.content)
    else:
        path = workdir / SentencePieceTokenizer.file_name
        tokenizer = SentencePieceTokenizer.train(sources.training(config.data), config.model.vocab_size, path)
    return tokenizer


def corpus_for(workdir: Path, config: Config, tokenizer: Tokenizer, digest: str | None = None) -> rows.Corpus:
    """The run's rows, tokenised once and kept under `data.directory`, or else `workdir/data`.

    With the `digest` of what the run has been trained on, other rows are a DataError, and those made anew are compared
    before they take their place.
    """
    d, directory = config.data, _rows_directory(workdir, config)
    made = directory
    if digest and not (directory / "metadata.json").exists():
        made = directory / "made-anew"
    try:
        corpus = rows.prepare(
            made,
            *(d.source, tokenizer, d.sequence_length, d.holdout_fraction),
            text_key=d.text_key,
            holdout_source=d.holdout_source,
        )
        if digest and corpus.metadata.digest != digest:
            raise _another_corpus(workdir, directory, corpus.metadata.digest, digest)
        if made != directory:
            for name in ("train.npy", "holdout.npy", "metadata.json"):  # which counts, last
                (made / name).replace(directory / name)
            corpus = rows.open_corpus(directory)
    finally:
        if made != directory:
            shutil.rmtree(made, ignore_errors=True)
            with contextlib.suppress(OSError):
                directory.rmdir()  # where there was none before
    return corpus


def corpus_of_run(workdir: Path, config: Config, tokenizer: Tokenizer, step: int) -> rows.Corpus:
    """The rows that the run of `step` was trained on, opened where they are and never made.

    They lie where the config says, in the workdir, or in the sweep that the workdir belongs to. UserError where there
    are none, DataError where they are others.
    """
    item = run_item.read(workdir / "checkpoints", step)
    digest = _corpus_digest(workdir, item)
    own = _rows_directory(workdir, config)
    places = list(dict.fromkeys([own, workdir / "data", workdir.absolute().parent.parent / "data"]))
    found = [place for place in places if (place / "metadata.json").exists()]
    for place in found:
        corpus = rows.open_corpus(place)
        d, m = config.data, corpus.metadata
        asked = (d.source, d.sequence_length, d.holdout_fraction, tokenizer.sha256)
        as_asked = asked == (m.source, m.sequence_length, m.holdout_fraction, m.tokenizer_sha256)
        if m.digest == digest or (digest is None and as_asked):
            return corpus
    if own in found and digest is not None:
        raise _another_corpus(workdir, own, rows.open_corpus(own).metadata.digest, digest)
    raise UserError(
        f"no rows of {workdir} in {' or '.join(map(str, places[:2]))}; llada train --workdir={workdir} makes them from "
        f"data.source={config.data.source}, or finds them with --config.data.directory=DIR"
    )


def _corpus_digest(workdir: Path, item: RunItem) -> str | None:
    """Of the rows that a run has been trained on; None where nothing says it: before training, and in old runs."""
    path = workdir / "summary.json"
    digest = item.cursor.get("corpus_digest")
    if digest is None and item.begun and path.exists():
        digest = json_files.read(path).get("corpus_digest")
    return digest


def _another_corpus(workdir: Path, directory: Path, found: str, wanted: str) -> DataError:
    return DataError(
        f"{directory}: these rows (digest {found}) are not those that {workdir} was trained on (digest {wanted}); put "
        "back the documents that it was made from, or give its rows by --config.data.directory=DIR; for another corpus "
        "give a new --workdir"
    )


def _rows_directory(workdir: Path, config: Config) -> Path:
    given = config.data.directory
    return workdir / "data" if given is None else user_path(given, "--config.data.directory")


def read_config(workdir: Path) -> Config:
    """The experiment of an existing workdir; UserError if there is none."""
    path = user_path(workdir, "--workdir") / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no config.json; give the workdir of a run of llada train")
    return config_lib.load(path)


def saved_tokenizer(workdir: Path, checkpoints: Checkpoints, step: int) -> Tokenizer:
    """The tokenizer of an existing run: the workdir's file, else the copy in the checkpoint of `step`.

    UserError where the two differ.
    """
    item = checkpoints.item(step)
    name = f"the tokenizer in the checkpoint of step {step}"
    return _own_tokenizer(workdir, item) or tokenizer_files.parse(item.tokenizer, name)


def load(workdir: str | os.PathLike, step: int | None = None, mesh: MeshConfig | None = None) -> Run:
    """Open a workdir for inference, at `step` or the latest checkpoint, on this machine's devices.

    UserError where there is no run, no checkpoint, or no such step. `mesh` defaults to all devices on the data axis.
    """
    workdir = user_path(workdir, "--workdir")
    config = read_config(workdir)
    device_mesh = mesh_lib.make(mesh or MeshConfig())
    checkpoints = Checkpoints(workdir)
    step = checkpoints.resolve(step)
    tokenizer = saved_tokenizer(workdir, checkpoints, step)
    params = checkpoints.restore_parameters(config, device_mesh, step)
    checkpoints.close()
    return Run(config, params, tokenizer, step, device_mesh)
