"""The released LLaDA format (GSAI-ML/LLaDA-8B): names of its tensors, and its config.json both ways.

The format grew out of OLMo's and has switches for much that LLaDA does not do; those are written as released and
refused when they are set otherwise.
"""

from typing import Any

from llada.config import ModelConfig
from llada.errors import UserError
from llada.interop.schema import TRANSFORMERS_VERSION, Special, field, first_ids

ARCHITECTURE = "LLaDAModelLM"
MODEL_TYPE = "llada"
NAMES = {
    "embedding": "model.transformer.wte.weight",
    "layers.attention_norm": "model.transformer.blocks.{}.attn_norm.weight",
    "layers.query": "model.transformer.blocks.{}.q_proj.weight",
    "layers.key": "model.transformer.blocks.{}.k_proj.weight",
    "layers.value": "model.transformer.blocks.{}.v_proj.weight",
    "layers.query_norm": "model.transformer.blocks.{}.q_norm.weight",
    "layers.key_norm": "model.transformer.blocks.{}.k_norm.weight",
    "layers.output": "model.transformer.blocks.{}.attn_out.weight",
    "layers.ffn_norm": "model.transformer.blocks.{}.ff_norm.weight",
    "layers.gate": "model.transformer.blocks.{}.ff_proj.weight",
    "layers.up": "model.transformer.blocks.{}.up_proj.weight",
    "layers.down": "model.transformer.blocks.{}.ff_out.weight",
    "final_norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
}

# What every LLaDA has in common; another value would be another network.
_FIXED = {
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
_INERT = {
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


# What the released class takes for a field that a file leaves out; sizes must be there, as its own are GPT-2's.
_DEFAULTS = {
    "init_std": 0.02,
    "max_sequence_length": 1_024,
    "mlp_ratio": 4,
    "qk_norm": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "weight_tying": True,
}


def to_json(model: ModelConfig, special: Special) -> dict[str, Any]:
    """`config.json`: every field of the released one, and `qk_norm` where the model has it (the release has none)."""
    values = {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": f"modeling_llada.{ARCHITECTURE}",
            "AutoModelForCausalLM": f"modeling_llada.{ARCHITECTURE}",
        },
        "model_type": MODEL_TYPE,
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
        "pad_token_id": special.pad,
    }
    extra = {"qk_norm": True} if model.qk_norm else {}
    return dict(sorted((values | extra | _FIXED | _INERT).items()))


def from_json(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """(fields of ModelConfig, special ids that are given) from a `config.json`; UserError for another network."""
    values = _FIXED | _DEFAULTS | {name: value for name, value in given.items() if value is not None}
    for name, wanted in _FIXED.items():
        if values[name] != wanted:
            raise UserError(f"{name}={values[name]!r} is not supported; a LLaDA has {wanted!r}")
    heads, width = field(values, "n_heads", int), field(values, "d_model", int)
    if not isinstance(values.get("multi_query_attention", False), bool):
        raise UserError(f"config.json has multi_query_attention={values['multi_query_attention']!r}; it must be bool")
    model = {
        "layers": field(values, "n_layers", int),
        "width": width,
        "heads": heads,
        "kv_heads": field(values, "n_kv_heads", int, 1 if values.get("multi_query_attention") else heads),
        "ffn": field(values, "mlp_hidden_size", int, field(values, "mlp_ratio", int) * width),
        "vocab_size": field(values, "embedding_size", int, field(values, "vocab_size", int)),
        "max_length": field(values, "max_sequence_length", int),
        "tie_embeddings": field(values, "weight_tying", bool),
        "qk_norm": field(values, "qk_norm", bool),
        "rope_theta": field(values, "rope_theta", float),
        "norm_eps": field(values, "rms_norm_eps", float),
        "init_std": field(values, "init_std", float),
        "causal": False,
    }
    return model, first_ids(values, ("mask", "eos", "pad"))
