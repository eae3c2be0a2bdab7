"""Fine-tuning's objective, LLaDA Eq. (5), against sums over all masks: two examples that share a row, padding, ARMs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.polynomial import Polynomial

from llada.config import ModelConfig, ObjectiveConfig
from llada.model import transformer
from llada.objectives import autoregressive, diffusion
from llada.objectives import noise as noise_lib
from llada.objectives.contract import ANSWER, CONTEXT, PADDING, Examples, SpecialTokens
from llada.objectives.noise import Noise

MASK, EOS = 3, 2
SPECIAL = SpecialTokens(mask=MASK, eos=EOS)
EPS, STEPS = 0.05, 4000
DIFFUSION = ModelConfig(layers=1, width=8, heads=2, ffn=16, vocab_size=4, max_length=8, init_std=0.7, dtype="float32")
CAUSAL = ModelConfig(**{**vars(DIFFUSION), "causal": True})
# A row of two examples and a place that nobody sees, and a row of one: prompts, answers, predicted padding.
ROWS = Examples(
    np.array([[0, 1, 0, 1, 1, 2, 0], [1, 0, 0, 1, 1, 2, 2]], np.int32),
    np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32),
    np.array([[0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 2, 2]], np.int32),
)
EXAMPLES = [(0, [0, 1, 2], [1, 2]), (0, [3, 4, 5], [4, 5]), (1, list(range(7)), [2, 3, 4, 5, 6])]  # row, tokens, answer


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(transformer.init, DIFFUSION))(jax.random.key(1))


def noise(step, batch_size=2):
    return Noise(7, step, jnp.arange(batch_size), batch_size)


def objective(family, model, params, step, normalization, rows=ROWS):
    predict = functools.partial(transformer.hidden, model, params, segments_BL=rows.example_BL)
    config = ObjectiveConfig(eps=EPS, normalization=normalization, head_rows=32)
    rows = Examples(*map(jnp.asarray, rows))
    return family.answer_loss(predict, transformer.head(model, params), rows, noise(step), SPECIAL, config)


def expected(params, normalization):
    """Eq. (5) summed over the examples, each alone in its row, as a sum over all its masks; with eps, p is in [eps, 1].

    A mask of k of L' tokens has probability p^k (1-p)^(L'-k) and weight 1/p.
    """
    P = Polynomial([0, 1])
    total = 0.0
    for row, tokens, answer in EXAMPLES:
        x0, places = ROWS.tokens_BL[row, tokens], [tokens.index(i) for i in answer]
        for k in range(1, len(places) + 1):
            integral = (P ** (k - 1) * (1 - P) ** (len(places) - k)).integ()
            weight = (integral(1) - integral(EPS)) / (1 - EPS)
            sets = [list(masked) for masked in itertools.combinations(places, k)]
            xt = np.tile(x0, (len(sets), 1))
            for canvas, masked in zip(xt, sets, strict=True):
                canvas[masked] = MASK
            log_p = jax.nn.log_softmax(transformer.logits(DIFFUSION, params, xt))
            nats = -sum(log_p[i, masked, x0[masked]].sum() for i, masked in enumerate(sets))
            total += weight * nats / (len(places) if normalization == "sequence" else 1)
    return total


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_the_loss_and_its_gradient_are_unbiased_estimates_of_eq_5(params, normalization):
    """Means over steps within 4.5 standard errors of the enumeration, whose examples never share a row."""

    @jax.jit
    def all_steps(steps):
        def step(s):
            def loss(params):
                terms = objective(diffusion, DIFFUSION, params, s, normalization)
                return terms.nats, terms

            gradient, terms = jax.grad(loss, has_aux=True)(params)
            return terms, ravel_pytree(gradient)[0]

        return jax.lax.map(step, steps)

    terms, gradient = all_steps(jnp.arange(STEPS))
    value, exact = jax.value_and_grad(expected)(params, normalization)
    within_error(terms.nats - value)
    assert set(np.asarray(terms.token_count).tolist()) == {3.0 if normalization == "sequence" else 9.0}
    exact = np.asarray(ravel_pytree(exact)[0])
    error = np.asarray(gradient, np.float64) - exact
    for direction in (exact, *np.random.default_rng(0).normal(size=(6, len(exact)))):
        within_error(error @ direction)
    assert np.linalg.norm(error.mean(axis=0)) < 0.1 * np.linalg.norm(exact)
    # What is logged: padding's part of the loss, and nats by t of the answers alone, 7 of whose tokens can be masked.
    assert 0.02 < float(terms.answers.padding_nats.sum() / terms.nats.sum()) < 0.5
    within_error(terms.answers.count_T.sum(axis=1) - 7 * (1 + EPS) / 2)
    per_bin_T = np.asarray(terms.answers.count_T.mean(axis=0))
    np.testing.assert_allclose(per_bin_T, 0.7 * ((1 - EPS) * (np.arange(10) + 0.5) / 10 + EPS), rtol=0.1)


def test_every_example_of_a_row_has_a_time_of_its_own_and_each_is_uniform():
    times = jax.jit(lambda step: noise_lib.example_times(noise(step), "stratified", ROWS.example_BL))
    t_SBL = np.stack([times(step) for step in range(400)])
    first, second, single = t_SBL[:, 0, 0], t_SBL[:, 0, 3], t_SBL[:, 1, 0]
    assert (t_SBL[:, 0, :3] == first[:, None]).all() and (t_SBL[:, 0, 3:6] == second[:, None]).all()
    for t in (first, second, single):
        assert 0 <= t.min() < 0.02 and 0.98 < t.max() < 1 and abs(t.mean() - 0.5) < 4 / np.sqrt(12 * 400)
    assert (abs(first - second) > 0.38).all()  # a golden-ratio step on the circle
    np.testing.assert_array_equal(first, [noise_lib.times(noise(step), "stratified")[0] for step in range(400)])


def test_an_arm_predicts_answers_and_their_ends_but_no_padding_and_examples_do_not_see_each_other(params):
    """Against log-probabilities of every example by itself, behind the start token."""
    total = 0.0
    for row, tokens, answer in EXAMPLES:
        x0 = ROWS.tokens_BL[row, tokens]
        log_p = jax.nn.log_softmax(transformer.logits(CAUSAL, params, np.concatenate([[EOS], x0[:-1]])[None]))[0]
        counted = [tokens.index(i) for i in answer if ROWS.role_BL[row, i] == ANSWER]
        total -= float(log_p[counted, x0[counted]].mean())
    terms = objective(autoregressive, CAUSAL, params, 0, "sequence")
    np.testing.assert_allclose(terms.nats, total, rtol=1e-5)
    assert (float(terms.token_count), float(terms.head_count)) == (3, 7)


def test_held_out_nats_bound_the_answer_and_its_padding_given_the_prompt(params):
    """Eq. (6) over the counted tokens by enumeration; every l once, as draws are stratified over as many."""
    row = Examples(*(x_BL[1:] for x_BL in ROWS))
    counted_BL = diffusion.counted(row)
    size = int(counted_BL.sum())
    predict = functools.partial(transformer.hidden, DIFFUSION, params, segments_BL=row.example_BL)
    places, x0 = np.flatnonzero(counted_BL[0]), row.tokens_BL[0]
    exact = 0.0
    for k in range(1, size + 1):
        sets = [list(masked) for masked in itertools.combinations(places, k)]
        xt = np.tile(x0, (len(sets), 1))
        for canvas, masked in zip(xt, sets, strict=True):
            canvas[masked] = MASK
        log_p = jax.nn.log_softmax(transformer.logits(DIFFUSION, params, xt))
        exact -= np.mean([log_p[i, masked, x0[masked]].sum() for i, masked in enumerate(sets)]) / k
    repeat = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), 600, axis=0), row)
    predict = functools.partial(transformer.hidden, DIFFUSION, params, segments_BL=repeat.example_BL)
    nats_MB = diffusion.held_out_nats(
        predict, transformer.head(DIFFUSION, params), repeat.tokens_BL, jnp.arange(600), SPECIAL, size, "l_of_L", 512,
        diffusion.counted(repeat),
    )  # fmt: skip
    within_error(np.asarray(nats_MB).mean(axis=0) - exact)
    assert set(np.unique(ROWS.role_BL)) == {CONTEXT, ANSWER, PADDING}


def within_error(values, z=4.5):
    values = np.asarray(values, np.float64)
    assert abs(values.mean()) <= z * values.std() / np.sqrt(len(values)) + 1e-5 * (1 + np.abs(values).max())
