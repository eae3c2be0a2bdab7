"""The grid of a sweep: which runs there are, and every number of theirs that follows from a rule.

Three modes, one grid. isoflop: a run for every budget and size, each with its own annealed schedule (SMDM section 4,
Chinchilla section 3.2). checkpoints: one run a size at a constant rate, read at every budget (LLaDA section 3.1 reads
checkpoints of one run a model). repeat: one run a size and amount of unique data, read after every number of epochs
(Quokka, arXiv 2510.03280; arXiv 2511.03276).
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import accounting
from llada import config as config_lib
from llada.config import Config
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.errors import UserError

MODES = ("isoflop", "checkpoints", "repeat")
MATCHING = {
    "6nd": lambda config: accounting.flops_6nd_per_token(config.model),
    "exact": accounting.flops_exact_per_token,
}
FAMILIES = {"diffusion": "llada", "autoregressive": "arm"}
LEAST_STEPS = 20  # fewer are hardly training, and rounding to whole steps would miss the budget by more than 2.5 %


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The group `sweep` of an experiment file: what varies between runs, and the rules for what follows from it."""

    mode: str = "isoflop"  # isoflop | checkpoints | repeat
    matching: str = "6nd"  # which FLOPs a budget counts: 6nd | exact
    budgets: tuple = ()  # FLOPs of one run, rising
    sizes: tuple = ()  # dicts of model keys, such as dict(layers=6, width=256, ...); `objective` limits one to a family
    objectives: tuple = ("diffusion", "autoregressive")
    seeds: tuple = (0,)
    # A budget gets the sizes that it trains on so many tokens per parameter: dict(diffusion=(10, 1000), ...), all where
    # a family has no entry; and of these so many, evenly. Diffusion wants more tokens per parameter than an ARM.
    tokens_per_parameter: dict = dataclasses.field(default_factory=dict)
    sizes_per_budget: int | None = None
    unique_tokens: tuple = ()  # repeat: how much of the corpus, rising
    epochs: tuple = ()  # repeat: when to read, rising; the last ends the run
    max_epochs: float = 1.0  # isoflop, checkpoints: how often a run may read the corpus
    # Peak learning rate: optimizer.peak_learning_rate (reference_width / width) ^ learning_rate_exponent.
    reference_width: int = 256
    learning_rate_exponent: float = 0.0
    # Batch: train.batch_size (tokens / reference_tokens) ^ batch_exponent, to the nearest power of 2 times batch_size.
    reference_tokens: float = 1e9
    batch_exponent: float = 0.0
    largest_batch: int = 4096
    # Schedule: linear warm-up over a share of the run, or at least so many steps, and then `decay` (isoflop only).
    warmup_fraction: float = 0.02
    warmup_steps: int = 0
    decay: str = "80%:1 100%:0.1"
    evaluation_rows: int = 512  # held-out rows of every reading
    annealing_gain: float = 0.0  # share of the loss to take off readings without annealing (GIDD: about 0.0245)


class Reading(NamedTuple):
    """A held-out figure to take: at `step` of the run, for `budget` FLOPs (as matched)."""

    budget: float
    step: int


class PlannedRun(NamedTuple):
    """One run of the grid. `group` is what its readings share in a table: a budget, or an amount of unique data."""

    name: str
    objective: str
    size: str
    seed: int
    group: str
    config: Config
    readings: tuple[Reading, ...]

    @property
    def tokens(self) -> int:
        """Read over the whole run."""
        return self.config.steps * self.config.tokens_per_step

    @property
    def flops(self) -> float:
        """All matrix products of the whole run: what it costs, whichever count it is matched by."""
        return self.tokens * accounting.flops_exact_per_token(self.config)


def parse(values: dict[str, Any]) -> SweepConfig:
    """The border for the group `sweep`: unknown keys, wrong types and what cannot work raise UserError."""
    sweep = config_lib.build(SweepConfig, values, "config.sweep")
    for key, allowed in (("mode", MODES), ("matching", tuple(MATCHING))):
        _require(getattr(sweep, key) in allowed, key, getattr(sweep, key), f"it must be one of {', '.join(allowed)}")
    bad = [name for name in sweep.objectives if name not in FAMILIES]
    _require(sweep.objectives and not bad, "objectives", sweep.objectives, f"name some of {', '.join(FAMILIES)}")
    _require(sweep.seeds and all(type(s) is int for s in sweep.seeds), "seeds", sweep.seeds, "give whole numbers")
    _require(sweep.sizes and all(isinstance(s, dict) for s in sweep.sizes), "sizes", sweep.sizes,
             "give dicts of model keys, dict(layers=6, width=256, heads=4, ffn=704)")  # fmt: skip
    axes = ("unique_tokens", "epochs") if sweep.mode == "repeat" else ("budgets",)
    for key in axes:
        values = getattr(sweep, key)
        numbers = all(isinstance(v, int | float) and 0 < v < math.inf for v in values)
        _require(values and numbers, key, values, f"mode {sweep.mode} needs one or more numbers above 0")
        rising = all(a < b for a, b in itertools.pairwise(values))
        _require(rising, key, values, "they must rise, each given once")
    for key in ("max_epochs", "reference_width", "reference_tokens", "evaluation_rows", "largest_batch"):
        _require(getattr(sweep, key) > 0, key, getattr(sweep, key), "it must be positive")
    for key in ("warmup_fraction", "annealing_gain"):
        _require(0 <= getattr(sweep, key) < 1, key, getattr(sweep, key), "it must be in [0, 1)")
    for name, window in sweep.tokens_per_parameter.items():
        ok = name in FAMILIES and len(window) == 2 and 0 <= window[0] < window[1]
        _require(ok, "tokens_per_parameter", sweep.tokens_per_parameter,
                 f"it must be a dict of (least, most) by {', '.join(FAMILIES)}")  # fmt: skip
    if sweep.mode == "isoflop":
        for objective in sweep.objectives:
            count = len([s for s in sweep.sizes if s.get("objective", objective) == objective])
            _require(count >= 3, "sizes", f"({count} of {objective})",
                     "a parabola through the sizes of a budget needs 3 or more")  # fmt: skip
    return sweep


def plan(base: dict[str, Any], sweep: SweepConfig, directory: Path) -> list[PlannedRun]:
    """Every run, cheapest budget first; `base` is the tree of all config keys that do not vary.

    Runs share tokenizer and rows under `directory`. UserError for budgets below a few steps, sizes that leave a budget
    fewer than three, names that two sizes share.
    """
    base = copy.deepcopy(base)
    base["data"]["directory"] = str(directory / "data")
    if base["data"]["tokenizer"] is None:
        base["data"]["tokenizer"] = str(directory / SentencePieceTokenizer.file_name)  # trained once, before the runs
    axis = sweep.unique_tokens if sweep.mode == "repeat" else sweep.budgets if sweep.mode == "isoflop" else (None,)
    runs = []
    for value, objective, seed in itertools.product(axis, sweep.objectives, sweep.seeds):
        sizes = [_sized(base, sweep, size, objective, seed) for size in sweep.sizes
                 if size.get("objective", objective) == objective]  # fmt: skip
        sizes.sort(key=lambda named: accounting.parameters(named[1].model).non_embedding)
        if sweep.mode == "repeat":
            runs += [_repeating(sweep, *named, value) for named in sizes]
        else:
            runs += _budgeted(sweep, sizes, [value] if value else list(sweep.budgets))
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--config.sweep.sizes has two of one name ({min(twice)}); give one of them a key name='...'")
    return runs


def _sized(base, sweep: SweepConfig, size: dict[str, Any], objective: str, seed: int) -> tuple[str, Config]:
    """The name of a size and its Config but for how long it trains."""
    tree = copy.deepcopy(base)
    shape = {key: value for key, value in size.items() if key not in ("objective", "name")}
    tree["model"].update(shape)
    tree["seed"], tree["objective"]["name"] = seed, objective
    if objective == "autoregressive":
        tree["model"]["causal"], tree["objective"]["random_length_fraction"] = True, 0.0
    tree["train"].update(steps=1, tokens=None)
    tree["optimizer"]["peak_learning_rate"] *= (
        sweep.reference_width / tree["model"]["width"]
    ) ** sweep.learning_rate_exponent
    config = config_lib.from_config_dict(tree)
    return size.get("name", f"L{config.model.layers}-d{config.model.width}"), config


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
                suited.append(name)
        keep = len(suited) if sweep.sizes_per_budget is None else min(sweep.sizes_per_budget, len(suited))
        suited = [suited[i] for i in sorted(set(np.linspace(0, len(suited) - 1, keep).round().astype(int)))]
        if sweep.mode == "isoflop" and len(suited) < 3:
            raise UserError(
                f"--config.sweep.budgets={budget:g} leaves {len(suited)} sizes of {family} with {least:g} to {most:g} "
                "tokens per parameter; a parabola needs 3: add sizes, or widen sweep.tokens_per_parameter in the file"
            )
        for name in suited:
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
    data = dataclasses.replace(config.data, unique_tokens=int(unique_tokens))
    config = _with_length(sweep, dataclasses.replace(config, data=data), steps, annealed=False)
    per_step = MATCHING[sweep.matching](config) * config.tokens_per_step
    readings = tuple(Reading(step * per_step, step) for step in steps)
    return _named(sweep, size, config, f"U={unique_tokens:g}", f"U{unique_tokens:g}".replace("+", ""), readings)


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
    seed = f"_s{config.seed}" if len(sweep.seeds) > 1 else ""
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
    if not (slash and job.isdigit() and jobs.isdigit() and 1 <= int(job) <= int(jobs)):
        raise UserError(f"--only={only} must be I/N with I from 1 to N, such as --only=1/4")
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
            raise UserError(
                f"--config.sweep.unique_tokens={unique} is more than the corpus has, {train_tokens} training tokens; "
                "lower it or give more text"
            )
        if unique is None and run.tokens > sweep.max_epochs * train_tokens:
            raise UserError(
                f"{run.name} asks for {run.tokens} tokens, {run.tokens / train_tokens:.2f} epochs of the corpus's "
                f"{train_tokens}; give more text, smaller budgets, or allow it with --config.sweep.max_epochs="
                f"{math.ceil(max(r.tokens for r in runs) / train_tokens)}"
            )


def _require(ok: Any, key: str, value: Any, rule: str) -> None:
    if not ok:
        raise UserError(f"--config.sweep.{key}={value}: {rule}")
