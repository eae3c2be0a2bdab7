"""Normalisation, rotary embedding, attention: the stateless pieces of a block.

Norms, rotary embedding and softmax are float32 whatever the dtype of the matrix products.
Shapes: B sequences, L tokens, D width, H query heads, K key/value heads, C channels per head.
"""

import jax
import jax.numpy as jnp


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32, returned in the dtype of `x`."""
    x = x_BLD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (x * scale_D).astype(x_BLD.dtype)


def rotary_angles(length: int, channels: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine tables `(cos_LC, sin_LC)`, float32, half-split layout (channel i pairs with i + C/2)."""
    frequency = theta ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None, :]
    angle_LC = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle_LC), jnp.sin(angle_LC)


def rotate(x_BLHC: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Apply rotary position embedding in float32; returned in the dtype of `x`."""
    cos_LC, sin_LC = angles
    x = x_BLHC.astype(jnp.float32)
    left, right = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    return (x * cos_LC[None, :, None, :] + turned * sin_LC[None, :, None, :]).astype(x_BLHC.dtype)


def attend(
    query_BLHC: jax.Array, key_BLKC: jax.Array, value_BLKC: jax.Array, causal: bool, lengths_B: jax.Array | None
) -> jax.Array:
    """Softmax attention, grouped where K < H. Keys at positions >= lengths_B are not allowed.

    With `lengths_B` None and `causal` False every position sees every other: the mask predictor's plain case.
    """
    return jax.nn.dot_product_attention(
        query_BLHC, key_BLKC, value_BLKC, is_causal=causal, key_value_seq_lengths=lengths_B, implementation="xla"
    )
