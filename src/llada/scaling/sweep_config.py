"""The group `sweep` of an experiment file: its keys, and what they may be."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llada import knobs
from llada.config import ModelConfig
from llada.errors import UserError
from llada.knobs import Knob, knob
from llada.objectives.families import FAMILIES

MODES = ("isoflop", "checkpoints", "repeat")
MATCHED = {"6nd": "6ND", "exact": "exact FLOPs"}  # the two counts of a budget, in words
LEAST_SIZES = 3  # of a budget: a parabola has three coefficients
MOST = 1e40  # FLOPs, tokens, epochs: beyond any use, and far from where floats end

# Which keys of `sweep` do nothing in a mode.
UNUSED = {
    "isoflop": ("unique_tokens", "epochs"),
    "checkpoints": ("unique_tokens", "epochs", "decay"),
    "repeat": ("budgets", "tokens_per_parameter", "sizes_per_budget", "max_epochs", "decay", "annealing_gain"),
}
# What a size may hold beside keys of the model, and keys of the model that a size may not set.
OF_A_SIZE = ("name", "objective", "peak_learning_rate")
NOT_OF_A_SIZE = {
    "causal": "give objective='autoregressive' instead",
    "vocab_size": "one tokenizer serves all runs; use --config.model.vocab_size",
    "max_length": "one corpus serves all runs; use --config.model.max_length",
}


_WINDOWS = (
    "a budget gets the sizes that it trains on so many tokens per parameter, dict(diffusion=(10, 1000)); all where a "
    "family has no entry"
)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What varies between runs, and the rules for what follows from it."""

    mode: str = knob("isoflop", "one run a budget and size, or one a size read again and again", choices=MODES)
    matching: str = knob("6nd", "which FLOPs a budget counts", choices=tuple(MATCHED))
    budgets: tuple = knob((), "FLOPs of one run, rising")
    sizes: tuple = knob(
        (),
        "dicts of model keys, dict(layers=6, width=256, heads=4, ffn=704); also name, objective (for one family only) "
        "and peak_learning_rate (in place of the rule's)",
    )
    objectives: tuple = knob(tuple(FAMILIES), "the families")
    seeds: tuple = knob((0,), "a run each; others may be added later")
    # Diffusion wants more tokens per parameter than an ARM.
    tokens_per_parameter: dict = dataclasses.field(default_factory=dict, metadata={"knob": Knob(_WINDOWS)})
    sizes_per_budget: int | None = knob(None, "of these so many, evenly; None: all", above=0, most=10_000)
    unique_tokens: tuple = knob((), "repeat: how much of the corpus, rising")
    epochs: tuple = knob((), "repeat: when to read, rising; the last ends the run")
    max_epochs: float = knob(1.0, "isoflop, checkpoints: how often a run may read the corpus", above=0, most=MOST)
    # Peak learning rate: optimizer.peak_learning_rate (reference_width / width) ^ learning_rate_exponent.
    reference_width: int = knob(256, "width that has optimizer.peak_learning_rate", above=0, most=2**17)
    learning_rate_exponent: float = knob(0.0, "of reference_width over the width", least=-4, most=4)
    # Batch: train.batch_size (tokens / reference_tokens) ^ batch_exponent, to the nearest power of 2 times batch_size.
    reference_tokens: float = knob(1e9, "tokens of a run that has train.batch_size", least=1, most=MOST)
    batch_exponent: float = knob(0.0, "of the run's tokens over reference_tokens", least=-4, most=4)
    largest_batch: int = knob(4096, "sequences; where the rule for batches ends", above=0, most=2**24)
    # Schedule: linear warm-up over a share of the run, or at least so many steps, and then `decay`.
    warmup_fraction: float = knob(0.02, "share of the run that the rate rises over", least=0, below=1)
    warmup_steps: int = knob(0, "or at least so many, but no more than a fifth of the run", least=0, most=2**31 - 1)
    decay: str = knob("80%:1 100%:0.1", "isoflop: the schedule after warm-up, as in optimizer.schedule")
    evaluation_rows: int = knob(512, "held-out rows of every reading", above=0, most=2**31 - 1)
    annealing_gain: float = knob(
        0.0, "share of the loss to take off readings without annealing (GIDD: about 0.0245)", least=0, below=1
    )


def parse(values: dict[str, Any]) -> SweepConfig:
    """The border for the group `sweep`: unknown keys, wrong types and what cannot work raise UserError."""
    sweep = knobs.build(SweepConfig, values, "config.sweep")
    knobs.check(sweep, "config.sweep")

    def require(ok: Any, key: str, rule: str) -> None:
        _require(ok, key, getattr(sweep, key), rule)

    known = all(isinstance(name, str) and name in FAMILIES for name in sweep.objectives)
    families = ", ".join(FAMILIES)
    require(
        sweep.objectives and known and _differ(sweep.objectives), "objectives", f"name some of {families}, each once"
    )
    integers = all(type(seed) is int and 0 <= seed < 2**31 for seed in sweep.seeds)
    require(sweep.seeds and integers and _differ(sweep.seeds), "seeds", "give whole numbers in [0, 2**31), each once")
    _check_sizes(sweep)
    for key in ("unique_tokens", "epochs") if sweep.mode == "repeat" else ("budgets",):
        axis = getattr(sweep, key)
        needed = f"mode {sweep.mode} needs one or more numbers above 0, up to {MOST:g}"
        require(axis and all(_is_number(v) and 0 < v <= MOST for v in axis), key, needed)
        require(all(a < b for a, b in itertools.pairwise(axis)), key, "they must rise, each given once")
    integers = sweep.mode != "repeat" or all(tokens == int(tokens) for tokens in sweep.unique_tokens)
    require(integers, "unique_tokens", "they must be whole numbers of tokens")
    windows = all(name in FAMILIES and _is_window(window) for name, window in sweep.tokens_per_parameter.items())
    require(windows, "tokens_per_parameter", f"it must be a dict of (least, most), finite, by {families}")
    few = sweep.mode == "isoflop" and sweep.sizes_per_budget is not None and sweep.sizes_per_budget < LEAST_SIZES
    require(not few, "sizes_per_budget", f"a parabola needs {LEAST_SIZES} sizes of a budget or more")
    return sweep


def _differ(values: Sequence) -> bool:
    return all(a != b for a, b in itertools.combinations(values, 2))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_window(window: Any) -> bool:
    """Two finite numbers that rise, not below 0."""
    pair = isinstance(window, tuple | list) and len(window) == 2 and all(map(_is_number, window))
    return pair and 0 <= window[0] < window[1] <= MOST


def _check_sizes(sweep: SweepConfig) -> None:
    dicts = sweep.sizes and all(isinstance(size, dict) for size in sweep.sizes)
    rule = "give dicts of model keys in the experiment file, dict(layers=6, width=256, heads=4)"
    _require(dicts, "sizes", sweep.sizes, rule)
    for size in sweep.sizes:
        _check_size(size, size.get("objective", sweep.objectives[0]))
    for objective in sweep.objectives:
        count = len(sizes_of(sweep, objective))
        if sweep.mode == "isoflop":
            rule = f"a parabola through the sizes of a budget needs {LEAST_SIZES} or more"
            _require(count >= LEAST_SIZES, "sizes", f"({count} of {objective})", rule)
        rule = "add a size of that family, or leave it out of sweep.objectives"
        _require(count, "sizes", f"({count} of {objective})", rule)


def _check_size(size: dict[str, Any], objective: Any) -> None:
    known = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in NOT_OF_A_SIZE]
    for key in size:
        if key in NOT_OF_A_SIZE:
            raise UserError(f"--config.sweep.sizes has {key}={size[key]!r:.40} in a size; {NOT_OF_A_SIZE[key]}")
        keys = (*OF_A_SIZE, *known)
        _require(key in keys, "sizes", size, f"{key!r:.40} is none of {', '.join(keys)}")
    named = isinstance(objective, str) and objective in FAMILIES
    _require(named, "sizes", size, f"its objective must be one of {', '.join(FAMILIES)}")
    rate = size.get("peak_learning_rate", 1.0)
    positive = _is_number(rate) and 0 < rate < math.inf
    _require(positive, "sizes", size, "its peak_learning_rate must be a positive number")
    # It becomes part of a directory's name.
    name = size.get("name", "x")
    ok = isinstance(name, str) and re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,100}", name) and len(name.encode()) <= 150
    _require(ok, "sizes", size, "its name must be up to 100 characters, without slashes")


def sizes_of(sweep: SweepConfig, objective: str) -> list[dict[str, Any]]:
    """The sizes that a family is trained in."""
    return [size for size in sweep.sizes if size.get("objective", objective) == objective]


def _require(ok: Any, key: str, value: Any, rule: str) -> None:
    if not ok:
        text = str(value)
        raise UserError(f"--config.sweep.{key}={text if len(text) <= 120 else f'{text[:100]}...'}: {rule}")
