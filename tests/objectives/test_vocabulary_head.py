"""`weighted_nats` against a dense log-softmax that stores every logit: values, nats and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada import mesh as mesh_lib
from llada.config import MeshConfig
from llada.objectives import autoregressive, vocabulary_head
from llada.objectives.contract import SpecialTokens
from llada.objectives.vocabulary_head import weighted_nats

V, D = 13, 6


def dense(hidden, head, targets, weights):
    """The definition, in the dtype of its inputs."""
    log_p = jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, head))
    nats = jnp.where(weights != 0, -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], 0)
    return jnp.sum(weights * nats), nats


def value_and_gradients(loss, scale=1.0):
    def scaled(hidden, head, targets, weights):
        total, nats = loss(hidden, head, targets, weights)
        return scale * total, nats

    return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)


def inputs(B, L, seed=0, sharpness=3.0):
    rng = np.random.default_rng(seed)
    hidden = sharpness * rng.normal(size=(B, L, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    return jnp.array(hidden), jnp.array(head), jnp.array(rng.integers(0, V, (B, L)), jnp.int32)


def weights_of(kind: str, B: int, L: int) -> jax.Array:
    rng = np.random.default_rng(1)
    drawn = {
        "half": rng.uniform(0.5, 9, (B, L)) * (rng.uniform(size=(B, L)) < 0.5),
        "zero": np.zeros((B, L)),
        "ones": np.ones((B, L)),
        "one row": np.arange(B * L).reshape(B, L) == B * L - 1,
        "signed": rng.normal(size=(B, L)),
    }
    return jnp.array(drawn[kind], jnp.float32)


# 14 rows: one row per block, blocks whose smallest divides 14, one that divides it, one whose smallest does not (the
# last is filled up), blocks larger than everything; one row only.
BLOCKS = [(2, 7, 1), (2, 7, 4), (2, 7, 7), (2, 7, 12), (2, 7, 512), (1, 1, 4)]


# What is left after whole blocks takes another way on accelerators: up to three blocks of one size.
@pytest.mark.parametrize(("B", "L", "block_rows", "where"), [*((*b, "cpu") for b in BLOCKS), (2, 7, 8, "tpu")])
def test_value_nats_and_gradients_equal_the_dense_ones_for_any_weights_and_block_size(
    B, L, block_rows, where, monkeypatch
):
    """Under jit, with a cotangent of 3; logits reach +-30, where a naive softmax would lose digits.

    In two cases the gradient takes the 13 entries of the vocabulary five, five and three at a time.
    """
    if block_rows in (4, 12):
        monkeypatch.setattr(vocabulary_head, "PIECE", 5)
    sizes = vocabulary_head.block_sizes(B * L, block_rows, where)
    monkeypatch.setattr(vocabulary_head, "block_sizes", lambda *_: sizes)
    data = inputs(B, L)
    blocked = jax.jit(value_and_gradients(functools.partial(weighted_nats, block_rows=block_rows), scale=3.0))
    wanted = jax.jit(value_and_gradients(dense))
    for kind in ("half", "zero", "ones", "one row", "signed"):
        weights = weights_of(kind, B, L)
        (total, nats), gradients = blocked(*data, weights)
        (dense_total, dense_nats), dense_gradients = wanted(*data, weights)
        np.testing.assert_allclose(total, 3 * dense_total, rtol=1e-5, atol=1e-4, err_msg=kind)
        np.testing.assert_allclose(nats, dense_nats, rtol=1e-5, atol=1e-4, err_msg=kind)
        for name, got, want in zip(("hidden", "head"), gradients, dense_gradients, strict=True):
            np.testing.assert_allclose(got, 3 * want, rtol=1e-4, atol=1e-4, err_msg=f"{kind}: {name}")
        # Without differentiation another branch of the loop runs.
        np.testing.assert_allclose(weighted_nats(*data, weights, block_rows)[0], dense_total, rtol=1e-5, atol=1e-4)


def test_rows_without_weight_never_meet_the_vocabulary():
    """Four weighted rows fill one block of four: NaN in all the others must reach neither value nor gradients."""
    hidden, head, targets = inputs(2, 7)
    used = jnp.zeros((2, 7), bool).at[jnp.array([0, 0, 1, 1]), jnp.array([1, 6, 0, 4])].set(True)
    poisoned = jnp.where(used[..., None], hidden, jnp.nan)
    (total, nats), (d_hidden, d_head) = value_and_gradients(functools.partial(weighted_nats, block_rows=4))(
        poisoned, head, targets, 2.0 * used
    )
    (dense_total, dense_nats), wanted = value_and_gradients(dense)(hidden, head, targets, 2.0 * used)
    np.testing.assert_allclose(total, dense_total, rtol=1e-5)
    np.testing.assert_allclose(nats, dense_nats, rtol=1e-5)
    np.testing.assert_allclose(d_head, wanted[1], atol=1e-4)
    np.testing.assert_allclose(jnp.where(used[..., None], d_hidden, 0), wanted[0], atol=1e-4)
    assert not np.any(d_hidden[~used])


def test_gradients_flow_through_the_total_only_and_not_to_the_weights():
    """The nats are for reporting, the weights are constants of the forward process."""
    hidden, head, targets = inputs(2, 7)
    weights = weights_of("half", 2, 7)
    of_nats = jax.grad(lambda h, v: jnp.sum(weighted_nats(h, v, targets, weights, 4)[1]), argnums=(0, 1))(hidden, head)
    of_weights = jax.grad(lambda w: weighted_nats(hidden, head, targets, w, 4)[0])(weights)
    assert not any(np.any(g) for g in (*of_nats, of_weights))


def test_bfloat16_products_keep_a_float32_softmax():
    """Value and nats are as exact as float32 on the rounded inputs; gradients carry bfloat16's three digits."""
    hidden, head, targets = inputs(4, 16)
    weights = weights_of("half", 4, 16)
    (total, nats), (d_hidden, d_head) = value_and_gradients(functools.partial(weighted_nats, block_rows=8))(
        hidden.astype(jnp.bfloat16), head, targets, weights
    )
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (hidden, head)]
    (dense_total, dense_nats), wanted = value_and_gradients(dense)(*rounded, targets, weights)
    assert (total.dtype, nats.dtype, d_hidden.dtype, d_head.dtype) == ("float32", "float32", "bfloat16", "float32")
    np.testing.assert_allclose(total, dense_total, rtol=1e-5)
    np.testing.assert_allclose(nats, dense_nats, rtol=1e-5, atol=1e-5)
    for got, want in zip((d_hidden, d_head), wanted, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 1e-2


def test_inside_a_mesh_the_result_is_the_same():
    """The sharded path on one device: what changes is placement only."""
    data = (*inputs(2, 7), weights_of("half", 2, 7))
    loss = jax.jit(value_and_gradients(functools.partial(weighted_nats, block_rows=4)))
    outside = loss(*data)
    with jax.set_mesh(mesh_lib.make(MeshConfig(), jax.devices()[:1])):
        inside = loss(*data)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), inside, outside)


def test_an_arm_learns_nothing_of_what_was_cut_off():
    hidden, head, targets = inputs(2, 7)
    lengths, special = jnp.array([3, 7]), SpecialTokens(mask=None, eos=1)
    total, nats = autoregressive.row_nats(lambda *_: hidden, head, targets, lengths, special, 4)
    kept = np.arange(7) < np.asarray(lengths)[:, None]
    wanted, _ = dense(hidden, head, targets, jnp.array(kept, jnp.float32))
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert np.all((np.asarray(nats) != 0) == kept)
