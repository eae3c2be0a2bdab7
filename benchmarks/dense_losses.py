"""`diffusion.loss` with logits of all positions, as in published code: what the vocabulary head is compared with.

`register` adds them to the families as DENSE and CHUNKED. Both give the loss and gradients of `diffusion` where no
sequence is cut short. So does STATIC where no more than CAPACITY of the rows are masked: it is the vocabulary head
itself, with loops whose trip count does not depend on the masks.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from llada.objectives import diffusion, families, vocabulary_head
from llada.objectives import noise as noise_lib
from llada.objectives.contract import LossTerms
from llada.objectives.corruption import forward_process

DENSE = "dense"  # all logits at once, saved for the backward pass
CHUNKED = "chunked"  # of CHUNK positions, recomputed in the backward pass: 8 V d FLOPs a position instead of 6
CHUNK = 2048
STATIC = "static"
CAPACITY = 0.55


def _nats(hidden_ND, head_VD, targets_N):
    logits_NV = jnp.einsum("nd,vd->nv", hidden_ND, head_VD.astype(hidden_ND.dtype))
    return optax.softmax_cross_entropy_with_integer_labels(logits_NV.astype(jnp.float32), targets_N)


def _nats_in_chunks(hidden_ND, head_VD, targets_N):
    size = min(CHUNK, len(targets_N))
    if len(targets_N) % size:
        raise ValueError(f"{len(targets_N)} positions are not a multiple of {size}")
    chunks = hidden_ND.reshape(-1, size, hidden_ND.shape[-1]), targets_N.reshape(-1, size)
    return jax.lax.map(jax.checkpoint(lambda chunk: _nats(chunk[0], head_VD, chunk[1])), chunks).reshape(-1)


def _loss(nats_of, predict, head_VD, x0_BL, noise, special, objective) -> LossTerms:
    B, L = x0_BL.shape
    t_B = noise_lib.times(noise, objective.time_sampling)
    uniform_BL = noise_lib.uniform(noise, noise_lib.MASK, (L,))
    corrupted = forward_process(x0_BL, t_B, uniform_BL, jnp.ones((B, L), bool), special.mask, objective.eps)
    rows, finish, weights = predict(corrupted.xt_BL, None)
    flat = jax.tree.map(lambda x: x.reshape(B * L, -1), rows)
    # Of all rows: here the last layer skips nothing either.
    nats_BL = nats_of(finish(weights, flat), head_VD, x0_BL.reshape(-1)).reshape(B, L)
    nats_BL = jnp.where(corrupted.masked_BL, nats_BL, 0.0)
    return LossTerms(
        jnp.sum(nats_BL * corrupted.weight_B[:, None]),
        jnp.float32(B * L),
        jnp.sum(nats_BL),
        jnp.sum(corrupted.masked_BL, dtype=jnp.float32),
    )


def _trip_count(used_N, R: int) -> int:
    return -(-int(CAPACITY * len(used_N)) // R)


def _static(*arguments) -> LossTerms:
    with mock.patch.object(vocabulary_head, "blocks_with_work", _trip_count):
        return diffusion.loss(*arguments)


def register() -> None:
    """Let a config's `objective.name` be one of these, in this process."""
    dense, chunked = functools.partial(_loss, _nats), functools.partial(_loss, _nats_in_chunks)
    for name, loss in ((STATIC, _static), (DENSE, dense), (CHUNKED, chunked)):
        families.FAMILIES[name] = dataclasses.replace(families.DIFFUSION, loss=loss)
