"""The equations of the paper against brute force: three ordinary tokens, three positions, a real Transformer.

Small enough that every mask, every order and every text can be enumerated, so the expected values here are sums written
down from the paper, in float64, and nothing is compared with itself.
"""

import functools
import itertools
import math
from typing import NamedTuple

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
from llada.objectives.contract import SpecialTokens
from llada.objectives.noise import Noise

L = 3
MASK = 3  # ids 0, 1, 2 are ordinary
SPECIAL = SpecialTokens(mask=MASK, eos=2)
# A wide init makes predictions far from uniform: a wrong weight or a wrong mask then shows.
DIFFUSION = ModelConfig(layers=1, width=8, heads=2, ffn=16, vocab_size=4, max_length=L, init_std=0.7, dtype="float32")
CAUSAL = ModelConfig(**{**vars(DIFFUSION), "causal": True})
HEAD_ROWS = 32
TEXTS = np.array(list(itertools.product(range(3), repeat=L)), np.int32)  # all 27
CANVASES = np.array(list(itertools.product(range(4), repeat=L)), np.int32)  # all 64, masks included


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(transformer.init, DIFFUSION))(jax.random.key(1))


@pytest.fixture(scope="module")
def log_p(params):
    """`log_p[canvas][i, v]` = log p(x_i = v | canvas), float64, for each of the 64 canvases."""
    logits = jax.jit(functools.partial(transformer.logits, DIFFUSION))(params, CANVASES)
    logits = np.asarray(logits, np.float64)
    table = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    assert np.exp(table).max() > 0.9  # far from uniform, or the tests below prove little
    return table.reshape(4, 4, 4, L, 4)


def conditional_nats(log_p, x0, masked) -> float:
    """Sum of -log p(x0_i | x_t) over the masked i, x_t being x0 with `masked` replaced."""
    canvas = tuple(MASK if i in masked else int(x0[i]) for i in range(L))
    return -sum(log_p[canvas][i, x0[i]] for i in masked)


def bound(log_p, x0) -> float:
    """LLaDA Eq. (6): E over l ~ U{1..L} and the C(L, l) sets of l positions, of L/l x nats."""
    total = 0.0
    for size in range(1, L + 1):
        sets = list(itertools.combinations(range(L), size))
        total += L / size * np.mean([conditional_nats(log_p, x0, masked) for masked in sets]) / L
    return total


def order_nats(log_p, x0, order) -> float:
    """-log of the chain-rule product that reveals positions in `order`."""
    return sum(-log_p[_revealed(x0, order[:k])][order[k], x0[order[k]]] for k in range(L))


def _revealed(x0, positions):
    return tuple(int(x0[i]) if i in positions else MASK for i in range(L))


def test_bounds_over_counts_over_times_and_over_orders_are_equal_and_above_the_exact_likelihood(log_p):
    """Eqs. (3), (6) and (15) are one number; by Jensen it is at least -log of the order-averaged likelihood."""
    gaps = []
    for x0 in TEXTS:
        eq6 = bound(log_p, x0)
        # Eq. (3): integral over t of 1/t sum over masks of t^k (1-t)^(L-k) x nats; the t part is Beta(k, L-k+1).
        eq3 = 0.0
        for size in range(1, L + 1):
            beta = math.factorial(size - 1) * math.factorial(L - size) / math.factorial(L)
            eq3 += beta * sum(conditional_nats(log_p, x0, masked) for masked in itertools.combinations(range(L), size))
        orders = [order_nats(log_p, x0, order) for order in itertools.permutations(range(L))]
        np.testing.assert_allclose(eq3, eq6, atol=1e-5)
        np.testing.assert_allclose(np.mean(orders), eq6, atol=1e-4)
        exact = -np.log(np.mean(np.exp(-np.array(orders))))
        assert eq6 >= exact - 1e-4
        gaps.append(eq6 - exact)
    assert max(gaps) > 0.1  # strictly above: this model's orders disagree


class Draws(NamedTuple):
    text: np.ndarray  # (rows,) index into TEXTS
    exact: np.ndarray  # (rows,) enumerated bound
    nats: dict[str, np.ndarray]  # estimator -> (draws, rows)


@pytest.fixture(scope="module")
def draws(params, log_p) -> Draws:
    repeats, M = 128, 16
    text = np.tile(np.arange(len(TEXTS)), repeats)
    rows = jnp.arange(len(text))

    @functools.partial(jax.jit, static_argnums=2)
    def estimate(x0_BL, row_B, estimator):
        predict = functools.partial(transformer.hidden, DIFFUSION, params)
        head = transformer.head(DIFFUSION, params)
        return diffusion.held_out_nats(predict, head, x0_BL, row_B, SpecialTokens(MASK, 0), M, estimator, 4096)

    nats = {name: np.asarray(estimate(TEXTS[text], rows, name), np.float64) for name in diffusion.ESTIMATORS}
    part = slice(100, 111)
    np.testing.assert_allclose(  # a row's draws depend on its id, not on the batch it is in
        estimate(TEXTS[text[part]], rows[part], "l_of_L"), nats["l_of_L"][:, part], rtol=1e-4, atol=1e-4
    )
    return Draws(text, np.array([bound(log_p, x0) for x0 in TEXTS])[text], nats)


@pytest.mark.parametrize("estimator", diffusion.ESTIMATORS)
def test_each_evaluation_draw_is_an_unbiased_estimate_of_the_enumerated_bound(draws, estimator):
    """Eq. (4) and Eq. (6), per text over all draws and per draw over all texts: within 4 standard errors."""
    error_MB = draws.nats[estimator] - draws.exact
    error_B = error_MB.mean(axis=0)  # the draws of a row share a shift; rows are independent
    for text in range(len(TEXTS)):
        assert_mean_is_zero(error_B[draws.text == text])
    for error in error_MB:
        assert_mean_is_zero(error)
    assert_mean_is_zero(error_B)
    assert abs(error_B.mean()) < 0.02 * draws.exact.mean()


def test_masking_a_fixed_count_has_lower_variance_and_stratified_draws_lower_it_further(draws):
    """Why evaluation uses Eq. (6); and its M draws per row are worth more than M independent ones."""

    def variance(nats_MB):
        row = nats_MB.mean(axis=0)
        return np.mean([row[draws.text == text].var() for text in range(len(TEXTS))])

    for some in (slice(1), slice(None)):
        assert variance(draws.nats["l_of_L"][some]) < 0.5 * variance(draws.nats["bernoulli"][some])
    single = np.mean([variance(nats_MB[None]) for nats_MB in draws.nats["l_of_L"]])
    assert variance(draws.nats["l_of_L"]) < 0.9 * single / len(draws.nats["l_of_L"])


class Training(NamedTuple):
    nats: np.ndarray  # (steps,)
    token_count: np.ndarray
    head_nats: np.ndarray
    head_count: np.ndarray
    gradient: np.ndarray  # (steps, parameters)


EPS = 1e-3
STEPS = 2000


@pytest.fixture(scope="module")
def training(params):
    """`diffusion.loss` and its gradient on the batch of all 27 texts, at 2000 steps' noise."""

    @functools.cache
    def run(time_sampling: str, fraction: float) -> Training:
        config = ObjectiveConfig(
            eps=EPS, time_sampling=time_sampling, random_length_fraction=fraction, head_rows=HEAD_ROWS
        )
        B = len(TEXTS)

        def loss(params, step):
            predict = functools.partial(transformer.hidden, DIFFUSION, params)
            head = transformer.head(DIFFUSION, params)
            terms = diffusion.loss(predict, head, jnp.asarray(TEXTS), Noise(7, step, jnp.arange(B), B), SPECIAL, config)
            return terms.nats, terms

        def step(s):
            gradient, terms = jax.grad(loss, has_aux=True)(params, s)
            return *terms[:4], ravel_pytree(gradient)[0]

        out = jax.jit(lambda steps: jax.lax.map(step, steps))(jnp.arange(STEPS))
        return Training(*(np.asarray(a, np.float64) for a in out))

    return run


P = Polynomial([0, 1])  # the probability of masking, uniform on [eps, 1]


def mean_over_p(polynomial: Polynomial) -> float:
    integral = polynomial.integ()
    return (integral(1) - integral(EPS)) / (1 - EPS)


def enumerated_loss(params, fraction):
    """The expectation of `diffusion.loss` on TEXTS as a differentiable sum over lengths n and masks of n positions.

    A mask of k of n positions has probability p^k (1-p)^(n-k) and weight 1/p.
    """
    lengths, masks, weights = [], [], []
    for n in range(1, L + 1):
        for k in range(1, n + 1):
            for masked in itertools.combinations(range(n), k):
                lengths.append(n)
                masks.append([i in masked for i in range(L)])
                weights.append(mean_over_p(P ** (k - 1) * (1 - P) ** (n - k)))
    lengths, masks = np.array(lengths), np.array(masks)
    coefficients = np.array(weights) * (fraction / L + (1 - fraction) * (lengths == L))
    canvas = np.where(masks[:, None, :], MASK, TEXTS)
    target = np.broadcast_to(TEXTS, canvas.shape)
    logits = transformer.logits(DIFFUSION, params, canvas.reshape(-1, L), np.repeat(lengths, len(TEXTS)))
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), target.reshape(-1, L, 1), axis=-1).reshape(canvas.shape)
    return jnp.sum(coefficients[:, None, None] * masks[:, None, :] * nats)


@pytest.fixture(scope="module")
def enumerated_gradient():
    return jax.jit(jax.value_and_grad(enumerated_loss))


@pytest.mark.parametrize(
    ("time_sampling", "fraction"), [("iid", 0.0), ("stratified", 0.0), ("stratified", 0.5)], ids=str
)
def test_training_loss_and_its_gradient_are_unbiased(
    training, enumerated_gradient, params, log_p, time_sampling, fraction
):
    """Eq. (3) with the published eps, whole and randomly cut: value, token count, head rows and every gradient leaf."""
    run = training(time_sampling, fraction)
    value, gradient = enumerated_gradient(params, fraction)
    assert_mean_is_zero(run.nats - float(value))
    mean_length = (1 - fraction) * L + fraction * (1 + L) / 2
    assert_mean_is_zero(run.token_count - len(TEXTS) * mean_length)
    assert_mean_is_zero(run.head_count - len(TEXTS) * mean_length * (1 + EPS) / 2)
    if fraction == 0:
        unweighted = sum(
            mean_over_p(P**k * (1 - P) ** (L - k)) * conditional_nats(log_p, x0, masked)
            for x0 in TEXTS for k in range(1, L + 1) for masked in itertools.combinations(range(L), k)
        )  # fmt: skip
        assert_mean_is_zero(run.head_nats - unweighted)
        # The enumeration itself, against the float64 one: eps moves the bound by less than a percent.
        np.testing.assert_allclose(value, sum(bound(log_p, x0) for x0 in TEXTS), rtol=1e-2)

    rng = np.random.default_rng(0)
    exact = np.asarray(ravel_pytree(gradient)[0], np.float64)
    leaf_of = np.concatenate([np.full(leaf.size, i) for i, leaf in enumerate(jax.tree.leaves(gradient))])
    for leaf in range(leaf_of.max() + 1):
        here = leaf_of == leaf
        assert np.linalg.norm(exact[here]) > 0
        # Along the true gradient a wrong weight shows; along random directions a wrong direction does.
        for direction in (exact[here], *rng.normal(size=(3, here.sum()))):
            assert_mean_is_zero((run.gradient[:, here] - exact[here]) @ direction)
    error = run.gradient.mean(axis=0) - exact
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(exact)


def test_stratified_times_lower_the_variance_that_times_bring(log_p):
    """The reason for the default: E[loss | t] of eight equal texts, exact for every t, varies less over steps.

    The variance that masks bring on top is the same either way, and most of the whole on three tokens.
    """
    size = np.arange(1, L + 1)
    nats_of_size = np.array(  # (texts, sizes)
        [[sum(conditional_nats(log_p, x0, m) for m in itertools.combinations(range(L), k)) for k in size]
         for x0 in TEXTS]
    )  # fmt: skip
    B = 8
    variance = {}
    for sampling in ("iid", "stratified"):
        times = jax.vmap(lambda step, how=sampling: noise_lib.times(Noise(7, step, jnp.arange(B), B), how))
        t = np.asarray(times(jnp.arange(500)), np.float64)
        expected = np.einsum("sbk,xk->sx", t[..., None] ** (size - 1) * (1 - t[..., None]) ** (L - size), nats_of_size)
        variance[sampling] = expected.var(axis=0).mean()
    assert variance["stratified"] < 2 / B * variance["iid"], variance  # 1 / B where E[loss | t] is linear in t


def test_autoregressive_nats_are_the_chain_rule_and_their_probabilities_sum_to_one(params):
    """Eq. (1): exact and normalised over all 4^3 rows; each factor sees the end-of-text token and the tokens before."""
    logits = jax.jit(functools.partial(transformer.logits, CAUSAL))

    @jax.jit
    def nats_of(rows):
        predict = functools.partial(transformer.hidden, CAUSAL, params)
        head = transformer.head(CAUSAL, params)
        return autoregressive.row_nats(predict, head, rows, None, SPECIAL, HEAD_ROWS)

    total, nats_BL = nats_of(CANVASES)
    nats_BL = np.asarray(nats_BL, np.float64)
    probability = np.exp(-nats_BL.sum(axis=1))
    np.testing.assert_allclose(probability.sum(), 1, atol=1e-4)
    assert probability.max() > 5 / 64
    np.testing.assert_allclose(total, nats_BL.sum(), rtol=1e-5)
    for i in range(L):  # shorter inputs hold nothing but what the factor may see
        inputs = np.concatenate([np.full((64, 1), SPECIAL.eos), CANVASES[:, :i]], axis=1)
        log_q = jax.nn.log_softmax(logits(params, inputs)[:, -1])
        np.testing.assert_allclose(nats_BL[:, i], -log_q[np.arange(64), CANVASES[:, i]], atol=1e-4)


def assert_mean_is_zero(samples: np.ndarray) -> None:
    """Within 4 standard errors. The noise is a fixed function of its seed: a pass stays a pass."""
    stderr = samples.std(ddof=1) / math.sqrt(len(samples))
    assert abs(samples.mean()) <= 4 * stderr + 1e-6, (samples.mean(), stderr)
