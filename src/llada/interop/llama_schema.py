"""The Llama family's format: names of its tensors, and its config.json both ways.

Our ARM is a Llama; with qk-norm it is a Qwen3, which is a Llama with that norm. iLLaDA, a mask predictor, uses the same
names and fields.
"""

from typing import Any

from llada.config import ModelConfig
from llada.errors import UserError
from llada.interop.schema import TRANSFORMERS_VERSION, Special, field

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


def to_json(model: ModelConfig, special: Special) -> dict[str, Any]:
    """`config.json` of a LlamaForCausalLM, or of a Qwen3ForCausalLM where the model has qk-norm.

    Rows of our ARM begin after an end-of-text token, which therefore is the beginning-of-text token here.
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
        "bos_token_id": special.eos,
        "eos_token_id": ends if len(ends) > 1 else special.eos,
        "pad_token_id": special.pad,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    if model.qk_norm:
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.layers}
    else:
        values |= {"mlp_bias": False, "pretraining_tp": 1}
    return dict(sorted(values.items()))


def from_json(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int | None]]:
    """(fields of ModelConfig, special ids that are given) from a `config.json`; UserError for another network."""
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if values.get(name, wanted) != wanted:
            raise UserError(f"{name}={values[name]!r} is not supported; only {wanted!r} is")
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    length = field(values, "max_position_embeddings", int)
    if window is not None and window < length:
        raise UserError(f"sliding_window={window} is not supported; attention here sees the whole context")
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
        "kv_heads": field(values, "num_key_value_heads", int, None) or heads,
        "ffn": field(values, "intermediate_size", int),
        "vocab_size": field(values, "vocab_size", int),
        "max_length": length,
        # transformers leaves it out of a file where it is its class's default.
        "tie_embeddings": field(values, "tie_word_embeddings", bool, False),
        "qk_norm": values["model_type"] == "qwen3",
        "rope_theta": _rope_theta(values),
        "norm_eps": field(values, "rms_norm_eps", float),
        "init_std": field(values, "initializer_range", float, 0.02),
        "causal": values["model_type"] in CAUSAL,
    }
    given = {role: values.get(f"{role}_token_id") for role in ("mask", "eos", "pad")}
    # Several ends: the first is that of a text, others end turns.
    given["eos"] = given["eos"][0] if isinstance(given["eos"], list) and given["eos"] else given["eos"]
    # Old files say -1 for none.
    return model, {role: token for role, token in given.items() if type(token) is int and token >= 0}


def _rope_theta(values: dict[str, Any]) -> float:
    """From `rope_theta`, or `rope_parameters` as transformers 5 writes it; UserError for scaled frequencies."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"config.json has rope_parameters={scaling!r}; it must be an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" or scaling.get("factor", 1.0) != 1.0:
        raise UserError(f"rope_type={kind!r} is not supported; only unscaled rotary embedding ('default') is")
    return field(scaling if "rope_theta" in scaling else values, "rope_theta", float)
