"""From hidden states to per-token nats without storing logits.

Only rows with a non-zero weight are multiplied with the vocabulary matrix: for masked diffusion about half of them.
Rows are compacted, then a loop of as many blocks as there are rows to do forms `block_rows x V` logits at a time and,
when differentiated, both gradients in the same pass, so nothing is recomputed. Exact for any weights.
Shapes: B sequences, L tokens, N rows of one device, R rows of a block, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from llada.mesh import ACTIVATIONS, AXES


def weighted_nats(
    hidden_BLD: jax.Array, head_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, block_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Sum over tokens of weight x (-log softmax(hidden @ head.T)[target]), and the nats themselves.

      hidden_BLD  compute dtype          head_VD     float32
      targets_BL  int32                  weights_BL  float32; constants: no gradient flows to them
    Returns `(total, nats_BL)`: a differentiable float32 scalar, and float32 nats (zero where the weight is zero) that
    carry no gradient. Softmax and sums are float32; matrix products take the dtype of `hidden`.
    """
    head_VD = head_VD.astype(hidden_BLD.dtype)

    def rows_of_one_device(hidden, head, targets, weights):
        total, nats_N = _weighted_nats(
            hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), weights.reshape(-1), block_rows
        )
        return total.reshape(1, 1), nats_N.reshape(targets.shape)

    if not jax.sharding.get_abstract_mesh().empty:
        # Each device does its own rows against the whole vocabulary: no collective inside the loop, and loops may
        # differ in length between devices.
        rows, whole = ACTIVATIONS["BL_rows"], ACTIVATIONS["VD_gathered"]
        rows_of_one_device = jax.shard_map(
            rows_of_one_device,
            in_specs=(ACTIVATIONS["BLD_rows"], whole, rows, rows),
            out_specs=(rows, rows),
            axis_names=set(AXES),
            check_vma=False,
        )
    total, nats_BL = rows_of_one_device(hidden_BLD, head_VD, targets_BL, weights_BL)
    return jnp.sum(total), jax.lax.stop_gradient(nats_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_nats(hidden_ND, head_VD, targets_N, weights_N, block_rows):
    total, nats_N, _ = _loop(hidden_ND, head_VD, targets_N, weights_N, block_rows, with_gradients=False)
    return total, nats_N


def _forward(hidden_ND, head_VD, targets_N, weights_N, block_rows):
    total, nats_N, gradients = _loop(hidden_ND, head_VD, targets_N, weights_N, block_rows, with_gradients=True)
    return (total, nats_N), gradients


def _backward(block_rows, gradients, cotangents):
    scale, _ = cotangents
    d_hidden_ND, d_head_VD = gradients
    return (scale * d_hidden_ND).astype(d_hidden_ND.dtype), (scale * d_head_VD).astype(d_hidden_ND.dtype), None, None


_weighted_nats.defvjp(_forward, _backward)


def _loop(hidden_ND, head_VD, targets_N, weights_N, block_rows, with_gradients):
    N, D = hidden_ND.shape
    R = min(block_rows, N)
    used_N = weights_N != 0
    order_N = jnp.argsort(~used_N, stable=True)  # rows with work first, in their own order
    position_N = jnp.argsort(order_N)
    # Padding to whole blocks repeats row 0 with weight 0: a clamped slice would count rows twice.
    padded = -N % R + N
    order = jnp.pad(order_N, (0, padded - N))
    x_ND, y_N = hidden_ND[order], targets_N[order]
    w_N = jnp.where(jnp.arange(padded) < N, weights_N[order], 0.0)

    def block(i, carry):
        total, nats_N, d_x_ND, d_head_VD = carry
        x_RD, y_R, w_R = (jax.lax.dynamic_slice_in_dim(a, i * R, R) for a in (x_ND, y_N, w_N))
        logits_RV = jnp.einsum("rd,vd->rv", x_RD, head_VD, preferred_element_type=jnp.float32)
        log_z_R = jax.nn.logsumexp(logits_RV, axis=-1)
        nats_R = log_z_R - jnp.take_along_axis(logits_RV, y_R[:, None], axis=-1)[:, 0]
        nats_R = jnp.where(w_R != 0, nats_R, 0.0)
        total += jnp.sum(w_R * nats_R)
        nats_N = jax.lax.dynamic_update_slice_in_dim(nats_N, nats_R, i * R, 0)
        if with_gradients:
            probability_RV = jnp.exp(logits_RV - log_z_R[:, None])
            is_target_RV = jnp.arange(head_VD.shape[0]) == y_R[:, None]
            d_logits_RV = (w_R[:, None] * (probability_RV - is_target_RV)).astype(x_RD.dtype)
            d_x_RD = jnp.einsum("rv,vd->rd", d_logits_RV, head_VD)
            d_x_ND = jax.lax.dynamic_update_slice_in_dim(d_x_ND, d_x_RD, i * R, 0)
            d_head_VD += jnp.einsum("rv,rd->vd", d_logits_RV, x_RD, preferred_element_type=jnp.float32)
        return total, nats_N, d_x_ND, d_head_VD

    zeros = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(padded, jnp.float32),
        jnp.zeros((padded, D) if with_gradients else (0, D), hidden_ND.dtype),
        jnp.zeros(head_VD.shape if with_gradients else (0, D), jnp.float32),
    )
    blocks = (jnp.sum(used_N) + R - 1) // R
    total, nats, d_x, d_head_VD = jax.lax.fori_loop(0, blocks, block, zeros)
    d_hidden_ND = d_x[position_N] if with_gradients else d_x
    return total, nats[position_N], (d_hidden_ND, d_head_VD)
