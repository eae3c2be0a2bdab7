"""Every knob and every default, in one place.

An experiment file returns a `ConfigDict`; `from_config_dict` turns it into the frozen dataclasses below and refuses
what it does not know. Past that border no ConfigDict exists, and nothing reads a field "with a default".
Positions of the learning-rate schedule are parsed in `training/optimizer.py`, where they are used.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections

from llada import changes, config_rules, json_files, knobs
from llada.config_rules import CAUSAL, MOST_STEPS
from llada.errors import UserError
from llada.knobs import build, knob

# Generous limits, so that a typing error or a hostile file cannot ask for more than any machine has: counts of things
# that are allocated or iterated over, and (_FAR) counts that are only compared.
_LAYERS, _WIDTH, _ROWS, _STEPS, _FAR = 10_000, 2**17, 2**24, MOST_STEPS, 10**15

BEST_OBJECTIVE = {"time_law": "logit_normal", "weight": "paper"}  # of those that docs/objectives/report.md ranks
# What data.source begins with where it is dialogues, or rows that llada tokenize has written.
DIALOGUES, ARRAY_RECORD = "dialogues:", "array_record:"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Transformer for both families; `causal` is the only difference (LLaDA section 2.1, Table 5)."""

    layers: int = knob(6, "Transformer blocks", above=0, most=_LAYERS)
    width: int = knob(256, "channels of the residual stream", above=0, most=_WIDTH)
    heads: int = knob(4, "attention heads; they divide the width", above=0, most=_WIDTH)
    kv_heads: int | None = knob(None, "key/value heads; None: as many as heads (MHA); fewer: GQA", above=0, most=_WIDTH)
    ffn: int = knob(704, "hidden channels of the gated FFN", above=0, most=8 * _WIDTH)
    vocab_size: int = knob(2048, "pieces, the mask token among them", above=0, most=_ROWS)
    max_length: int = knob(256, "the longest sequence the model is meant for, in tokens", above=0, most=_ROWS)
    causal: bool = knob(False, "attention to the left only, as an ARM has it")
    tie_embeddings: bool = knob(False, "one matrix for embedding and vocabulary head")
    qk_norm: bool = knob(False, "RMSNorm of queries and keys")
    rope_theta: float = knob(500_000.0, "base of the rotary embedding", above=0, most=1e20)
    norm_eps: float = knob(1e-5, "RMSNorm's epsilon", above=0, most=1.0)
    init_std: float = knob(0.02, "standard deviation of initial weights", above=0, most=1e3)
    dropout: float = knob(
        0.0, "share of each branch's output and of the embedding set to zero, in training only", least=0, below=1
    )
    dtype: str = knob(
        "bfloat16", "of products; parameters, norms, softmax and loss are float32", choices=("bfloat16", "float32")
    )
    scan_unroll: int | None = knob(
        None, "layers per iteration of the scan; None: CPU 4, GPU all, TPU 1", above=0, most=_LAYERS, changeable=True
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
    """The training objective. `eps` to `clean_prefix` are the diffusion objective's; `input_masking` is the ARM's."""

    name: str = knob("diffusion", "LLaDA's bound, or an ARM's NLL", choices=tuple(CAUSAL))
    eps: float = knob(1e-3, "masking probability p = (1 - eps) t + eps", least=0, below=1)
    time_sampling: str = knob(
        "stratified", "of t: over the global batch, or iid as in the paper", choices=("stratified", "iid")
    )
    time_law: str = knob(
        "uniform",
        "distribution of t: uniform (the paper); logit_normal, bell-shaped (arXiv 2605.13026); band, uniform on a part",
        choices=("uniform", "logit_normal", "band"),
    )
    time_mean: float | None = knob(None, "logit_normal: mean of logit t; None: 0", least=-20, most=20)
    time_std: float | None = knob(None, "logit_normal: standard deviation of logit t; None: 1", least=0.01, most=20)
    time_uniform_share: float | None = knob(
        None,
        "logit_normal: share of the t drawn uniformly, so that elbo has bounded weights; None: 0",
        least=0,
        below=1,
    )
    time_low: float | None = knob(None, "band: the smallest t", least=0, below=1)
    time_high: float | None = knob(None, "band: where it ends", above=0, most=1)
    weight: str = knob(
        "elbo",
        "of a masked token's nats: elbo, 1/p over the density of t: the bound; paper, 1/p whatever the law of t; "
        "clipped, 1/p up to weight_bound; flat, all alike, 1/E[p]",
        choices=("elbo", "paper", "clipped", "flat"),
    )
    weight_bound: float | None = knob(None, "clipped: the largest weight", least=1, most=1e6)
    masks: str = knob(
        "bernoulli",
        "each token by itself (the paper, Eq. (3)); exact_count, l of L tokens (Eq. (6)); complementary, each row "
        "twice in a batch, the second time with the other tokens masked (arXiv 2512.15745)",
        choices=("bernoulli", "exact_count", "complementary"),
    )
    clean_prefix: float = knob(
        0.0,
        "share of sequences whose first part, of a length drawn from U[1, L - 1], is never masked",
        least=0,
        below=1,
    )
    input_masking: float = knob(
        0.0, "the ARM: share of its input tokens that the mask token replaces (arXiv 2510.04071)", least=0, below=1
    )
    random_length_fraction: float = knob(
        0.01, "share of sequences that are cut to a length drawn from U[1, L]", least=0, most=1
    )
    block_cross_document_attention: bool = knob(False, "a row holds parts of several documents: each sees itself only")
    normalization: str = knob(
        "sequence",
        "of a fine-tuning loss: sequence, 1/L' of each answer as in Eq. (5), or token, all answers' tokens alike",
        choices=("sequence", "token"),
    )
    head_rows: int | None = knob(
        None,
        "token positions per vocabulary-sized block of logits; None: by platform",
        above=0,
        most=_STEPS,
        changeable=True,
    )

    @property
    def variant(self) -> str:
        """What differs from the paper's objective, "time_law=band, weight=flat"; "" for the paper's own."""
        values, plain = vars(self), vars(self.plain)
        return ", ".join(f"{name}={value}" for name, value in values.items() if value != plain[name])

    @property
    def plain(self) -> "ObjectiveConfig":
        """The paper's objective of the same family, other keys as they are."""
        names = [field.name for field in dataclasses.fields(self)]
        variants = names[names.index("time_law") : names.index("input_masking") + 1]
        return dataclasses.replace(self, **{name: vars(ObjectiveConfig())[name] for name in variants})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, and how it becomes rows of tokens."""

    source: str = knob(
        "stdlib", "stdlib | packages | text:GLOB[,GLOB ...] | dialogues:GLOB[,...] | array_record:DIR; or a directory"
    )
    text_key: str = knob("text", "field (JSON lines) or column (Parquet) that holds a document's text")
    tokenizer: str | None = knob(
        None, "SentencePiece .model, tokenizer.json or its directory; None: the shards', or a new one", changeable=True
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
class DialogueConfig:
    """How dialogues become rows, where `data.source` is `dialogues:...` (LLaDA section 2.3)."""

    template: str | None = knob(
        None, "chat template: plain, llada or a Jinja file; None: the tokenizer's own, else plain", changeable=True
    )
    turns: str = knob(
        "drawn",
        "answers that train: drawn, one of each dialogue in every epoch; each; last",
        choices=("drawn", "each", "last"),
    )
    padding: str = knob(
        "eos",
        "behind an answer: eos, end-of-text tokens that are part of it (the paper); ignore, nothing that is seen; "
        "rainbow, a cycle of padding tokens (arXiv 2510.03680)",
        choices=("eos", "ignore", "rainbow"),
    )
    bucket: int | None = knob(
        None,
        "each example is padded to a multiple of so many tokens, and as many as fit share a row; None: a row each",
        above=0,
        most=_ROWS,
    )
    too_long: str = knob(
        "refuse",
        "an example longer than a row: refuse, or truncate its answer (and leave out prompts that fill the row)",
        choices=("refuse", "truncate"),
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with clipping and a piecewise-linear learning rate."""

    peak_learning_rate: float = knob(1e-3, "the rate at factor 1 of the schedule", above=0, recorded=True)
    weight_decay: float = knob(0.1, "decoupled, times the learning rate", least=0)
    beta1: float = knob(0.9, "Adam's decay of the mean", least=0, below=1)
    beta2: float = knob(0.95, "Adam's decay of the mean square", least=0, below=1)
    adam_eps: float = knob(1e-8, "Adam's epsilon", above=0)
    clip_norm: float = knob(1.0, "the gradient's norm over all parameters is cut to this", above=0, recorded=True)
    spike_factor: float | None = knob(
        None, "skip an update at so many times the median norm of 128 gradients", above=1, below=1e9, recorded=True
    )
    schedule: str = knob(
        "0:0 2%:1 80%:1 100%:0.1",
        '"position:factor ..." with positions in tokens (10.5G) or percent of the run (2%); linear in between, a jump '
        "where a position repeats; factors multiply peak_learning_rate",
        recorded=True,
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
    steps: int | None = knob(None, "optimizer steps; or give tokens or epochs", above=0, most=_STEPS, changeable=True)
    tokens: int | None = knob(None, "token positions to read, instead of steps", above=0, most=_FAR, changeable=True)
    epochs: float | None = knob(
        None,
        "how often to read the training side, instead of steps: they are counted once its rows are prepared",
        above=0,
        most=1e6,
        changeable=True,
    )
    most_skipped: int = knob(
        10, "updates skipped in a row, not finite or a spike, that end the run", above=0, most=_FAR, recorded=True
    )
    roll_back: int | None = knob(
        None,
        "instead of that, go back once to a checkpoint at least so many steps before the first of them, and leave out "
        "the batches since; None: do not",
        least=0,
        most=_FAR,
        recorded=True,
    )
    log_every: int = knob(20, "steps per line of metrics.jsonl", above=0, most=_FAR, changeable=True)
    watchdog_seconds: float | None = knob(
        1800.0, "without a finished step that end the run (status 6); None: none do", above=0, most=1e9, changeable=True
    )


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
    keep_every: int = knob(
        0, "steps; those of multiples are kept for good; 0: none", least=0, most=_FAR, changeable=True
    )


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
    dialogues: DialogueConfig = DialogueConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    debug: DebugConfig = DebugConfig()
    changes: tuple = knob((), "(from step, key, value) of recorded keys; written by llada train", changeable=True)

    @property
    def tokens_per_step(self) -> int:
        """Token positions read per optimizer step."""
        return self.train.batch_size * self.data.sequence_length

    @property
    def row_copies(self) -> int:
        """How often a batch holds each of its rows."""
        return 2 if self.objective.masks == "complementary" else 1

    @property
    def fine_tunes(self) -> bool:
        """Whether it trains on dialogues, of which answers alone are in the loss."""
        return self.data.source.startswith(DIALOGUES)

    @property
    def reads_records(self) -> bool:
        """Whether its rows are those that llada tokenize has written."""
        return self.data.source.startswith(ARRAY_RECORD)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, from `train.steps` or rounded down from `train.tokens`; 0 for `train.epochs`."""
        if self.train.tokens is not None and self.train.steps is None:
            return self.train.tokens // self.tokens_per_step
        return self.train.steps or 0


def default_config() -> ml_collections.ConfigDict:
    """The defaults above as a ConfigDict for experiment files to change; keys that may be None are placeholders."""
    return knobs.to_config_dict(Config())


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
    config_rules.check(config)
    return changes.checked(config)


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
