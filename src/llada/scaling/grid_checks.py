"""What a grid refuses, and what it leaves out: keys that its rules overwrite, too little text, sizes without a run."""

import functools
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

from llada import config as config_lib
from llada import knobs
from llada.config import Config
from llada.errors import UserError
from llada.scaling.grid import PlannedRun, size_name
from llada.scaling.sweep_config import UNUSED, SweepConfig, families_of, series_of, sizes_of, window_of

# Keys that rules set for each run, and what to use instead: a value of the user's would do nothing.
LENGTH = "the budgets (or epochs) and the rules of config.sweep say how long a run is and when it is read"
RULED = {
    "seed": "use --config.sweep.seeds",
    "objective.name": "use --config.sweep.objectives",
    "model.causal": "use --config.sweep.objectives",
    "data.directory": "all runs share the rows in --workdir/data",
    "data.unique_tokens": "use --config.sweep.unique_tokens",
    "train.steps": LENGTH,
    "train.tokens": LENGTH,
    "train.epochs": LENGTH,
    "optimizer.schedule": "use config.sweep.warmup_fraction, warmup_steps and decay",
    "evaluate.every": LENGTH,
    "evaluate.at": LENGTH,
    "evaluate.batches": "use --config.sweep.evaluation_rows",
}
# Keys that rules start from, or only write out as full paths.
STARTED_FROM = ("train.batch_size", "data.tokenizer")


def left_out(base: dict[str, Any], sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """A sentence for every series and budget that is not trained, or not read, in all sizes.

    A variant that has the sizes of its plain family, which the sweep has too, needs none of its own.
    """
    trained = families_of(sweep)
    texts = [
        f"{size_name(base, size)}: of {size['objective']} alone, which --config.sweep.objectives does not name"
        for size in sweep.sizes
        if size.get("objective", trained[0]) not in trained
    ]
    read = {(run.series.key, run.size, reading.budget) for run in runs for reading in run.readings}
    series = series_of(sweep)
    own = [
        s for s in series if s == s.plain or s.plain not in series or window_of(sweep, s) != window_of(sweep, s.plain)
    ]
    for each, budget in itertools.product(own, sweep.budgets if sweep.mode != "repeat" else ()):
        names = [size_name(base, size) for size in sizes_of(sweep, each.family.name)]
        if missing := [name for name in names if (each.key, name, budget) not in read]:
            least, most = window_of(sweep, each)
            why = f"tokens per parameter outside {least:g} to {most:g}"
            if sweep.sizes_per_budget is not None:
                why += f", or more than sweep.sizes_per_budget={sweep.sizes_per_budget}"
            texts.append(f"{each.key} at {budget:g} FLOPs: {', '.join(missing)} ({why})")
    return texts


def check_used(
    base: dict[str, Any], sweep: SweepConfig, runs: Sequence[PlannedRun], typed: Collection[str], in_file: bool
) -> None:
    """UserError for a key whose value the rules overwrite or the mode does not read, so that it would do nothing.

    typed    keys of the command line, `sweep.` before those of the group
    in_file  whether keys of the experiment file count as well: those whose value is not the default
    """
    base = config_lib.to_dict(knobs.build(Config, base, "config"))
    for key in knobs.keys(SweepConfig, "sweep."):
        name = key.name.removeprefix("sweep.")
        value = getattr(sweep, name)
        given = any(word == key.name or word.startswith(f"{key.name}.") for word in typed)
        if name in UNUSED[sweep.mode] and (given or (in_file and value != key.default)):
            raise UserError(f"--config.{key.name} does nothing in mode {sweep.mode}; leave it out, or see sweep.mode")
    own_rates = all("peak_learning_rate" in size for size in sweep.sizes)
    trees = [config_lib.to_dict(run.config) for run in runs]
    for key in knobs.keys(Config):
        value = _at(base, key.name)
        if not (key.name in typed or (in_file and value != key.default)) or key.name in STARTED_FROM:
            continue
        if key.name == "optimizer.peak_learning_rate" and not own_rates:
            continue
        planned = [_at(tree, key.name) for tree in trees]
        # Some sizes, or a family, may set it themselves; the rest have the user's value.
        of_sizes = key.name.startswith("model.") and all(key.name.removeprefix("model.") in s for s in sweep.sizes)
        changed = any if key.name in RULED or of_sizes else all
        if changed(other != value for other in planned):
            instead = RULED.get(key.name) or (
                "the sizes have their own" if key.name.startswith(("model.", "optimizer.")) else "no run would have it"
            )
            raise UserError(
                f"--config.{key.name}={value!s:.60} would do nothing in a sweep, whose rules set it; {instead}"
            )
    drawn = any(not series.exact for series in series_of(sweep))
    if drawn and _at(base, "evaluate.draws") < 2 and (in_file or "evaluate.draws" in typed):
        raise UserError(
            "--config.evaluate.draws=1 tells no Monte Carlo error, by which the fits of a sweep weigh its runs; give 2 "
            "or more"
        )
    if sweep.batch_exponent and sweep.largest_batch < runs[0].config.train.batch_size:
        raise UserError(
            f"--config.sweep.largest_batch={sweep.largest_batch} is below --config.train.batch_size="
            f"{_at(base, 'train.batch_size')}, where the rule for batches begins; raise it"
        )


def _at(tree: dict[str, Any], key: str) -> Any:
    return functools.reduce(dict.__getitem__, key.split("."), tree)


def check_epochs(runs: Sequence[PlannedRun], sweep: SweepConfig, train_tokens: int) -> None:
    """UserError where a run would read the corpus more often than allowed, or asks for more than there is."""
    for run in runs:
        unique = run.config.data.unique_tokens
        if unique is not None and unique > train_tokens:
            key = "sweep.unique_tokens" if sweep.mode == "repeat" else "data.unique_tokens"
            raise UserError(
                f"--config.{key}={unique} is more than the corpus has, {train_tokens} training tokens; "
                "lower it or give more text"
            )
        read = unique or train_tokens
        if sweep.mode != "repeat" and run.tokens_read > sweep.max_epochs * read:
            raise UserError(
                f"{run.name} asks for {run.tokens_read} tokens, {run.tokens_read / read:.2f} epochs of the corpus's "
                f"{read}; give more text, smaller budgets, or allow it with --config.sweep.max_epochs="
                f"{math.ceil(max(r.tokens_read for r in runs) / read)}"
            )
