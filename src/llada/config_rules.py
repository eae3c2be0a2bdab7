"""Rules between the keys of a config; the limits of single keys stand with them in config.py."""

import math
from typing import TYPE_CHECKING

from llada import knobs
from llada.errors import UserError

if TYPE_CHECKING:
    from llada.config import Config

MOST_STEPS = 2**31 - 1
# The families by name, and whether attention is to the left only; what else a family is: objectives/families.py.
CAUSAL = {"diffusion": False, "autoregressive": True}


def check(config: "Config") -> None:
    """UserError for what cannot work, naming the value, the rule and the flag. Mesh against devices: `mesh.check`."""
    knobs.check(config, "config")
    for require in (
        _require_heads,
        _require_lengths,
        _require_steps,
        _require_variant,
        _require_dialogues,
        _require_records,
    ):
        require(config)


def _require_heads(c: "Config") -> None:
    m = c.model
    _require(c, m.width % m.heads == 0, "model.heads", f"it must divide {_divisors(m.width, m.heads, 'model.width')}")
    even = f"rotary embedding needs model.width={m.width} / heads, now {m.head_size}, to be even"
    _require(c, m.head_size % 2 == 0, "model.heads", even)
    groups = f"it must divide {_divisors(m.heads, m.key_value_heads, 'model.heads')}"
    _require(c, m.heads % m.key_value_heads == 0, "model.kv_heads", groups)
    causal = CAUSAL[c.objective.name]
    rule = f"objective.name={c.objective.name} needs {causal}; change one of the two"
    _require(c, m.causal == causal, "model.causal", rule)


def _require_lengths(c: "Config") -> None:
    length, most = c.data.sequence_length, c.model.max_length
    rule = f"it must not exceed model.max_length={most}; lower the one or raise the other"
    _require(c, length <= most, "data.sequence_length", rule)
    enough = c.data.unique_tokens is None or c.data.unique_tokens >= length
    _require(c, enough, "data.unique_tokens", f"one row is data.sequence_length={length} tokens")


def _require_steps(c: "Config") -> None:
    lengths = {key: getattr(c.train, key) for key in ("steps", "tokens", "epochs")}
    given = [f"{key}={value}" for key, value in lengths.items() if value]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"give one of --config.train.steps, --config.train.tokens and --config.train.epochs, not {got}")
    step = f"one step is {c.tokens_per_step} tokens (train.batch_size x data.sequence_length)"
    _require(c, c.steps > 0 or c.train.epochs is not None, "train.tokens", step)
    most = f"they are {c.steps:,} steps, and a run has at most {MOST_STEPS:,}"
    _require(c, c.steps <= MOST_STEPS, "train.tokens", most)
    times = f"times data.sequence_length={c.data.sequence_length} it must be at most {MOST_STEPS:,} tokens"
    _require(c, c.tokens_per_step <= MOST_STEPS, "train.batch_size", times)
    multiple = f"it must be a multiple of train.microbatches={c.train.microbatches}"
    _require(c, c.train.batch_size % c.train.microbatches == 0, "train.batch_size", multiple)


# Keys of `objective` that mean something for one value of another one only.
_LAW_OF = {
    "time_mean": "logit_normal",
    "time_std": "logit_normal",
    "time_uniform_share": "logit_normal",
    "time_low": "band",
    "time_high": "band",
}
# Keys of `objective` for mask predictors only, with the values that are the paper's.
_OF_DIFFUSION = {"time_law": "uniform", "weight": "elbo", "masks": "bernoulli", "clean_prefix": 0.0}


def _require_variant(c: "Config") -> None:
    """What the objective's variants need; objectives/corruption.py says what they are."""
    o = c.objective
    if CAUSAL[o.name]:
        for key, value in _OF_DIFFUSION.items():
            rule = f"it is for mask predictors, and objective.name={o.name} has no masks; leave it out"
            _require(c, getattr(o, key) == value, f"objective.{key}", rule)
    else:
        rule = f"it is for an ARM, and objective.name={o.name} masks by itself; leave it out"
        _require(c, o.input_masking == 0, "objective.input_masking", rule)
    for key, law in _LAW_OF.items():
        rule = f"it belongs to objective.time_law={law}, and the law is {o.time_law}; change one of the two"
        _require(c, getattr(o, key) is None or o.time_law == law, f"objective.{key}", rule)
    clipped = o.weight == "clipped"
    rule = f"it belongs to objective.weight=clipped, and the weight is {o.weight}; change one of the two"
    _require(c, o.weight_bound is None or clipped, "objective.weight_bound", rule)
    rule = "give its largest weight, --config.objective.weight_bound, such as 10"
    _require(c, o.weight_bound is not None or not clipped, "objective.weight", rule)
    _require_law(c)
    even = "complementary masks pair the rows of a batch, so train.batch_size must be even, not {}"
    paired = o.masks != "complementary" or c.train.batch_size % 2 == 0
    _require(c, paired, "objective.masks", even.format(c.train.batch_size))
    long_enough = o.clean_prefix == 0 or c.data.sequence_length > 1
    _require(c, long_enough, "objective.clean_prefix", "a row of one token has no prefix; raise data.sequence_length")


def _require_law(c: "Config") -> None:
    o = c.objective
    if o.time_law == "band":
        ends = "a band needs both ends, --config.objective.time_low and --config.objective.time_high"
        low, high = o.time_low, o.time_high
        if low is None or high is None:
            raise UserError(f"--config.objective.time_law=band: {ends}")
        _require(c, low < high, "objective.time_low", f"the band up to objective.time_high={high} is empty")
        _require(c, (low, high) != (0, 1), "objective.time_law", "a band from 0 to 1 is the uniform law; use that")
        rule = "a band leaves out a part of the bound, which no weight brings back; use paper, clipped or flat"
        _require(c, o.weight != "elbo", "objective.weight", rule)
    if o.time_law == "logit_normal":
        rule = (
            "with objective.time_law=logit_normal its importance weights have no finite variance; give "
            "--config.objective.time_uniform_share, such as 0.1, which bounds them, or another weight"
        )
        _require(c, o.weight != "elbo" or bool(o.time_uniform_share), "objective.weight", rule)


def _require_dialogues(c: "Config") -> None:
    if not c.fine_tunes:
        return
    bucket, length = c.dialogues.bucket, c.data.sequence_length
    multiple = f"data.sequence_length={length} must be a multiple of it"
    _require(c, bucket is None or length % bucket == 0, "dialogues.bucket", multiple)
    cut = "dialogues are not cut at random; set it to 0"
    _require(c, c.objective.random_length_fraction == 0, "objective.random_length_fraction", cut)
    whole = "dialogues take bernoulli masks only; leave it out"
    _require(c, c.objective.masks == "bernoulli", "objective.masks", whole)
    prompt = "a dialogue's prompt is never masked as it is; leave it out"
    _require(c, c.objective.clean_prefix == 0, "objective.clean_prefix", prompt)
    apart = "it is for rows of documents; examples that share a row never see each other"
    _require(c, not c.objective.block_cross_document_attention, "objective.block_cross_document_attention", apart)
    _require(c, c.data.unique_tokens is None, "data.unique_tokens", "it is for documents; give fewer dialogues")


def _require_records(c: "Config") -> None:
    own = "an array_record corpus has held-out rows of its own, as llada tokenize chose them; leave it out"
    _require(c, not c.reads_records or c.data.holdout_source is None, "data.holdout_source", own)


def _require(config: "Config", ok: bool, key: str, rule: str) -> None:
    if not ok:
        raise UserError(f"--config.{key}={knobs.value(config, key)}: {rule}")


def _divisors(n: int, near: int, key: str) -> str:
    """`key=n: ` and the divisors of n; of many, the eight closest to `near`."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)}, key=lambda d: abs(d - near))
    return f"{key}={n}: " + ", ".join(map(str, sorted(divisors[:8]))) + (", ..." if len(divisors) > 8 else "")
