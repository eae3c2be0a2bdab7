"""A work directory under training: who may continue it, and what is prepared in it.

config.json  tokenizer.model (or tokenizer.bundle.json)  data/  checkpoints/  metrics.jsonl  calls.jsonl  summary.json
events.out.tfevents.*
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from llada import changes, json_files, processes
from llada import config as config_lib
from llada.config import Config
from llada.data import tokenizer_files
from llada.data.tokenizer import Tokenizer
from llada.errors import Damaged, UserError, disk_error
from llada.files import lock, write_atomically
from llada.paths import writable_directory
from llada.training import corpus as corpus_lib
from llada.training import optimizer, run_item
from llada.training.checkpoint import require_plain
from llada.training.corpus import (
    Corpus,
    corpus_digest,
    corpus_for,
    open_matching,
    require_documents,
    rows_directory,
    saved_tokenizer,
    tokenizer_for,
)
from llada.training.run_item import RunItem


def require_same(config: Config) -> None:
    """UserError, on all, unless every process runs the same experiment."""
    theirs = config_lib.from_config_dict(processes.from_first(config_lib.to_dict(config)))
    with processes.agreement():
        if theirs != config:
            changed = "; ".join(changes.differences(theirs, config)[:4]) or "in keys that may change between calls"
            raise UserError(f"its configuration is not that of process 0 ({changed}); run the same command everywhere")


def require_source(workdir: Path, config: Config) -> None:
    """UserError, on all, for paths that do not exist, rows of another corpus, and a new run without documents.

    Checked before its workdir is created.
    """
    d = config.data
    with processes.agreement():
        directory = rows_directory(workdir, config)
        has_rows = corpus_lib.has_rows(directory, config)
        if config.reads_records:
            open_matching(directory, config)
        elif processes.is_first() and d.directory is not None:
            if has_rows:
                open_matching(directory, config, flag="--config.data.directory=")
            else:
                writable_directory(d.directory, "--config.data.directory")
        if processes.is_first() and not run_item.saved_steps(workdir / "checkpoints"):
            has_tokenizer = d.tokenizer is not None or tokenizer_files.in_workdir(workdir) is not None
            if d.tokenizer is not None and tokenizer_files.in_workdir(workdir) is None:
                tokenizer_files.load(d.tokenizer)
            if not (has_rows and (has_tokenizer or config.reads_records)):
                require_documents(config)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """A block in which only this run trains in `workdir`; process 0 holds its lock. UserError, on all, if it is taken.

    A workdir that did not exist before, and in which nothing was left, is removed again.
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
    log: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus of a workdir that `claim` says is this experiment's. UserError if that fails.

    Of several processes the first prepares them, the others wait for it and then open what it wrote. `log` is called
    with how far it is; `check` between pieces of work, and may raise to end it.
    """
    with processes.agreement():
        if processes.is_first():
            tokenizer, corpus = _prepare_first(workdir, config, log, check)
    processes.require_shared(workdir, "--workdir")
    with processes.agreement():
        if not processes.is_first():
            directory = rows_directory(workdir, config)
            if not corpus_lib.has_rows(directory, config):
                raise UserError(f"no corpus in --config.data.directory={directory}, where process 0 has made one")
            tokenizer = tokenizer_for(workdir, config)
            corpus = corpus_for(workdir, config, tokenizer)
    if len(set(processes.gather(corpus.metadata.digest))) > 1:
        raise UserError(f"--config.data.directory={config.data.directory} does not hold the same corpus on all hosts")
    return tokenizer, corpus


def _prepare_first(
    workdir: Path, config: Config, log: Callable[[str], None], check: Callable[[], None]
) -> tuple[Tokenizer, Corpus]:
    """What process 0 does of `prepare`, and the workdir's config.json."""
    item = newest(workdir)
    is_new = not (workdir / "config.json").exists()
    digest = None
    if item is None:
        _write_config(workdir, config)
    else:
        digest = corpus_digest(workdir, item)
        tokenizer = saved_tokenizer(workdir, item)
        if tokenizer_files.in_workdir(workdir) is None:
            write_atomically(workdir / tokenizer.file_name, tokenizer.content)
    try:
        tokenizer = tokenizer_for(workdir, config, log, check)
        corpus = corpus_for(workdir, config, tokenizer, digest, log, check)
    except UserError:
        if is_new and tokenizer_files.in_workdir(workdir) is None:  # these values led to nothing
            (workdir / "config.json").unlink(missing_ok=True)
        raise
    if item is not None:  # now that its corpus is known to be the same
        _write_config(workdir, config)
    return tokenizer, corpus


def newest(workdir: Path, damaged: dict[int, Damaged] | None = None) -> RunItem | None:
    """What the newest checkpoint says about itself; None where there is none. UserError where it cannot be used.

    With `damaged` such steps are passed over, and their errors put into it, where an older one is good.
    """
    directory = workdir / "checkpoints"
    found: dict[int, Damaged] = {}
    for step in reversed(run_item.saved_steps(directory)):
        try:
            item = run_item.read(directory, step)
        except Damaged as error:
            found[step] = error
            if damaged is None:
                break
        else:
            (damaged if damaged is not None else {}).update(found)
            return item
    if found:
        raise next(iter(found.values()))
    return None


def claim(
    workdir: Path,
    config: Config,
    allow_rate_jump: bool = False,
    log: Callable[[str], None] = lambda text: None,
    allow_return: bool | None = None,
) -> tuple[int | None, Config]:
    """The step that a run of `config` in `workdir` would go on from, None where there is no checkpoint; and the config.

    The config has the record of what later calls changed (`changes`), which `log` is told, as it is of steps that say
    nothing true about themselves: they are set aside where there is an older one to go on from. UserError, on all
    processes, unless the workdir is this experiment's, or free. What an experiment is, is settled once there is a
    checkpoint: before, other values replace those of earlier calls, and what these wrote is removed. Refused too is a
    longer or shorter run whose schedule would make the rate jump, unless that is allowed, and a value that the run has
    left behind, unless that is (default: as `allow_rate_jump`).
    """
    allow_return = allow_rate_jump if allow_return is None else allow_return
    item = None
    damaged: dict[int, Damaged] = {}
    with processes.agreement():
        if processes.is_first():
            require_plain(workdir)
            item = newest(workdir, damaged)
            path = workdir / "config.json"
            old = config_lib.load(path) if path.exists() else None
            if item is not None:
                config = _continued(workdir, item, old, config, allow_return)
                if not allow_rate_jump:
                    _refuse_a_jump(item, config)
                for step, error in damaged.items():
                    log(f"{error}: now {run_item.set_aside(workdir / 'checkpoints', step)}")
                for line in changes.described(config, since=item.step):
                    log(line)
            elif old is not None and (workdir / "summary.json").exists():
                _refuse_another(workdir, changes.differences(old, config, recorded=True))
            elif old is not None:
                _clear(workdir, old, config)
    step, tree = processes.from_first((None if item is None else item.step, config_lib.to_dict(config)))
    return step, config_lib.from_config_dict(tree)


def advice(workdir: Path) -> str:
    """What to do once all processes have ended together."""
    steps = run_item.saved_steps(workdir / "checkpoints")
    return f"start it again on all hosts: it goes on from {f'step {steps[-1]}' if steps else 'the start'}"


def _continued(workdir: Path, item: RunItem, old: Config | None, config: Config, allow_return: bool) -> Config:
    """`config` with the record of what has changed. `old` is what config.json holds: it may know of later changes."""
    if old is not None and not changes.differences(old, config, begun=item.begun):
        run_item.require_same(item, config, workdir / "checkpoints")
    _refuse_another(workdir, changes.differences(item.config, config, begun=item.begun))
    changed = changes.differences(item.config, config, recorded=True)
    if changed and item.step >= config.steps:
        raise UserError(
            f"--workdir={workdir} has come to its end, step {item.step}, and another value ({'; '.join(changed)}) "
            "would hold from the next step on; give more --config.train.steps, or the old value"
        )
    if not item.begun:
        return dataclasses.replace(config, changes=())
    trained, known = (changes.at(c, item.step - 1) for c in (item.config, old or item.config))
    if old is None or changes.differences(trained, known, recorded=True):
        old = item.config  # config.json was edited
    return changes.continued(old, config, item.step, allow_return)


def _refuse_a_jump(item: RunItem, config: Config) -> None:
    """Percent positions of a schedule move with the length of the run."""
    old, step = item.config, item.step
    if not item.begun or old.steps == config.steps or not 0 < step < config.steps:
        return
    then, now = (changes.at(c, step).optimizer for c in (old, config))
    if (then.peak_learning_rate, then.schedule) != (now.peak_learning_rate, now.schedule):
        return  # it is asked for
    rate, planned, longer = (
        float(optimizer.learning_rate(changes.at(c, s))(s)) for c, s in ((old, step - 1), (old, step), (config, step))
    )
    if not math.isclose(planned, longer, rel_tol=1e-4):
        raise UserError(
            f"{old.steps:,} -> {config.steps:,} steps moves the percent positions of optimizer.schedule="
            f"{config.optimizer.schedule!r}: from step {step} to {step + 1} the learning rate would go from "
            f"{rate:.3g} to {longer:.3g}; --allow_rate_jump goes on so. A run that is to be extended needs positions "
            "in tokens from its start, such as '0:0 2M:1'"
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
    """Before the first checkpoint: remove what other values of `data` or the vocabulary's size have prepared here."""

    def made_by(c: Config):
        data = dataclasses.replace(c.data, directory=None, unique_tokens=None)
        return c.model.vocab_size, data, (c.dialogues.template, c.dialogues.too_long, c.dialogues.padding)

    if made_by(old) == made_by(config):
        return
    for rows in (workdir / "data").glob("*.npy"):
        rows.unlink()
    (workdir / "data" / "metadata.json").unlink(missing_ok=True)
    path = tokenizer_files.in_workdir(workdir)
    if path is not None:  # set aside: it may have been put there by hand
        path.replace(path.with_name(f"{path.name}.replaced"))
