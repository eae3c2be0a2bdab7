"""The released LLaDA format (GSAI-ML/LLaDA-8B): names of its tensors, and its config.json both ways.

The format grew out of OLMo's and has switches for much that LLaDA does not do; those are written as released and
refused when they are set otherwise.
"""

from typing import Any

from llada.config import ModelConfig
from llada.errors import UserError
from llada.interop.schema import TRANSFORMERS_VERSION, Special, field

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


def from_json(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int | None]]:
    """(fields of ModelConfig, special ids that are given) from a `config.json`; UserError for another network."""
    for name, wanted in _FIXED.items():
        got = values.get(name, wanted)
        # The released class has no bias in norms unless it is asked for; null means "as include_bias".
        if got != wanted and not (name == "bias_for_layer_norm" and got is None):
            raise UserError(f"{name}={got!r} is not supported; a LLaDA has {wanted!r}")
    heads, width = field(values, "n_heads", int), field(values, "d_model", int)
    kv_heads = field(values, "n_kv_heads", int, None)
    if kv_heads is None:
        kv_heads = 1 if values.get("multi_query_attention") else heads
    vocab_size = field(values, "vocab_size", int)
    ffn = field(values, "mlp_hidden_size", int, None)
    model = {
        "layers": field(values, "n_layers", int),
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn": field(values, "mlp_ratio", int, 4) * width if ffn is None else ffn,
        "vocab_size": field(values, "embedding_size", int, None) or vocab_size,
        "max_length": field(values, "max_sequence_length", int),
        "tie_embeddings": field(values, "weight_tying", bool, False),
        "qk_norm": field(values, "qk_norm", bool, False),
        "rope_theta": field(values, "rope_theta", float),
        "norm_eps": field(values, "rms_norm_eps", float),
        "init_std": field(values, "init_std", float, 0.02),
    }
    given = {role: field(values, f"{role}_token_id", int, None) for role in ("mask", "eos", "pad")}
    return model, {role: token for role, token in given.items() if token is not None}
