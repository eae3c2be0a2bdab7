"""Dropout: its masks and scale, where they apply, and what never sees it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada import changes
from llada import config as config_lib
from llada.config import ModelConfig
from llada.interop import beginning, schema
from llada.model import cached, layers, transformer
from llada.model.attention import Allowed, attend
from llada.objectives.contract import SpecialTokens, Unfinished
from llada.objectives.noise import DROPOUT, Noise, root_key, sequence_keys
from llada.objectives.vocabulary_head import weighted_nats
from llada.training import step as step_lib

RATE = 0.3
TINY = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, ffn=24, vocab_size=11, max_length=8, dtype="float32", dropout=RATE
)
TOKENS = np.array([[3, 1, 4, 10, 5, 9], [3, 1, 4, 10, 5, 9], [2, 6, 0, 5, 3, 7]], np.int32)
SPECIAL = SpecialTokens(mask=3, eos=1)


@functools.cache
def parameters(config):
    return jax.jit(functools.partial(transformer.init, config))(root_key(0))


def keys(step, seed=5, batch=3):
    return sequence_keys(Noise(seed, step, jnp.arange(batch), batch), DROPOUT)


@jax.jit
def mask(key, layer, position, branch):
    """What one row of one sequence is multiplied with."""
    for number in (layer, position, branch):
        key = jax.random.fold_in(key, number)
    return jax.random.bernoulli(key, 1 - RATE, (TINY.width,)) / (1 - RATE)


@pytest.mark.fast
def test_each_seed_step_sequence_layer_position_and_branch_drops_its_own_share_and_means_are_kept():
    """Rates within 4.5 standard errors, no two masks alike, pairs of them independent."""
    J, B, L, D = 3, 4, 5, 64

    @functools.partial(jax.vmap, in_axes=(0, None))
    def masks(step, seed):
        rows = layers.row_keys(keys(step, seed, B), J, L)
        return jnp.stack([layers.dropout(jnp.ones((J, B, L, D)), rows, branch, RATE) for branch in (0, 1)])

    drawn = np.stack([jax.jit(masks)(jnp.arange(6), seed) for seed in (0, 1)])  # seed, step, branch, J, B, L, D
    assert set(np.unique(drawn)) == {0, np.float32(1 / (1 - RATE))}
    dropped = drawn == 0
    for axis in range(drawn.ndim):
        share = np.mean(dropped, axis=tuple(other for other in range(drawn.ndim) if other != axis))
        stderr = np.sqrt(RATE * (1 - RATE) * drawn.shape[axis] / drawn.size)
        assert np.all(np.abs(share - RATE) < 4.5 * stderr), axis
    rows = dropped.reshape(-1, D)
    assert len(np.unique(rows, axis=0)) == len(rows)
    both = (rows.T.astype(int) @ rows)[np.triu_indices(D, 1)] / len(rows)  # of two channels
    assert np.all(np.abs(both - RATE**2) < 5 * np.sqrt(RATE**2 / len(rows)))


def test_the_mean_over_steps_is_what_no_dropout_gives():
    """What enters the only layer: the embedding. Rows of the last layer's branches: linear in their masks too."""
    config, steps = dataclasses.replace(TINY, layers=1), 3000
    params = parameters(config)

    def stream(step):
        return transformer.up_to_last_attention(config, params, TOKENS, dropout_B=keys(step))[0][0]

    dropped = np.asarray(jax.lax.map(jax.jit(stream), jnp.arange(steps)))
    embedded = np.asarray(params["embedding"])[TOKENS]
    # Each number is 0 or x / (1 - RATE): its standard deviation is |x| sqrt(RATE / (1 - RATE)).
    stderr = np.abs(embedded) * np.sqrt(RATE / (1 - RATE) / steps)
    assert np.all(np.abs(dropped.mean(axis=0) - embedded) < 4.5 * stderr)
    half = layers.dropout(jnp.ones((4, 4096), jnp.bfloat16), jax.random.split(root_key(0), 4), 0, RATE)
    assert half.dtype == jnp.bfloat16 and abs(float(half.astype(jnp.float32).mean()) - 1) < 0.02


def masks_by_hand(config, tokens, key_B):
    """By (layer, branch): (0, 2) is the embedding's."""
    sites = [(0, 2), *((n, branch) for n in range(1, config.layers + 1) for branch in (0, 1))]
    rows = list(np.ndindex(tokens.shape))
    drawn = np.stack([[mask(key_B[b], layer, i, branch) for b, i in rows] for layer, branch in sites])
    return dict(zip(sites, drawn.reshape(-1, *tokens.shape, config.width), strict=True))


def by_hand(c, params, tokens, masks, weight_BL):
    """Weighted nats of all rows, the masks multiplied in where the residual stream is added to."""
    angles = layers.rotary_angles(tokens.shape[1], c.head_size, c.rope_theta)
    x_BLD = params["embedding"][tokens] * masks[0, 2]
    for n in range(c.layers):
        p = {name: leaf[n] for name, leaf in params["layers"].items()}
        heads = transformer.rotated(c, p, transformer.project(c, p, x_BLD), angles, angles)
        mixed_BLHC = attend(*heads, Allowed(c.causal))
        x_BLD += masks[n + 1, 0] * jnp.einsum("blhc,hcd->bld", mixed_BLHC, p["output"])
        y_BLD = layers.rms_norm(x_BLD, p["ffn_norm"], c.norm_eps)
        x_BLD += masks[n + 1, 1] * ((jax.nn.silu(y_BLD @ p["gate"]) * (y_BLD @ p["up"])) @ p["down"])
    hidden_BLD = layers.rms_norm(x_BLD, params["final_norm"], c.norm_eps)
    logits_BLV = transformer.unembed(hidden_BLD, transformer.head(c, params))
    return jnp.sum(weight_BL * optax.softmax_cross_entropy_with_integer_labels(logits_BLV, jnp.asarray(tokens)))


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full", "scan_unroll": 1},
        {"causal": True, "remat": "dots", "tie_embeddings": True},
        {"layers": 1},
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_masks_multiplied_in_by_hand(changes):
    """Also where the last layer is finished for the rows with a weight only, and where layers are recomputed."""
    config = dataclasses.replace(TINY, init_std=0.3, **changes)
    params, key_B = parameters(config), keys(7)
    weight_BL = (jnp.arange(TOKENS.size).reshape(TOKENS.shape) % 3 != 1) * 1.5

    def loss(params, key_B):
        hidden = Unfinished(*transformer.up_to_last_attention(config, params, TOKENS, dropout_B=key_B))
        return weighted_nats(hidden, transformer.head(config, params), jnp.asarray(TOKENS), weight_BL, 4)[0]

    masks = masks_by_hand(config, TOKENS, key_B)
    wanted = jax.jit(jax.value_and_grad(lambda params: by_hand(config, params, TOKENS, masks, weight_BL)))(params)
    got = jax.jit(jax.value_and_grad(loss))(params, key_B)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, wanted)
    assert abs(got[0] - loss(params, None)) > 1e-2


def test_microbatches_drop_the_same_and_steps_do_not(tiny):
    """Loss and gradient norm of a step of the ARM, whose loss has no other noise."""
    changes = {"model.dropout": 0.5, "model.layers": 1, "model.init_std": 0.3}
    rows_BL = jnp.tile(jnp.arange(4, 36)[None], (8, 1))

    def metrics(microbatches, *steps):
        config = tiny("arm", changes | {"train.microbatches": microbatches})
        state = jax.jit(functools.partial(step_lib.init_state, config))()
        train_step = jax.jit(functools.partial(step_lib.train_step, config=config, special=SPECIAL))
        found = [train_step(state._replace(step=jnp.int32(step)), rows_BL)[1] for step in steps]
        return [(float(m["loss_nats_per_token"]), float(m["grad_norm"])) for m in found]

    first, second = metrics(1, 1, 2)
    assert metrics(4, 1) == [pytest.approx(first, rel=1e-5)]
    assert abs(first[0] - second[0]) > 1e-3


def test_without_dropout_no_key_is_made(tiny, monkeypatch):
    """The step at rate 0 is traced without the functions that drop out."""

    def program(rate):
        config = tiny("llada", {"model.dropout": rate, "train.microbatches": 2, "model.remat": "dots"})
        state = jax.eval_shape(functools.partial(step_lib.init_state, config))
        rows = jax.ShapeDtypeStruct((8, 32), jnp.int32)
        return jax.eval_shape(functools.partial(step_lib.train_step, config=config, special=SPECIAL), state, rows)

    def refuse(*arguments):
        raise AssertionError("a random key of dropout")

    monkeypatch.setattr(layers, "row_keys", refuse)
    monkeypatch.setattr(jax.random, "bernoulli", refuse)
    program(0.0)
    with pytest.raises(AssertionError, match="random key"):
        program(0.5)


def test_evaluation_decoding_and_export_are_those_of_the_model_without_dropout():
    plain = dataclasses.replace(TINY, dropout=0.0)
    params = transformer.abstract_parameters(TINY)
    assert params == transformer.abstract_parameters(plain)
    for passes in (transformer.hidden, transformer.logits, cached.prefill):
        dropping, without = (str(jax.make_jaxpr(functools.partial(passes, c))(params, TOKENS)) for c in (TINY, plain))
        assert dropping == without
    for causal in (False, True):
        written = [
            schema.schema_of(c).to_json(c, SPECIAL, None)
            for c in (dataclasses.replace(c, causal=causal) for c in (TINY, plain))
        ]
        assert written[0] == written[1]


def test_a_run_that_begins_from_a_model_may_choose_its_dropout_and_must_keep_it(tiny, tmp_path):
    old, new = tiny("arm", {"model.dropout": 0.2}), tiny("arm", {"model.dropout": 0.1, "model.layers": 3})
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(old)))
    begun = config_lib.from_config_dict(beginning.adopt(config_lib.to_dict(new), tmp_path, tmp_path / "new"))
    assert (begun.model.dropout, begun.model.layers) == (0.1, 2)
    assert changes.differences(old, begun) == ["model.dropout: 0.2 -> 0.1"]
    assert changes.differences(old, begun, begun=False) == []
