"""The grid of a sweep: which runs it has, and every number of theirs that follows from a rule.

Four modes, one grid. isoflop: a run for every budget and size, each with its own annealed schedule (SMDM section 4,
Chinchilla section 3.2); variants: the same, of few sizes. checkpoints: one run a size at a constant rate, read at every
budget (LLaDA section 3.1 reads checkpoints of one run a model). repeat: one run a size and amount of unique data, read
after every number of epochs (Quokka, arXiv 2510.03280; arXiv 2511.03276).
"""

import copy
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import accounting, knobs, processes
from llada import config as config_lib
from llada.config import ARRAY_RECORD, Config
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.errors import UserError
from llada.objectives.families import FAMILIES
from llada.paths import user_path
from llada.scaling.series import Series
from llada.scaling.sweep_config import (
    ANNEALED,
    LEAST_SIZES,
    OF_A_SIZE,
    OF_A_VARIANT,
    SweepConfig,
    families_of,
    series_of,
    sizes_of,
    window_of,
)

FLOPS_PER_TOKEN: dict[str, Callable[[Config], float]] = {  # by what budgets are matched in
    "6nd": lambda config: accounting.flops_6nd_per_token(config.model),
    "exact": accounting.flops_exact_per_token,
}
LEAST_STEPS = 20  # fewer are hardly training, and rounding to whole steps would miss the budget by more than 2.5 %
MOST_STEPS = 2**31 - 1


class Reading(NamedTuple):
    """A held-out figure to take: at `step` of the run, for `budget` FLOPs (as matched)."""

    budget: float
    step: int


class _Size(NamedTuple):
    """A size of one series and seed, and all of its config but how long it trains."""

    name: str
    config: Config
    series: Series

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
    variant: str | None = None  # of the objective; None: the plain one

    @property
    def series(self) -> Series:
        """Family and variant."""
        return Series(FAMILIES[self.objective], self.variant)

    @property
    def tokens(self) -> int:
        """Trained on over the whole run."""
        return self.config.steps * self.config.tokens_per_step

    @property
    def tokens_read(self) -> int:
        """Of the corpus: where a batch holds each of its rows twice, half of those trained on."""
        return self.tokens // self.config.row_copies

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
    base["data"]["directory"] = None if base["data"]["source"].startswith(ARRAY_RECORD) else str(directory / "data")
    trained = directory / SentencePieceTokenizer.file_name  # once, before the runs
    base["data"]["tokenizer"] = str(user_path(given, "--config.data.tokenizer").absolute() if given else trained)
    # Every size has a run for each of these: a budget, an amount of unique data, or (None) all budgets together.
    axis = {"checkpoints": (None,), "repeat": sweep.unique_tokens}.get(sweep.mode, sweep.budgets)
    _require_variants_differ(base, sweep)
    runs: list[PlannedRun] = []
    for value, series, seed in itertools.product(axis, series_of(sweep), sweep.seeds):
        sizes = [_sized(base, sweep, size, series, seed) for size in sizes_of(sweep, series.family.name)]
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


def _require_variants_differ(base: dict[str, Any], sweep: SweepConfig) -> None:
    """UserError for a variant that is its family's plain objective, or another variant, under another name."""
    names: dict[Config, str] = {}
    for name in families_of(sweep):
        size = sizes_of(sweep, name)[0]
        plain = Series(FAMILIES[name])
        for series in (plain, *(s for s in series_of(sweep) if s.variant and s.family is plain.family)):
            config = _sized(base, sweep, size, series, sweep.seeds[0]).config
            if (other := names.setdefault(config, series.key)) != series.key:
                keys = sweep.variants[series.variant]
                raise UserError(
                    f"--config.sweep.variants.{series.variant}={keys} is the same objective as {other}; leave it out"
                )


def _sized(base: dict[str, Any], sweep: SweepConfig, size: dict[str, Any], series: Series, seed: int) -> _Size:
    tree = copy.deepcopy(base)
    tree["model"].update({key: value for key, value in size.items() if key not in OF_A_SIZE})
    tree["model"]["causal"] = series.family.causal
    tree["seed"], tree["objective"]["name"] = seed, series.family.name
    if series.family.causal:  # every length up to that of a row is trained on anyway
        tree["objective"]["random_length_fraction"] = 0.0
    for key, value in sweep.variants[series.variant].items() if series.variant else ():
        tree["model" if key in OF_A_VARIANT else "objective"][key] = value
    tree["train"].update(steps=1, tokens=None)
    try:
        config = config_lib.from_config_dict(tree)
    except UserError as error:
        where = f" (in a size of config.sweep.sizes, {size})" if "config.model." in str(error) else ""
        if series.variant:
            where = f" (in config.sweep.variants.{series.variant}={sweep.variants[series.variant]})"
        raise UserError(f"{error}{where}") from error
    rate = size.get("peak_learning_rate")
    if rate is None:
        ratio = sweep.reference_width / config.model.width
        rate = config.optimizer.peak_learning_rate * ratio**sweep.learning_rate_exponent
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=float(rate))
    return _Size(size_name(base, size), dataclasses.replace(config, optimizer=optimizer), series)


def size_name(base: dict[str, Any], size: dict[str, Any]) -> str:
    """Of a dict of `sweep.sizes`: its own, or from its shape."""
    shape = base["model"] | size
    return size.get("name", f"L{shape['layers']}-d{shape['width']}")


def _budgeted(sweep: SweepConfig, sizes: list[_Size], budgets: list[float]) -> Iterator[PlannedRun]:
    """Runs of one series and seed that are read at `budgets`: at one, annealed, or at all that suit their size."""
    wanted: dict[str, list[float]] = {}
    series = sizes[0].series
    least, most = window_of(sweep, series)
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
                f"--config.sweep.budgets={budget:g} leaves {different} sizes of {series.key} with {least:g} to "
                f"{most:g} tokens per parameter; a parabola needs 3: add sizes, or widen sweep.tokens_per_parameter in "
                "the file"
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
    if sweep.mode in ANNEALED:
        return _planned(sweep, size, (f"C={budgets[0]:g}", f"C{budgets[0]:g}"), batch, readings)
    return _planned(sweep, size, ("all budgets", "curve"), batch, readings)


def _repeated(sweep: SweepConfig, size: _Size, unique_tokens: float) -> PlannedRun:
    """A run over `unique_tokens` again and again, read after every number of epochs."""
    copies = size.config.row_copies
    batch = _batch(sweep, size.config, unique_tokens * sweep.epochs[-1] * copies)
    per_step = batch * size.config.data.sequence_length
    rows = unique_tokens // size.config.data.sequence_length
    steps = [round(rows * epochs * copies / batch) for epochs in sweep.epochs]
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
    decay = f" {sweep.decay}" if sweep.mode in ANNEALED else ""
    tree = config_lib.to_dict(size.config)
    tree["data"].update(data)
    tree["optimizer"]["schedule"] = f"0:0 {warmup * per_step}:1{decay}"
    tree["train"].update(batch_size=batch, steps=end)
    at = " ".join(str(reading.step * per_step) for reading in readings[:-1])
    tree["evaluate"].update(batches=sweep.evaluation_rows // batch, every=0, at=at)
    config = config_lib.from_config_dict(tree)
    (group, part), seed = labels, f"_s{config.seed}" if len(sweep.seeds) > 1 else ""
    series = size.series
    name = f"{series.prefix}_{size.name}_{part.replace('+', '')}{seed}"  # what exists keeps its name: sweep.make
    run = PlannedRun(name, series.family.name, size.name, config.seed, group, config, readings)
    return run._replace(variant=series.variant)


def share(runs: Sequence[PlannedRun], only: str | None) -> list[PlannedRun]:
    """The runs of job I of N, "I/N" with I from 1: every run in one share, shares of about equal FLOPs.

    UserError for anything that is not such a pair.
    """
    if only is None:
        return list(runs)
    job, jobs = processes.job(only)
    load = [0.0] * jobs
    shares: list[set[str]] = [set() for _ in load]
    for run in sorted(runs, key=lambda run: -run.flops):
        lightest = load.index(min(load))
        shares[lightest].add(run.name)
        load[lightest] += run.flops
    return [run for run in runs if run.name in shares[job - 1]]
