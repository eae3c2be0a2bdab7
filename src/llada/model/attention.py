"""Softmax attention, by the fastest means of the platform a program is made for.

cuDNN's flash kernel on GPU, the splash kernel on TPU. Where neither serves (CPU; float32 on GPU; causal queries at
given positions) long sequences go by blocks of queries and short ones hold all scores at once: only these ever hold
L x L numbers, forward or backward. Softmax is float32 in all of them.
Shapes: B sequences, L keys, Q queries, H query heads, K key/value heads (G = H / K), C channels, X = G Q.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llada.mesh import ACTIVATIONS, device_kind, on_each_device, platform, shared_axes

# From so many keys on by blocks of so many queries: 64 MB of float32 scores for 16 heads of one sequence.
SHORT, BLOCK = 1024, 128

# At least so many keys go to a kernel: below, a tile is mostly padding.
KERNEL_FROM = 128
LANES = 128  # a TPU register's width: sequences are padded to it
SMALL_TILE = 1024  # queries and keys of a tile of the splash kernel where it cannot be larger
_RESIDUALS = "attention"  # name of what attention's backward pass takes: see `save_residuals`


def save_residuals(primitive, *given, **parameters) -> bool:
    """A remat policy: what attention's backward pass takes is kept, so that no kernel runs again for it."""
    # What cuDNN's kernel leaves has no name, but is known by who made it.
    named = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)
    return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *given, **parameters)


def attend(
    query_BQHC: jax.Array,
    key_BLKC: jax.Array,
    value_BLKC: jax.Array,
    causal: bool,
    lengths_B: jax.Array | None,
    position_BQ: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, grouped where K < H; returns `(B, Q, H, C)` in the dtype of the queries.

    With `lengths_B` None and `causal` False every position sees every other: the mask predictor's plain case. Keys at
    positions >= lengths_B (>= 1) are not allowed. `position_BQ` says where the queries stand (at >= L: padding, whose
    result means nothing but is finite); None: at 0..L-1. With `segments_BL` (int32 >= 0, a document each) keys of other
    segments are not allowed. The platform is that of the mesh in force, or the default one where none is.
    """
    L = key_BLKC.shape[1]
    segments_BQ = segments_BL
    if segments_BL is not None and position_BQ is not None:
        segments_BQ = jnp.take_along_axis(segments_BL, jnp.minimum(position_BQ, L - 1), axis=1)
    allowed = (lengths_B, segments_BQ, segments_BL)
    by_kernel = L >= KERNEL_FROM and (position_BQ is None or not causal)
    if by_kernel and platform() == "tpu" and _divides(query_BQHC.shape) and _divides(key_BLKC.shape):
        return on_tpu(query_BQHC, key_BLKC, value_BLKC, causal, *allowed)
    query_BQHC, key_BLKC, value_BLKC = (checkpoint_name(x, _RESIDUALS) for x in (query_BQHC, key_BLKC, value_BLKC))
    if by_kernel and platform() == "gpu" and has_flash(query_BQHC.dtype, query_BQHC.shape[-1]):
        return on_gpu(query_BQHC, key_BLKC, value_BLKC, causal, *allowed)
    way = by_blocks if L >= SHORT and query_BQHC.shape[1] > BLOCK else at_once
    return way(query_BQHC, key_BLKC, value_BLKC, causal, position_BQ, *allowed)


def at_once(
    query_BQHC, key_BLKC, value_BLKC, causal, position_BQ=None, lengths_B=None, segments_BQ=None, segments_BL=None
):
    """`attend` with all scores in memory.

    Weights are normalised after meeting the values, which is the same sum and moves L / C times fewer numbers.
    """
    B, Q, H, C = query_BQHC.shape
    L, K = key_BLKC.shape[1:3]
    G = H // K
    # Queries are C / L times as many numbers as scores, and on CPU a factor of scores would be as large as they are.
    query_BQHC = _scaled(query_BQHC)
    # The heads of a group share keys, so they stand behind each other in one longer query axis (X = G Q).
    query_BKXC = query_BQHC.reshape(B, Q, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * Q, C)
    key_BKLC, value_BKLC = key_BLKC.swapaxes(1, 2), value_BLKC.swapaxes(1, 2)
    scores_BKXL = jnp.einsum("bkxc,bklc->bkxl", query_BKXC, key_BKLC, preferred_element_type=jnp.float32)
    position_L = jnp.arange(L)
    if segments_BL is not None:
        # Finite, as padding behind a length may be in a segment with no key left: its result is a mean, not NaN.
        least = jnp.finfo(jnp.float32).min
        allowed_BXL = jnp.tile(segments_BQ[:, :, None] == segments_BL[:, None], (1, G, 1))
        scores_BKXL = jnp.where(allowed_BXL[:, None], scores_BKXL, least)
    else:
        least = -jnp.inf
    if causal:
        stands_BQ = position_L[None, :] if position_BQ is None else position_BQ
        allowed_BXL = jnp.tile(stands_BQ[:, :, None] >= position_L, (1, G, 1))
        scores_BKXL = jnp.where(allowed_BXL[:, None], scores_BKXL, least)
    if lengths_B is not None:
        allowed_BL = position_L < lengths_B[:, None]
        scores_BKXL = jnp.where(allowed_BL[:, None, None, :], scores_BKXL, least)
    top = jax.lax.stop_gradient(jnp.max(scores_BKXL, axis=-1, keepdims=True))
    weights_BKXL = jnp.exp(scores_BKXL - top)
    total = jnp.sum(weights_BKXL, axis=-1, keepdims=True)
    mixed_BKXC = (weights_BKXL.astype(value_BKLC.dtype) @ value_BKLC / total).astype(query_BQHC.dtype)
    return mixed_BKXC.reshape(B, K, G, Q, C).transpose(0, 3, 1, 2, 4).reshape(B, Q, H, C)


def by_blocks(
    query_BQHC,
    key_BLKC,
    value_BLKC,
    causal,
    position_BQ=None,
    lengths_B=None,
    segments_BQ=None,
    segments_BL=None,
    block: int = BLOCK,
):
    """`attend` with the scores of `block` queries in memory: the backward pass computes them again."""
    B, Q, H, C = query_BQHC.shape
    if causal and position_BQ is None:
        position_BQ = jnp.arange(Q)[None]

    def split(x):
        """`(B or 1, Q, ...)` to `(blocks, B or 1, block, ...)`, the last one filled up."""
        x = jnp.pad(x, [(0, 0), (0, -Q % block)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return x.reshape(len(x), -1, block, *x.shape[2:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(part):
        query, position, segments = part
        return at_once(query, key_BLKC, value_BLKC, causal, position, lengths_B, segments, segments_BL)

    mixed = jax.lax.map(one, jax.tree.map(split, (query_BQHC, position_BQ, segments_BQ)))
    return mixed.swapaxes(0, 1).reshape(B, -1, H, C)[:, :Q]


def on_tpu(
    query_BQHC, key_BLKC, value_BLKC, causal, lengths_B, segments_BQ, segments_BL, interpret: bool = False
) -> jax.Array:
    """`attend` by the splash kernel, each device on its own sequences and heads: the partitioner cannot split a kernel.

    Lengths and the padding to whole registers are segments too: one no query is in.
    """
    B, Q, H, C = query_BQHC.shape
    L = key_BLKC.shape[1]
    if lengths_B is not None or segments_BL is not None or L % LANES:
        segments_BL = jnp.zeros((B, L), jnp.int32) if segments_BL is None else segments_BL
        segments_BQ = jnp.zeros((B, Q), jnp.int32) if segments_BQ is None else segments_BQ
        if lengths_B is not None:
            segments_BL = jnp.where(jnp.arange(L) < lengths_B[:, None], segments_BL, -1)

    def of_one_device(query_BQHC, key_BLKC, value_BLKC, segments_BQ, segments_BL):
        given = (_padded(x, 0).swapaxes(1, 2) for x in (_scaled(query_BQHC), key_BLKC, value_BLKC))
        query, key, value = (checkpoint_name(x, _RESIDUALS) for x in given)
        kernel = splash_kernel(causal, query.shape[1:], key.shape[2], interpret)
        segments = None
        if segments_BL is not None:
            segments = splash.SegmentIds(q=_padded(segments_BQ, 0), kv=_padded(segments_BL, -1))
        mixed_BHQC = jax.vmap(kernel)(query, key, value, segments)
        return mixed_BHQC.swapaxes(1, 2)[:, :Q]

    heads, rows = ACTIVATIONS["BLHC"], ACTIVATIONS["BL"]
    of_all = on_each_device(of_one_device, (heads, heads, heads, rows, rows), heads)
    return of_all(query_BQHC, key_BLKC, value_BLKC, segments_BQ, segments_BL)


def _scaled(query_BQHC: jax.Array) -> jax.Array:
    """Queries over the root of their channels."""
    return (query_BQHC.astype(jnp.float32) / math.sqrt(query_BQHC.shape[-1])).astype(query_BQHC.dtype)


def _divides(shape_BLHC: tuple[int, ...]) -> bool:
    """Whether sequences and heads divide over the mesh in force; a batch of one, say, does not."""
    size = shared_axes()
    ways = size.get("data", 1) * size.get("fsdp", 1)
    return shape_BLHC[0] % ways == 0 and shape_BLHC[2] % size.get("tensor", 1) == 0


def _padded(x_BL: jax.Array, value: int) -> jax.Array:
    """Positions filled up to a multiple of LANES."""
    return jnp.pad(x_BL, [(0, 0), (0, -x_BL.shape[1] % LANES)] + [(0, 0)] * (x_BL.ndim - 2), constant_values=value)


def splash_kernel(causal: bool, shape_HQC: tuple[int, int, int], keys: int, interpret: bool = False):
    """The kernel of one sequence, `(H, Q, C), (K, L, C), (K, L, C), segments -> (H, Q, C)`."""
    heads, queries, channels = shape_HQC
    # Of large tiles in memory, small ones in registers: the more work a step of the grid has, the less its start costs.
    # The fused backward pass writes a partial query gradient for each tile of keys, so all keys are one where they fit:
    # 16 MB of fast memory, all that a v4 has, are 30 KB too few for 2048.
    # A causal kernel leaves out tiles that no query sees, so its tiles are not that large.
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
        residual_checkpoint_name=_RESIDUALS,
        interpret=interpret,
    )


def causal_share(length: int) -> float:
    """The share of a sequence's L x L scores that a causal splash kernel computes: tiles on the diagonal wholly."""
    tile = _tile(length, SMALL_TILE)
    return (1 + tile / length) / 2


def _tile(size: int, most: int) -> int:
    """The largest multiple of LANES that divides `size` and is at most `most`."""
    return max(tile for tile in range(LANES, min(size, most) + 1, LANES) if size % tile == 0)


def has_flash(dtype, channels: int) -> bool:
    """Whether cuDNN's flash attention takes this dtype and head size on the GPU there is."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")  # "9.0"; AMD: "gfx90a"
    try:
        generation = float(capability)
    except ValueError:
        return False
    most = 0 if generation < 8 else 128 if generation < 9 else 256
    return dtype in (jnp.bfloat16, jnp.float16) and channels % 8 == 0 and channels <= most


def on_gpu(
    query_BQHC, key_BLKC, value_BLKC, causal, lengths_B, segments_BQ, segments_BL, implementation: str = "cudnn"
) -> jax.Array:
    """`attend` by cuDNN's flash kernel.

    Segments reach it as a mask of B Q L numbers, the same for all heads: its packed layout, which would skip what is
    not allowed, has no public interface in JAX.
    """
    L = key_BLKC.shape[1]
    kernel = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    if segments_BL is None:
        lengths = None if lengths_B is None else lengths_B.astype(jnp.int32)
        return kernel(query_BQHC, key_BLKC, value_BLKC, key_value_seq_lengths=lengths)
    allowed_BQL = segments_BQ[:, :, None] == segments_BL[:, None]
    if lengths_B is not None:
        allowed_BQL &= jnp.arange(L) < lengths_B[:, None, None]
    return kernel(query_BQHC, key_BLKC, value_BLKC, mask=allowed_BQL[:, None])
