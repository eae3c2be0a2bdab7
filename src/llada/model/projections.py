"""Platform forms of the model's row-wise work: the same mathematics, in the form that XLA runs fastest.

Every choice of the model by platform is here, except attention's kernel (`attention_kernels.py`).
Shapes: B sequences, L tokens, D width, H heads, C channels per head.
"""

import math
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from llada.mesh import platform


def to_heads(x_BLD: jax.Array, kernel_DHC: jax.Array) -> jax.Array:
    """`x_BLHC`: a projection to the channels of every head."""
    if platform() == "tpu":
        # With all axes in one product the compiler writes heads before positions, where rotation and the attention
        # kernel want them; of flat rows each change of order is a pass over memory or two.
        return jnp.einsum("bld,dhc->blhc", x_BLD, kernel_DHC)
    # On CPU the weight gradient of a product with two row axes is slower than that of one over flat rows.
    flat = x_BLD.reshape(-1, x_BLD.shape[-1]) @ kernel_DHC.reshape(len(kernel_DHC), -1)
    return flat.reshape(*x_BLD.shape[:2], *kernel_DHC.shape[1:])


def from_heads(x_BLHC: jax.Array, kernel_HCD: jax.Array) -> jax.Array:
    """`x_BLD`, or `x_ND` of `x_NHC`: the projection back, in two forms for the same reasons."""
    if platform() == "tpu":
        return jnp.einsum("...hc,hcd->...d", x_BLHC, kernel_HCD)
    rows, D = x_BLHC.shape[:-2], kernel_HCD.shape[-1]
    flat = x_BLHC.reshape(math.prod(rows), -1) @ kernel_HCD.reshape(-1, D)
    return flat.reshape(*rows, D)


def rotate_pairs(x_BHLC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate channel i and channel i + C/2 as the two coordinates of a point, in float32; returned in `x`'s dtype."""
    if platform() == "tpu":
        return rotate_by_product(x_BHLC, cos, sin)
    x = x_BHLC.astype(jnp.float32)
    left, right = jnp.split(x, 2, axis=-1)
    swapped = jnp.concatenate([-right, left], axis=-1)
    return _rotated(x, swapped, cos, sin).astype(x_BHLC.dtype)


@jax.custom_vjp
def rotate_by_product(x_BHLC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate_pairs` where channels lie across a register: swap halves by multiplying with a signed permutation matrix.

    Exact, as one term of each sum is not zero. Split and concatenated, halves would go through memory three times.
    No gradient flows to the angles.
    """
    C = x_BHLC.shape[-1]
    swap_CC = jnp.eye(C, k=C // 2, dtype=x_BHLC.dtype) - jnp.eye(C, k=-C // 2, dtype=x_BHLC.dtype)
    exact = None if x_BHLC.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    swapped = jnp.einsum("...c,cd->...d", x_BHLC, swap_CC, precision=exact, preferred_element_type=jnp.float32)
    return _rotated(x_BHLC.astype(jnp.float32), swapped, cos, sin).astype(x_BHLC.dtype)


# The transpose of a rotation is the rotation by the opposite angle.
rotate_by_product.defvjp(
    lambda x_BHLC, cos, sin: (rotate_by_product(x_BHLC, cos, sin), (cos, sin)),
    lambda angles, d_BHLC: (rotate_by_product(d_BHLC, angles[0], -angles[1]), None, None),
)


def _rotated(x_BHLC: jax.Array, swapped_BHLC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x cos + swapped sin`, the tables `(L, C)` or `(B, 1, L, C)`."""
    cos, sin = (jax.lax.broadcast_to_rank(table, 4) for table in (cos, sin))
    return x_BHLC * cos + swapped_BHLC * sin


def recompute_for_gradient(f: Callable, *inputs: jax.Array) -> jax.Array:
    """`f(*inputs)`, recomputed in the backward pass on CPU.

    XLA would write every intermediate of `f` to memory in a pass of its own and read it in the backward pass.
    """
    return (jax.checkpoint(f) if platform() == "cpu" else f)(*inputs)


def table_library() -> ModuleType:
    """NumPy on CPU, `jax.numpy` elsewhere: what tables of angles are made with, at trace time or in the program.

    XLA's CPU compiler fuses the computation of a table into its uses, once for every head of every sequence.
    """
    return np if platform() == "cpu" else jnp


def layers_unrolled(layers: int) -> int:
    """How many layers of the scan one iteration holds, where the config does not say.

    Each iteration copies a layer's weights and activations on CPU and GPU. On TPU it costs nothing, and one layer
    compiles quickly.
    """
    return {"cpu": 4, "gpu": layers}.get(platform(), 1)


def decodes_unstacked() -> bool:
    """Whether repeated forward passes want a leaf per layer: on CPU a product with a slice first copies the slice."""
    return platform() == "cpu"
