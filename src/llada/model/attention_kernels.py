"""Attention kernels of accelerators: splash on TPU, cuDNN's flash attention on GPU, and the choice between them.

No kernel holds L x L numbers, forward or backward; softmax is float32 in both.
Shapes: B sequences, L keys, Q queries, H query heads, K key/value heads, C channels.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.typing import DTypeLike

from llada.mesh import ACTIVATIONS, device_kind, on_each_device, platform, shared_axes

KERNEL_FROM = 128  # fewer keys do not go to a kernel: a tile would be mostly padding
LANES = 128  # a TPU register's width: sequences are padded to it
SMALL_TILE = 1024  # queries and keys of a tile of the splash kernel where it cannot be larger
RESIDUALS = "attention"  # checkpoint name of what attention's backward pass needs


class Allowed(NamedTuple):
    """Which keys a query sees: those for which every condition holds. Without conditions every query sees every key.

    causal       the key's position is not after the query's
    lengths_B    the key's position is less than its sequence's length (>= 1)
    position_BQ  positions of the queries; None: 0..Q-1. At L or beyond they are padding: finite, without meaning
    segments_BQ  the key is of the query's segment (int32 >= 0, a document each); both None: one segment
    segments_BL  segments of the keys
    """

    causal: bool = False
    lengths_B: jax.Array | None = None
    position_BQ: jax.Array | None = None
    segments_BQ: jax.Array | None = None
    segments_BL: jax.Array | None = None


Implementation = Callable[[jax.Array, jax.Array, jax.Array, Allowed], jax.Array]


def kernel_for(query_BQHC: jax.Array, key_BLKC: jax.Array, allowed: Allowed) -> Implementation | None:
    """The kernel for these inputs on the platform of the program being traced; None where no kernel takes them.

    tpu  splash, where sequences and heads divide over the mesh
    gpu  cuDNN, for the dtypes and head sizes that it takes
    cpu  none; nor for few keys, nor for causal queries at given positions, on any platform
    """
    if key_BLKC.shape[1] < KERNEL_FROM or (allowed.causal and allowed.position_BQ is not None):
        return None
    if platform() == "tpu" and _divides(query_BQHC.shape) and _divides(key_BLKC.shape):
        return splash_attention
    if platform() == "gpu" and has_flash(query_BQHC.dtype, query_BQHC.shape[-1]):
        return cudnn_attention
    return None


def scaled(query_BQHC: jax.Array) -> jax.Array:
    """Queries over the root of their channels."""
    return (query_BQHC.astype(jnp.float32) / math.sqrt(query_BQHC.shape[-1])).astype(query_BQHC.dtype)


def splash_attention(
    query_BQHC: jax.Array, key_BLKC: jax.Array, value_BLKC: jax.Array, allowed: Allowed, interpret: bool = False
) -> jax.Array:
    """`attention.attend` by the splash kernel, each device on its own sequences and heads: XLA cannot split a kernel.

    The kernel knows segments but no lengths: keys beyond a length, and padding to whole registers, get segment -1,
    which no query has.
    """
    B, Q = query_BQHC.shape[:2]
    L = key_BLKC.shape[1]
    _, lengths_B, _, segments_BQ, segments_BL = allowed
    if lengths_B is not None or segments_BL is not None or L % LANES:
        segments_BL = jnp.zeros((B, L), jnp.int32) if segments_BL is None else segments_BL
        segments_BQ = jnp.zeros((B, Q), jnp.int32) if segments_BQ is None else segments_BQ
        if lengths_B is not None:
            segments_BL = jnp.where(jnp.arange(L)[None] < lengths_B[:, None], segments_BL, -1)

    def on_one_device(query_BQHC, key_BLKC, value_BLKC, segments_BQ, segments_BL):
        inputs = (_padded(x, 0).swapaxes(1, 2) for x in (scaled(query_BQHC), key_BLKC, value_BLKC))
        query, key, value = (checkpoint_name(x, RESIDUALS) for x in inputs)
        kernel = splash_kernel(allowed.causal, query.shape[1:], key.shape[2], interpret)
        segments = None
        if segments_BL is not None:
            segments = splash.SegmentIds(q=_padded(segments_BQ, 0), kv=_padded(segments_BL, -1))
        mixed_BHQC = jax.vmap(kernel)(query, key, value, segments)
        return mixed_BHQC.swapaxes(1, 2)[:, :Q]

    heads, rows = ACTIVATIONS["BLHC"], ACTIVATIONS["BL"]
    on_all = on_each_device(on_one_device, (heads, heads, heads, rows, rows), heads)
    return on_all(query_BQHC, key_BLKC, value_BLKC, segments_BQ, segments_BL)


def splash_kernel(causal: bool, shape_HQC: tuple[int, int, int], keys: int, interpret: bool = False) -> Callable:
    """The kernel of one sequence, `(H, Q, C), (K, L, C), (K, L, C), segments -> (H, Q, C)`."""
    heads, queries, channels = shape_HQC
    # A grid step copies a `block` into on-chip memory and computes it in `compute` pieces that fit the registers. Each
    # step costs a fixed overhead, so blocks are as large as memory allows.
    # The fused backward pass writes a partial query gradient for each block of keys: one block of all keys is best.
    # It does not fit a v4, whose 16 MB of on-chip memory are 30 KB too few for 2048. A causal kernel skips blocks that
    # no query sees, and large ones would skip less.
    small = causal or device_kind() == "TPU v4"
    q, kv = _tile(queries, SMALL_TILE), _tile(keys, SMALL_TILE if small else 2048)
    q_back, kv_back = (q, kv) if small else (_tile(queries, 512), _tile(keys, 4096))
    blocks = splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=_tile(kv, 512),
        block_q_dkv=q_back,
        block_kv_dkv=kv_back,
        block_kv_dkv_compute=_tile(kv_back, 512),
        use_fused_bwd_kernel=True,
        # Fewer channels than a register has lanes leave the rest of each empty, in memory too; positions fill them.
        q_layout=splash.QKVLayout.SEQ_MINOR if channels < LANES else splash.QKVLayout.HEAD_DIM_MINOR,
    )
    mask = (splash.CausalMask if causal else splash.FullMask)((queries, keys))
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def causal_share(length: int) -> float:
    """The share of a sequence's L x L scores that a causal splash kernel computes: all of a tile on the diagonal."""
    tile = _tile(length, SMALL_TILE)
    return (1 + tile / length) / 2


def _tile(size: int, most: int) -> int:
    """The largest multiple of LANES that divides `size` and is at most `most`."""
    return max(tile for tile in range(LANES, min(size, most) + 1, LANES) if size % tile == 0)


def _padded(x_BL: jax.Array, value: int) -> jax.Array:
    """Positions filled up to a multiple of LANES."""
    return jnp.pad(x_BL, [(0, 0), (0, -x_BL.shape[1] % LANES)] + [(0, 0)] * (x_BL.ndim - 2), constant_values=value)


def _divides(shape_BLHC: tuple[int, ...]) -> bool:
    """Whether sequences and heads divide over the mesh in force; a batch of one, say, does not."""
    size = shared_axes()
    shards = size.get("data", 1) * size.get("fsdp", 1)
    return shape_BLHC[0] % shards == 0 and shape_BLHC[2] % size.get("tensor", 1) == 0


def has_flash(dtype: DTypeLike, channels: int) -> bool:
    """Whether cuDNN's flash attention takes this dtype and head size on the local GPU."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")  # "9.0"; AMD: "gfx90a"
    try:
        generation = float(capability)
    except ValueError:
        return False
    most = 0 if generation < 8 else 128 if generation < 9 else 256
    return dtype in (jnp.bfloat16, jnp.float16) and channels % 8 == 0 and channels <= most


def cudnn_attention(
    query_BQHC: jax.Array,
    key_BLKC: jax.Array,
    value_BLKC: jax.Array,
    allowed: Allowed,
    implementation: str = "cudnn",
) -> jax.Array:
    """`attention.attend` by cuDNN's flash kernel.

    Segments reach it as a mask of B Q L numbers, the same for all heads: its packed layout, which would skip what is
    not allowed, has no public interface in JAX.
    """
    causal, lengths_B, _, segments_BQ, segments_BL = allowed
    kernel = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    if segments_BQ is None or segments_BL is None:
        lengths = None if lengths_B is None else lengths_B.astype(jnp.int32)
        return kernel(query_BQHC, key_BLKC, value_BLKC, key_value_seq_lengths=lengths)
    allowed_BQL = segments_BQ[:, :, None] == segments_BL[:, None]
    if lengths_B is not None:
        allowed_BQL &= jnp.arange(key_BLKC.shape[1])[None, None] < lengths_B[:, None, None]
    return kernel(query_BQHC, key_BLKC, value_BLKC, mask=allowed_BQL[:, None])
