"""From hidden states to per-token nats without storing logits.

Only rows with a non-zero weight are multiplied with the vocabulary matrix: for masked diffusion about half of them.
Rows are compacted, then loops of as many blocks as there are rows to do form `block_rows x V` logits at a time and,
when differentiated, all gradients in the same pass, so nothing is recomputed. Exact for any weights. What the model
left `Unfinished` is done in the same loop, and so for the same rows only.
Shapes: B sequences, L tokens, N rows of one device, R rows of a block, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from llada.mesh import ACTIVATIONS, on_each_device, platform
from llada.objectives.contract import Unfinished

# Rows of a block where the config says none. Each block reads and writes the whole float32 gradient of the vocabulary
# matrix, 8 bytes for 2 FLOPs a row, and the data sheets of accelerators have 166 to 560 FLOPs for a byte.
ROWS = {"cpu": 384, "gpu": 1024, "tpu": 2048}

# On CPU gradients take so many entries of the vocabulary at a time: XLA writes a product before it adds it to a sum,
# and what is small is still in the caches then. Elsewhere the sum is part of the product. Not a power of two: rows of
# 4,096 bytes would all begin in the same lines of a cache. 104 pieces are LLaDA's vocabulary.
PIECE = 1216

# Names of the two loops in a compiled program: `llada plan` tells them apart by these.
WHOLE_BLOCKS, SMALLER_BLOCKS = "whole_blocks", "smaller_blocks"


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

    def rows_of_one_device(rows, parameters, head, targets, weights):
        flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
        total, nats_N = _weighted_nats(
            flat, parameters, head, targets.reshape(-1), weights.reshape(-1), hidden.finish, block_rows
        )
        return total.reshape(1, 1), nats_N.reshape(targets.shape)

    # Each device does its own rows against whole matrices: no collective inside the loop, and loops may differ in
    # length between devices.
    rows, whole = ACTIVATIONS["BL_rows"], ACTIVATIONS["replicated"]
    places = (ACTIVATIONS["BLD_rows"], whole, whole, rows, rows)
    total, nats_BL = on_each_device(rows_of_one_device, places, (rows, rows))(
        hidden.rows, hidden.weights, head_VD, targets_BL, weights_BL
    )
    return jnp.sum(total), jax.lax.stop_gradient(nats_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _weighted_nats(rows, parameters, head_VD, targets_N, weights_N, finish, block_rows):
    total, nats_N, _ = _loop(rows, parameters, head_VD, targets_N, weights_N, finish, block_rows, with_gradients=False)
    return total, nats_N


def _forward(rows, parameters, head_VD, targets_N, weights_N, finish, block_rows):
    total, nats_N, gradients = _loop(
        rows, parameters, head_VD, targets_N, weights_N, finish, block_rows, with_gradients=True
    )
    # Summed in float32, handed on in the dtype of what they are gradients of.
    gradients = jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, (rows, parameters, head_VD))
    return (total, nats_N), gradients


def _backward(finish, block_rows, gradients, cotangents):
    scale, _ = cotangents
    d_rows, d_parameters, d_head_VD = jax.tree.map(lambda d: (scale * d).astype(d.dtype), gradients)
    return d_rows, d_parameters, d_head_VD, None, None


_weighted_nats.defvjp(_forward, _backward)


def _loop(rows, parameters, head_VD, targets_N, weights_N, finish, block_rows, with_gradients):
    N, V = len(targets_N), len(head_VD)
    sizes = block_sizes(N, block_rows, platform())
    smallest = sizes[-1]
    used_N = weights_N != 0
    on_cpu = platform() == "cpu"
    order_N = jnp.argsort(~used_N, stable=True)  # rows with work first, in their own order
    position_N = jnp.argsort(order_N)
    # Padding to whole blocks repeats row 0 with weight 0: a clamped slice would count rows twice.
    padded = -N % smallest + N
    order = jnp.pad(order_N, (0, padded - N))
    rows, y_N = jax.tree.map(lambda x: x[order], (rows, targets_N))
    w_N = jnp.where(jnp.arange(padded) < N, weights_N[order], 0.0)

    def block(R, i, carry):
        total, nats_N, gradients = carry
        rows_R, y_R, w_R = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * R, R), (rows, y_N, w_N))
        if with_gradients:
            x_RD, pull_back = jax.vjp(lambda *given: finish(*reversed(given)), rows_R, parameters)
        else:
            x_RD = finish(parameters, rows_R)
        logits_RV = jnp.einsum("rd,vd->rv", x_RD, head_VD, preferred_element_type=jnp.float32)
        top_R = jnp.max(logits_RV, axis=-1)
        weight_RV = jnp.exp(logits_RV - top_R[:, None])
        if on_cpu:
            # Kept for the gradient: a second exponential costs more there than writing the first one down, over the
            # logits. For that their targets are not read from them; products there are as exact either way.
            weight_RV = jax.lax.optimization_barrier(weight_RV)
            target_R = jnp.sum(x_RD.astype(jnp.float32) * head_VD[y_R].astype(jnp.float32), axis=-1)
        else:
            target_R = jnp.take_along_axis(logits_RV, y_R[:, None], axis=-1)[:, 0]
        z_R = jnp.sum(weight_RV, axis=-1)
        nats_R = top_R + jnp.log(z_R) - target_R
        nats_R = jnp.where(w_R != 0, nats_R, 0.0)
        total += jnp.sum(w_R * nats_R)
        nats_N = jax.lax.dynamic_update_slice_in_dim(nats_N, nats_R, i * R, 0)
        if with_gradients:
            d_rows, sum_parameters, sum_head_VD = gradients

            def piece(P, start, carry):
                d_x_RD, sum_head_VD = carry
                probability_RP = jax.lax.dynamic_slice_in_dim(weight_RV, start, P, 1) / z_R[:, None]
                is_target_RP = start + jnp.arange(P) == y_R[:, None]
                d_logits_RP = (w_R[:, None] * (probability_RP - is_target_RP)).astype(x_RD.dtype)
                head_PD, sum_PD = (jax.lax.dynamic_slice_in_dim(a, start, P) for a in (head_VD, sum_head_VD))
                d_x_RD += jnp.einsum("rp,pd->rd", d_logits_RP, head_PD, preferred_element_type=jnp.float32)
                sum_PD += jnp.einsum("rp,rd->pd", d_logits_RP, x_RD, preferred_element_type=jnp.float32)
                return d_x_RD, jax.lax.dynamic_update_slice_in_dim(sum_head_VD, sum_PD, start, 0)

            carry = jnp.zeros(x_RD.shape, jnp.float32), sum_head_VD
            d_x_RD, sum_head_VD = _in_pieces(piece, V, PIECE if on_cpu else V, carry)
            d_rows_R, d_parameters = pull_back(d_x_RD.astype(x_RD.dtype))
            d_rows = jax.tree.map(
                lambda d, new: jax.lax.dynamic_update_slice_in_dim(d, new, i * R, 0), d_rows, d_rows_R
            )
            gradients = d_rows, jax.tree.map(jnp.add, sum_parameters, d_parameters), sum_head_VD
        return total, nats_N, gradients

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (parameters, head_VD))
    gradients = (jax.tree.map(jnp.zeros_like, rows), *sums) if with_gradients else ()
    carry = (jnp.zeros((), jnp.float32), jnp.zeros(padded, jnp.float32), gradients)
    # A block costs the same whatever share of it is needed, so what is left after whole ones goes in smaller ones.
    turns, done = blocks_with_work(used_N, smallest), 0
    for k, R in enumerate(sizes):
        each = R // smallest
        with jax.named_scope(SMALLER_BLOCKS if k else WHOLE_BLOCKS):
            carry = jax.lax.fori_loop(done // each, turns // each, functools.partial(block, R), carry)
        done = turns // each * each
    total, nats, gradients = carry
    if with_gradients:
        d_rows, *sums = gradients
        gradients = jax.tree.map(lambda d: d[position_N], d_rows), *sums
    return total, nats[position_N], gradients


def blocks_with_work(used_N: jax.Array, R: int) -> jax.Array:
    """How many blocks of R hold all rows that are used, when these come first: known when the program runs."""
    return (jnp.sum(used_N) + R - 1) // R


def _in_pieces(piece, V: int, size: int, carry):
    """`carry` after `piece(entries, first entry, carry)` over a vocabulary of V, `size` entries at a time."""
    turns = V // size if size < V else 0
    if turns:
        carry = jax.lax.fori_loop(0, turns, lambda i, carry: piece(size, i * size, carry), carry)
    rest = V - turns * size
    return piece(rest, V - rest, carry) if rest else carry


def block_sizes(N: int, block_rows: int, where: str) -> tuple[int, ...]:
    """Rows of a whole block and of the smaller ones behind it, for N rows of one device on that platform.

    On CPU a block of half the rows comes between: products of few rows are slow there.
    """
    largest = min(block_rows, N)
    if largest % 4:
        return (largest,)
    return (largest, largest // 2, largest // 4) if where == "cpu" else (largest, largest // 4)
