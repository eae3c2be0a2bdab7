"""A work directory: what is in it, when it may be continued, and opening one for inference.

config.json  tokenizer.model (or tokenizer.bundle.json)  data/  checkpoints/  metrics.jsonl  summary.json
events.out.tfevents.*
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llada import config as config_lib
from llada import json_files, processes
from llada import mesh as mesh_lib
from llada.config import Config, MeshConfig
from llada.data import rows, sources, tokenizer_files
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError, disk_error
from llada.files import lock, write_atomically
from llada.paths import user_path, writable_directory
from llada.training import optimizer, run_item
from llada.training.checkpoint import Checkpoints, require_plain
from llada.training.corpus import corpus_digest, corpus_for, corpus_of_run, rows_directory
from llada.training.run import Run
from llada.training.run_item import RunItem, StepRemoved

__all__ = ["corpus_for", "corpus_of_run"]  # of corpus.py, where callers look for what belongs to a workdir


def require_same(config: Config) -> None:
    """UserError, on all, unless every process was given the same experiment."""
    theirs = config_lib.from_config_dict(processes.from_first(config_lib.to_dict(config)))
    with processes.agreement():
        if theirs != config:
            changed = "; ".join(config_lib.differences(theirs, config)[:4]) or "in keys that may change between calls"
            raise UserError(f"its configuration is not that of process 0 ({changed}); run the same command everywhere")


def require_source(workdir: Path, config: Config) -> None:
    """UserError, on all, for paths that are none, rows of another corpus, and a new run without documents.

    Before its workdir is made.
    """
    d = config.data
    with processes.agreement():
        directory = rows_directory(workdir, config)
        rows_made = (directory / "metadata.json").exists()
        if processes.is_first() and d.directory is not None:
            if rows_made:
                asked = ("source", "sequence_length", "holdout_fraction", "text_key", "holdout_source")
                rows.reopened(directory, {name: getattr(d, name) for name in asked}, "--config.data.directory=")
            else:
                writable_directory(d.directory, "--config.data.directory")
        if processes.is_first() and not run_item.saved_steps(workdir / "checkpoints"):
            own = tokenizer_files.in_workdir(workdir)
            if d.tokenizer is not None and own is None:
                tokenizer_files.load(user_path(d.tokenizer, "--config.data.tokenizer"))
            if not rows_made or (d.tokenizer is None and own is None):
                require_documents(config)


def require_documents(config: Config) -> None:
    """UserError for sources that have none: asked before any work begins."""
    d = config.data
    next(sources.documents(d.source, d.text_key), None)
    if d.holdout_source is not None:
        next(sources.documents(d.holdout_source, d.text_key, flag="--config.data.holdout_source"), None)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """A block in which nobody else trains in `workdir`; process 0 holds its lock. UserError, on all, where one does.

    A workdir that was not there before, and in which nothing was left, is taken away again.
    """
    new = processes.is_first() and not workdir.exists()
    try:
        with contextlib.ExitStack() as stack:
            with processes.agreement():
                if processes.is_first():
                    try:
                        stack.enter_context(lock(workdir / "lock", f"--workdir={workdir}", remove=True))
                    except OSError as error:
                        raise _unwritable(workdir, error) from error
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                workdir.rmdir()  # where it is empty


def prepare(
    workdir: Path,
    config: Config,
    say: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Tokenizer, rows.Corpus]:
    """Tokenizer and corpus of a workdir that `claim` has found to be this experiment's. UserError if that fails.

    Of several processes the first makes them, the others wait for it and then open what it made. `say` is told how far
    it is; `check` is called between pieces of work, and may raise to end it.
    """

    def opened(item: RunItem | None = None) -> tuple[Tokenizer, rows.Corpus]:
        tokenizer = tokenizer_for(workdir, config, say, check)
        return tokenizer, corpus_for(workdir, config, tokenizer, item and corpus_digest(workdir, item), say, check)

    with processes.agreement():
        if processes.is_first():
            item = newest(workdir)
            new = not (workdir / "config.json").exists()
            if item is None:
                _write_config(workdir, config)
            else:
                _give_tokenizer(workdir, item)
            try:
                made = opened(item)
            except UserError:
                if new and tokenizer_files.in_workdir(workdir) is None:  # nothing was made by these values
                    (workdir / "config.json").unlink(missing_ok=True)
                raise
            if item is not None:  # once its corpus is known to be the same
                _write_config(workdir, config)
    processes.require_shared(workdir, "--workdir")
    with processes.agreement():
        if not processes.is_first():
            directory = rows_directory(workdir, config)
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


def claim(workdir: Path, config: Config, allow_rate_jump: bool = False) -> int | None:
    """The step that a run of `config` in `workdir` would go on from; None where there is no checkpoint.

    UserError, on all processes, unless the workdir is this experiment's, or free. What an experiment is, is settled
    once there is a checkpoint: before, other values replace those of earlier calls, and what was made by them is
    cleared away. Refused too is a longer or shorter run whose schedule would make the rate jump, unless allowed.
    """
    item = None
    with processes.agreement():
        if processes.is_first():
            require_plain(workdir)
            item = newest(workdir)
            path = workdir / "config.json"
            old = config_lib.load(path) if path.exists() else None
            if item is not None:
                if old is not None and not config_lib.differences(old, config, begun=item.begun):
                    run_item.require_same(item, config, workdir / "checkpoints")
                _refuse_another(workdir, config_lib.differences(item.config, config, begun=item.begun))
                if not allow_rate_jump:
                    _refuse_a_jump(item, config)
            elif old is not None and (workdir / "summary.json").exists():
                _refuse_another(workdir, config_lib.differences(old, config))
            elif old is not None:
                _clear(workdir, old, config)
    return processes.from_first(None if item is None else item.step)


def _refuse_a_jump(item: RunItem, config: Config) -> None:
    """Percent positions of a schedule move with the length of the run."""
    old, step = item.config, item.step
    if not item.begun or old.steps == config.steps or not 0 < step < config.steps:
        return
    before, planned, now = (
        float(optimizer.learning_rate(c)(s)) for c, s in ((old, step - 1), (old, step), (config, step))
    )
    if not math.isclose(planned, now, rel_tol=1e-4):
        raise UserError(
            f"{old.steps:,} -> {config.steps:,} steps moves the percent positions of optimizer.schedule="
            f"{config.optimizer.schedule!r}: from step {step} to {step + 1} the learning rate would go from "
            f"{before:.3g} to {now:.3g}; --allow_rate_jump goes on so. A run that is to be extended needs positions in "
            "tokens from its start, such as '0:0 2M:1'"
        )


def _write_config(workdir: Path, config: Config) -> None:
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json_files.dumps(config_lib.to_dict(config), indent=2) + "\n").encode())
    except OSError as error:
        raise _unwritable(workdir, error) from error


def _unwritable(workdir: Path, error: OSError) -> UserError:
    full = disk_error(error, f"writing in --workdir={workdir}")
    return full or UserError(f"--workdir={workdir} cannot be written: {error.strerror or error}; choose another")


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


def tokenizer_for(
    workdir: Path,
    config: Config,
    say: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> Tokenizer:
    """The run's tokenizer: the workdir's copy, else `data.tokenizer`, else one trained on the training documents.

    `say` is told that it is trained; `check` is called between documents, and may raise to end it.
    """
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
        say(f"training the tokenizer: {config.model.vocab_size:,} pieces, from {config.data.source}")
        texts = sources.training(config.data)
        tokenizer = SentencePieceTokenizer.train(texts, config.model.vocab_size, path, say, check)
    return tokenizer


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


def load(
    workdir: str | os.PathLike, step: int | None = None, mesh: MeshConfig | None = None, dtype: str = "float32"
) -> Run:
    """Open a workdir for inference, at `step` or the latest checkpoint, its parameters in `dtype` spread over `mesh`.

    UserError where there is no run, no checkpoint, or no such step, and for a mesh that the model does not divide over.
    `mesh` defaults to all devices, of all processes, on the data axis. Of several processes all must call it.
    """
    workdir = user_path(workdir, "--workdir")
    with processes.agreement():
        config = read_config(workdir)
        device_mesh = mesh_lib.make(mesh or MeshConfig())
        mesh_lib.check_parameters(config, device_mesh)
    with Checkpoints(workdir) as checkpoints:
        try:
            return _opened(workdir, checkpoints, config, device_mesh, step, dtype)
        except StepRemoved:
            if step is not None:
                raise
            return _opened(workdir, checkpoints, config, device_mesh, None, dtype)  # training has saved a newer one


def _opened(workdir: Path, checkpoints: Checkpoints, config: Config, mesh, step: int | None, dtype: str) -> Run:
    with processes.agreement():
        step = checkpoints.resolve(step)
    step = processes.from_first(step)
    with processes.agreement():
        tokenizer = saved_tokenizer(workdir, checkpoints, step)
    return Run(config, checkpoints.restore_parameters(config, mesh, step, dtype), tokenizer, step, mesh, workdir)
