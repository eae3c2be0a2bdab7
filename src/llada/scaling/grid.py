"""The grid of a sweep: which runs it has, and every number of theirs that follows from a rule.

Three modes, one grid. isoflop: a run for every budget and size, each with its own annealed schedule (SMDM section 4,
Chinchilla section 3.2). checkpoints: one run a size at a constant rate, read at every budget (LLaDA section 3.1 reads
checkpoints of one run a model). repeat: one run a size and amount of unique data, read after every number of epochs
(Quokka, arXiv 2510.03280; arXiv 2511.03276).
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import accounting, knobs
from llada import config as config_lib
from llada.config import Config
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.errors import UserError
from llada.objectives.families import FAMILIES
from llada.paths import user_path
from llada.scaling.sweep_config import LEAST_SIZES, OF_A_SIZE, UNUSED, SweepConfig, sizes_of

FLOPS_PER_TOKEN: dict[str, Callable[[Config], float]] = {  # by what budgets are matched in
    "6nd": lambda config: accounting.flops_6nd_per_token(config.model),
    "exact": accounting.flops_exact_per_token,
}
LEAST_STEPS = 20  # fewer are hardly training, and rounding to whole steps would miss the budget by more than 2.5 %
MOST_STEPS = 2**31 - 1

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
    "optimizer.schedule": "use config.sweep.warmup_fraction, warmup_steps and decay",
    "evaluate.every": LENGTH,
    "evaluate.at": LENGTH,
    "evaluate.batches": "use --config.sweep.evaluation_rows",
}
# Keys that rules start from, or only write out as full paths.
STARTED_FROM = ("train.batch_size", "data.tokenizer")


class Reading(NamedTuple):
    """A held-out figure to take: at `step` of the run, for `budget` FLOPs (as matched)."""

    budget: float
    step: int


class _Size(NamedTuple):
    """A size of one family and seed, and all of its config but how long it trains."""

    name: str
    config: Config

    @property
    def non_embedding(self) -> int:
        """N."""
        return accounting.parameters(self.config.model).non_embedding


class PlannedRun(NamedTuple):
    """One run of the grid. `group` is what its readings share in a table: a budget, or an amount of unique data.

    `retried`: of a run that is trained again at another rate than the grid's, why.
    """

    name: str
    objective: str
    size: str
    seed: int
    group: str
    config: Config
    readings: tuple[Reading, ...]
    retried: str | None = None

    @property
    def tokens(self) -> int:
        """Read over the whole run."""
        return self.config.steps * self.config.tokens_per_step

    @property
    def flops(self) -> float:
        """All matrix products of the whole run: what it costs, whichever count it is matched by."""
        return self.tokens * accounting.flops_exact_per_token(self.config)


def plan(base: dict[str, Any], sweep: SweepConfig, directory: Path) -> list[PlannedRun]:
    """Every run, cheapest budget first; `base` is the tree of all config keys that do not vary.

    Runs share tokenizer and rows under `directory`, written in full, so that they open from anywhere. UserError for
    budgets below a few steps, sizes that leave a budget fewer than three, names that two sizes share, no run at all.
    """
    base = config_lib.to_dict(knobs.build(Config, base, "config"))
    directory, given = directory.absolute(), base["data"]["tokenizer"]
    base["data"]["directory"] = str(directory / "data")
    trained = directory / SentencePieceTokenizer.file_name  # once, before the runs
    base["data"]["tokenizer"] = str(user_path(given, "--config.data.tokenizer").absolute() if given else trained)
    # Every size has a run for each of these: a budget, an amount of unique data, or (None) all budgets together.
    axis = {"isoflop": sweep.budgets, "checkpoints": (None,), "repeat": sweep.unique_tokens}[sweep.mode]
    runs: list[PlannedRun] = []
    for value, objective, seed in itertools.product(axis, sweep.objectives, sweep.seeds):
        sizes = [_sized(base, sweep, size, objective, seed) for size in sizes_of(sweep, objective)]
        sizes.sort(key=lambda size: size.non_embedding)
        if twice := _twice(size.name for size in sizes):
            raise UserError(f"--config.sweep.sizes has two of one name ({twice}); give one of them a key name='...'")
        if sweep.mode == "repeat":
            runs += [_repeated(sweep, size, value) for size in sizes]
        else:
            runs += _budgeted(sweep, sizes, [value] if value else list(sweep.budgets))
    if not runs:
        raise UserError("--config.sweep.tokens_per_parameter leaves no size at any budget, so there is nothing to run")
    if twice := _twice(run.name for run in runs):
        key = "unique_tokens" if sweep.mode == "repeat" else "budgets"
        raise UserError(f"--config.sweep.{key}={axis} has two numbers alike to six digits ({twice}); leave one out")
    return runs


def _twice(names: Iterable[str]) -> str | None:
    """The alphabetically first name that occurs more than once."""
    return min((name for name, number in Counter(names).items() if number > 1), default=None)


def _sized(base: dict[str, Any], sweep: SweepConfig, size: dict[str, Any], objective: str, seed: int) -> _Size:
    tree = copy.deepcopy(base)
    tree["model"].update({key: value for key, value in size.items() if key not in OF_A_SIZE})
    tree["model"]["causal"] = FAMILIES[objective].causal
    tree["seed"], tree["objective"]["name"] = seed, objective
    if FAMILIES[objective].causal:  # every length up to that of a row is trained on anyway
        tree["objective"]["random_length_fraction"] = 0.0
    tree["train"].update(steps=1, tokens=None)
    try:
        config = config_lib.from_config_dict(tree)
    except UserError as error:
        where = f" (in a size of config.sweep.sizes, {size})" if "config.model." in str(error) else ""
        raise UserError(f"{error}{where}") from error
    rate = size.get("peak_learning_rate")
    if rate is None:
        ratio = sweep.reference_width / config.model.width
        rate = config.optimizer.peak_learning_rate * ratio**sweep.learning_rate_exponent
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=float(rate))
    return _Size(_size_name(base, size), dataclasses.replace(config, optimizer=optimizer))


def _size_name(base: dict[str, Any], size: dict[str, Any]) -> str:
    shape = base["model"] | size
    return size.get("name", f"L{shape['layers']}-d{shape['width']}")


def left_out(base: dict[str, Any], sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """A sentence for every family and budget that is not trained, or not read, in all sizes."""
    texts = [
        f"{_size_name(base, size)}: of {size['objective']} alone, which --config.sweep.objectives does not name"
        for size in sweep.sizes
        if size.get("objective", sweep.objectives[0]) not in sweep.objectives
    ]
    read = {(run.objective, run.size, reading.budget) for run in runs for reading in run.readings}
    for objective, budget in itertools.product(sweep.objectives, sweep.budgets if sweep.mode != "repeat" else ()):
        names = [_size_name(base, size) for size in sizes_of(sweep, objective)]
        if missing := [name for name in names if (objective, name, budget) not in read]:
            least, most = sweep.tokens_per_parameter.get(objective, (0, math.inf))
            why = f"tokens per parameter outside {least:g} to {most:g}"
            if sweep.sizes_per_budget is not None:
                why += f", or more than sweep.sizes_per_budget={sweep.sizes_per_budget}"
            texts.append(f"{objective} at {budget:g} FLOPs: {', '.join(missing)} ({why})")
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
    drawn = any(not FAMILIES[objective].exact for objective in sweep.objectives)
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


def _budgeted(sweep: SweepConfig, sizes: list[_Size], budgets: list[float]) -> Iterator[PlannedRun]:
    """Runs of one family and seed that are read at `budgets`: at one, annealed, or at all that suit their size."""
    wanted: dict[str, list[float]] = {}
    objective = sizes[0].config.objective.name
    least, most = sweep.tokens_per_parameter.get(objective, (0, math.inf))
    for budget in budgets:
        suited = [
            size
            for size in sizes
            if least <= budget / FLOPS_PER_TOKEN[sweep.matching](size.config) / size.non_embedding <= most
        ]
        number = min(sweep.sizes_per_budget or len(suited), len(suited))
        suited = [suited[i] for i in sorted(set(np.linspace(0, len(suited) - 1, number).round().astype(int)))]
        different = len({size.non_embedding for size in suited})
        if sweep.mode == "isoflop" and different < LEAST_SIZES:
            raise UserError(
                f"--config.sweep.budgets={budget:g} leaves {different} sizes of {objective} with {least:g} to {most:g} "
                "tokens per parameter; a parabola needs 3: add sizes, or widen sweep.tokens_per_parameter in the file"
            )
        for size in suited:
            wanted.setdefault(size.name, []).append(budget)
    for size in sizes:
        if size.name in wanted:
            yield _read_at_budgets(sweep, size, wanted[size.name])


def _read_at_budgets(sweep: SweepConfig, size: _Size, budgets: Sequence[float]) -> PlannedRun:
    """A run up to the largest of `budgets`."""
    per_token = FLOPS_PER_TOKEN[sweep.matching](size.config)
    batch = _batch(sweep, size.config, budgets[-1] / per_token)
    per_step = batch * size.config.data.sequence_length
    steps = [round(budget / per_token / per_step) for budget in budgets]
    if steps[0] < LEAST_STEPS:
        raise UserError(
            f"--config.sweep.budgets={budgets[0]:g} is {budgets[0] / per_token / per_step:.3g} steps of {per_step} "
            f"tokens for {size.name}, less than {LEAST_STEPS}; raise the budget, lower --config.train.batch_size or "
            "leave the size out"
        )
    _require_apart("budgets", budgets, steps, size.name)
    readings = tuple(map(Reading, budgets, steps))
    if sweep.mode == "isoflop":
        return _planned(sweep, size, (f"C={budgets[0]:g}", f"C{budgets[0]:g}"), batch, readings)
    return _planned(sweep, size, ("all budgets", "curve"), batch, readings)


def _repeated(sweep: SweepConfig, size: _Size, unique_tokens: float) -> PlannedRun:
    """A run over `unique_tokens` again and again, read after every number of epochs."""
    batch = _batch(sweep, size.config, unique_tokens * sweep.epochs[-1])
    per_step = batch * size.config.data.sequence_length
    rows = unique_tokens // size.config.data.sequence_length
    steps = [round(rows * epochs / batch) for epochs in sweep.epochs]
    if steps[0] < 1:
        raise UserError(
            f"--config.sweep.epochs={sweep.epochs[0]:g} of --config.sweep.unique_tokens={unique_tokens} is less than "
            f"one step of {per_step} tokens; raise one of the two"
        )
    _require_apart("epochs", sweep.epochs, steps, size.name)
    flops = FLOPS_PER_TOKEN[sweep.matching](size.config) * per_step
    readings = tuple(Reading(step * flops, step) for step in steps)
    labels = f"U={unique_tokens:g}", f"U{unique_tokens:g}"
    return _planned(sweep, size, labels, batch, readings, unique_tokens=int(unique_tokens))


def _require_apart(key: str, values: Sequence[float], steps: list[int], size: str) -> None:
    """UserError for readings at one step, and for runs longer than any can be."""
    for (a, b), (first, second) in zip(itertools.pairwise(values), itertools.pairwise(steps), strict=True):
        if first == second:
            raise UserError(f"--config.sweep.{key} has {a:g} and {b:g}, which are the same step {first} of {size}")
    if steps[-1] > MOST_STEPS:
        raise UserError(
            f"--config.sweep.{key}={values[-1]:g} is {steps[-1]:.3g} steps of {size}, more than the {MOST_STEPS:,} "
            "that a run can have; lower it, or raise --config.train.batch_size"
        )


def _batch(sweep: SweepConfig, config: Config, tokens: float) -> int:
    """Sequences per step of a run of `tokens`; UserError where held-out rows are no multiple of it."""
    factor = (tokens / sweep.reference_tokens) ** sweep.batch_exponent
    largest = max(0, math.floor(math.log2(max(1, sweep.largest_batch / config.train.batch_size))))
    batch = config.train.batch_size * 2 ** min(max(round(math.log2(factor)), 0), largest)
    if sweep.evaluation_rows % batch:
        raise UserError(
            f"--config.sweep.evaluation_rows={sweep.evaluation_rows} is not a multiple of the batch of {batch} "
            "sequences, so runs would be read on different rows; make it one"
        )
    return batch


def _planned(
    sweep: SweepConfig, size: _Size, labels: tuple[str, str], batch: int, readings: tuple[Reading, ...], **data: int
) -> PlannedRun:
    """The run, everything that rules set written into its config; `labels` are its group and its part of the name."""
    end, per_step = readings[-1].step, batch * size.config.data.sequence_length
    # At most a fifth of the run: a rule in steps must not swallow a short one.
    warmup = min(max(math.ceil(sweep.warmup_fraction * end), sweep.warmup_steps, 1), max(1, end // 5))
    decay = f" {sweep.decay}" if sweep.mode == "isoflop" else ""
    tree = config_lib.to_dict(size.config)
    tree["data"].update(data)
    tree["optimizer"]["schedule"] = f"0:0 {warmup * per_step}:1{decay}"
    tree["train"].update(batch_size=batch, steps=end)
    at = " ".join(str(reading.step * per_step) for reading in readings[:-1])
    tree["evaluate"].update(batches=sweep.evaluation_rows // batch, every=0, at=at)
    config = config_lib.from_config_dict(tree)
    (group, part), seed = labels, f"_s{config.seed}" if len(sweep.seeds) > 1 else ""
    prefix = FAMILIES[config.objective.name].prefix
    name = f"{prefix}_{size.name}_{part.replace('+', '')}{seed}"  # what exists already keeps its name: sweep.make
    return PlannedRun(name, config.objective.name, size.name, config.seed, group, config, readings)


def share(runs: Sequence[PlannedRun], only: str | None) -> list[PlannedRun]:
    """The runs of job I of N, "I/N" with I from 1: every run in one share, shares of about equal FLOPs.

    UserError for anything that is not such a pair.
    """
    if only is None:
        return list(runs)
    job, slash, jobs = only.partition("/")
    pair = [int(word) if word.isdecimal() and len(word) < 6 else 0 for word in (job, jobs)]
    if not (slash and 1 <= pair[0] <= pair[1]):
        raise UserError(f"--only={only} must be I/N with I from 1 to N (at most 99999), such as --only=1/4")
    load = [0.0] * pair[1]
    shares: list[set[str]] = [set() for _ in load]
    for run in sorted(runs, key=lambda run: -run.flops):
        lightest = load.index(min(load))
        shares[lightest].add(run.name)
        load[lightest] += run.flops
    return [run for run in runs if run.name in shares[pair[0] - 1]]


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
        if sweep.mode != "repeat" and run.tokens > sweep.max_epochs * read:
            raise UserError(
                f"{run.name} asks for {run.tokens} tokens, {run.tokens / read:.2f} epochs of the corpus's "
                f"{read}; give more text, smaller budgets, or allow it with --config.sweep.max_epochs="
                f"{math.ceil(max(r.tokens for r in runs) / read)}"
            )
