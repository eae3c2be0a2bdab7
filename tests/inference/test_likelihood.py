"""Likelihoods against brute force: four ordinary tokens, a real Transformer, every mask and every order enumerated.

Expected values are sums written down from the paper in float64, over a table of the model's laws on every canvas.
Shapes: as in `likelihood`; S masks of one answer, N digests (as many prompts that mask differently).
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llada import mesh as mesh_lib
from llada.config import MeshConfig, ModelConfig
from llada.errors import UserError
from llada.inference import likelihood, mask_plans
from llada.inference.likelihood import LikelihoodConfig, Pair
from llada.model import transformer
from llada.objectives import diffusion
from llada.objectives.autoregressive import shift_right
from llada.objectives.contract import SpecialTokens
from llada.objectives.estimates import stratified_variance

V, MASK, EOS, BOS = 5, 3, 2, 0
ORDINARY = (0, 1, 2, 4)
SPECIAL = SpecialTokens(mask=MASK, eos=EOS)
# Wide parameters make predictions far from uniform: a wrong weight or a wrong mask then shows.
MODEL = ModelConfig(layers=2, width=16, heads=2, ffn=24, vocab_size=V, max_length=48, init_std=0.7, dtype="float32")
CAUSAL = dataclasses.replace(MODEL, causal=True)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)

    def normal(path, leaf):
        return np.float32(MODEL.init_std * rng.normal(size=leaf.shape) + ("norm" in str(path[-1])))

    return jax.tree_util.tree_map_with_path(normal, transformer.abstract_parameters(MODEL))


logits = jax.jit(transformer.logits, static_argnums=0)


def log_laws(config, params, rows_BL, guided_by=None, w=0.0) -> np.ndarray:
    """log softmax of the logits of each row, float64; with a second set of rows, of un + (1 + w) (c - un)."""

    def read(rows_BL):
        few_shapes = np.resize(np.array(rows_BL, np.int32), (128, len(rows_BL[0])))
        return np.asarray(logits(config, params, few_shapes), np.float64)[: len(rows_BL)]

    logits_BLV = read(rows_BL)
    if w:
        without_BLV = read(guided_by)
        logits_BLV = without_BLV + (1 + w) * (logits_BLV - without_BLV)
    return logits_BLV - np.log(np.sum(np.exp(logits_BLV), axis=-1, keepdims=True))


def laws_given(params, prompt, canvases, w=0.0) -> dict:
    """`log_p[canvas][i, v]` = log p(answer token i = v | prompt, canvas); `w` guides against the prompt masked."""
    rows = [[*prompt, *canvas] for canvas in canvases]
    blind = [[MASK] * len(prompt) + list(canvas) for canvas in canvases]
    log_p = log_laws(MODEL, params, rows, blind, w)[:, len(prompt) :]
    return dict(zip(canvases, log_p, strict=True))


def with_masks(answer, masked) -> tuple:
    return tuple(MASK if i in masked else token for i, token in enumerate(answer))


def all_masks(A) -> list[tuple]:
    """Every set of positions but the empty one."""
    return [masked for size in range(1, A + 1) for masked in itertools.combinations(range(A), size)]


def nats(log_p, answer, masked) -> float:
    """Sum of -log p(a_i | what is not masked) over the masked i."""
    return -sum(log_p[with_masks(answer, masked)][i, answer[i]] for i in masked)


def bound(log_p, answer) -> float:
    """LLaDA Eq. (6): E over l ~ U{1..A} and the C(A, l) sets of l positions, of A/l x nats."""
    A = len(answer)
    return np.mean(
        [
            np.mean([A / size * nats(log_p, answer, masked) for masked in itertools.combinations(range(A), size)])
            for size in range(1, A + 1)
        ]
    )


def left_to_right(log_p, answer) -> float:
    """-log of the chain rule: a_i given the answer before it, the rest masked."""
    A = len(answer)
    return -sum(log_p[with_masks(answer, range(i, A))][i, answer[i]] for i in range(A))


def most_confident_first(log_p, answer) -> float:
    """-log of the chain rule that reveals where the most likely ordinary token has the highest probability.

    Probabilities are those the sampler ranks by, without the mask token; the leftmost of equals.
    """
    masked, total = set(range(len(answer))), 0.0
    while masked:
        law = log_p[with_masks(answer, masked)]
        confidence = law[:, ORDINARY].max(axis=1) - np.log(np.exp(law[:, ORDINARY]).sum(axis=1))
        best = min(i for i in masked if confidence[i] > max(confidence[list(masked)]) - 1e-5)
        total -= law[best, answer[best]]
        masked.remove(best)
    return total


def right_to_left(log_p, answer) -> float:
    """-log of the chain rule from the end: a_i given the answer behind it, the rest masked."""
    return -sum(log_p[with_masks(answer, range(i + 1))][i, answer[i]] for i in range(len(answer)))


BY_HAND = {
    "l_of_L": bound,
    "chain_rule": left_to_right,
    "chain_rule_reversed": right_to_left,
    "confidence_ordered": most_confident_first,
}


@pytest.mark.parametrize("w", [0.0, 1.5])
@pytest.mark.parametrize("estimator", BY_HAND)
def test_every_answer_to_a_prompt_has_the_likelihood_enumerated_by_hand(params, estimator, w):
    """All 64 answers of three tokens. The prompt is never masked but in the branch that guidance leaves it out of."""
    prompt = (1, 2)  # one whose order of confidence changes if the mask token counts
    config = dataclasses.replace(MODEL, max_length=5)  # full, and less than rows are padded to
    log_p = laws_given(params, prompt, list(itertools.product(range(V), repeat=3)), w)
    assert max(np.exp(law).max() for law in log_p.values()) > 0.9  # far from uniform, or this proves little
    answers = list(itertools.product(ORDINARY, repeat=3))
    settings = LikelihoodConfig(estimator=estimator, draws=7, cfg_scale=w, batch_tokens=2048)
    found = likelihood.log_likelihoods(config, params, [Pair(prompt, a) for a in answers], SPECIAL, settings)
    by_hand = {name: np.array([-value(log_p, answer) for answer in answers]) for name, value in BY_HAND.items()}
    np.testing.assert_allclose([f.log_likelihood for f in found], by_hand[estimator], rtol=1e-4, atol=1e-4)
    for name in BY_HAND:  # they are different numbers here
        assert name == estimator or np.abs(by_hand[name] - by_hand[estimator]).max() > 0.1
    rows = 7 if estimator == "l_of_L" else 3
    assert {(f.stderr, f.tokens, f.estimator, f.draws, f.rows) for f in found} == {(0.0, 3, estimator, 0, rows)}


@pytest.mark.parametrize("estimator", likelihood.ESTIMATORS)
def test_one_draw_is_exact_for_one_token(params, estimator):
    prompt = (4, 0)
    log_p = laws_given(params, prompt, [(MASK,)])[(MASK,)]
    pairs = [Pair(prompt, [token]) for token in ORDINARY]
    found = likelihood.log_likelihoods(MODEL, params, pairs, SPECIAL, LikelihoodConfig(estimator=estimator, draws=1))
    written = np.log(np.exp(log_p[0, ORDINARY]).sum()) if estimator == "sampler" else 0.0  # it writes no mask
    np.testing.assert_allclose([f.log_likelihood for f in found], log_p[0, ORDINARY] - written, rtol=1e-4, atol=1e-4)
    assert {(f.stderr, f.tokens, f.rows) for f in found} == {(0.0, 1, 1)}


@pytest.mark.parametrize("estimator", diffusion.ESTIMATORS)
def test_masks_that_come_up_twice_are_computed_once_and_count_twice(params, estimator):
    """Thirty draws of 31 masks: the plain mean over draws. Another answer meets the same masks: a paired comparison."""
    prompt, answers, M, A = (4, 1, 0), [(0, 2, 1, 4, 4), (1, 1, 2, 0, 4)], 30, 5
    settings = LikelihoodConfig(estimator=estimator, draws=M)
    found = likelihood.log_likelihoods(MODEL, params, [Pair(prompt, a) for a in answers], SPECIAL, settings)
    digest, length = mask_plans._mask_key(Pair(prompt, answers[0]))
    assert length == A
    masked_MA, weight_M = mask_plans._masks_of(M, 8, estimator, MASK, digest, A)
    masked_M = [tuple(np.flatnonzero(masked_A)) for masked_A in np.asarray(masked_MA)]
    assert len(set(masked_M)) < M
    for answer, result in zip(answers, found, strict=True):
        log_p = laws_given(params, prompt, [with_masks(answer, masked) for masked in all_masks(A)])
        draws = [float(weight) * nats(log_p, answer, masked) for masked, weight in zip(masked_M, weight_M, strict=True)]
        steps = [(draws[m + 1] - draws[m]) ** 2 for m in range(M - 1)]
        np.testing.assert_allclose(result.log_likelihood, -sum(draws) / M, rtol=1e-4)
        np.testing.assert_allclose(result.stderr, math.sqrt(sum(steps) / (2 * (M - 1)) / M), rtol=1e-4)
        assert (result.draws, result.rows) == (M, len(set(masked_M)))


A, M, N = 6, 16, 4000  # 63 masks: sixteen draws are not all of them


class Drawn(NamedTuple):
    mask_NM: np.ndarray  # as an integer: bit i is answer token i
    weight_NM: np.ndarray


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawn]:
    """The sixteen masks of 4000 prompts' digests."""
    digests = np.random.default_rng(0).integers(0, 2**31, N).astype(np.int32)
    found = {}
    for estimator in diffusion.ESTIMATORS:
        masks_of = jax.vmap(lambda digest, how=estimator: mask_plans._masks_of(M, 8, how, MASK, digest, A))
        masked_NMA, weight_NM = (np.asarray(x) for x in jax.jit(masks_of)(digests))
        assert not masked_NMA[..., A:].any()
        found[estimator] = Drawn(masked_NMA[..., :A] @ (1 << np.arange(A)), weight_NM.astype(np.float64))
    return found


@pytest.fixture(scope="module")
def table(params):
    """`nats_S[mask]` of one pair for all 2^6 masks, and its bound."""
    prompt, answer = (0, 0), (1, 4, 1, 4, 1, 2)
    log_p = laws_given(params, prompt, [with_masks(answer, masked) for masked in all_masks(A)])
    nats_S = np.zeros(2**A)
    for masked in all_masks(A):
        nats_S[sum(1 << i for i in masked)] = nats(log_p, answer, masked)
    return nats_S, bound(log_p, answer)


SIZE_S = np.array([bin(mask).count("1") for mask in range(2**A)])
CHOOSE_S = np.array([math.comb(A, size) for size in SIZE_S])


@pytest.mark.parametrize("estimator", diffusion.ESTIMATORS)
def test_the_drawn_masks_are_an_unbiased_estimate_of_the_bound(drawn, table, estimator):
    """For this pair; and for any other, since every mask alone has the weight that Eq. (6) gives it."""
    nats_S, expected = table
    mask_NM, weight_NM = drawn[estimator]
    assert_mean(np.mean(weight_NM * nats_S[mask_NM], axis=1), expected)
    for mask in range(1, 2**A):
        assert_mean(np.mean(weight_NM * (mask_NM == mask), axis=1), 1 / (SIZE_S[mask] * CHOOSE_S[mask]))
    # Draw m lies in the m-th of M slices of [0, 1): l of L tells u to within 1/L, t is u.
    some_NM, size_NM = mask_NM > 0, SIZE_S[mask_NM]
    low_NM = high_NM = 1 / np.where(some_NM, weight_NM, 1)
    if estimator == "l_of_L":
        low_NM, high_NM = (size_NM - 1) / A, size_NM / A
    inside_NM = (low_NM * M < np.arange(1, M + 1) + 1e-4) & (high_NM * M > np.arange(M) - 1e-4)
    assert inside_NM[some_NM].all()
    assert some_NM.all() == (estimator == "l_of_L")
    assert not weight_NM[~some_NM].any()


def variances(law_SU, value_SU) -> tuple[float, float]:
    """Exact variance of the mean of M draws: u stratified by one shift, and u independent. u is a fine grid of [0, 1).

    `law_SU`, `value_SU`: the probability of each mask given u, and what a draw is worth then.
    """
    mean_U = np.sum(law_SU * value_SU, axis=0)
    within_U = np.sum(law_SU * value_SU**2, axis=0) - mean_U**2
    of_shifts = mean_U.reshape(M, -1).mean(axis=0).var()
    return within_U.mean() / M + of_shifts, within_U.mean() / M + mean_U.var() / M


def test_l_of_L_stratified_is_the_estimator_of_least_variance(drawn, table):
    """Against its exact variance, against independent draws of l, and against weights 1/t, stratified and not.

    Weights 1/t have no variance to compare with: E[(nats/t)^2] has a term int 1/t dt, which diverges at 0 and on which
    stratified times have no hold. What they remove is the variance of E[nats/t | t]: a few percent of the rest even
    where t < 1e-3 is left out, less than 4000 estimates show. So the spread of 95 % of the estimates is compared as
    well, and that times are stratified is seen in nats without a weight.
    """
    nats_S, _ = table
    u_U = (np.arange(M * 600) + 0.5) / (M * 600)
    count_U = 1 + (u_U * A).astype(int)
    fixed_SU = (SIZE_S[:, None] == count_U) / CHOOSE_S[:, None]
    free_SU = u_U ** SIZE_S[:, None] * (1 - u_U) ** (A - SIZE_S[:, None])

    estimate = {name: np.mean(weight * nats_S[mask], axis=1) for name, (mask, weight) in drawn.items()}
    rng = np.random.default_rng(1)
    t_NM1 = rng.uniform(size=(N, M, 1))
    mask_NM = (rng.uniform(size=(N, M, A)) < t_NM1) @ (1 << np.arange(A))
    estimate["independent t"] = np.mean(nats_S[mask_NM] / t_NM1[..., 0], axis=1)
    variance = {name: x.var() for name, x in estimate.items()}
    spread = {name: np.subtract(*np.quantile(x, [0.975, 0.025])) for name, x in estimate.items()}
    print(f"variance: {variance}\n95 % of estimates: {spread}")

    stratified, independent = variances(fixed_SU, A / count_U * nats_S[:, None])
    print(f"exact variance of l_of_L: {stratified}, of independent l: {independent}")
    np.testing.assert_allclose(variance["l_of_L"], stratified, rtol=0.1)
    assert variance["l_of_L"] < 0.6 * independent
    for other in ("bernoulli", "independent t"):
        assert variance["l_of_L"] < 0.2 * variance[other] and spread["l_of_L"] < 0.5 * spread[other]

    stratified, independent = variances(free_SU, nats_S[:, None] * np.ones_like(u_U))
    unweighted = np.mean(nats_S[drawn["bernoulli"].mask_NM], axis=1).var()
    np.testing.assert_allclose(unweighted, stratified, rtol=0.1)
    assert unweighted < 0.6 * independent


def test_the_standard_error_is_that_of_the_estimate(drawn, table):
    """From neighbouring draws it is calibrated; the spread of all draws would count the trend over l as noise."""
    nats_S, _ = table
    mask_NM, weight_NM = (x[:1000] for x in drawn["l_of_L"])
    draws_NM = weight_NM * nats_S[mask_NM]
    true = draws_NM.mean(axis=1).std(ddof=1)
    reported = math.sqrt(np.mean([stratified_variance(draws_M, circular=False) for draws_M in draws_NM]))
    naive = math.sqrt(np.mean(draws_NM.var(axis=1, ddof=1) / M))
    print(f"standard deviation of the estimate {true}, reported {reported}, from the spread of all draws {naive}")
    assert 0.8 * true < reported < 1.2 * true < naive
    assert math.isnan(stratified_variance(draws_NM[0, :1], circular=False))


def random_ids(rng, count) -> list[int]:
    return rng.choice(ORDINARY, count).tolist()


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Twelve pairs of mixed lengths; three share a prompt, two of these the answer's length."""
    rng = np.random.default_rng(5)
    # Rows are padded to 8 or 24 tokens, so that few shapes are compiled.
    lengths = [(0, 1), (1, 20), (2, 5), (20, 1), (0, 18), (5, 2), (12, 8), (13, 5), (0, 5)]
    found = [Pair(random_ids(rng, p), random_ids(rng, a)) for p, a in lengths]
    prompt = random_ids(rng, 3)
    for where, a in ((2, 4), (5, 4), (11, 18)):
        found.insert(where, Pair(prompt, random_ids(rng, a)))
    return found


@pytest.mark.parametrize("estimator", ["l_of_L", "confidence_ordered"])
def test_a_score_does_not_depend_on_the_batch_it_was_computed_in(params, pairs, estimator):
    """Alone, in batches of any size and order, and on a mesh; scores come in the order asked."""

    def score(pairs, batch_tokens=8192, progress=None):
        settings = LikelihoodConfig(estimator=estimator, draws=4, batch_tokens=batch_tokens)
        return likelihood.log_likelihoods(MODEL, params, pairs, SPECIAL, settings, progress)

    alone = [score([pair])[0] for pair in pairs]
    assert [one.tokens for one in alone] == [len(pair.answer) for pair in pairs]
    assert np.diff(np.sort([one.log_likelihood for one in alone])).min() > 0.01  # an exchange would show

    def assert_as_alone(found, alone=alone):
        assert [one[2:] for one in found] == [one[2:] for one in alone]
        np.testing.assert_allclose([f[:2] for f in found], [f[:2] for f in alone], rtol=1e-4, atol=1e-4)

    calls = []
    assert_as_alone(score(pairs, 96))
    assert_as_alone(score(pairs[::-1], 96)[::-1])
    assert_as_alone(score(pairs, 32, lambda *call: calls.append(call)))
    with jax.set_mesh(mesh_lib.make(MeshConfig(), jax.devices()[:1])):
        assert_as_alone(score(pairs[2:4], 64), alone[2:4])
    total = len(pairs) if estimator == "confidence_ordered" else sum(one.rows for one in alone)
    assert calls == sorted(set(calls)) and calls[-1] == (total, total) and len(calls) > 4


def test_where_all_positions_are_equally_confident_the_order_starts_at_the_left(params):
    """Nothing but masks is to be seen: without a prompt every position has one law, and the first step is a tie."""
    log_p = laws_given(params, (), list(itertools.product(range(V), repeat=3)))
    blank = log_p[(MASK,) * 3]
    np.testing.assert_allclose(blank, blank[[0, 0, 0]], atol=1e-5)
    answers = list(itertools.product(ORDINARY, repeat=3))
    by_hand = [-most_confident_first(log_p, answer) for answer in answers]
    for batch_tokens in (8, 8192):
        settings = LikelihoodConfig(estimator="confidence_ordered", batch_tokens=batch_tokens)
        found = likelihood.log_likelihoods(MODEL, params, [Pair([], answer) for answer in answers], SPECIAL, settings)
        np.testing.assert_allclose([f.log_likelihood for f in found], by_hand, rtol=1e-4, atol=1e-4)


def test_masks_depend_on_the_prompt_and_the_length_of_the_answer_only():
    key = mask_plans._mask_key(Pair([1, 4], [0, 0, 1]))
    assert key == mask_plans._mask_key(Pair(np.array([1, 4], np.int32), (4, 2, 2)))
    others = [Pair([4, 1], [0, 0, 1]), Pair([], [0, 0, 1]), Pair([1], [4, 0, 0]), Pair([1, 4], [0, 0])]
    assert len({key, *map(mask_plans._mask_key, others)}) == 5


def read_causally(params, pair, start=EOS) -> float:
    """LLaDA Eq. (1) of the answer: each token from the end-of-text token and all tokens before it, unpadded."""
    row = np.array([[*pair.prompt, *pair.answer]], np.int32)
    log_p = log_laws(CAUSAL, params, shift_right(row, start))[0]
    assert log_p.shape[0] == row.shape[1]
    return sum(log_p[i, row[0, i]] for i in range(len(pair.prompt), row.shape[1]))


def test_an_arms_likelihood_is_the_sum_over_its_answer_of_the_causal_laws(params, pairs):
    """Rows of 5, 7 and 21 tokens, in two batches."""
    pairs = [pair for pair in pairs if len(pair.prompt) + len(pair.answer) in (5, 7, 21)]
    found = likelihood.log_likelihoods(CAUSAL, params, pairs, SPECIAL)
    by_hand = [read_causally(params, pair) for pair in pairs]
    np.testing.assert_allclose([f.log_likelihood for f in found], by_hand, rtol=1e-4, atol=1e-4)
    assert {(f.stderr, f.estimator, f.draws, f.rows) for f in found} == {(0.0, "exact", 0, 1)}
    assert [f.tokens for f in found] == [len(pair.answer) for pair in pairs]


def test_an_arms_rolling_likelihood_is_the_sum_over_windows_in_context(params):
    """Three and a half windows of four tokens, each given the three before it that a context of seven has room for.

    The model is one that was imported: its texts begin with a token of their own, and it has no mask token.
    """
    special = SpecialTokens(mask=None, eos=EOS, bos=BOS)
    config = dataclasses.replace(CAUSAL, max_length=7)
    text = random_ids(np.random.default_rng(3), 14)
    windows = [Pair(text[first:start], text[start : start + 4]) for first, start in ((0, 0), (1, 4), (5, 8), (9, 12))]
    found = likelihood.rolling(config, params, text, special, window=4)
    by_hand = sum(read_causally(params, pair, BOS) for pair in windows)
    np.testing.assert_allclose(found.log_likelihood, by_hand, rtol=1e-4)
    assert found[1:] == (0.0, 14, "exact", 0, 4)
    assert likelihood.rolling(config, params, text, special).rows == 5  # half the context is three
    # One window, and three that see all that came before them: both are the text's own likelihood.
    for length, window in ((4, 4), (5, 2)):
        found = likelihood.rolling(config, params, text[:length], special, window=window)
        whole = likelihood.log_likelihoods(config, params, [Pair([], text[:length])], special)[0].log_likelihood
        np.testing.assert_allclose(found.log_likelihood, whole, rtol=1e-4)
        np.testing.assert_allclose(found.log_likelihood, read_causally(params, Pair([], text[:length]), BOS), rtol=1e-4)


def test_rolling_adds_the_bounds_of_windows_and_their_variances(params):
    text = random_ids(np.random.default_rng(3), 7)
    windows = [Pair([], text[:3]), Pair(text[:3], text[3:6], salt=3), Pair(text[:6], text[6:], salt=6)]
    # Four draws are fewer than the masks of three tokens and more than the one of the last.
    settings = LikelihoodConfig(draws=4, batch_tokens=32)
    parts = likelihood.log_likelihoods(MODEL, params, windows, SPECIAL, settings)
    assert [part.stderr > 0 for part in parts] == [True, True, False]
    found = likelihood.rolling(MODEL, params, text, SPECIAL, settings, window=3)
    np.testing.assert_allclose(found.log_likelihood, sum(part.log_likelihood for part in parts), rtol=1e-4)
    np.testing.assert_allclose(found.stderr, math.hypot(*(part.stderr for part in parts)), rtol=1e-3)
    assert found[2:] == (7, "l_of_L", 4, sum(part.rows for part in parts))


def test_windows_are_drawn_independently(params):
    """One text twice, in two windows with nothing before either: drawn independently, their estimates differ."""
    config = dataclasses.replace(MODEL, max_length=7)
    text = random_ids(np.random.default_rng(3), 7)
    settings = LikelihoodConfig(draws=4, batch_tokens=32)
    one = likelihood.log_likelihoods(config, params, [Pair([], text)], SPECIAL, settings)[0]
    two = likelihood.rolling(config, params, text * 2, SPECIAL, settings, window=7)
    same_draws = abs(two.log_likelihood - 2 * one.log_likelihood) < 1e-3
    # Either other draws, or errors that add because they are one error twice.
    assert not same_draws or math.isclose(two.stderr, 2 * one.stderr, rel_tol=1e-3)


FULL = Pair([0] * 40, [1] * 8)
GOOD = Pair([0, 1], [4, 4])


@pytest.mark.parametrize(
    ("pair", "changes", "words"),
    [
        (Pair([0, 1], []), {}, "--answer is empty"),
        (Pair([0] * 41, [1] * 8), {}, r"49 tokens .* model\.max_length=48.*--rolling"),
        (Pair([0, -1], [1]), {}, "run from -1 to 1; .* 0 to 4"),
        (Pair([0], [1, V]), {}, "run from 0 to 5; .* 0 to 4"),
        (Pair([0, MASK], [1]), {}, "mask token 3 stands in the text"),
        (Pair([0], [1, MASK]), {}, "mask token 3 stands in the text"),
        (GOOD, {"draws": 0}, "--draws=0 must be at least 1"),
        (GOOD, {"draws": 65_537}, "--draws=65537 must be .* at most 65536"),
        (GOOD, {"draws": 2.5}, "--draws=2.5 must be a whole number"),
        (GOOD, {"draws": True}, "--draws=True must be a whole number"),
        (GOOD, {"batch_tokens": 0}, "--batch_tokens=0 must be at least 1"),
        (GOOD, {"estimator": None}, "--estimator=None must be text"),
        (GOOD, {"cfg_scale": "1"}, "--cfg_scale='1' must be a number"),
        (GOOD, {"cfg_scale": 1e39}, "--cfg_scale=1e[+]39 must not be negative, and at most"),
        (GOOD, {"cfg_scale": -0.5}, "--cfg_scale=-0.5 must not be negative"),
        (GOOD, {"cfg_scale": math.nan}, "--cfg_scale=nan must not be negative"),
        (GOOD, {"estimator": "exact"}, "--estimator=exact is not one of l_of_L, bernoulli, chain_rule, chain_rule_rev"),
        (GOOD, {"cfg_scale": 0.5, "causal": True}, "--cfg_scale=0.5 needs a diffusion model.*ARM"),
        (GOOD, {"estimator": "chain_rule", "causal": True}, "--estimator=chain_rule .* ARM's likelihood is exact"),
        (Pair([0], []), {"causal": True}, "--answer is empty"),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_what_cannot_be_scored_is_refused_before_anything_is(params, pair, changes, words):
    config = CAUSAL if changes.get("causal") else MODEL
    settings = LikelihoodConfig(**{k: v for k, v in changes.items() if k != "causal"})
    calls = []
    with pytest.raises(UserError, match=words):
        likelihood.log_likelihoods(
            config, params, [FULL, GOOD, pair], SPECIAL, settings, lambda *call: calls.append(call)
        )
    assert not calls
    likelihood.check_settings(config, LikelihoodConfig())
    for good in (FULL, GOOD):  # it was the one thing wrong
        likelihood.check_pair(config, good, SPECIAL)


@pytest.mark.parametrize("window", [0, -4, 49])
def test_a_window_must_fit_the_context(params, window):
    with pytest.raises(UserError, match=rf"--window={window} must be between 1 and model\.max_length=48"):
        likelihood.rolling(MODEL, params, [0, 1], SPECIAL, window=window)
    with pytest.raises(UserError, match="--answer is empty"):
        likelihood.rolling(MODEL, params, [], SPECIAL)


def test_no_pairs_have_no_likelihoods(params):
    assert likelihood.log_likelihoods(MODEL, params, [], SPECIAL) == []


def assert_mean(samples: np.ndarray, expected: float) -> None:
    """Within 4 standard errors. The noise is a fixed function of its seed: a pass stays a pass."""
    stderr = samples.std(ddof=1) / math.sqrt(len(samples))
    assert abs(samples.mean() - expected) <= 4 * stderr + 1e-6, (samples.mean(), expected, stderr)
