"""Normalisation, rotary embedding, projection: the stateless pieces of a block.

Norms and rotary embedding are float32 whatever the dtype of the matrix products.
Shapes: B sequences, L tokens, Q queries (all L positions, or some), D width, H query heads, K key/value heads,
C channels per head.
"""

import math

import jax
import jax.numpy as jnp


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32, returned in the dtype of `x`."""
    x = x_BLD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (x * scale_D).astype(x_BLD.dtype)


def rotary_angles(position: jax.Array, channels: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of positions `(L,)` or `(B, Q)`, float32, a last axis of `channels` added; half-split layout
    (channel i pairs with i + C/2).
    """
    frequency = theta ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    angle = position.astype(jnp.float32)[..., None] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def take(x_BL: jax.Array, at_BR: jax.Array) -> jax.Array:
    """`x[b, at[b, r]]` of `x_BL`, `x_BLD` and so on; a place off its end reads the last one."""
    at = jnp.minimum(at_BR, x_BL.shape[1] - 1).reshape(*at_BR.shape, *(1,) * (x_BL.ndim - 2))
    return jnp.take_along_axis(x_BL, at, axis=1)


def angles_at(angles: tuple[jax.Array, jax.Array], at_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`rotary_angles` of some places, where the queries stand."""
    return tuple(
        table[jnp.minimum(at_BR, len(table) - 1)] if table.ndim == 2 else take(table, at_BR) for table in angles
    )


def rotate(x_BLHC: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Apply rotary position embedding in float32; returned in the dtype of `x`."""
    # Heads go before positions while it turns: on CPU attention reads them that way, and one copy serves both.
    cos, sin = (table if table.ndim == 2 else table[:, None] for table in angles)  # the same for all heads
    x_BHLC = x_BLHC.astype(jnp.float32).swapaxes(1, 2)
    left, right = jnp.split(x_BHLC, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    return (x_BHLC * cos + turned * sin).swapaxes(1, 2).astype(x_BLHC.dtype)


def project(x: jax.Array, kernel: jax.Array, contracted: int = 1) -> jax.Array:
    """Contract the last `contracted` axes of `x` with the first ones of `kernel`: one matrix product over flat rows.

    On CPU the weight gradient of a product with two row axes (B, L) is slower than the flat one; elsewhere the
    two are the same.
    """
    rows, size = x.shape[: x.ndim - contracted], math.prod(kernel.shape[:contracted])
    flat = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return flat.reshape(*rows, *kernel.shape[contracted:])
