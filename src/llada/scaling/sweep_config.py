"""The group `sweep` of an experiment file: its keys, and what they may be."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llada import knobs
from llada.config import ModelConfig, ObjectiveConfig
from llada.errors import UserError
from llada.knobs import Knob, knob
from llada.objectives.families import DIFFUSION, FAMILIES
from llada.scaling.series import NAME, NAME_RULE, Series

MODES = ("isoflop", "checkpoints", "repeat", "variants")
ANNEALED = ("isoflop", "variants")  # a run for every budget, its learning rate down at the end
MATCHED = {"6nd": "6ND", "exact": "exact FLOPs"}  # the two counts of a budget, in words
LEAST_SIZES = 3  # of a budget: a parabola has three coefficients
MOST = 1e40  # FLOPs, tokens, epochs: beyond any use, and far from where floats end

# Which keys of `sweep` do nothing in a mode.
UNUSED = {
    "isoflop": ("unique_tokens", "epochs"),
    "checkpoints": ("unique_tokens", "epochs", "decay"),
    "repeat": ("budgets", "tokens_per_parameter", "sizes_per_budget", "max_epochs", "decay", "annealing_gain"),
    "variants": ("unique_tokens", "epochs", "annealing_gain"),
}
# What a size may hold beside keys of the model, and keys of the model that a size may not set.
OF_A_SIZE = ("name", "objective", "peak_learning_rate")
NOT_OF_A_SIZE = {
    "causal": "give objective='autoregressive' instead",
    "vocab_size": "one tokenizer serves all runs; use --config.model.vocab_size",
    "max_length": "one corpus serves all runs; use --config.model.max_length",
}
# Keys of the model that a variant may set, beside keys of the objective, and keys of the objective that it may not.
OF_A_VARIANT = {"dropout": float}
NOT_OF_A_VARIANT = {
    "head_rows": "it changes no figure; use --config.objective.head_rows",
    "block_cross_document_attention": "runs with and without it do not compare; use --config.objective for all",
}


_WINDOWS = (
    "a budget gets the sizes that it trains on so many tokens per parameter, dict(diffusion=(10, 1000)); all where a "
    "family has no entry; a variant has that of its family, or one under its own name"
)
_VARIANTS = (
    "and variants of their objective: by name, the keys of config.objective that differ, "
    'dict(bell=dict(time_law="logit_normal", weight="paper")); name="autoregressive" makes one of the ARM, dropout is '
    "config.model.dropout"
)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What varies between runs, and the rules for what follows from it."""

    mode: str = knob(
        "isoflop",
        "isoflop, one run a budget and size, with fits; variants, the same runs, and a ranking of sweep.variants; "
        "checkpoints and repeat, one run a size, read again and again",
        choices=MODES,
    )
    matching: str = knob("6nd", "which FLOPs a budget counts", choices=tuple(MATCHED))
    budgets: tuple = knob((), "FLOPs of one run, rising")
    sizes: tuple = knob(
        (),
        "dicts of model keys, dict(layers=6, width=256, heads=4, ffn=704); also name, objective (for one family only) "
        "and peak_learning_rate (in place of the rule's)",
    )
    objectives: tuple = knob(tuple(FAMILIES), "the families, their objective as `config.objective` has it")
    variants: dict = dataclasses.field(default_factory=dict, metadata={"knob": Knob(_VARIANTS)})
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
    if isinstance(variants := values.get("variants"), dict):
        values = values | {"variants": {name: _variant(name, keys) for name, keys in variants.items()}}
    sweep = knobs.build(SweepConfig, values, "config.sweep")
    knobs.check(sweep, "config.sweep")

    def require(ok: Any, key: str, rule: str) -> None:
        _require(ok, key, getattr(sweep, key), rule)

    known = all(isinstance(name, str) and name in FAMILIES for name in sweep.objectives)
    families = ", ".join(FAMILIES)
    some = sweep.objectives or sweep.variants
    require(some and known and _differ(sweep.objectives), "objectives", f"name some of {families}, each once")
    _check_variants(sweep)
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
    named = [*FAMILIES, *sweep.variants]
    windows = all(name in named and _is_window(window) for name, window in sweep.tokens_per_parameter.items())
    rule = f"it must be a dict of (least, most), finite, by {', '.join(named)}"
    require(windows, "tokens_per_parameter", rule)
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


def _variant(name: Any, keys: Any) -> dict[str, Any]:
    """The keys of a variant, typed and within their limits; UserError for what no variant can have."""
    where = f"config.sweep.variants.{name!s:.60}"
    _require(isinstance(name, str) and NAME.fullmatch(name), "variants", repr(name), NAME_RULE)
    if not (isinstance(keys, dict) and keys):
        rule = 'give a dict of keys of config.objective in the experiment file, dict(weight="flat")'
        raise UserError(f"--{where}={keys!s:.60}: {rule}")
    annotations = {key.name: key.annotation for key in knobs.keys(ObjectiveConfig) if key.name not in NOT_OF_A_VARIANT}
    annotations |= OF_A_VARIANT
    typed = {}
    for key, value in keys.items():
        if key in NOT_OF_A_VARIANT:
            raise UserError(f"--{where}.{key}={value!s:.60}: a variant has no such key; {NOT_OF_A_VARIANT[key]}")
        if key not in annotations:
            raise UserError(f"unknown config key {where}.{key!s:.60}; a variant's keys are {', '.join(annotations)}")
        # The command line's values are text.
        typed[key] = knobs.coerce(value, annotations[key], f"--{where}.{key}")
    objective = {key: value for key, value in typed.items() if key not in OF_A_VARIANT}
    knobs.check(knobs.build(ObjectiveConfig, objective, where), where)
    return typed


def _check_variants(sweep: SweepConfig) -> None:
    """Names that are taken; and a ranking needs variants and what they are compared with."""
    taken = {word.lower() for family in FAMILIES.values() for word in (family.name, family.title, family.prefix)}
    for name in sweep.variants:
        rule = "it is the name of a family, or of another variant but for capitals; give it another"
        _require(name.lower() not in taken, "variants", name, rule)
        taken.add(name.lower())
    if sweep.mode == "variants":
        _require(sweep.variants, "variants", sweep.variants, "mode variants ranks them; give one or more")
        missing = [name for name in families_of(sweep) if name not in sweep.objectives]
        rule = f"mode variants compares variants with their family; add {', '.join(missing)}"
        _require(not missing, "objectives", sweep.objectives, rule)


def _check_sizes(sweep: SweepConfig) -> None:
    dicts = sweep.sizes and all(isinstance(size, dict) for size in sweep.sizes)
    rule = "give dicts of model keys in the experiment file, dict(layers=6, width=256, heads=4)"
    _require(dicts, "sizes", sweep.sizes, rule)
    for size in sweep.sizes:
        _check_size(size, size.get("objective", DIFFUSION.name))
    for objective in families_of(sweep):
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


def series_of(sweep: SweepConfig) -> list[Series]:
    """What is trained in every size and budget: plain families, and then variants."""
    variants = [Series(FAMILIES[keys.get("name", DIFFUSION.name)], name) for name, keys in sweep.variants.items()]
    return [*(Series(FAMILIES[name]) for name in sweep.objectives), *variants]


def families_of(sweep: SweepConfig) -> list[str]:
    """The families that have a series, by name."""
    return list(dict.fromkeys(series.family.name for series in series_of(sweep)))


def keys_of(sweep: SweepConfig, series: Series) -> str | None:
    """What a variant changes in its family's objective, as text; None for a plain family."""
    if series.variant is None:
        return None
    return " ".join(f"{key}={value}" for key, value in sweep.variants[series.variant].items() if key != "name")


def window_of(sweep: SweepConfig, series: Series) -> tuple[float, float]:
    """The least and the most tokens per parameter that a series is trained on."""
    of_family = sweep.tokens_per_parameter.get(series.family.name, (0, math.inf))
    return sweep.tokens_per_parameter.get(series.variant, of_family) if series.variant else of_family


def _require(ok: Any, key: str, value: Any, rule: str) -> None:
    if not ok:
        text = str(value)
        raise UserError(f"--config.sweep.{key}={text if len(text) <= 120 else f'{text[:100]}...'}: {rule}")
