"""The loss and gradient of one step against a sum written down document by document."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada import mesh as mesh_lib
from llada.config import MeshConfig
from llada.evaluation.validation import Validator
from llada.model import transformer
from llada.objectives import noise as noise_lib
from llada.objectives.contract import SpecialTokens
from llada.objectives.corruption import forward_process
from llada.training import step as step_lib

SPECIAL = SpecialTokens(mask=3, eos=1)
ENDS = ((5, 20), (0, 31), ())  # of documents, by row: also in the first and last place, and nowhere


@pytest.fixture(scope="module", params=["llada", "arm"])
def run(request, tiny):
    changes = {"objective.block_cross_document_attention": True, "objective.random_length_fraction": 0.0}
    changes |= {"train.batch_size": 3, "model.init_std": 0.3, "evaluate.draws": 1}
    changes |= {"optimizer.schedule": "0:0 100%:1"}
    config = tiny(request.param, changes)
    rows_BL = np.random.default_rng(0).integers(4, 320, (3, 32)).astype(np.int32)
    for row, ends in zip(rows_BL, ENDS, strict=True):
        row[list(ends)] = SPECIAL.eos
    return config, rows_BL, jax.jit(functools.partial(step_lib.init_state, config))()


def documents(length: int, ends) -> list[slice]:
    cuts = sorted({0, length, *(end + 1 for end in ends)})
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def alone(config, params, rows_BL) -> jax.Array:
    """Nats per token where the model is given one document at a time, and no other tokens."""
    sequence_B = jnp.arange(len(rows_BL))
    noise = noise_lib.Noise(config.seed, 0, sequence_B, len(rows_BL))
    t_B = noise_lib.times(noise, config.objective.time_sampling)
    uniform_BL = noise_lib.uniform(noise, noise_lib.MASK, rows_BL.shape[1:])
    valid = jnp.ones(rows_BL.shape, bool)
    corrupted = forward_process(rows_BL, t_B, uniform_BL, valid, SPECIAL.mask, config.objective.eps)
    total = 0.0
    for b, ends in enumerate(ENDS):
        for part in documents(rows_BL.shape[1], ends):
            text_L = rows_BL[b, part]
            if config.model.causal:
                inputs_L, weight_L = jnp.concatenate([jnp.array([SPECIAL.eos]), text_L[:-1]]), 1.0
            else:
                inputs_L, weight_L = corrupted.xt_BL[b, part], corrupted.masked_BL[b, part] * corrupted.weight_B[b]
            logits_LV = transformer.logits(config.model, params, jnp.asarray(inputs_L)[None])[0]
            total += jnp.sum(weight_L * optax.softmax_cross_entropy_with_integer_labels(logits_LV, text_L))
    return total / rows_BL.size


@pytest.fixture(scope="module")
def apart(run):
    """The value of `alone` and its gradient."""
    config, rows_BL, state = run
    return jax.jit(jax.value_and_grad(functools.partial(alone, config)))(state.params, rows_BL)


def test_documents_of_a_row_are_learnt_as_if_each_were_alone(run, apart):
    (config, rows_BL, state), (expected, gradients) = run, apart
    _, metrics = jax.jit(functools.partial(step_lib.train_step, config=config, special=SPECIAL))(state, rows_BL)
    np.testing.assert_allclose(metrics["loss_nats_per_token"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-4)
    assert float(metrics["learning_rate"]) == pytest.approx(config.optimizer.peak_learning_rate / 12)  # of step 1 of 12
    fraction = float(metrics["head_fraction"])
    assert fraction == 1 if config.model.causal else 0.2 < fraction < 0.8


def test_parameters_and_noise_are_those_of_the_seed(tiny, monkeypatch):
    """Traced only: what initialisation and the noise of a step are made from."""
    config, noises, roots = tiny("llada", {"train.microbatches": 2}), [], []
    config = dataclasses.replace(config, seed=5)
    noise, root = step_lib.Noise, step_lib.root_key
    monkeypatch.setattr(step_lib, "Noise", lambda seed, *rest: noises.append(seed) or noise(seed, *rest))
    monkeypatch.setattr(step_lib, "root_key", lambda seed: roots.append(seed) or root(seed))
    state = jax.eval_shape(functools.partial(step_lib.init_state, config))
    rows = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    jax.eval_shape(functools.partial(step_lib.train_step, config=config, special=SPECIAL), state, rows)
    assert set(noises) == set(roots) == {5}


def test_held_out_documents_are_judged_alone_too(run, apart):
    """The ARM's figure is exact, so it is that sum; LLaDA's is a sum over documents, whichever stand in a row."""
    config, rows_BL, state = run

    def nats(rows_BL):
        mesh = mesh_lib.make(MeshConfig())
        with jax.set_mesh(mesh):
            validate = Validator(config, SPECIAL, np.ones(config.model.vocab_size), rows_BL, mesh)
            return validate(state.params).nats_per_token

    if config.model.causal:
        np.testing.assert_allclose(nats(rows_BL), apart[0], rtol=1e-5)
        return
    rng, cut = np.random.default_rng(1), 16
    (first, second), (other_first, other_second) = rng.integers(4, 320, (2, 2, 1, cut)).astype(np.int32)
    first[:, -1] = other_first[:, -1] = SPECIAL.eos
    values = [[nats(np.concatenate([a, b], axis=1)) for b in (second, other_second)] for a in (first, other_first)]
    np.testing.assert_allclose(values[0][0] + values[1][1], values[0][1] + values[1][0], rtol=1e-6)
    assert abs(values[0][0] - values[0][1]) > 1e-3 and abs(values[0][0] - values[1][0]) > 1e-3
