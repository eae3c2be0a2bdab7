"""Normalisation, embedding, rotary embedding, SwiGLU, dropout: the mathematics of a block, without state.

Norms and rotary embedding are float32 whatever the dtype of the matrix products.
Shapes: B sequences, L tokens, R of their positions, D width, H heads, C channels per head, V vocabulary, F
feed-forward, N rows.
"""

import jax
import jax.numpy as jnp

from llada.model.projections import recompute_for_gradient, rotate_pairs, table_library

Angles = tuple[jax.Array, jax.Array]


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32, returned in the dtype of `x`."""

    def normalised(x_BLD, scale_D):
        x = x_BLD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        return (x * jax.lax.broadcast_to_rank(scale_D, x.ndim)).astype(x_BLD.dtype)

    return recompute_for_gradient(normalised, x_BLD, scale_D)


@jax.custom_vjp
def look_up(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Rows of a table, in its dtype. Its gradient is summed in float32 and rounded to that dtype once.

    Half of all tokens are masks: thousands of gradients go to one row, and a sum in bfloat16 stops growing at 256 times
    what is added to it.
    """
    return table_VD[tokens_BL]


def _look_up_backward(residuals, d_BLD):
    tokens_BL, like_V0 = residuals
    zeros_VD = jnp.zeros((len(like_V0), d_BLD.shape[-1]), jnp.float32)
    return zeros_VD.at[tokens_BL].add(d_BLD.astype(jnp.float32)).astype(like_V0.dtype), None


# Of the table only its length and dtype are saved.
look_up.defvjp(lambda table_VD, tokens_BL: (table_VD[tokens_BL], (tokens_BL, table_VD[:, :0])), _look_up_backward)


def take(x_BL: jax.Array, at_BR: jax.Array) -> jax.Array:
    """`x[b, at[b, r]]` of `x_BL`, `x_BLD` and so on; a position beyond the end reads the last one."""
    at = jnp.minimum(at_BR, x_BL.shape[1] - 1).reshape(*at_BR.shape, *(1,) * (x_BL.ndim - 2))
    return jnp.take_along_axis(x_BL, at, axis=1)


def rotary_angles(position: jax.Array | int, channels: int, theta: float) -> Angles:
    """Cosine and sine of position x theta^(-2i/C), float32, for the pair of channels i and i + C/2.

    `position` is `(L,)` or `(B, Q)`, or a number L for positions 0..L-1; the tables have `channels` as one axis more.
    """
    xp = jnp
    if isinstance(position, int):
        xp = table_library()
        position = xp.arange(position)
    frequency = theta ** (-xp.arange(0, channels, 2, dtype=xp.float32) / channels)
    angle = position.astype(xp.float32)[..., None] * xp.expand_dims(frequency, tuple(range(position.ndim)))
    angle = xp.concatenate([angle, angle], axis=-1)
    return jnp.asarray(xp.cos(angle)), jnp.asarray(xp.sin(angle))


def angles_at(angles: Angles, at_BR: jax.Array) -> Angles:
    """`rotary_angles` of some positions of each sequence."""
    cos, sin = (
        table[jnp.minimum(at_BR, len(table) - 1)] if table.ndim == 2 else take(table, at_BR) for table in angles
    )
    return cos, sin


def rotate(x_BLHC: jax.Array, angles: Angles) -> jax.Array:
    """Apply rotary position embedding in float32; returned in the dtype of `x`."""
    # Heads before positions while rotating: attention on CPU reads them in that order, and one copy serves both.
    cos, sin = (table if table.ndim == 2 else table[:, None] for table in angles)  # the same for all heads
    return rotate_pairs(x_BLHC.swapaxes(1, 2), cos, sin).swapaxes(1, 2)


def swiglu(gate_NF: jax.Array, up_NF: jax.Array) -> jax.Array:
    """`silu(gate) * up`."""
    return recompute_for_gradient(lambda gate, up: jax.nn.silu(gate) * up, gate_NF, up_NF)


def row_keys(key_B: jax.Array, layers: int, length: int) -> jax.Array:
    """Random keys `(layers, B, L)`, one for each row of each layer, from those of the sequences.

    With them a row draws the same wherever it is computed: among all rows, or among those with a target.
    """
    fold_in = jnp.vectorize(jax.random.fold_in)  # which broadcasts
    key_JB = fold_in(key_B[None], jnp.arange(layers)[:, None])
    return fold_in(key_JB[..., None], jnp.arange(length)[None, None])


def dropout(x: jax.Array, row_key: jax.Array | None, branch: int, rate: float) -> jax.Array:
    """`x` with a share `rate` of its numbers zero and the others divided by 1 - rate; `x` itself without random keys.

    `row_key` has the axes of `x` but for channels; a row draws anew for each `branch`.
    """
    if row_key is None:
        return x

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, branch), 1 - rate, x.shape[-1:])

    kept = jax.vmap(keep)(row_key.reshape(-1)).reshape(x.shape)
    return jnp.where(kept, x.astype(jnp.float32) / (1 - rate), 0.0).astype(x.dtype)
