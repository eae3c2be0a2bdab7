"""The grid of a sweep: which runs there are, and every number of theirs that follows from a rule.

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
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import accounting, knobs
from llada import config as config_lib
from llada.config import Config
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.errors import UserError
from llada.paths import user_path
from llada.scaling.sweep_config import FAMILIES, LEAST_SIZES, OF_A_SIZE, UNUSED, SweepConfig, sizes_of
from llada.scaling.sweep_config import parse as parse

MATCHING = {
    "6nd": lambda config: accounting.flops_6nd_per_token(config.model),
    "exact": accounting.flops_exact_per_token,
}
LEAST_STEPS = 20  # fewer are hardly training, and rounding to whole steps would miss the budget by more than 2.5 %
MOST_STEPS = 2**31 - 1

# Keys that rules make for each run, and what to give in place of them. A value of one's own would do nothing.
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
# Keys that rules start from, or only write out in full.
STARTED_FROM = ("train.batch_size", "data.tokenizer")


class Reading(NamedTuple):
    """A held-out figure to take: at `step` of the run, for `budget` FLOPs (as matched)."""

    budget: float
    step: int


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
    own = directory / SentencePieceTokenizer.file_name  # trained once, before the runs
    base["data"]["tokenizer"] = str(user_path(given, "--config.data.tokenizer").absolute() if given else own)
    axis = sweep.unique_tokens if sweep.mode == "repeat" else sweep.budgets if sweep.mode == "isoflop" else (None,)
    runs = []
    for value, objective, seed in itertools.product(axis, sweep.objectives, sweep.seeds):
        sizes = [_sized(base, sweep, size, objective, seed) for size in sizes_of(sweep, objective)]
        sizes.sort(key=lambda named: accounting.parameters(named[1].model).non_embedding)
        _require_names(sizes)
        if sweep.mode == "repeat":
            runs += [_repeating(sweep, *named, value) for named in sizes]
        else:
            runs += _budgeted(sweep, sizes, [value] if value else list(sweep.budgets))
    if not runs:
        raise UserError("--config.sweep.tokens_per_parameter leaves no size at any budget, so there is nothing to run")
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        axis_key = "unique_tokens" if sweep.mode == "repeat" else "budgets"
        raise UserError(
            f"--config.sweep.{axis_key}={axis} has two numbers alike to six digits ({min(twice)}); leave one out"
        )
    return runs


def _require_names(sizes: list[tuple[str, Config]]) -> None:
    names = [name for name, _ in sizes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--config.sweep.sizes has two of one name ({min(twice)}); give one of them a key name='...'")


def _sized(base, sweep: SweepConfig, size: dict[str, Any], objective: str, seed: int) -> tuple[str, Config]:
    """The name of a size and its Config but for how long it trains."""
    tree = copy.deepcopy(base)
    tree["model"].update({key: value for key, value in size.items() if key not in OF_A_SIZE})
    tree["seed"], tree["objective"]["name"] = seed, objective
    tree["model"]["causal"] = objective == "autoregressive"
    if objective == "autoregressive":
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
    return _size_name(base, size), dataclasses.replace(config, optimizer=optimizer)


def _size_name(base: dict[str, Any], size: dict[str, Any]) -> str:
    shape = base["model"] | size
    return size.get("name", f"L{shape['layers']}-d{shape['width']}")


def left_out(base: dict[str, Any], sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """A sentence for every family and budget that is not trained, or not read, in all sizes."""
    said = [
        f"{_size_name(base, size)}: of {size['objective']} alone, which --config.sweep.objectives does not name"
        for size in sweep.sizes
        if size.get("objective", sweep.objectives[0]) not in sweep.objectives
    ]
    there = {(run.objective, run.size, reading.budget) for run in runs for reading in run.readings}
    for objective, budget in itertools.product(sweep.objectives, sweep.budgets if sweep.mode != "repeat" else ()):
        names = [_size_name(base, size) for size in sizes_of(sweep, objective)]
        if missing := [name for name in names if (objective, name, budget) not in there]:
            least, most = sweep.tokens_per_parameter.get(objective, (0, math.inf))
            why = f"tokens per parameter outside {least:g} to {most:g}"
            if sweep.sizes_per_budget is not None:
                why += f", or more than sweep.sizes_per_budget={sweep.sizes_per_budget}"
            said.append(f"{objective} at {budget:g} FLOPs: {', '.join(missing)} ({why})")
    return said


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
        # Some sizes, or a family, may have their own; the rest have what was given.
        of_sizes = key.name.startswith("model.") and all(key.name.removeprefix("model.") in s for s in sweep.sizes)
        changed = any if key.name in RULED or of_sizes else all
        if changed(own != value for own in planned):
            instead = RULED.get(key.name) or (
                "the sizes have their own" if key.name.startswith(("model.", "optimizer.")) else "no run would have it"
            )
            raise UserError(
                f"--config.{key.name}={str(value):.60} would do nothing in a sweep, whose rules set it; {instead}"
            )
    if "diffusion" in sweep.objectives and _at(base, "evaluate.draws") < 2 and (in_file or "evaluate.draws" in typed):
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


def _budgeted(sweep: SweepConfig, sizes: list[tuple[str, Config]], budgets: list[float]) -> Iterator[PlannedRun]:
    """Runs of one family and seed that are read at `budgets`: at one, annealed, or at all that suit their size."""
    wanted: dict[str, list[float]] = {}
    family = sizes[0][1].objective.name
    least, most = sweep.tokens_per_parameter.get(family, (0, math.inf))
    for budget in budgets:
        suited = []
        for name, config in sizes:
            n = accounting.parameters(config.model).non_embedding
            tokens = budget / MATCHING[sweep.matching](config)
            if least <= tokens / n <= most:
                suited.append((n, name))
        keep = len(suited) if sweep.sizes_per_budget is None else min(sweep.sizes_per_budget, len(suited))
        suited = [suited[i] for i in sorted(set(np.linspace(0, len(suited) - 1, keep).round().astype(int)))]
        if sweep.mode == "isoflop" and (different := len({n for n, _ in suited})) < LEAST_SIZES:
            raise UserError(
                f"--config.sweep.budgets={budget:g} leaves {different} sizes of {family} with {least:g} to {most:g} "
                "tokens per parameter; a parabola needs 3: add sizes, or widen sweep.tokens_per_parameter in the file"
            )
        for _, name in suited:
            wanted.setdefault(name, []).append(budget)
    for name, config in sizes:
        if name in wanted:
            yield _run(sweep, name, config, wanted[name])


def _run(sweep: SweepConfig, size: str, config: Config, budgets: Sequence[float]) -> PlannedRun:
    per_token = MATCHING[sweep.matching](config)
    config = _with_batch(sweep, config, budgets[-1] / per_token)
    steps = [round(budget / per_token / config.tokens_per_step) for budget in budgets]
    if steps[0] < LEAST_STEPS:
        raise UserError(
            f"--config.sweep.budgets={budgets[0]:g} is {budgets[0] / per_token / config.tokens_per_step:.3g} steps of "
            f"{config.tokens_per_step} tokens for {size}, less than {LEAST_STEPS}; raise the budget, lower "
            "--config.train.batch_size or leave the size out"
        )
    _require_apart("budgets", budgets, steps, size)
    annealed = sweep.mode == "isoflop"
    config = _with_length(sweep, config, steps, annealed)
    group = f"C={budgets[0]:g}" if annealed else "all budgets"
    readings = tuple(Reading(budget, step) for budget, step in zip(budgets, steps, strict=True))
    part = f"C{budgets[0]:g}".replace("+", "") if annealed else "curve"
    return _named(sweep, size, config, group, part, readings)


def _repeating(sweep: SweepConfig, size: str, config: Config, unique_tokens: int) -> PlannedRun:
    """A run over `unique_tokens` again and again, read after every number of epochs."""
    config = _with_batch(sweep, config, unique_tokens * sweep.epochs[-1])
    rows = unique_tokens // config.data.sequence_length
    steps = [round(rows * epochs / config.train.batch_size) for epochs in sweep.epochs]
    if steps[0] < 1:
        raise UserError(
            f"--config.sweep.epochs={sweep.epochs[0]:g} of --config.sweep.unique_tokens={unique_tokens} is less than "
            f"one step of {config.tokens_per_step} tokens; raise one of the two"
        )
    _require_apart("epochs", sweep.epochs, steps, size)
    data = dataclasses.replace(config.data, unique_tokens=int(unique_tokens))
    config = _with_length(sweep, dataclasses.replace(config, data=data), steps, annealed=False)
    per_step = MATCHING[sweep.matching](config) * config.tokens_per_step
    readings = tuple(Reading(step * per_step, step) for step in steps)
    return _named(sweep, size, config, f"U={unique_tokens:g}", f"U{unique_tokens:g}".replace("+", ""), readings)


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


def _with_batch(sweep: SweepConfig, config: Config, tokens: float) -> Config:
    """Batch by the rule; UserError where held-out rows do not come out even."""
    factor = (tokens / sweep.reference_tokens) ** sweep.batch_exponent
    largest = max(0, math.floor(math.log2(max(1, sweep.largest_batch / config.train.batch_size))))
    batch = config.train.batch_size * 2 ** min(max(round(math.log2(factor)), 0), largest)
    if sweep.evaluation_rows % batch:
        raise UserError(
            f"--config.sweep.evaluation_rows={sweep.evaluation_rows} is not a multiple of the batch of {batch} "
            "sequences, so runs would be read on different rows; make it one"
        )
    train = dataclasses.replace(config.train, batch_size=batch)
    evaluate = dataclasses.replace(config.evaluate, batches=sweep.evaluation_rows // batch)
    return dataclasses.replace(config, train=train, evaluate=evaluate)


def _with_length(sweep: SweepConfig, config: Config, steps: list[int], annealed: bool) -> Config:
    """Length, schedule and readings."""
    end, per_step = steps[-1], config.tokens_per_step
    # At most a fifth of the run: a rule in steps must not swallow a short one.
    warmup = min(max(math.ceil(sweep.warmup_fraction * end), sweep.warmup_steps, 1), max(1, end // 5))
    schedule = f"0:0 {warmup * per_step}:1" + (f" {sweep.decay}" if annealed else "")
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, schedule=schedule),
        train=dataclasses.replace(config.train, steps=end),
        evaluate=dataclasses.replace(config.evaluate, every=0, at=" ".join(str(s * per_step) for s in steps[:-1])),
    )


def _named(sweep, size, config: Config, group: str, part: str, readings) -> PlannedRun:
    seed = f"_s{config.seed}" if len(sweep.seeds) > 1 else ""  # what is there already keeps its name: sweep.make
    name = f"{FAMILIES[config.objective.name]}_{size}_{part}{seed}"
    # Once more through the border: batch, length and schedule came after it.
    config = config_lib.from_config_dict(config_lib.to_dict(config))
    return PlannedRun(name, config.objective.name, size, config.seed, group, config, readings)


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
    load, shares = [0.0] * int(jobs), [[] for _ in range(int(jobs))]
    for run in sorted(runs, key=lambda run: -run.flops):
        lightest = load.index(min(load))
        shares[lightest].append(run.name)
        load[lightest] += run.flops
    return [run for run in runs if run.name in shares[int(job) - 1]]


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
