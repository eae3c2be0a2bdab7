"""The Llama family's format: names of its tensors, and its config.json both ways.

Our ARM is a Llama; with qk-norm it is a Qwen3, which is a Llama with that norm. iLLaDA, a mask predictor, uses the same
names and fields.
"""

from typing import Any

from llada.config import ModelConfig
from llada.errors import UserError
from llada.interop.schema import TRANSFORMERS_VERSION, Special, field, first_ids

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers.attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers.query": "model.layers.{}.self_attn.q_proj.weight",
    "layers.key": "model.layers.{}.self_attn.k_proj.weight",
    "layers.value": "model.layers.{}.self_attn.v_proj.weight",
    "layers.query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.key_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.output": "model.layers.{}.self_attn.o_proj.weight",
    "layers.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
CAUSAL = ("llama", "mistral", "qwen3")
BIDIRECTIONAL = ("illada",)

# What transformers' classes take for a field that a file leaves out: older files lack what was added since, and some
# programs leave out what is the class's default.
_COMMON = {
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
_DEFAULTS = {
    "llama": _COMMON | {"intermediate_size": 11_008, "max_position_embeddings": 2_048},
    "mistral": _COMMON
    | {
        "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4_096,
    },
    "qwen3": _COMMON
    | {"intermediate_size": 22_016, "max_position_embeddings": 32_768, "vocab_size": 151_936}
    | {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
    # Its class is not part of transformers: sizes must be there.
    "illada": {
        name: _COMMON[name]
        for name in ("attention_bias", "hidden_act", "initializer_range", "mlp_bias", "tie_word_embeddings")
    },
}
_NULLABLE = ("head_dim", "num_key_value_heads", "sliding_window")


def to_json(model: ModelConfig, special: Special) -> dict[str, Any]:
    """`config.json` of a LlamaForCausalLM, or of a Qwen3ForCausalLM where the model has qk-norm.

    Rows of an ARM trained here begin after an end-of-text token, which therefore is the beginning-of-text token there.
    """
    ends = [special.eos] if special.eot is None else [special.eos, special.eot]
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
        "eos_token_id": ends if len(ends) > 1 else special.eos,
        "pad_token_id": special.pad,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    if model.qk_norm:
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.layers}
    else:
        values |= {"mlp_bias": False, "pretraining_tp": 1}
    return dict(sorted(values.items()))


def from_json(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """(fields of ModelConfig, special ids that are given) from a `config.json`; UserError for another network.

    A sliding window shortens the context to its length: up to there attention is the same.
    """
    # Null means the default as well, but for those of which it says that there is none.
    told = {name: value for name, value in given.items() if value is not None or name in _NULLABLE}
    values = _DEFAULTS[given["model_type"]] | told
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if values.get(name, wanted) != wanted:
            raise UserError(f"{name}={values[name]!r} is not supported; only {wanted!r} is")
    if values.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"partial_rotary_factor={values['partial_rotary_factor']!r} is not supported; only 1.0 is")
    window = field(values, "sliding_window", int, None)
    length = field(values, "max_position_embeddings", int)
    if window is not None and field(values, "use_sliding_window", bool, True):
        length = min(length, window)
    heads, width = field(values, "num_attention_heads", int), field(values, "hidden_size", int)
    head_dim = field(values, "head_dim", int, None)
    if head_dim is not None and head_dim * heads != width:
        raise UserError(f"head_dim={head_dim} x num_attention_heads={heads} is not hidden_size={width}: not supported")
    if values.get("layer_norm_eps") is not None:
        raise UserError(f"layer_norm_eps={values['layer_norm_eps']!r} is not supported; norms here are RMSNorm")
    model = {
        "layers": field(values, "num_hidden_layers", int),
        "width": width,
        "heads": heads,
        "kv_heads": field(values, "num_key_value_heads", int, heads),
        "ffn": field(values, "intermediate_size", int),
        "vocab_size": field(values, "vocab_size", int),
        "max_length": length,
        "tie_embeddings": field(values, "tie_word_embeddings", bool, False),
        "qk_norm": values["model_type"] == "qwen3",
        "rope_theta": _rope_theta(values),
        "norm_eps": field(values, "rms_norm_eps", float),
        "init_std": field(values, "initializer_range", float),
        "causal": values["model_type"] in CAUSAL,
    }
    return model, first_ids(values, ("mask", "eos", "pad", "bos"))


def _rope_theta(values: dict[str, Any]) -> float:
    """From `rope_theta`, or `rope_parameters` as transformers 5 writes it; UserError for scaled frequencies."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"config.json has rope_parameters={scaling!r}; it must be an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" or scaling.get("factor", 1.0) != 1.0:
        raise UserError(f"rope_type={kind!r} is not supported; only unscaled rotary embedding ('default') is")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial_rotary_factor in rope_parameters is not supported; only 1.0 is")
    return field(scaling if "rope_theta" in scaling else values, "rope_theta", float)
