"""Parameters and FLOPs of a configuration by arithmetic; nothing is built or allocated.

Two accountings, never mixed: `6nd` is the field's 6 x non-embedding parameters x tokens (LLaDA section 3.1); `exact`
counts every matrix product of the forward and backward pass: attention scores (halved where causal) and the vocabulary
head on the rows that meet it. Recomputation by remat is not useful work and is in neither; what training leaves out in
the last layer, for rows without a mask, is in both.
"""

from typing import NamedTuple

from llada.config import Config, ModelConfig
from llada.objectives import families


class ParameterCount(NamedTuple):
    """`non_embedding` leaves out the input embedding and the head; `total` has both (one, where tied)."""

    total: int
    non_embedding: int


def parameters(m: ModelConfig) -> ParameterCount:
    """Exact counts: LLaDA Table 5, recomputed."""
    attention = 2 * m.width * m.head_size * (m.heads + m.key_value_heads)
    norms = 2 * m.width + (2 * m.head_size if m.qk_norm else 0)
    non_embedding = m.layers * (attention + 3 * m.width * m.ffn + norms) + m.width
    tables = (1 if m.tie_embeddings else 2) * m.vocab_size * m.width
    return ParameterCount(non_embedding + tables, non_embedding)


def flops_6nd_per_token(m: ModelConfig) -> float:
    """6 N, forward and backward, N without embeddings."""
    return 6.0 * parameters(m).non_embedding


def flops_exact_per_token(config: Config, dense_head: bool = False) -> float:
    """Matrix products per trained token, forward and backward: 6 per weight, attention 12 L d S, head 6 V d.

    `dense_head` credits the head on every position, as codes that multiply them all are credited.
    """
    m, length = config.model, config.data.sequence_length
    weights = m.layers * (2 * m.width * m.head_size * (m.heads + m.key_value_heads) + 3 * m.width * m.ffn)
    attention = 12 * m.layers * m.heads * m.head_size * length * (0.5 if m.causal else 1.0)
    fraction = 1.0 if dense_head else head_fraction(config)
    return 6.0 * weights + attention + 6.0 * m.vocab_size * m.width * fraction


def head_fraction(config: Config) -> float:
    """Expected share of positions that meet the vocabulary head, by the config's family."""
    return families.of(config).head_fraction(config.objective, config.data.sequence_length)


# Dense bf16 peak FLOP/s of one device, by the name JAX gives it (JAX's own table for TPUs; vendors' sheets for GPUs).
# A CPU has no entry: MFU is then not printed.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a tpu7x chip shows as two devices
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
