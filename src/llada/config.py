"""Every knob and every default, in one place.

An experiment file returns a `ConfigDict`; `from_config_dict` turns it into the frozen dataclasses below and refuses
what it does not know. Past that border no ConfigDict exists, and nothing reads a field "with a default".
Positions of the learning-rate schedule are parsed in `training/optimizer.py`, where they are used.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from llada import json_files, knobs
from llada.errors import UserError
from llada.knobs import build, knob

# Generous limits, so that a typing error or a hostile file cannot ask for more than any machine has: counts of things
# that are allocated or iterated over, and (_FAR) counts that are only compared.
_LAYERS, _WIDTH, _ROWS, _STEPS, _FAR = 10_000, 2**17, 2**24, 2**31 - 1, 10**15

# The families by name, and whether attention is to the left only; what else a family is: objectives/families.py.
CAUSAL = {"diffusion": False, "autoregressive": True}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Transformer for both families; `causal` is the only difference (LLaDA section 2.1, Table 5)."""

    layers: int = knob(6, "Transformer blocks", above=0, most=_LAYERS)
    width: int = knob(256, "channels of the residual stream", above=0, most=_WIDTH)
    heads: int = knob(4, "attention heads; they divide the width", above=0, most=_WIDTH)
    kv_heads: int | None = knob(
        None, "key/value heads; None: as many as heads (MHA), fewer is GQA", above=0, most=_WIDTH
    )
    ffn: int = knob(704, "hidden channels of the gated FFN", above=0, most=8 * _WIDTH)
    vocab_size: int = knob(2048, "pieces, the mask token among them", above=0, most=_ROWS)
    max_length: int = knob(256, "the longest sequence the model is meant for, in tokens", above=0, most=_ROWS)
    causal: bool = knob(False, "attention to the left only, as an ARM has it")
    tie_embeddings: bool = knob(False, "one matrix for embedding and vocabulary head")
    qk_norm: bool = knob(False, "RMSNorm of queries and keys")
    rope_theta: float = knob(500_000.0, "base of the rotary embedding", above=0, most=1e20)
    norm_eps: float = knob(1e-5, "RMSNorm's epsilon", above=0, most=1.0)
    init_std: float = knob(0.02, "standard deviation of initial weights", above=0, most=1e3)
    dtype: str = knob(
        "bfloat16",
        "of the matrix products; parameters, norms, softmax and loss are float32",
        choices=("bfloat16", "float32"),
    )
    scan_unroll: int | None = knob(
        None,
        "layers per iteration of the scan; None: 4 on CPU, all on GPU, 1 on TPU",
        above=0,
        most=_LAYERS,
        changeable=True,
    )
    remat: str = knob(
        "none",
        "what the backward pass recomputes: none; dots (all but products and attention); attention (all but "
        "attention); full (each layer from its input); offload (the same, those inputs stored in the host's memory)",
        choices=("none", "dots", "attention", "full", "offload"),
        changeable=True,
    )

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        """Key/value heads after resolving None."""
        return self.heads if self.kv_heads is None else self.kv_heads


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective; `eps`, `time_sampling` matter to the diffusion objective only."""

    name: str = knob("diffusion", "LLaDA's bound, or an ARM's NLL", choices=tuple(CAUSAL))
    eps: float = knob(1e-3, "masking probability p = (1 - eps) t + eps", least=0, below=1)
    time_sampling: str = knob(
        "stratified", "of t: over the global batch, or iid as in the paper", choices=("stratified", "iid")
    )
    random_length_fraction: float = knob(
        0.01, "share of sequences that are cut to a length drawn from U[1, L]", least=0, most=1
    )
    block_cross_document_attention: bool = knob(False, "a row holds parts of several documents: each sees itself only")
    head_rows: int | None = knob(
        None,
        "token positions per vocabulary-sized block of logits; None: by platform",
        above=0,
        most=_STEPS,
        changeable=True,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, and how it becomes rows of tokens."""

    source: str = knob("stdlib", "stdlib | text:GLOB[,GLOB ...]; a directory stands for the files in it")
    text_key: str = knob("text", "field (JSON lines) or column (Parquet) that holds a document's text")
    tokenizer: str | None = knob(
        None,
        "a SentencePiece .model, a tokenizer.json or its directory; None: train one of model.vocab_size on the corpus",
        changeable=True,
    )
    sequence_length: int = knob(256, "tokens of a row", above=0, most=_ROWS)
    holdout_fraction: float = knob(
        0.02, "share of the documents held out, chosen by a hash of their text", above=0, below=1
    )
    holdout_source: str | None = knob(
        None, "held-out documents of one's own, written as `source`; None: by the fraction"
    )
    directory: str | None = knob(
        None, "where the rows of tokens are stored, for many runs to share; None: the workdir", changeable=True
    )
    unique_tokens: int | None = knob(
        None, "train on so many tokens, again and again; None: on the whole training side", above=0, most=_FAR
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with clipping and a piecewise-linear learning rate."""

    peak_learning_rate: float = knob(1e-3, "the rate at factor 1 of the schedule", above=0)
    weight_decay: float = knob(0.1, "decoupled, times the learning rate", least=0)
    beta1: float = knob(0.9, "Adam's decay of the mean", least=0, below=1)
    beta2: float = knob(0.95, "Adam's decay of the mean square", least=0, below=1)
    adam_eps: float = knob(1e-8, "Adam's epsilon", above=0)
    clip_norm: float = knob(1.0, "the gradient's norm over all parameters is cut to this", above=0)
    schedule: str = knob(
        "0:0 2%:1 80%:1 100%:0.1",
        '"position:factor ..." with positions in tokens (10.5G) or percent of the run (2%); linear in between, a jump '
        "where a position repeats; factors multiply peak_learning_rate",
    )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; their product is the number of devices."""

    data: int | None = knob(
        None,
        "copies of the model; None: all the devices that fsdp and tensor leave",
        above=0,
        most=2**20,
        changeable=True,
    )
    fsdp: int = knob(
        1, "devices that share parameters and moments, gathered as needed", above=0, most=2**20, changeable=True
    )
    tensor: int = knob(1, "devices that share the products of a layer", above=0, most=2**20, changeable=True)
    tpu_options: bool = knob(
        True, "compile for TPU with the libtpu options of fsdp.py; False: as libtpu would by itself", changeable=True
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and how much at once."""

    batch_size: int = knob(32, "sequences per step, over all devices and microbatches", above=0, most=2**20)
    microbatches: int = knob(1, "parts of a batch, one after another", above=0, most=2**20, changeable=True)
    steps: int | None = knob(None, "optimizer steps; give steps or tokens", above=0, most=_STEPS, changeable=True)
    tokens: int | None = knob(
        None, "token positions to read; give steps or tokens", above=0, most=_FAR, changeable=True
    )
    log_every: int = knob(20, "steps per line of metrics.jsonl", above=0, most=_FAR, changeable=True)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: int = knob(500, "steps; 0 evaluates at the end only", least=0, most=_FAR, changeable=True)
    at: str = knob("", 'and at these positions, written as in optimizer.schedule: "10M 20M 50%"', changeable=True)
    batches: int = knob(8, "of held-out rows", above=0, most=_FAR, changeable=True)
    draws: int = knob(
        8, "Monte Carlo draws (l, masks) per row; the ARM needs none", above=0, most=2**20, changeable=True
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many to keep."""

    every: int = knob(500, "steps", above=0, most=_FAR, changeable=True)
    keep: int = knob(2, "the newest ones", above=0, most=2**20, changeable=True)


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """What to record of a call of `llada train`; the run's figures stay the same to the bit."""

    profile_steps: int = knob(
        0,
        "steps to trace, from the third of this call on, into profile/ of the workdir",
        least=0,
        most=1000,
        changeable=True,
    )
    nans: bool = knob(False, "stop where the first NaN is computed, and name the operation (slow)", changeable=True)
    dump_hlo: bool = knob(
        False, "write the step's program, lowered and compiled, into hlo/ of the workdir", changeable=True
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole of a run."""

    seed: int = knob(0, "of initial weights, data order and masks", least=0, below=2**31)
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    debug: DebugConfig = DebugConfig()

    @property
    def tokens_per_step(self) -> int:
        """Token positions read per optimizer step."""
        return self.train.batch_size * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, from `train.steps` or rounded down from `train.tokens`."""
        if self.train.tokens is not None and self.train.steps is None:
            return self.train.tokens // self.tokens_per_step
        return self.train.steps or 0


def default_config() -> ml_collections.ConfigDict:
    """The defaults above as a ConfigDict for experiment files to change; keys that may be None are placeholders."""

    def convert(node):
        out = ml_collections.ConfigDict()
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                out[field.name] = convert(value)
            elif value is None:
                out[field.name] = config_dict.placeholder(knobs.scalar(field.type))
            else:
                out[field.name] = value
        return out

    return convert(Config())


def pick(argument: str, choices: dict[str, Any]) -> Any:
    """What an experiment file's `:argument` stands for; UserError listing the arguments for any other."""
    if argument not in choices:
        raise UserError(f"--config=...:{argument} is not an argument of this file; use one of {', '.join(choices)}")
    return choices[argument]


def from_config_dict(values: ml_collections.ConfigDict | dict) -> Config:
    """The border: nested dataclasses from a ConfigDict or plain dict; unknown keys and bad values raise UserError."""
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = build(Config, values, "config")
    _validate(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, ready for JSON; `from_config_dict` reads it back."""
    return dataclasses.asdict(config)


def load(path: Path) -> Config:
    """Read a `config.json`: `to_dict` as JSON. UserError naming the file for what is damaged, or no config of ours."""
    values = json_files.read(path)
    if "model_type" in values:
        raise UserError(f"{path} is a Hugging Face model's; bring it in by llada import --source={path.parent}")
    try:
        return from_config_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def differences(old: Config, new: Config, begun: bool = True) -> list[str]:
    """`key: old -> new` for every key that differs, save those a later call may change.

    Before a run has `begun` (an imported model) only the model is settled.
    """
    return [
        f"{key.name}: {a!r} -> {b!r}"
        for key in knobs.keys(Config)
        if not key.knob.changeable and (begun or key.name.startswith("model."))
        if (a := _value(old, key.name)) != (b := _value(new, key.name))
    ]


def _value(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _validate(config: Config) -> None:
    """Refuse what cannot work, naming the value, the rule and the flag. Mesh against devices: see `mesh.check`."""
    knobs.check(config, "config")
    for require in (_require_heads, _require_lengths, _require_steps):
        require(config)


def _require_heads(c: Config) -> None:
    m = c.model
    _require(c, m.width % m.heads == 0, "model.heads", f"it must divide {_divisors(m.width, m.heads, 'model.width')}")
    even = f"rotary embedding needs model.width={m.width} / heads, now {m.head_size}, to be even"
    _require(c, m.head_size % 2 == 0, "model.heads", even)
    groups = f"it must divide {_divisors(m.heads, m.key_value_heads, 'model.heads')}"
    _require(c, m.heads % m.key_value_heads == 0, "model.kv_heads", groups)
    causal = CAUSAL[c.objective.name]
    rule = f"objective.name={c.objective.name} needs {causal}; change one of the two"
    _require(c, m.causal == causal, "model.causal", rule)


def _require_lengths(c: Config) -> None:
    length, most = c.data.sequence_length, c.model.max_length
    rule = f"it must not exceed model.max_length={most}; lower the one or raise the other"
    _require(c, length <= most, "data.sequence_length", rule)
    enough = c.data.unique_tokens is None or c.data.unique_tokens >= length
    _require(c, enough, "data.unique_tokens", f"one row is data.sequence_length={length} tokens")


def _require_steps(c: Config) -> None:
    given = [f"{key}={value}" for key, value in (("steps", c.train.steps), ("tokens", c.train.tokens)) if value]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"give one of --config.train.steps and --config.train.tokens, not {got}")
    step = f"one step is {c.tokens_per_step} tokens (train.batch_size x data.sequence_length)"
    _require(c, c.steps > 0, "train.tokens", step)
    _require(c, c.steps <= _STEPS, "train.tokens", f"they are {c.steps:,} steps, and a run has at most {_STEPS:,}")
    times = f"times data.sequence_length={c.data.sequence_length} it must be at most {_STEPS:,} tokens"
    _require(c, c.tokens_per_step <= _STEPS, "train.batch_size", times)
    multiple = f"it must be a multiple of train.microbatches={c.train.microbatches}"
    _require(c, c.train.batch_size % c.train.microbatches == 0, "train.batch_size", multiple)


def _require(config: Config, ok: bool, key: str, rule: str) -> None:
    if not ok:
        raise UserError(f"--config.{key}={_value(config, key)}: {rule}")


def _divisors(n: int, near: int, key: str) -> str:
    """`key=n: ` and the divisors of n; of many, the eight closest to `near`."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)}, key=lambda d: abs(d - near))
    return f"{key}={n}: " + ", ".join(map(str, sorted(divisors[:8]))) + (", ..." if len(divisors) > 8 else "")
