"""Models with random weights for the benchmarks of inference."""

import jax

from llada.config import ModelConfig
from llada.model import transformer
from llada.objectives.contract import SpecialTokens

SHAPES = {  # layers, width, heads, ffn, vocabulary
    "20m": (12, 384, 6, 1024, 126_464),
    "100m": (12, 768, 12, 2048, 126_464),
    "toy": (2, 64, 2, 128, 1024),
}


def build(name: str, head_scale: float = 1.0):
    """`(config, parameters, special tokens)` with random weights.

    They are larger than at the start of training, where confidences at masked positions differ by little more than
    rounding and two programs may rank them differently.
    """
    layers, width, heads, ffn, vocab = SHAPES[name]
    unroll = layers if jax.default_backend() == "cpu" else 1
    config = ModelConfig(
        **dict(layers=layers, width=width, heads=heads, ffn=ffn, vocab_size=vocab, max_length=512),
        **dict(dtype="float32", scan_unroll=unroll, init_std=0.1),
    )
    params = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(0))
    params["head"] = params["head"] * head_scale
    return config, params, SpecialTokens(mask=vocab - 128, eos=vocab - 383)
