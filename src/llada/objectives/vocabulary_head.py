"""From hidden states to per-token nats without storing logits.

Only rows with a non-zero weight are multiplied with the vocabulary matrix: for masked diffusion about half of them.
Used rows are moved to the front, and a loop over blocks of R rows computes `R x V` logits at a time, with a trip count
that follows from the number of used rows. Under differentiation the same iteration computes all gradients, so nothing
is recomputed. Exact for any weights. The row-wise work that the model left `Unfinished` is done in the same loop.

    weights_N      .  2  .  .  5  1  .  3  4  .  .  2     a device's N = 12 rows, six of them used
    order_N        1  4  5  7  8 11  0  2  3  6  9 10     used rows first, each kind in its own order
    whole blocks  [1  4  5  7]                            of R = 4 rows, as many as are full
    smaller ones              [8][11]                     of R = 1 row, until no used row is left

Shapes: B sequences, L tokens, N rows of one device, R rows of a block, P entries of a piece of the vocabulary, D width,
V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada.mesh import ACTIVATIONS, on_each_device, platform
from llada.objectives.contract import Unfinished

Finish = Callable[[Any, Any], jax.Array]

# Rows of a block by platform, where objective.head_rows is None. Each block reads and writes the vocabulary matrix's
# float32 gradient, 8 bytes an entry for 2 FLOPs a row; accelerators have 166 to 560 FLOPs per byte.
ROWS = {"cpu": 384, "gpu": 1024, "tpu": 2048}

# Vocabulary entries per piece of the gradient on CPU, where XLA writes a product to memory before it adds it to a sum:
# a small one is still in cache by then. Elsewhere the sum is fused into the product. Not a power of two: rows of 4,096
# bytes would all map to the same cache sets. LLaDA's vocabulary is 104 pieces.
PIECE = 1216

# Names of the two loops in a compiled program: `llada plan` tells them apart by these.
WHOLE_BLOCKS, SMALLER_BLOCKS = "whole_blocks", "smaller_blocks"


def scoring_rows(where: str | None = None) -> int:
    """Rows of a block when texts are scored, on that platform or the one of the program being traced.

    The last block is part padding: on CPU that is time lost.
    """
    return 64 if (where or platform()) == "cpu" else 512


def scoring_tokens(full: bool = False) -> int:
    """Tokens of a batch of texts to score; of one that is filled up, so that its size never changes, perhaps fewer.

    On CPU larger batches only fall out of the caches, and what fills them up costs as much as the rest.
    """
    return (1024 if full else 4096) if platform() == "cpu" else 16_384


def choosing_rows(where: str | None = None) -> tuple[int, ...]:
    """Rows of a block when tokens are chosen, and of the last block instead: on CPU the time grows with the rows."""
    return (32, 24, 16, 8) if (where or platform()) == "cpu" else (256,)


def weighted_nats(
    hidden: jax.Array | Unfinished,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    block_rows: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Sum over tokens of weight x (-log softmax(hidden @ head.T)[target]), and the nats themselves.

      hidden      (B, L, D) in the compute dtype, or Unfinished      head_VD     float32
      targets_BL  int32                                              weights_BL  float32; no gradient flows to them
    `block_rows`: rows whose logits are in memory at once; None takes the platform's ROWS.
    Returns `(total, nats_BL)`: a differentiable float32 scalar, and float32 nats (zero where the weight is zero) that
    carry no gradient. Softmax and sums are float32; matrix products take the dtype of `hidden`.
    """
    if not isinstance(hidden, Unfinished):
        hidden = Unfinished(hidden, lambda _, rows: rows, ())
    head_VD = head_VD.astype(jax.tree.leaves(hidden.rows)[0].dtype)
    block_rows = ROWS[platform()] if block_rows is None else block_rows

    def on_one_device(rows, parameters, head_VD, targets_BL, weights_BL):
        rows_N = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
        total, nats_N = _weighted_nats(
            rows_N,
            parameters,
            head_VD,
            targets_BL.reshape(-1),
            weights_BL.reshape(-1),
            hidden.finish,
            block_sizes(targets_BL.size, block_rows, platform()),
        )
        return total.reshape(1, 1), nats_N.reshape(targets_BL.shape)

    # Each device does its own rows against all of the vocabulary: no collective inside the loop, and loops may differ
    # in length between devices.
    rows, replicated = ACTIVATIONS["BL_rows"], ACTIVATIONS["replicated"]
    specs = (ACTIVATIONS["BLD_rows"], replicated, replicated, rows, rows)
    with jax.named_scope("vocabulary_head"):
        total, nats_BL = on_each_device(on_one_device, specs, (rows, rows))(
            hidden.rows, hidden.weights, head_VD, targets_BL, weights_BL
        )
        return jnp.sum(total), jax.lax.stop_gradient(nats_BL)


def block_sizes(N: int, block_rows: int, where: str) -> tuple[int, ...]:
    """Rows of a whole block and of the smaller ones behind it, for N rows of one device on that platform.

    On CPU a block of half the rows comes between: products of few rows are slow there.
    """
    largest = min(block_rows, N)
    if largest % 4:
        return (largest,)
    return (largest, largest // 2, largest // 4) if where == "cpu" else (largest, largest // 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _weighted_nats(rows, parameters, head_VD, targets_N, weights_N, finish, sizes):
    """`(total, nats_N)` of one device's rows; `finish(parameters, rows)` are their hidden states."""
    compact = compact_rows(rows, targets_N, weights_N, sizes[-1])

    def block(R, i, carry):
        rows_R, targets_R, weights_R = compact.block(R, i)
        softmax = nats_of_block(finish(parameters, rows_R), head_VD, targets_R, weights_R)
        return _add_nats(carry, softmax.nats_R, weights_R, i * R)

    total, nats = walk_blocks(block, compact.used_N, sizes, _no_nats(compact))
    return total, nats[compact.position_N]


def _forward(rows, parameters, head_VD, targets_N, weights_N, finish, sizes):
    """`_weighted_nats` and its gradients: a block that has its logits makes both, so the backward pass has no loop."""
    compact = compact_rows(rows, targets_N, weights_N, sizes[-1])

    def block(R, i, carry):
        nats, (d_rows, sum_parameters, sum_head_VD) = carry
        rows_R, targets_R, weights_R = compact.block(R, i)
        x_RD, pull_back = jax.vjp(finish, parameters, rows_R)
        softmax = nats_of_block(x_RD, head_VD, targets_R, weights_R)
        nats = _add_nats(nats, softmax.nats_R, weights_R, i * R)
        d_x_RD, sum_head_VD = gradients_of_block(softmax, x_RD, head_VD, targets_R, weights_R, sum_head_VD)
        d_parameters, d_rows_R = pull_back(d_x_RD.astype(x_RD.dtype))
        d_rows = jax.tree.map(lambda all_, d: _with_block(all_, d, i * R), d_rows, d_rows_R)
        return nats, (d_rows, jax.tree.map(jnp.add, sum_parameters, d_parameters), sum_head_VD)

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (parameters, head_VD))
    start = _no_nats(compact), (jax.tree.map(jnp.zeros_like, compact.rows), *sums)
    (total, nats), (d_rows, *sums) = walk_blocks(block, compact.used_N, sizes, start)
    d_rows = jax.tree.map(lambda d: d[compact.position_N], d_rows)
    # Summed in float32, handed on in the dtype of what they are gradients of.
    gradients = jax.tree.map(lambda d, x: d.astype(x.dtype), (d_rows, *sums), (rows, parameters, head_VD))
    return (total, nats[compact.position_N]), gradients


def _with_block(d_all, d_block, start):
    """Gradients of all rows with a block's written from `start` on; those of integers stay zero."""
    if d_block.dtype == jax.dtypes.float0:
        return d_all
    return jax.lax.dynamic_update_slice_in_dim(d_all, d_block, start, 0)


def _backward(finish, sizes, gradients, cotangents):
    scale, _ = cotangents
    d_rows, d_parameters, d_head_VD = jax.tree.map(lambda d: (scale * d).astype(d.dtype), gradients)
    return d_rows, d_parameters, d_head_VD, None, None


_weighted_nats.defvjp(_forward, _backward)


class CompactRows(NamedTuple):
    """Rows in the order of the module's drawing, filled up to a multiple of the smallest block.

    rows, targets, weights  of each place in that order; rows a tree of arrays, padding has weight 0
    position_N              the place in that order of each row of the input
    used_N                  which rows of the input have a weight
    """

    rows: Any
    targets: jax.Array
    weights: jax.Array
    position_N: jax.Array
    used_N: jax.Array

    def block(self, R: int, i: jax.Array):
        """Rows, targets and weights of the i-th block of R."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * R, R), self[:3])


def compact_rows(rows: Any, targets_N: jax.Array, weights_N: jax.Array, multiple: int) -> CompactRows:
    """The rows with a weight before those without, each kind in its own order."""
    N = len(targets_N)
    used_N = weights_N != 0
    order_N = jnp.argsort(~used_N, stable=True)
    position_N = jnp.argsort(order_N)
    # Padding to whole blocks repeats row 0 with weight 0: a clamped slice would count rows twice.
    padded = -N % multiple + N
    order = jnp.pad(order_N, (0, padded - N))
    rows, targets = jax.tree.map(lambda x: x[order], (rows, targets_N))
    weights = jnp.where(jnp.arange(padded) < N, weights_N[order], 0.0)
    return CompactRows(rows, targets, weights, position_N, used_N)


def walk_blocks(block: Callable, used_N: jax.Array, sizes: tuple[int, ...], carry):
    """`carry` after `block(R, i, carry)` for as many blocks as hold all used rows, the largest that are full first.

    A block costs the same whatever share of it is used, so what is left after whole ones goes in smaller ones.
    """
    smallest = sizes[-1]
    trips = blocks_with_work(used_N, smallest)  # of smallest blocks
    done: jax.Array | int = 0
    for k, R in enumerate(sizes):
        each = R // smallest
        with jax.named_scope(SMALLER_BLOCKS if k else WHOLE_BLOCKS):
            carry = jax.lax.fori_loop(done // each, trips // each, functools.partial(block, R), carry)
        done = trips // each * each
    return carry


def blocks_with_work(used_N: jax.Array, R: int) -> jax.Array:
    """How many blocks of R hold all used rows, when these come first: known when the program runs."""
    return (jnp.sum(used_N) + R - 1) // R


class BlockSoftmax(NamedTuple):
    """What a block's gradient needs of its nats: softmax is `weight_RV / z_R`."""

    nats_R: jax.Array
    weight_RV: jax.Array
    z_R: jax.Array


def nats_of_block(x_RD: jax.Array, head_VD: jax.Array, targets_R: jax.Array, weights_R: jax.Array) -> BlockSoftmax:
    """-log softmax(x @ head.T)[target] of a block's rows, zero where the weight is; float32."""
    logits_RV = jnp.einsum("rd,vd->rv", x_RD, head_VD, preferred_element_type=jnp.float32)
    top_R = jnp.max(logits_RV, axis=-1)
    weight_RV = jnp.exp(logits_RV - top_R[:, None])
    if platform() == "cpu":
        # Saved for the gradient: a second exponential costs more there than writing the first one down, over the
        # logits. For that their targets are not read from them; products there are as exact either way.
        weight_RV = jax.lax.optimization_barrier(weight_RV)
        target_R = jnp.sum(x_RD.astype(jnp.float32) * head_VD[targets_R].astype(jnp.float32), axis=-1)
    else:
        target_R = jnp.take_along_axis(logits_RV, targets_R[:, None], axis=-1)[:, 0]
    z_R = jnp.sum(weight_RV, axis=-1)
    nats_R = top_R + jnp.log(z_R) - target_R
    return BlockSoftmax(jnp.where(weights_R != 0, nats_R, 0.0), weight_RV, z_R)


def gradients_of_block(
    softmax: BlockSoftmax,
    x_RD: jax.Array,
    head_VD: jax.Array,
    targets_R: jax.Array,
    weights_R: jax.Array,
    sum_head_VD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Float32 gradients of the block's weighted nats: `d_x_RD`, and `sum_head_VD` with that of the head added.

    d nats / d logits = softmax - one_hot(target); a piece of the vocabulary at a time, where that is faster.
    """

    def piece(P, start, carry):
        d_x_RD, sum_head_VD = carry
        probability_RP = jax.lax.dynamic_slice_in_dim(softmax.weight_RV, start, P, 1) / softmax.z_R[:, None]
        is_target_RP = (start + jnp.arange(P))[None] == targets_R[:, None]
        d_logits_RP = (weights_R[:, None] * (probability_RP - is_target_RP)).astype(x_RD.dtype)
        head_PD, sum_PD = (jax.lax.dynamic_slice_in_dim(a, start, P) for a in (head_VD, sum_head_VD))
        d_x_RD += jnp.einsum("rp,pd->rd", d_logits_RP, head_PD, preferred_element_type=jnp.float32)
        sum_PD += jnp.einsum("rp,rd->pd", d_logits_RP, x_RD, preferred_element_type=jnp.float32)
        return d_x_RD, jax.lax.dynamic_update_slice_in_dim(sum_head_VD, sum_PD, start, 0)

    V = len(head_VD)
    size = PIECE if platform() == "cpu" else V
    return _in_pieces(piece, V, size, (jnp.zeros(x_RD.shape, jnp.float32), sum_head_VD))


def _in_pieces(piece, V: int, size: int, carry):
    """`carry` after `piece(entries, first entry, carry)` over a vocabulary of V, `size` entries at a time."""
    pieces = V // size if size < V else 0
    if pieces:
        carry = jax.lax.fori_loop(0, pieces, lambda i, carry: piece(size, i * size, carry), carry)
    rest = V - pieces * size
    return piece(rest, V - rest, carry) if rest else carry


def _no_nats(compact: CompactRows) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros(len(compact.targets), jnp.float32)


def _add_nats(carry, nats_R, weights_R, start) -> tuple[jax.Array, jax.Array]:
    """The weighted total with a block's nats added, and all nats with the block's written from `start` on."""
    total, nats = carry
    return total + jnp.sum(weights_R * nats_R), jax.lax.dynamic_update_slice_in_dim(nats, nats_R, start, 0)
