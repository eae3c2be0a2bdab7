"""The two formats of config.json and of tensor names: the released LLaDA's, and that of the Llama family.

LLaDA (GSAI-ML/LLaDA-8B) grew out of OLMo and has switches for much that LLaDA does not do; those are written as
released and refused when they are set otherwise. Our ARM is a Llama; with qk-norm it is a Qwen3, which is a Llama with
that norm. iLLaDA, a mask predictor, uses the Llama family's names and fields.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from llada.config import ModelConfig
from llada.errors import UserError
from llada.objectives.contract import SpecialTokens

# The format of the files written here: what transformers of this version would write, and later ones read.
TRANSFORMERS_VERSION = "4.57.6"

# In the workdir of an import: the source's own config.json, which an export reuses where it still describes the model.
SOURCE_CONFIG = "source_config.json"

Json = dict[str, Any]

_NOTHING = object()
# Sizes and ids are counts: nothing near this is one, and arithmetic with more may go wrong.
_MOST = 2**31 - 1


class Schema(NamedTuple):
    """One format.

    names      our leaf to their tensor; `{}` stands for the layer
    to_json    config.json of a model, its special tokens and the id that pads
    from_json  (fields of ModelConfig, special ids by role as far as they are there); UserError for another network
    """

    names: dict[str, str]
    to_json: Callable[[ModelConfig, SpecialTokens, int | None], Json]
    from_json: Callable[[Json], tuple[Json, dict[str, int]]]


def schema_of(model: ModelConfig) -> Schema:
    """The format in which a model is exported."""
    return LLAMA if model.causal else LLADA


def read(values: Json) -> tuple[Schema, Json, dict[str, int]]:
    """(its format, fields of ModelConfig, special ids) of a config.json. UserError for one of no known model_type."""
    kind = values.get("model_type")
    if kind not in ("llada", *_LLAMA_DEFAULTS):
        known = ", ".join(("llada", *_LLAMA_DEFAULTS))
        raise UserError(f"config.json has model_type={kind!r:.80}; supported are {known}")
    schema = LLADA if kind == "llada" else LLAMA
    return schema, *schema.from_json(values)


# Our leaf, the released LLaDA's module, the Llama family's.
_MODULES = (
    ("embedding", "model.transformer.wte", "model.embed_tokens"),
    ("layers.attention_norm", "model.transformer.blocks.{}.attn_norm", "model.layers.{}.input_layernorm"),
    ("layers.query", "model.transformer.blocks.{}.q_proj", "model.layers.{}.self_attn.q_proj"),
    ("layers.key", "model.transformer.blocks.{}.k_proj", "model.layers.{}.self_attn.k_proj"),
    ("layers.value", "model.transformer.blocks.{}.v_proj", "model.layers.{}.self_attn.v_proj"),
    ("layers.query_norm", "model.transformer.blocks.{}.q_norm", "model.layers.{}.self_attn.q_norm"),
    ("layers.key_norm", "model.transformer.blocks.{}.k_norm", "model.layers.{}.self_attn.k_norm"),
    ("layers.output", "model.transformer.blocks.{}.attn_out", "model.layers.{}.self_attn.o_proj"),
    ("layers.ffn_norm", "model.transformer.blocks.{}.ff_norm", "model.layers.{}.post_attention_layernorm"),
    ("layers.gate", "model.transformer.blocks.{}.ff_proj", "model.layers.{}.mlp.gate_proj"),
    ("layers.up", "model.transformer.blocks.{}.up_proj", "model.layers.{}.mlp.up_proj"),
    ("layers.down", "model.transformer.blocks.{}.ff_out", "model.layers.{}.mlp.down_proj"),
    ("final_norm", "model.transformer.ln_f", "model.norm"),
    ("head", "model.transformer.ff_out", "lm_head"),
)

# What every LLaDA has in common; another value would be another network.
_FIXED: Json = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}
# Released values of switches that do not change what a trained network computes.
_INERT: Json = {
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm_with_affine": True,
    "block_group_size": 1,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "residual_dropout": 0.0,
    "rope_full_precision": True,
    "transformers_version": TRANSFORMERS_VERSION,
    "use_cache": False,
}
# What the released class takes for a field that a file leaves out. Its sizes are GPT-2's, so a file must have its own.
_LLADA_DEFAULTS: Json = {
    "init_std": 0.02,
    "max_sequence_length": 1_024,
    "mlp_ratio": 4,
    "qk_norm": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "weight_tying": True,
}


def _llada_to_json(model: ModelConfig, special: SpecialTokens, pad_id: int | None) -> Json:
    """Every field of the released one, and `qk_norm` where the model has it (the release has none)."""
    values = {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "model_type": "llada",
        "d_model": model.width,
        "n_layers": model.layers,
        "n_heads": model.heads,
        "n_kv_heads": model.key_value_heads,
        "mlp_hidden_size": model.ffn,
        "vocab_size": model.vocab_size,
        "embedding_size": model.vocab_size,
        "max_sequence_length": model.max_length,
        "weight_tying": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        "init_std": model.init_std,
        "precision": "amp_bf16" if model.dtype == "bfloat16" else "fp32",
        "mask_token_id": special.mask,
        "eos_token_id": special.eos,
        "pad_token_id": pad_id,
    }
    extra = {"qk_norm": True} if model.qk_norm else {}
    return dict(sorted((values | extra | _FIXED | _INERT).items()))


def _llada_from_json(source: Json) -> tuple[Json, dict[str, int]]:
    values = _FIXED | _LLADA_DEFAULTS | {name: value for name, value in source.items() if value is not None}
    for name, wanted in _FIXED.items():
        if values[name] != wanted:
            raise UserError(f"{name}={values[name]!r:.80} is not supported; a LLaDA has {wanted!r:.80}")
    heads, width = _field(values, "n_heads", int), _field(values, "d_model", int)
    one_key_head = _field(values, "multi_query_attention", bool, False)
    model = {
        "layers": _field(values, "n_layers", int),
        "width": width,
        "heads": heads,
        "kv_heads": _field(values, "n_kv_heads", int, 1 if one_key_head else heads),
        "ffn": _field(values, "mlp_hidden_size", int, _field(values, "mlp_ratio", int) * width),
        "vocab_size": _field(values, "embedding_size", int, _field(values, "vocab_size", int)),
        "max_length": _field(values, "max_sequence_length", int),
        "tie_embeddings": _field(values, "weight_tying", bool),
        "qk_norm": _field(values, "qk_norm", bool),
        "rope_theta": _field(values, "rope_theta", float),
        "norm_eps": _field(values, "rms_norm_eps", float),
        "init_std": _field(values, "init_std", float),
        "causal": False,
    }
    return model, _first_ids(values, ("mask", "eos", "pad"))


# What transformers' classes take for a field that a file leaves out: older files lack what was added since, and some
# programs leave out what is the class's default.
_COMMON: Json = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32_000,
}
_LLAMA_DEFAULTS: dict[str, Json] = {
    # Its class is not part of transformers: sizes must be there.
    "illada": {
        name: _COMMON[name]
        for name in ("attention_bias", "hidden_act", "initializer_range", "mlp_bias", "tie_word_embeddings")
    },
    "llama": _COMMON | {"intermediate_size": 11_008, "max_position_embeddings": 2_048},
    "mistral": _COMMON
    | {"intermediate_size": 14_336, "max_position_embeddings": 131_072}
    | {"num_key_value_heads": 8, "sliding_window": 4_096},
    "qwen3": _COMMON
    | {"intermediate_size": 22_016, "max_position_embeddings": 32_768, "vocab_size": 151_936}
    | {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
}
_NULLABLE = ("head_dim", "num_key_value_heads", "sliding_window")
_BIDIRECTIONAL = ("illada",)


def _llama_to_json(model: ModelConfig, special: SpecialTokens, pad_id: int | None) -> Json:
    """A LlamaForCausalLM, or a Qwen3ForCausalLM where the model has qk-norm.

    Rows of an ARM trained here begin after an end-of-text token, which therefore is the beginning-of-text token there.
    """
    values = {
        "architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if model.qk_norm else "llama",
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_length,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": special.start,
        "eos_token_id": special.eos if special.eot is None else list(special.ends),
        "pad_token_id": pad_id,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    if model.qk_norm:
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.layers}
    else:
        values |= {"mlp_bias": False, "pretraining_tp": 1}
    return dict(sorted(values.items()))


def _llama_from_json(source: Json) -> tuple[Json, dict[str, int]]:
    """A sliding window shortens the context to its length: up to there attention is the same."""
    kind = source["model_type"]
    # Null means the default as well, but for fields where it means that there is none.
    present = {name: value for name, value in source.items() if value is not None or name in _NULLABLE}
    values = _LLAMA_DEFAULTS[kind] | present
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if values.get(name, wanted) != wanted:
            raise UserError(f"{name}={values[name]!r:.80} is not supported; only {wanted!r:.80} is")
    if values.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"partial_rotary_factor={values['partial_rotary_factor']!r:.80} is not supported; only 1.0 is")
    window = _field(values, "sliding_window", int, None)
    length = _field(values, "max_position_embeddings", int)
    if window is not None and _field(values, "use_sliding_window", bool, True):
        length = min(length, window)
    heads, width = _field(values, "num_attention_heads", int), _field(values, "hidden_size", int)
    head_dim = _field(values, "head_dim", int, None)
    if head_dim is not None and head_dim * heads != width:
        raise UserError(f"head_dim={head_dim} x num_attention_heads={heads} is not hidden_size={width}: not supported")
    if values.get("layer_norm_eps") is not None:
        raise UserError(f"layer_norm_eps={values['layer_norm_eps']!r:.80} is not supported; norms here are RMSNorm")
    model = {
        "layers": _field(values, "num_hidden_layers", int),
        "width": width,
        "heads": heads,
        "kv_heads": _field(values, "num_key_value_heads", int, heads),
        "ffn": _field(values, "intermediate_size", int),
        "vocab_size": _field(values, "vocab_size", int),
        "max_length": length,
        "tie_embeddings": _field(values, "tie_word_embeddings", bool, False),
        "qk_norm": kind == "qwen3",
        "rope_theta": _rope_theta(values),
        "norm_eps": _field(values, "rms_norm_eps", float),
        "init_std": _field(values, "initializer_range", float),
        "causal": kind not in _BIDIRECTIONAL,
    }
    return model, _first_ids(values, ("mask", "eos", "pad", "bos"))


def _rope_theta(values: Json) -> float:
    """From `rope_theta`, or `rope_parameters` as transformers 5 writes it; UserError for scaled frequencies."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"config.json has rope_parameters={scaling!r:.80}; it must be an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" or scaling.get("factor", 1.0) != 1.0:
        raise UserError(f"rope_type={kind!r:.80} is not supported; only unscaled rotary embedding ('default') is")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial_rotary_factor in rope_parameters is not supported; only 1.0 is")
    return _field(scaling if "rope_theta" in scaling else values, "rope_theta", float)


def _field(values: Json, name: str, kind: type, default: Any = _NOTHING) -> Any:
    """`values[name]`, which must be a `kind` in range; `default` where it is null or missing. UserError naming it."""
    value = values.get(name)
    if value is None and default is not _NOTHING:
        return default
    if name not in values:
        raise UserError(f"config.json lacks {name}")
    if kind is float and type(value) is int:
        value = float(min(max(value, -_MOST), _MOST))
    if type(value) is not kind:
        raise UserError(f"config.json has {name}={_short(value)}; it must be {kind.__name__}")
    if not _in_range(value):
        raise UserError(f"config.json has {name}={_short(value)}, which is out of range")
    return value


def _in_range(value: Any) -> bool:
    return math.isfinite(value) if type(value) is float else type(value) is not int or abs(value) <= _MOST


def _first_ids(values: Json, roles: tuple[str, ...]) -> dict[str, int]:
    """Role to the first id of `<role>_token_id`, where there is one. Of several ends the others end turns."""
    ids = {role: _token_ids(values, f"{role}_token_id") for role in roles}
    return {role: several[0] for role, several in ids.items() if several}


def _token_ids(values: Json, name: str) -> list[int]:
    """The ids under `name`: one, several in a list, or none (missing, null, -1 in old files). UserError otherwise."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token > _MOST for token in ids):
        raise UserError(f"config.json has {name}={_short(value)}; it must be a token id or a list of them")
    return [token for token in ids if token >= 0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


LLADA = Schema({leaf: f"{llada}.weight" for leaf, llada, _ in _MODULES}, _llada_to_json, _llada_from_json)
LLAMA = Schema({leaf: f"{llama}.weight" for leaf, _, llama in _MODULES}, _llama_to_json, _llama_from_json)
