"""A sweep directory, and running what its grid plans.

sweep.json  tokenizer.model  data/  runs/NAME/ (ordinary workdirs)  results.csv  fits.json  *.png  report.md

Jobs share a directory without talking: each has its share of the runs (`grid.share`), a lock keeps two processes off
one run, and whatever the state of the others is, the disk tells it.
"""

import copy
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llada import accounting
from llada import config as config_lib
from llada.config import Config
from llada.data.rows import Metadata
from llada.errors import UserError
from llada.files import Locked, lock, write_atomically
from llada.scaling.grid import MATCHING, PlannedRun, SweepConfig, check_epochs, parse, plan
from llada.scaling.results import FAILED, FINISHED, RUNNING, WAITING, Result, failure, write_failure
from llada.training import loop
from llada.training import metrics as metrics_lib
from llada.training import workdir as workdir_lib


class Sweep(NamedTuple):
    """A directory and its grid; `base` is the tree of config keys that do not vary between runs."""

    directory: Path
    config: SweepConfig
    base: dict[str, Any]
    runs: list[PlannedRun]

    def workdir(self, run: PlannedRun) -> Path:
        """Where the run lives."""
        return self.directory / "runs" / run.name


def make(directory: Path, base: dict[str, Any], values: dict[str, Any]) -> Sweep:
    """The sweep that `base` and the group `sweep` describe; nothing is written. UserError as in `grid`.

    Also where the directory holds a run of the same name made by other rules.
    """
    config = parse(values)
    sweep = Sweep(directory, config, base, plan(base, config, directory))
    if metadata := corpus_metadata(sweep):  # otherwise `prepare` will find out
        check_epochs(sweep.runs, config, metadata.train_tokens)
    for run in sweep.runs:
        path = sweep.workdir(run) / "config.json"
        if path.exists() and (changed := config_lib.differences(config_lib.load(path), run.config)):
            raise UserError(
                f"{path.parent} was planned by other rules ({'; '.join(changed[:3])}{'; ...' if changed[3:] else ''}); "
                "give a new --workdir, or the old values"
            )
    return sweep


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`base` and the group `sweep` of an existing directory. UserError if there is none."""
    path = directory / "sweep.json"
    if not path.exists():
        raise UserError(f"--workdir={directory} holds no sweep; give --config=experiments/isoflop.py:quick")
    tree = json.loads(path.read_text())
    return tree["base"], tree["sweep"]


def prepare(sweep: Sweep) -> None:
    """Train the tokenizer and write the rows, once for all runs; refuse a corpus too small for the grid."""
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={sweep.directory} cannot be written: {error.strerror}; choose another") from error
    tree = {"sweep": sweep.config.__dict__, "base": sweep.base}
    write_atomically(sweep.directory / "sweep.json", (json.dumps(tree, indent=2) + "\n").encode())
    with lock(sweep.directory / "prepare.lock", wait=True):
        config = sweep.runs[0].config
        made_here = sweep.base["data"]["tokenizer"] is None
        data = _replaced(config, tokenizer=None) if made_here else config
        tokenizer = workdir_lib.tokenizer_for(sweep.directory, data)
        corpus = workdir_lib.corpus_for(sweep.directory, config, tokenizer)
    check_epochs(sweep.runs, sweep.config, corpus.metadata.train_tokens)


def _replaced(config: Config, **data) -> Config:
    tree = copy.deepcopy(config_lib.to_dict(config))
    tree["data"].update(data)
    return config_lib.from_config_dict(tree)


def corpus_metadata(sweep: Sweep) -> Metadata | None:
    """Of the shared rows; None before they are prepared."""
    path = sweep.directory / "data" / "metadata.json"
    return Metadata(**json.loads(path.read_text())) if path.exists() else None


def state(workdir: Path, steps: int) -> str:
    """waiting | running (begun; perhaps interrupted) | finished | failed."""
    if failure(workdir) is not None:
        return FAILED
    summary = workdir / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["step"] == steps:
        return FINISHED
    return RUNNING if (workdir / "config.json").exists() else WAITING


def run_all(
    sweep: Sweep,
    mine: Sequence[PlannedRun],
    progress: Callable[[PlannedRun], metrics_lib.Progress],
    ended: Callable[[PlannedRun, str], None],
    retry_failed: bool = False,
) -> None:
    """Train what of `mine` is neither finished nor failed, in order; `ended(run, state or remark)` after each.

    A run that diverges or breaks is put on record and the next one begins. Raises Interrupted, after saving.
    """
    for run in mine:
        workdir = sweep.workdir(run)
        if retry_failed:
            (workdir / "failed.json").unlink(missing_ok=True)
        if state(workdir, run.config.steps) in (FINISHED, FAILED):
            continue
        try:
            with lock(workdir / "lock"):
                loop.train(run.config, workdir, progress(run))
        except Locked:
            ended(run, "left to another process, which has it")
            continue
        except loop.Diverged as error:
            write_failure(workdir, f"diverged: {error}")
        except (loop.Interrupted, UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # memory, disk, a fault of ours: the other runs can still be had
            (workdir / "failed.txt").write_text(traceback.format_exc())
            write_failure(workdir, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        ended(run, state(workdir, run.config.steps))
        jax.clear_caches()  # no two runs share a program; kept, they fill the memory


def collect(sweep: Sweep) -> list[Result]:
    """A row for every reading of the grid, with what is known of it by now."""
    metadata = corpus_metadata(sweep)
    return [row for run in sweep.runs for row in _rows(sweep, run, metadata)]


def _rows(sweep: Sweep, run: PlannedRun, metadata: Metadata | None) -> Iterator[Result]:
    config, workdir = run.config, sweep.workdir(run)
    count = accounting.parameters(config.model)
    available = metadata.train_tokens if metadata else None
    unique = config.data.unique_tokens or available
    status = state(workdir, config.steps)
    summary = json.loads((workdir / "summary.json").read_text()) if status == FINISHED else {}
    lines = metrics_lib.read(workdir / "metrics.jsonl")
    read_at = {line["step"]: line for line in lines if "eval/nats_per_token" in line}
    for reading in run.readings:
        tokens = reading.step * config.tokens_per_step
        found = read_at.get(reading.step, {})
        last = reading.step == config.steps
        yield Result(
            run=run.name,
            objective=run.objective,
            size=run.size,
            seed=run.seed,
            mode=sweep.config.mode,
            matching=sweep.config.matching,
            budget=reading.budget,
            layers=config.model.layers,
            width=config.model.width,
            parameters=count.total,
            non_embedding_parameters=count.non_embedding,
            tokens=tokens,
            unique_tokens=unique,
            epochs=tokens / unique if unique else None,
            flops_6nd=tokens * MATCHING["6nd"](config),
            flops_exact=tokens * MATCHING["exact"](config),
            step=reading.step,
            steps=config.steps,
            batch_size=config.train.batch_size,
            peak_learning_rate=config.optimizer.peak_learning_rate,
            status=status if status != RUNNING or not found else FINISHED,
            reason=failure(workdir),
            nats_per_token=found.get("eval/nats_per_token"),
            stderr=found.get("eval/stderr"),
            monte_carlo_stderr=found.get("eval/monte_carlo_stderr"),
            bits_per_byte=found.get("eval/bits_per_byte"),
            tokens_per_second=summary.get("tokens_per_second"),
            seconds=summary.get("seconds") if last else None,
            unigram_entropy_nats=metadata and metadata.unigram_entropy_nats,
            corpus_digest=metadata and metadata.digest,
            tokenizer_sha256=metadata and metadata.tokenizer_sha256,
            eval_rows_digest=summary.get("eval_rows_digest"),
            rows_digest=summary.get("rows_digest") if last else None,
        )
