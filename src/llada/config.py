"""Every knob and every default, in one place.

An experiment file returns a `ConfigDict`; `from_config_dict` turns it into the frozen dataclasses below and refuses
what it does not know. Past that border no ConfigDict exists, and nothing reads a field "with a default".
Positions of the learning-rate schedule are parsed in `training/optimizer.py`, where they are used.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from llada.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Transformer for both families; `causal` is the only difference (LLaDA section 2.1, Table 5)."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads (MHA); fewer is GQA
    ffn: int = 704
    vocab_size: int = 2048
    max_length: int = 256  # the longest sequence the model is meant for, in tokens
    causal: bool = False
    tie_embeddings: bool = False
    qk_norm: bool = False
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dtype: str = "bfloat16"  # of the matrix products; parameters, norms, softmax and loss are float32
    scan_unroll: int | None = None  # layers per turn of the scan; None: 4 on CPU, all on GPU, 1 on TPU
    # What the backward pass recomputes: none | dots (all but products and attention) | attention (all but attention) |
    # full (each layer from its input) | offload (the same, with those inputs kept in the host's memory)
    remat: str = "none"

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

    name: str = "diffusion"  # diffusion | autoregressive
    eps: float = 1e-3  # masking probability p = (1 - eps) t + eps
    time_sampling: str = "stratified"  # stratified over the global batch | iid, as in the paper
    random_length_fraction: float = 0.01  # sequences cut to a length drawn from U[1, L]
    block_cross_document_attention: bool = False  # a row holds parts of several documents: each sees itself only
    head_rows: int | None = None  # token positions per vocabulary-sized block of logits; None: by platform


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, and how it becomes rows of tokens."""

    source: str = "stdlib"  # stdlib | text:GLOB[,GLOB ...]; a directory stands for the files in it
    text_key: str = "text"  # field (JSON lines) or column (Parquet) that holds a document's text
    # A SentencePiece .model, a tokenizer.json or its directory; None: train one of model.vocab_size on the corpus
    tokenizer: str | None = None
    sequence_length: int = 256
    holdout_fraction: float = 0.02  # of the documents, chosen by a hash of their text
    holdout_source: str | None = None  # held-out documents of one's own, written as `source`; None: by the fraction
    directory: str | None = None  # where the rows of tokens are kept, for many runs to share; None: the workdir
    unique_tokens: int | None = None  # train on so many tokens, again and again; None: on the whole training side


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with clipping and a piecewise-linear learning rate."""

    peak_learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_norm: float = 1.0
    # "position:factor ..." with positions in tokens (10.5G) or percent of the run (2%); linear in between, a jump where
    # a position repeats. Factors multiply peak_learning_rate.
    schedule: str = "0:0 2%:1 80%:1 100%:0.1"


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; their product is the number of devices."""

    data: int | None = None  # None: all the devices that fsdp and tensor leave
    fsdp: int = 1
    tensor: int = 1
    tpu_options: bool = True  # compile for TPU with the libtpu options of fsdp.py; False: as libtpu would by itself


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and how much at once."""

    batch_size: int = 32  # sequences per optimizer step, over all devices and microbatches
    microbatches: int = 1
    steps: int | None = None  # give steps or tokens
    tokens: int | None = None
    log_every: int = 20


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation during and after training."""

    every: int = 500  # steps; 0 evaluates at the end only
    at: str = ""  # and at these positions, written as in optimizer.schedule: "10M 20M 50%"
    batches: int = 8
    draws: int = 8  # Monte Carlo draws (l, masks) per row; the ARM needs none


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many to keep."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole of a run."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def tokens_per_step(self) -> int:
        """Token positions read per optimizer step."""
        return self.train.batch_size * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, from `train.steps` or rounded down from `train.tokens`."""
        if self.train.steps is not None:
            return self.train.steps
        return self.train.tokens // self.tokens_per_step


# Keys that a later call on the same workdir may change: they alter how long and how the run is executed, not which
# model it is or what it sees at a given step.
CHANGEABLE = (
    *("train.steps", "train.tokens", "train.log_every", "train.microbatches", "objective.head_rows"),
    *("model.remat", "model.scan_unroll", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.tpu_options"),
    *("data.directory", "data.tokenizer"),
    *("evaluate.every", "evaluate.at", "evaluate.batches", "evaluate.draws", "checkpoint.every", "checkpoint.keep"),
)


def default_config() -> ml_collections.ConfigDict:
    """The defaults above as a ConfigDict for experiment files to change; keys that may be None are placeholders."""

    def convert(node):
        out = ml_collections.ConfigDict()
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                out[field.name] = convert(value)
            elif value is None:
                out[field.name] = config_dict.placeholder(_scalar_type(field.type))
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
    """Read a `config.json`: `to_dict` as JSON."""
    return from_config_dict(json.loads(path.read_text()))


def differences(old: Config, new: Config, begun: bool = True) -> list[str]:
    """`key: old -> new` for every key that differs, save those a later call may change.

    Before a run has `begun` (an imported model) only the model is settled.
    """
    a, b = _flatten(to_dict(old)), _flatten(to_dict(new))
    settled = [key for key in a if key not in CHANGEABLE and (begun or key.startswith("model."))]
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in settled if a[key] != b[key]]


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _scalar_type(annotation) -> type:
    """`int` from `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def build(cls, values: dict, path: str):
    """A config dataclass from nested dicts; `path` names it in the UserError for an unknown key or a wrong type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    out = {}
    for key, value in values.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean --{path}.{close[0]}? " if close else ""
            raise UserError(f"unknown config key {path}.{key}; {hint}known keys of {path}: {', '.join(sorted(fields))}")
        field_type = fields[key].type
        if dataclasses.is_dataclass(field_type):
            if not isinstance(value, dict):
                raise UserError(f"{path}.{key}={value!r} must be a group of keys, not one value")
            out[key] = build(field_type, value, f"{path}.{key}")
        else:
            out[key] = _checked(value, field_type, f"{path}.{key}")
    return cls(**out)


def _checked(value, annotation, path: str):
    wanted = _scalar_type(annotation)
    if value is None and wanted is not annotation:
        return None
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is tuple and type(value) is list:
        return tuple(value)
    if type(value) is not wanted:
        optional = " or None" if wanted is not annotation else ""
        raise UserError(f"--{path}={value!r} is a {type(value).__name__}; it must be {wanted.__name__}{optional}")
    return value


def _validate(config: Config) -> None:
    """Refuse what cannot work, naming the value, the rule and the flag. Mesh against devices: see `mesh.check`."""
    _check_ranges(_flatten(to_dict(config)))
    _check_model(config.model)
    _check_run(config)


POSITIVE = (
    *("model.layers", "model.width", "model.heads", "model.kv_heads", "model.ffn", "model.vocab_size"),
    *("model.max_length", "model.scan_unroll", "model.rope_theta", "model.norm_eps", "model.init_std"),
    *("objective.head_rows", "data.sequence_length", "data.unique_tokens", "mesh.data", "mesh.fsdp", "mesh.tensor"),
    *("optimizer.peak_learning_rate", "optimizer.adam_eps", "optimizer.clip_norm"),
    *("train.batch_size", "train.microbatches", "train.steps", "train.tokens", "train.log_every"),
    *("evaluate.batches", "evaluate.draws", "checkpoint.every", "checkpoint.keep"),
)
CHOICES = {
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("none", "dots", "attention", "full", "offload"),
    "objective.name": ("diffusion", "autoregressive"),
    "objective.time_sampling": ("stratified", "iid"),
}


def _check_ranges(flat: dict[str, Any]) -> None:
    """One key at a time."""
    for key in POSITIVE:
        _require(flat[key] is None or 0 < flat[key] < float("inf"), key, flat[key], "it must be positive")
    for key, allowed in CHOICES.items():
        _require(flat[key] in allowed, key, flat[key], f"it must be one of {', '.join(allowed)}")
    for key in ("optimizer.beta1", "optimizer.beta2", "objective.eps"):
        _require(0 <= flat[key] < 1, key, flat[key], "it must be in [0, 1)")
    for key in ("optimizer.weight_decay", "evaluate.every"):
        _require(0 <= flat[key] < float("inf"), key, flat[key], "it must not be negative")
    fraction = flat["objective.random_length_fraction"]
    _require(0 <= fraction <= 1, "objective.random_length_fraction", fraction, "it must be in [0, 1]")
    fraction = flat["data.holdout_fraction"]
    _require(0 < fraction < 1, "data.holdout_fraction", fraction, "it must lie between 0 and 1")
    _require(0 <= flat["seed"] < 2**31, "seed", flat["seed"], "it must be in [0, 2**31)")


def _check_model(m: ModelConfig) -> None:
    """Heads against width and each other."""
    _require(m.width % m.heads == 0, "model.heads", m.heads,
             f"it must divide model.width={m.width}: {_divisors(m.width)}")  # fmt: skip
    _require(m.head_size % 2 == 0, "model.heads", m.heads,
             f"rotary embedding needs model.width={m.width} / heads, now {m.head_size}, to be even")  # fmt: skip
    _require(m.heads % m.key_value_heads == 0, "model.kv_heads", m.kv_heads,
             f"it must divide model.heads={m.heads}: {_divisors(m.heads)}")  # fmt: skip


def _check_run(c: Config) -> None:
    """Keys that must fit each other."""
    causal = c.objective.name == "autoregressive"
    _require(c.model.causal == causal, "model.causal", c.model.causal,
             f"objective.name={c.objective.name} needs {causal}; change one of the two")  # fmt: skip
    _require(c.data.sequence_length <= c.model.max_length, "data.sequence_length", c.data.sequence_length,
             f"it must not exceed model.max_length={c.model.max_length}; lower the one or raise the other")  # fmt: skip
    given = [f"{key}={value}" for key, value in (("steps", c.train.steps), ("tokens", c.train.tokens)) if value]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"give one of --config.train.steps and --config.train.tokens, not {got}")
    _require(c.steps > 0, "train.tokens", c.train.tokens,
             f"one step is {c.tokens_per_step} tokens (train.batch_size x data.sequence_length)")  # fmt: skip
    _require(c.train.batch_size % c.train.microbatches == 0, "train.batch_size", c.train.batch_size,
             f"it must be a multiple of train.microbatches={c.train.microbatches}")  # fmt: skip


def _require(ok: bool, key: str, value: Any, rule: str) -> None:
    if not ok:
        raise UserError(f"--config.{key}={value}: {rule}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
