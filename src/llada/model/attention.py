"""Softmax attention: by the platform's kernel where there is one, else in blocks that bound the scores in memory.

Where no kernel serves (CPU; float32 on GPU; causal queries at given positions) long sequences go by blocks of queries
and short ones hold all scores at once: only these ever hold L x L numbers, forward or backward. Softmax is float32 in
all implementations. Which kernel a platform has is decided in `attention_kernels.kernel_for`.
Shapes: B sequences, L keys, Q queries, H query heads, K key/value heads (G = H / K), C channels, X = G Q.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llada.model.attention_kernels import RESIDUALS, Allowed, kernel_for, scaled, splash_attention

# From SHORT keys on attention goes by blocks of BLOCK queries: 64 MB of float32 scores for 16 heads of one sequence.
SHORT, BLOCK = 1024, 128


def save_residuals(primitive, *inputs, **parameters) -> bool:
    """A remat policy: save what attention's backward pass needs, so that no kernel runs again for it."""
    # What cuDNN's kernel returns has no checkpoint name, but is known by the primitive that returns it.
    named = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
    return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *inputs, **parameters)


def attend(query_BQHC: jax.Array, key_BLKC: jax.Array, value_BLKC: jax.Array, allowed: Allowed) -> jax.Array:
    """Softmax attention, grouped where K < H; returns `(B, Q, H, C)` in the dtype of the queries.

    `Allowed()` is the mask predictor's plain case: every position sees every other. The platform is that of the mesh in
    force, or the default one where none is.
    """
    kernel = kernel_for(query_BQHC, key_BLKC, allowed)
    if kernel is not splash_attention:  # which names its padded, transposed inputs itself
        query_BQHC, key_BLKC, value_BLKC = (checkpoint_name(x, RESIDUALS) for x in (query_BQHC, key_BLKC, value_BLKC))
    if kernel is None:
        kernel = by_blocks if key_BLKC.shape[1] >= SHORT and query_BQHC.shape[1] > BLOCK else at_once
    return kernel(query_BQHC, key_BLKC, value_BLKC, allowed)


def at_once(query_BQHC: jax.Array, key_BLKC: jax.Array, value_BLKC: jax.Array, allowed: Allowed) -> jax.Array:
    """`attend` with all scores in memory.

    Weights are normalised after meeting the values, which is the same sum and moves L / C times fewer numbers.
    """
    B, Q, H, C = query_BQHC.shape
    L, K = key_BLKC.shape[1:3]
    G = H // K
    causal, lengths_B, position_BQ, segments_BQ, segments_BL = allowed
    # Queries are C / L times as many numbers as scores, and on CPU a factor of scores would be as large as they are.
    query_BQHC = scaled(query_BQHC)
    # The heads of a group share keys, so they stand behind each other in one longer query axis (X = G Q).
    query_BKXC = query_BQHC.reshape(B, Q, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * Q, C)
    key_BKLC, value_BKLC = key_BLKC.swapaxes(1, 2), value_BLKC.swapaxes(1, 2)
    scores_BKXL = jnp.einsum("bkxc,bklc->bkxl", query_BKXC, key_BKLC, preferred_element_type=jnp.float32)
    position_L = jnp.arange(L)
    least = -jnp.inf
    if segments_BQ is not None and segments_BL is not None:
        # Finite, as padding behind a length may be in a segment with no key left: its result is a mean, not NaN.
        least = float(jnp.finfo(jnp.float32).min)
        allowed_BXL = jnp.tile(segments_BQ[:, :, None] == segments_BL[:, None], (1, G, 1))
        scores_BKXL = jnp.where(allowed_BXL[:, None], scores_BKXL, least)
    if causal:
        query_position_BQ = position_L[None, :] if position_BQ is None else position_BQ
        allowed_BXL = jnp.tile(query_position_BQ[:, :, None] >= position_L[None, None], (1, G, 1))
        scores_BKXL = jnp.where(allowed_BXL[:, None], scores_BKXL, least)
    if lengths_B is not None:
        allowed_BL = position_L[None] < lengths_B[:, None]
        scores_BKXL = jnp.where(allowed_BL[:, None, None, :], scores_BKXL, least)
    top = jax.lax.stop_gradient(jnp.max(scores_BKXL, axis=-1, keepdims=True))
    weights_BKXL = jnp.exp(scores_BKXL - top)
    total = jnp.sum(weights_BKXL, axis=-1, keepdims=True)
    mixed_BKXC = (weights_BKXL.astype(value_BKLC.dtype) @ value_BKLC / total).astype(query_BQHC.dtype)
    return mixed_BKXC.reshape(B, K, G, Q, C).transpose(0, 3, 1, 2, 4).reshape(B, Q, H, C)


def by_blocks(
    query_BQHC: jax.Array, key_BLKC: jax.Array, value_BLKC: jax.Array, allowed: Allowed, block: int = BLOCK
) -> jax.Array:
    """`attend` with the scores of `block` queries in memory: the backward pass recomputes them."""
    B, Q, H, C = query_BQHC.shape
    position_BQ = allowed.position_BQ
    if allowed.causal and position_BQ is None:
        position_BQ = jnp.arange(Q)[None]

    def split(x):
        """`(B or 1, Q, ...)` to `(blocks, B or 1, block, ...)`, the last one filled up."""
        x = jnp.pad(x, [(0, 0), (0, -Q % block)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return x.reshape(len(x), -1, block, *x.shape[2:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_block(block):
        query, position, segments = block
        return at_once(query, key_BLKC, value_BLKC, allowed._replace(position_BQ=position, segments_BQ=segments))

    mixed = jax.lax.map(attend_block, jax.tree.map(split, (query_BQHC, position_BQ, allowed.segments_BQ)))
    return mixed.swapaxes(0, 1).reshape(B, -1, H, C)[:, :Q]
