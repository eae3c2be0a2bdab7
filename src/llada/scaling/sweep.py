"""A sweep directory, and running what its grid plans.

sweep.json  tokenizer.model  data/  runs/NAME/ (ordinary workdirs)  failed/  results.csv  fits.json  *.png  report.md

Jobs share a directory and do not communicate: each has its share of the runs (`grid.share`), a run's lock keeps a
second process off it, and the state of all runs is read from the disk.
"""

import contextlib
import dataclasses
import itertools
import math
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llada import accounting, changes, json_files, knobs
from llada import config as config_lib
from llada import mesh as mesh_lib
from llada.config import Config
from llada.data import tokenizer_files
from llada.errors import Diverged, Interrupted, UserError, disk_error
from llada.files import Locked, lock, queue_for_lock, write_atomically
from llada.objectives import families
from llada.objectives.families import FAMILIES
from llada.scaling.grid import FLOPS_PER_TOKEN, PlannedRun, plan
from llada.scaling.grid_checks import check_epochs, check_used, left_out
from llada.scaling.results import DIVERGED, FAILED, FINISHED, RUNNING, WAITING, Result, failure, write_failure
from llada.scaling.sweep_config import SweepConfig, keys_of, parse
from llada.training import corpus, loop
from llada.training import metrics as metrics_lib
from llada.training.corpus import Metadata
from llada.training.optimizer import parse_schedule
from llada.training.progress import Progress


class Sweep(NamedTuple):
    """A directory and its grid; `base` is the tree of config keys that do not vary between runs."""

    directory: Path
    config: SweepConfig
    base: dict[str, Any]
    runs: list[PlannedRun]

    def workdir(self, run: PlannedRun) -> Path:
        """Where the run lives."""
        return self.directory / "runs" / run.name


def make(
    directory: Path, base: dict[str, Any], values: dict[str, Any], typed: Collection[str] = (), in_file: bool = False
) -> Sweep:
    """The sweep that `base` and the group `sweep` describe; nothing is written. UserError as in `grid`.

    Also where the directory holds a run of the same name made by other rules, or anything that is no sweep. `typed` and
    `in_file` are those of `check_used`.
    """
    if (directory / "config.json").exists() and not (directory / "sweep.json").exists():
        raise UserError(f"--workdir={directory} is a run or a model, not a sweep; give a directory of its own")
    config = parse(values)
    runs = plan(base, config, directory)
    check_used(base, config, runs, typed, in_file)
    for run in runs:
        _check_schedule(run, config)
    sweep = Sweep(directory, config, base, runs)
    sweep = sweep._replace(runs=[_as_on_disk(sweep, run) for run in runs])
    if metadata := corpus_metadata(sweep):  # otherwise `prepare` will find out
        check_epochs(sweep.runs, config, metadata.train_tokens)
    return sweep


def _check_schedule(run: PlannedRun, sweep: SweepConfig) -> None:
    """What the run itself would refuse of its schedule, before any run begins."""
    try:
        parse_schedule(run.config)
    except UserError as error:
        raise UserError(f"--config.sweep.decay={sweep.decay!r:.80} makes no schedule of {run.name}: {error}") from error


def _as_on_disk(sweep: Sweep, run: PlannedRun) -> PlannedRun:
    """The run under the name, and with the rate, that it has in the directory.

    A grid of one seed names runs without it; what was trained so keeps its name where seeds are added, and the other
    way round. UserError where the directory has the run by other rules.
    """
    suffix = f"_s{run.seed}"
    plain = run.name.removesuffix(suffix)
    of_seed, of_plain = (_config_on_disk(sweep.directory / "runs" / name) for name in (plain + suffix, plain))
    if of_seed is not None and of_seed.seed == run.seed:
        run = run._replace(name=plain + suffix)
    elif of_plain is not None:
        run = run._replace(name=plain if of_plain.seed == run.seed else plain + suffix)
    workdir = sweep.workdir(run)
    run = _retried(run, workdir / "retry.json")
    if (old := of_plain if run.name == plain else of_seed) is not None:
        changed = changes.differences(old, run.config, recorded=True)
        # Fixed within a sweep: finished runs are not evaluated again, and all are to be evaluated alike.
        for name in ("draws", "batches"):
            before, now = getattr(old.evaluate, name), getattr(run.config.evaluate, name)
            changed += [f"evaluate.{name}: {before} -> {now}"] * (before != now)
        if changed:
            rate = any("peak_learning_rate" in change for change in changed)
            raise UserError(
                f"{workdir} was planned by other rules ({'; '.join(changed[:3])}{'; ...' if changed[3:] else ''}); "
                "give a new --workdir, or the old values"
                + ("; --retry_rate=0.5 trains failed runs at half their rate" if rate else "")
            )
    return run


def _config_on_disk(workdir: Path) -> Config | None:
    path = workdir / "config.json"
    return config_lib.load(path) if path.exists() else None


def _retried(run: PlannedRun, path: Path) -> PlannedRun:
    """The run at the rate that retry.json gives in place of the grid's, where there is one for that."""
    if not path.exists():
        return run
    note, planned = json_files.read(path), run.config.optimizer.peak_learning_rate
    rates = [note.get(key) for key in ("planned_peak_learning_rate", "peak_learning_rate")]
    if not all(type(rate) is float and 0 < rate < math.inf for rate in rates):
        raise UserError(f"{path} holds no rates; remove {path.parent} to train the run at the grid's")
    if not math.isclose(rates[0], planned, rel_tol=1e-9):
        return run  # the grid has another rate by now, and says so against config.json
    return _at_rate(run, rates[1], f"peak rate {rates[1]:.3g} and not {planned:.3g}: {note.get('reason')}")


def _at_rate(run: PlannedRun, rate: float, why: str) -> PlannedRun:
    optimizer = dataclasses.replace(run.config.optimizer, peak_learning_rate=rate)
    return run._replace(config=dataclasses.replace(run.config, optimizer=optimizer), retried=why)


def retry_at(sweep: Sweep, mine: Sequence[PlannedRun], factor: float) -> Sweep:
    """The sweep with the failed runs of `mine` to be trained again, at `factor` times the rate that they failed at.

    What they left behind goes to failed/NAME-N; retry.json in the new workdir says what is changed, and why.
    """
    runs, names = [], {run.name for run in mine}
    for run in sweep.runs:
        workdir = sweep.workdir(run)
        reason = failure(workdir)
        if reason is not None and run.name in names:
            failed_at = run.config.optimizer.peak_learning_rate
            before = json_files.read(workdir / "retry.json") if run.retried else {}
            note = {
                "planned_peak_learning_rate": before.get("planned_peak_learning_rate", failed_at),
                "peak_learning_rate": failed_at * factor,
                "reason": "; ".join(filter(None, (before.get("reason"), f"at {failed_at:.3g} it {_failed(reason)}"))),
            }
            with lock(workdir / "lock", f"--workdir={workdir}", remove=True):
                old = _free_name(sweep.directory / "failed", run.name)
                old.parent.mkdir(exist_ok=True)
                workdir.rename(old)
                (old / "lock").unlink(missing_ok=True)
            write_atomically(workdir / "retry.json", (json_files.dumps(note, indent=2) + "\n").encode())
            run = _retried(_at_rate(run, note["planned_peak_learning_rate"], ""), workdir / "retry.json")
        runs.append(run)
    return sweep._replace(runs=runs)


def _failed(reason: str) -> str:
    reason = reason.partition(". ")[0]  # without advice, which has been followed
    return reason.replace(DIVERGED, "diverged, ", 1) if reason.startswith(DIVERGED) else f"failed, {reason}"


def _free_name(folder: Path, name: str) -> Path:
    return next(path for n in itertools.count(1) if not (path := folder / f"{name}-{n}").exists())


def remarks(sweep: Sweep) -> list[str]:
    """Sentences about what a reader of the table would otherwise miss: sizes left out, runs of an earlier grid."""
    texts = [f"left out: {text}" for text in left_out(sweep.base, sweep.config, sweep.runs)]
    metadata = corpus_metadata(sweep)
    if metadata and metadata.holdout_rows < sweep.config.evaluation_rows:
        texts.append(
            f"the hold-out side has {metadata.holdout_rows} rows, fewer than sweep.evaluation_rows="
            f"{sweep.config.evaluation_rows}: readings are of all of them"
        )
    planned = {run.name for run in sweep.runs}
    others = sorted(p.parent.name for p in sweep.directory.glob("runs/*/config.json") if p.parent.name not in planned)
    if others:
        named = ", ".join(others[:8]) + (", ..." if others[8:] else "")
        texts.append(
            f"left out: {len(others)} runs in {sweep.directory / 'runs'} that this grid does not plan: {named}"
        )
    return texts


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`base` and the group `sweep` of an existing directory. UserError if there is none."""
    path = directory / "sweep.json"
    if not path.exists():
        raise UserError(f"--workdir={directory} holds no sweep; give --config=experiments/isoflop.py:quick")
    tree = json_files.read(path)
    if not all(isinstance(tree.get(key), dict) for key in ("base", "sweep")):
        raise UserError(f"{path} holds no sweep; give --config=FILE once more, which writes it again")
    return tree["base"], tree["sweep"]


def require_documents(sweep: Sweep) -> None:
    """UserError where the rows are still to be written and there are no documents for them."""
    if corpus_metadata(sweep) is None:
        corpus.require_documents(sweep.runs[0].config)


def prepare(sweep: Sweep, log: Callable[[str], None] = lambda text: None) -> None:
    """Train the tokenizer and write the rows, once for all runs; refuse a corpus too small for the grid.

    `log` gets a line for each piece of work.
    """
    mesh = mesh_lib.make(sweep.runs[0].config.mesh)
    for run in sweep.runs:
        mesh_lib.check(run.config, mesh)
    tree = {"sweep": sweep.config.__dict__, "base": sweep.base}
    path, is_new = sweep.directory / "sweep.json", not sweep.directory.exists()
    before = json_files.read_bytes(path) if path.exists() else None
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
        with queue_for_lock(sweep.directory / "prepare.lock", f"prepares {sweep.directory}"):
            _clear(sweep)
            write_atomically(path, (json_files.dumps(tree, indent=2) + "\n").encode())
            # One tokenizer for all series: with a mask token where one of them needs it.
            config = max((run.config for run in sweep.runs), key=_masks)
            given = config.data.tokenizer if sweep.base["data"]["tokenizer"] else None
            data = dataclasses.replace(config.data, tokenizer=given)
            tokenizer = corpus.tokenizer_for(sweep.directory, dataclasses.replace(config, data=data), log)
            made = corpus.corpus_for(sweep.directory, config, tokenizer, log=log)
        check_epochs(sweep.runs, sweep.config, made.metadata.train_tokens)
    except UserError:
        if before is not None:
            write_atomically(path, before)
        # A first mistake leaves nothing behind, except what took work and the grid that it was done for.
        if is_new and tokenizer_files.in_workdir(sweep.directory) is None and corpus_metadata(sweep) is None:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                (sweep.directory / "data").rmdir()
            with contextlib.suppress(OSError):
                sweep.directory.rmdir()
        raise
    except OSError as error:
        if full := disk_error(error, f"preparing --workdir={sweep.directory}"):
            raise full from error
        if not str(error.filename or "").startswith(str(sweep.directory)):
            raise
        raise UserError(f"--workdir={sweep.directory} cannot be written: {error.strerror}; choose another") from error


def _masks(config: Config) -> tuple[bool, bool]:
    """Whether it needs a mask token: a family that does, the most; an ARM that masks its inputs asks for one."""
    return families.of(config).masks, config.objective.input_masking > 0


def _clear(sweep: Sweep) -> None:
    """Remove the rows and the tokenizer of an earlier grid's other values, where no run has begun with them."""
    if not _is_stale(sweep):
        return
    for path in (sweep.directory / "data" / "metadata.json", *(sweep.directory / "data").glob("*.npy")):
        path.unlink(missing_ok=True)
    if (tokenizer := tokenizer_files.in_workdir(sweep.directory)) is not None:  # it may have been put there by hand
        tokenizer.replace(tokenizer.with_name(f"{tokenizer.name}.replaced"))


def _is_stale(sweep: Sweep) -> bool:
    """Whether rows and tokenizer are those of other values, and no run has begun with them."""
    if not (sweep.directory / "sweep.json").exists() or any(sweep.directory.glob("runs/*/config.json")):
        return False

    def values(base: dict[str, Any]) -> tuple:
        tree = config_lib.to_dict(knobs.build(Config, base, "config"))
        return tree["model"]["vocab_size"], {**tree["data"], "unique_tokens": None}, tree["dialogues"]

    return values(read(sweep.directory)[0]) != values(sweep.base)


def corpus_metadata(sweep: Sweep) -> Metadata | None:
    """Of the shared rows, or examples; None before they are prepared."""
    config = sweep.runs[0].config
    directory = corpus.rows_directory(sweep.directory, config)
    exist = corpus.has_rows(directory, config) and (config.reads_records or not _is_stale(sweep))
    return corpus.open_corpus(directory, config).metadata if exist else None


def state(workdir: Path, steps: int) -> str:
    """One of waiting | running (begun; perhaps interrupted) | finished | failed."""
    if failure(workdir) is not None:
        return FAILED
    if _summary(workdir).get("step") == steps:
        return FINISHED
    return RUNNING if (workdir / "config.json").exists() else WAITING


def _summary(workdir: Path) -> dict[str, Any]:
    path = workdir / "summary.json"
    return json_files.read(path) if path.exists() else {}


def run_all(
    sweep: Sweep,
    mine: Sequence[PlannedRun],
    progress: Callable[[PlannedRun], Progress],
    ended: Callable[[PlannedRun, str], None],
    retry_failed: bool = False,
) -> None:
    """Train what of `mine` is neither finished nor failed, in order; `ended(run, state or remark)` after each.

    A run that diverges or breaks is put on record and the next one begins. Raises Interrupted, after saving, and what
    would meet the next run as well: a mistake, damaged data, a full disk.
    """
    for run in mine:
        workdir = sweep.workdir(run)
        if retry_failed and (reason := failure(workdir)) is not None:
            if reason.startswith(DIVERGED):
                ended(run, "begun again at the rate at which it diverged; --retry_rate=0.5 starts over at half of it")
            (workdir / "failed.json").unlink(missing_ok=True)
        if state(workdir, run.config.steps) in (FINISHED, FAILED):
            continue
        try:
            loop.train(run.config, workdir, progress(run))
        except Locked:
            ended(run, "left to another process, which has it")
            continue
        except Diverged as error:
            write_failure(workdir, error)
        except (Interrupted, UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # out of memory, a bug: the other runs can still be trained
            if full := disk_error(error, f"training {run.name}"):
                raise full from error
            write_atomically(workdir / "failed.txt", traceback.format_exc().encode("utf-8", "backslashreplace"))
            write_failure(workdir, error)
        ended(run, state(workdir, run.config.steps))
        jax.clear_caches()  # no two runs share a program; the compiled ones would fill the memory


# What a reading takes from its line of metrics.jsonl.
_EVALUATED = ("nats_per_token", "stderr", "monte_carlo_stderr", "bits_per_byte")


def collect(sweep: Sweep) -> list[Result]:
    """A row for every reading of the grid, with what is known of it by now."""
    metadata = corpus_metadata(sweep)
    return [row for run in sweep.runs for row in _rows(sweep, run, metadata)]


def _rows(sweep: Sweep, run: PlannedRun, metadata: Metadata | None) -> Iterator[Result]:
    config, workdir = run.config, sweep.workdir(run)
    status = state(workdir, config.steps)
    summary = _summary(workdir) if status == FINISHED else {}
    unique = config.data.unique_tokens or (metadata.train_tokens if metadata else None)
    count = accounting.parameters(config.model)
    of_run: dict[str, Any] = {
        "run": run.name,
        **{key: getattr(run, key) for key in ("objective", "variant", "size", "seed", "retried")},
        **{key: getattr(sweep.config, key) for key in ("mode", "matching")},
        **{key: getattr(config.model, key) for key in ("layers", "width")},
        **{key: summary.get(key) for key in ("tokens_per_second", "eval_rows_digest")},
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "unique_tokens": unique,
        "steps": config.steps,
        "batch_size": config.train.batch_size,
        "peak_learning_rate": config.optimizer.peak_learning_rate,
        "block_cross_document_attention": config.objective.block_cross_document_attention,
        "variant_keys": keys_of(sweep.config, run.series),
        "bound_trained": families.of(config).bound_trained(config.objective),
        "row_copies": config.row_copies,
        "draws": 1 if FAMILIES[run.objective].exact else config.evaluate.draws,
        "reason": failure(workdir),
    }
    if metadata:
        of_run |= {key: getattr(metadata, key) for key in ("unigram_entropy_nats", "tokenizer_sha256")}
        of_run["corpus_digest"] = metadata.digest
    lines = metrics_lib.read(workdir / "metrics.jsonl")
    evaluations = {line["step"]: line for line in lines if "eval/nats_per_token" in line}
    for reading in run.readings:
        tokens, line = reading.step * config.tokens_per_step, evaluations.get(reading.step, {})
        ended = summary if reading.step == config.steps else {}
        figures: dict[str, Any] = {key: line.get(f"eval/{key}") for key in _EVALUATED}
        figures |= {key: ended.get(key) for key in ("seconds", "rows_digest")}
        yield Result(
            **of_run,
            budget=reading.budget,
            step=reading.step,
            tokens=tokens,
            epochs=tokens / config.row_copies / unique if unique else None,
            flops_6nd=tokens * FLOPS_PER_TOKEN["6nd"](config),
            flops_exact=tokens * FLOPS_PER_TOKEN["exact"](config),
            status=FINISHED if line and status == RUNNING else status,
            **figures,
        )
