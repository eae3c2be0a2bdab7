"""Normalisation, rotary embedding, attention: the stateless pieces of a block.

Norms, rotary embedding and softmax are float32 whatever the dtype of the matrix products.
Shapes: B sequences, L tokens, D width, H query heads, K key/value heads, C channels per head.
"""

import math

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


def project(x: jax.Array, kernel: jax.Array, contracted: int = 1) -> jax.Array:
    """Contract the last `contracted` axes of `x` with the first ones of `kernel`: one matrix product over flat rows.

    On CPU the weight gradient of a product with two row axes (B, L) is slower than the flat one; elsewhere the
    two are the same.
    """
    rows, size = x.shape[: x.ndim - contracted], math.prod(kernel.shape[:contracted])
    flat = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return flat.reshape(*rows, *kernel.shape[contracted:])


def attend(
    query_BLHC: jax.Array, key_BLKC: jax.Array, value_BLKC: jax.Array, causal: bool, lengths_B: jax.Array | None
) -> jax.Array:
    """Softmax attention, grouped where K < H. Keys at positions >= lengths_B (>= 1) are not allowed.

    With `lengths_B` None and `causal` False every position sees every other: the mask predictor's plain case.
    Scores and softmax are float32; weights are normalised after meeting the values, which is the same sum and moves
    L / C times fewer numbers.
    """
    B, L, H, C = query_BLHC.shape
    K = key_BLKC.shape[2]
    # The heads of a group share keys, so they stand behind each other in one longer query axis (G = H / K).
    query_BKQC = query_BLHC.reshape(B, L, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)
    key_BKCL, value_BKLC = key_BLKC.transpose(0, 2, 3, 1), value_BLKC.transpose(0, 2, 1, 3)
    scores_BKQL = jnp.matmul(query_BKQC, key_BKCL, preferred_element_type=jnp.float32) / math.sqrt(C)
    position_L = jnp.arange(L)
    if causal:
        allowed_QL = jnp.tile(position_L[:, None] >= position_L[None, :], (H // K, 1))
        scores_BKQL = jnp.where(allowed_QL, scores_BKQL, -jnp.inf)
    if lengths_B is not None:
        allowed_BL = position_L < lengths_B[:, None]
        scores_BKQL = jnp.where(allowed_BL[:, None, None, :], scores_BKQL, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores_BKQL, axis=-1, keepdims=True))
    weights_BKQL = jnp.exp(scores_BKQL - top)
    total = jnp.sum(weights_BKQL, axis=-1, keepdims=True)
    mixed_BKQC = (weights_BKQL.astype(value_BKLC.dtype) @ value_BKLC / total).astype(query_BLHC.dtype)
    return mixed_BKQC.reshape(B, K, H // K, L, C).transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)
