"""The group `sweep` of an experiment file: its keys, and what they may be."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llada import config as config_lib
from llada import knobs
from llada.errors import UserError
from llada.knobs import knob

MODES = ("isoflop", "checkpoints", "repeat")
FAMILIES = {"diffusion": "llada", "autoregressive": "arm"}
LEAST_SIZES = 3  # of a budget: a parabola has three coefficients
MOST = 1e40  # FLOPs, tokens, epochs: beyond any use, and far from where floats end

# Which keys of `sweep` do nothing in a mode.
UNUSED = {
    "isoflop": ("unique_tokens", "epochs"),
    "checkpoints": ("unique_tokens", "epochs", "decay"),
    "repeat": ("budgets", "tokens_per_parameter", "sizes_per_budget", "max_epochs", "decay", "annealing_gain"),
}
# What a size may hold beside keys of the model, and keys of the model that are not a size's to say.
OF_A_SIZE = ("name", "objective", "peak_learning_rate")
NOT_OF_A_SIZE = {
    "causal": "give objective='autoregressive' instead",
    "vocab_size": "one tokenizer serves all runs; use --config.model.vocab_size",
    "max_length": "one corpus serves all runs; use --config.model.max_length",
}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What varies between runs, and the rules for what follows from it."""

    mode: str = knob("isoflop", "one run a budget and size, or one a size read again and again", choices=MODES)
    matching: str = knob("6nd", "which FLOPs a budget counts", choices=("6nd", "exact"))
    budgets: tuple = knob((), "FLOPs of one run, rising")
    sizes: tuple = knob(
        (),
        "dicts of model keys, dict(layers=6, width=256, heads=4, ffn=704); also name, objective (for one family only) "
        "and peak_learning_rate (in place of the rule's)",
    )
    objectives: tuple = knob(("diffusion", "autoregressive"), "the families")
    seeds: tuple = knob((0,), "a run each; others may be added later")
    # Diffusion wants more tokens per parameter than an ARM.
    tokens_per_parameter: dict = knob(
        {},
        "a budget gets the sizes that it trains on so many tokens per parameter, dict(diffusion=(10, 1000)); all where "
        "a family has no entry",
    )
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
    bad = [name for name in sweep.objectives if not (isinstance(name, str) and name in FAMILIES)]
    families = f"name some of {', '.join(FAMILIES)}, each once"
    _require(sweep.objectives and not bad and _differ(sweep.objectives), "objectives", sweep.objectives, families)
    ok = sweep.seeds and all(type(s) is int and 0 <= s < 2**31 for s in sweep.seeds) and _differ(sweep.seeds)
    _require(ok, "seeds", sweep.seeds, "give whole numbers in [0, 2**31), each once")
    _check_sizes(sweep)
    axes = ("unique_tokens", "epochs") if sweep.mode == "repeat" else ("budgets",)
    for key in axes:
        given = getattr(sweep, key)
        numbers = all(type(v) in (int, float) and 0 < v <= MOST for v in given)
        _require(given and numbers, key, given, f"mode {sweep.mode} needs one or more numbers above 0, up to {MOST:g}")
        rising = all(a < b for a, b in itertools.pairwise(given))
        _require(rising, key, given, "they must rise, each given once")
    whole = sweep.mode != "repeat" or all(v == int(v) for v in sweep.unique_tokens)
    _require(whole, "unique_tokens", sweep.unique_tokens, "they must be whole numbers of tokens")
    for name, window in sweep.tokens_per_parameter.items():
        ok = name in FAMILIES and isinstance(window, tuple | list) and len(window) == 2
        ok = ok and all(type(v) in (int, float) and 0 <= v <= MOST for v in window) and window[0] < window[1]
        _require(ok, "tokens_per_parameter", sweep.tokens_per_parameter,
                 f"it must be a dict of (least, most), finite, by {', '.join(FAMILIES)}")  # fmt: skip
    few = sweep.mode == "isoflop" and sweep.sizes_per_budget is not None and sweep.sizes_per_budget < LEAST_SIZES
    _require(not few, "sizes_per_budget", sweep.sizes_per_budget,
             f"a parabola needs {LEAST_SIZES} sizes of a budget or more")  # fmt: skip
    return sweep


def _differ(values: Sequence) -> bool:
    return all(a != b for a, b in itertools.combinations(values, 2))


def _check_sizes(sweep: SweepConfig) -> None:
    _require(sweep.sizes and all(isinstance(s, dict) for s in sweep.sizes), "sizes", sweep.sizes,
             "give dicts of model keys in the experiment file, dict(layers=6, width=256, heads=4)")  # fmt: skip
    known = [field.name for field in dataclasses.fields(config_lib.ModelConfig) if field.name not in NOT_OF_A_SIZE]
    for size in sweep.sizes:
        for key in size:
            if key in NOT_OF_A_SIZE:
                raise UserError(f"--config.sweep.sizes has {key}={size[key]!r:.40} in a size; {NOT_OF_A_SIZE[key]}")
            _require(key in known or key in OF_A_SIZE, "sizes", size,
                     f"{key!r:.40} is none of {', '.join((*OF_A_SIZE, *known))}")  # fmt: skip
        family = size.get("objective", sweep.objectives[0])
        _require(isinstance(family, str) and family in FAMILIES, "sizes", size,
                 f"its objective must be one of {', '.join(FAMILIES)}")  # fmt: skip
        rate = size.get("peak_learning_rate", 1.0)
        _require(type(rate) in (int, float) and 0 < rate < math.inf, "sizes", size,
                 "its peak_learning_rate must be a positive number")  # fmt: skip
        name = size.get("name", "x")
        # It becomes part of a directory's name.
        ok = isinstance(name, str) and re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,100}", name) and len(name.encode()) <= 150
        _require(ok, "sizes", size, "its name must be up to 100 characters, without slashes")
    for objective in sweep.objectives:
        count = len(sizes_of(sweep, objective))
        if sweep.mode == "isoflop":
            _require(count >= LEAST_SIZES, "sizes", f"({count} of {objective})",
                     f"a parabola through the sizes of a budget needs {LEAST_SIZES} or more")  # fmt: skip
        _require(count, "sizes", f"({count} of {objective})",
                 "add a size of that family, or leave it out of sweep.objectives")  # fmt: skip


def sizes_of(sweep: SweepConfig, objective: str) -> list[dict[str, Any]]:
    """The sizes that a family is trained in."""
    return [size for size in sweep.sizes if size.get("objective", objective) == objective]


def _require(ok: Any, key: str, value: Any, rule: str) -> None:
    if not ok:
        text = str(value)
        raise UserError(f"--config.sweep.{key}={text if len(text) <= 120 else f'{text[:100]}...'}: {rule}")
