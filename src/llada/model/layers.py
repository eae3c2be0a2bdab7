"""Normalisation, rotary embedding, projection: the stateless pieces of a block.

Norms and rotary embedding are float32 whatever the dtype of the matrix products.
Shapes: B sequences, L tokens, Q queries (all L positions, or some), D width, H query heads, K key/value heads,
C channels per head, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llada.mesh import platform


def _again(f, *given: jax.Array) -> jax.Array:
    """`f(*given)`, computed again on CPU for its gradient.

    XLA would write down what each of its steps makes, in a pass over memory, and read it in the backward pass.
    """
    return (jax.checkpoint(f) if platform() == "cpu" else f)(*given)


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32, returned in the dtype of `x`."""

    def normalised(x_BLD, scale_D):
        x = x_BLD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        return (x * scale_D).astype(x_BLD.dtype)

    return _again(normalised, x_BLD, scale_D)


@jax.custom_vjp
def look_up(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Rows of a table, in its dtype. Its gradient is added up in float32 and rounded to that dtype once.

    Half of all tokens are masks: thousands of gradients go to one row, and a sum in bfloat16 stands still at 256 times
    what it adds.
    """
    return table_VD[tokens_BL]


def _look_up_backward(kept, d_BLD):
    tokens_BL, like_V0 = kept
    zeros_VD = jnp.zeros((len(like_V0), d_BLD.shape[-1]), jnp.float32)
    return zeros_VD.at[tokens_BL].add(d_BLD.astype(jnp.float32)).astype(like_V0.dtype), None


# Of the table only its length and dtype are kept.
look_up.defvjp(lambda table_VD, tokens_BL: (table_VD[tokens_BL], (tokens_BL, table_VD[:, :0])), _look_up_backward)


def rotary_angles(position: jax.Array | int, channels: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of positions `(L,)` or `(B, Q)`, or of the first L, float32, a last axis of `channels` added;
    half-split layout (channel i pairs with i + C/2).
    """
    xp = jnp
    if isinstance(position, int):
        # Constants on CPU: XLA would compute them there for every head of every sequence again.
        xp = np if platform() == "cpu" else jnp
        position = xp.arange(position)
    frequency = theta ** (-xp.arange(0, channels, 2, dtype=xp.float32) / channels)
    angle = position.astype(xp.float32)[..., None] * frequency
    angle = xp.concatenate([angle, angle], axis=-1)
    return jnp.asarray(xp.cos(angle)), jnp.asarray(xp.sin(angle))


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
    x_BHLC = x_BLHC.swapaxes(1, 2)
    if platform() == "tpu":
        return rotate_by_product(x_BHLC, cos, sin).swapaxes(1, 2)
    x_BHLC = x_BHLC.astype(jnp.float32)
    left, right = jnp.split(x_BHLC, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    return (x_BHLC * cos + turned * sin).swapaxes(1, 2).astype(x_BLHC.dtype)


@jax.custom_vjp
def rotate_by_product(x_BHLC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same where channels lie across a register: halves of it change places by a product with ones and zeros.

    Exact, as one term of each sum is not zero; taken apart and put together they would go through memory three times.
    No gradient flows to the angles.
    """
    C = x_BHLC.shape[-1]
    turn_CC = jnp.eye(C, k=C // 2, dtype=x_BHLC.dtype) - jnp.eye(C, k=-C // 2, dtype=x_BHLC.dtype)
    exact = None if x_BHLC.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    turned = jnp.einsum("...c,cd->...d", x_BHLC, turn_CC, precision=exact, preferred_element_type=jnp.float32)
    return (x_BHLC.astype(jnp.float32) * cos + turned * sin).astype(x_BHLC.dtype)


# Turning back is turning by the opposite angle.
rotate_by_product.defvjp(
    lambda x_BHLC, cos, sin: (rotate_by_product(x_BHLC, cos, sin), (cos, sin)),
    lambda angles, d_BHLC: (rotate_by_product(d_BHLC, angles[0], -angles[1]), None, None),
)


def swiglu(gate_NF: jax.Array, up_NF: jax.Array) -> jax.Array:
    """`silu(gate) * up`."""
    return _again(lambda gate, up: jax.nn.silu(gate) * up, gate_NF, up_NF)


def to_heads(x_BLD: jax.Array, kernel_DHC: jax.Array) -> jax.Array:
    """`x_BLHC`: a projection to the channels of every head."""
    if platform() == "tpu":
        # With all its axes the compiler has the product write heads before positions, where rotation and the attention
        # kernel want them; of flat rows each change of order is a pass over memory or two.
        return jnp.einsum("bld,dhc->blhc", x_BLD, kernel_DHC)
    # On CPU the weight gradient of a product with two row axes is slower than that of one over flat rows.
    flat = x_BLD.reshape(-1, x_BLD.shape[-1]) @ kernel_DHC.reshape(len(kernel_DHC), -1)
    return flat.reshape(*x_BLD.shape[:2], *kernel_DHC.shape[1:])


def from_heads(x_BLHC: jax.Array, kernel_HCD: jax.Array) -> jax.Array:
    """`x_BLD`, or `x_ND` of `x_NHC`: the projection back, for the same reasons in two ways."""
    if platform() == "tpu":
        return jnp.einsum("...hc,hcd->...d", x_BLHC, kernel_HCD)
    rows, D = x_BLHC.shape[:-2], kernel_HCD.shape[-1]
    flat = x_BLHC.reshape(math.prod(rows), -1) @ kernel_HCD.reshape(-1, D)
    return flat.reshape(*rows, D)
