"""Texts under samplers and orders, against full enumeration: three ordinary tokens, three open positions.

Expected values are products and sums written down in float64 over a table of the model's laws on every canvas: 27 texts
of each sampler, and the mean over all six orders that bounds lie on either side of.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import likelihood, mask_plans, orders, sampler
from llada.inference.likelihood import LikelihoodConfig, Pair
from llada.inference.settings import SamplerConfig
from llada.model import cached, transformer
from llada.objectives.contract import SpecialTokens

L, MASK, PROMPT = 3, 3, (1, 0)
SPECIAL = SpecialTokens(mask=MASK, eos=2)
MODEL = ModelConfig(layers=1, width=8, heads=2, ffn=16, vocab_size=4, max_length=8, init_std=0.7, dtype="float32")
CANVASES = list(itertools.product(range(4), repeat=L))
TEXTS = list(itertools.product(range(3), repeat=L))
SAMPLES = 20_000
CHI_SQUARE = 56.4  # the 0.9995 quantile with 26 degrees of freedom


@pytest.fixture(scope="module")
def params():
    return transformer.init(MODEL, jax.random.key(1))


@pytest.fixture(scope="module")
def logits(params):
    """`logits[canvas]` of all four ids at the three open positions, and those of canvases without their prompt."""

    def read(prompt):
        rows = np.array([(*prompt, *canvas) for canvas in CANVASES], np.int32)
        values = np.asarray(transformer.logits(MODEL, params, rows), np.float64)[:, len(PROMPT) :]
        return dict(zip(CANVASES, values, strict=True))

    return read(PROMPT), read([MASK] * len(PROMPT))


def law(logits, canvas, w=0.0, temperature=1.0, ids=slice(0, 3)):
    """Log-probabilities over `ids`, guided."""
    given, blind = (table[canvas] for table in logits)
    x = ((1 + w) * given - w * blind)[:, ids] / temperature
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def log_p_of(logits, text, s: LikelihoodConfig):
    """log p(text), by the sampler's rule: per step the positions of the highest top probability, all tokens at once."""
    size = s.block_length or L
    blocks = [range(i, min(i + size, L)) for i in range(0, L, size)]
    steps = (s.steps or len(blocks) * size) // len(blocks)
    canvas, total = (MASK,) * L, 0.0
    for block in blocks:
        for left in range(steps, 0, -1):
            masked = [i for i in block if canvas[i] == MASK]
            top = law(logits, canvas, s.cfg_scale).max(axis=-1)
            chosen = sorted(masked, key=lambda i, top=top: -top[i])[: math.ceil(len(masked) / left)]
            if s.confidence_threshold:
                chosen += [i for i in masked if top[i] >= math.log(s.confidence_threshold) and i not in chosen]
            drawn_from = law(logits, canvas, s.cfg_scale, s.temperature)
            total += sum(drawn_from[i, text[i]] for i in chosen)
            canvas = tuple(text[i] if i in chosen else canvas[i] for i in range(L))
    return total


SETTINGS = [
    LikelihoodConfig(estimator="sampler"),
    LikelihoodConfig(estimator="sampler", steps=2),
    LikelihoodConfig(estimator="sampler", steps=2, block_length=2, cfg_scale=0.8),
    LikelihoodConfig(estimator="sampler", confidence_threshold=0.6, temperature=0.7),
    LikelihoodConfig(estimator="sampler", block_length=2, confidence_threshold=0.5),
]


@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: str({k: v for k, v in vars(s).items() if v}))
def test_a_sampler_draws_texts_with_the_probability_of_their_scores(params, logits, s):
    """Scores are those written by hand, sum to 1, and 20,000 texts of the sampler itself come as often."""
    pairs = [Pair(PROMPT, text) for text in TEXTS]
    found = likelihood.log_likelihoods(MODEL, params, pairs, SPECIAL, s)
    scores = np.array([f.log_likelihood for f in found])
    np.testing.assert_allclose(scores, [log_p_of(logits, text, s) for text in TEXTS], rtol=1e-4, atol=1e-5)
    assert abs(np.exp(scores).sum() - 1) < 1e-6
    assert {(f.stderr, f.draws, f.kind) for f in found} == {(0.0, 0, "exact under its sampler")}

    size = s.block_length or L
    chosen = SamplerConfig(
        steps=s.steps or size * -(-L // size),
        block_length=size,
        temperature=s.temperature,
        cfg_scale=s.cfg_scale,
        remasking="top_probability",
        confidence_threshold=s.confidence_threshold,
    )
    canvas_BL = np.full((SAMPLES, len(PROMPT) + L), MASK, np.int32)
    canvas_BL[:, : len(PROMPT)] = PROMPT
    drawn = sampler.reverse_process(MODEL, params, canvas_BL, chosen, SPECIAL, np.zeros(4, bool), seed_B=17)
    counts = np.bincount(drawn.tokens_BL[:, len(PROMPT) :] @ [9, 3, 1], minlength=27)
    wanted = SAMPLES * np.exp(scores)
    order = np.argsort(wanted)
    rare = order[: np.searchsorted(np.cumsum(wanted[order]), 5) + 1]  # together expected at least five times
    observed = np.append(np.delete(counts, rare), counts[rare].sum())
    expected = np.append(np.delete(wanted, rare), wanted[rare].sum())
    assert np.sum((observed - expected) ** 2 / expected) < CHI_SQUARE

    # The scorer goes through a text in the steps that wrote it.
    some = slice(0, 27)
    order = orders.order_for(L, s.steps, s.block_length, s.temperature, s.cfg_scale, s.confidence_threshold, False)[0]
    unstacked, open_BL = cached.for_decoding(params), canvas_BL[some] == MASK
    at = orders.scored(MODEL, SPECIAL, np.array([MASK]), order, unstacked, drawn.tokens_BL[some], open_BL, None)
    np.testing.assert_array_equal(at[1], drawn.step_BL[some])


def test_settings_are_other_distributions(logits):
    """Or the cases above could not tell them apart."""
    for one, other in itertools.combinations(SETTINGS, 2):
        p, q = ([math.exp(log_p_of(logits, text, s)) for text in TEXTS] for s in (one, other))
        assert 0.5 * np.abs(np.subtract(p, q)).sum() > 0.01, (one, other)


def test_at_temperature_0_both_rankings_are_one(params):
    canvas_BL = np.array([(*prompt, MASK, MASK, MASK) for prompt in itertools.product(range(3), repeat=2)], np.int32)
    texts = [
        sampler.reverse_process(
            MODEL,
            params,
            canvas_BL,
            SamplerConfig(steps=2, block_length=3, remasking=remasking),
            SPECIAL,
            np.zeros(4, bool),
        )
        for remasking in ("low_confidence", "top_probability")
    ]
    np.testing.assert_array_equal(texts[0].tokens_BL, texts[1].tokens_BL)
    np.testing.assert_array_equal(texts[0].step_BL, texts[1].step_BL)


def any_order(logits, text):
    """`log_p_S` of the six orders that LLaDA Eq. (15) is a mean of: the chain rule over all ids, in each of them."""
    found = []
    for order in itertools.permutations(range(L)):
        canvas, total = [MASK] * L, 0.0
        for i in order:
            total += law(logits, tuple(canvas), ids=slice(0, 4))[i, text[i]]
            canvas[i] = text[i]
        found.append(total)
    return np.array(found)


def test_the_mean_over_all_orders_lies_between_the_bounds(params, logits):
    """For all 27 texts: bound <= log of the mean of the six products <= the tangent, whatever orders it is taken at."""
    pairs = [Pair(PROMPT, text) for text in TEXTS]
    below = likelihood.log_likelihoods(MODEL, params, pairs, SPECIAL, LikelihoodConfig(draws=7))
    gaps = []
    for text, bound in zip(TEXTS, below, strict=True):
        log_p_S = any_order(logits, text)
        marginal = np.logaddexp.reduce(log_p_S) - math.log(6)
        assert bound.stderr == 0 and bound.log_likelihood < marginal + 1e-5
        np.testing.assert_allclose(bound.log_likelihood, log_p_S.mean(), rtol=1e-4, atol=1e-4)
        # What OrdersPlan estimates of two drawn orders, for all 36 that they can be: its mean is the upper bound.
        plan = mask_plans.OrdersPlan(np.zeros((18, 3), bool), np.zeros((18, 3), bool), np.zeros((2, 3), int))
        drawn = []
        for one, other in itertools.product(log_p_S, repeat=2):
            nats_R = np.array([-one, 0, 0, -other, 0, 0])
            value, stderr = plan._replace(row_MA=np.arange(6).reshape(2, 3)).estimate(nats_R)
            np.testing.assert_allclose(-value, one - 1 + math.exp(other - one), atol=1e-9)
            assert math.isnan(stderr)
            drawn.append(-value)
        assert np.mean(drawn) >= marginal - 1e-9
        gaps.append((marginal - bound.log_likelihood, np.mean(drawn) - marginal))
    assert np.min(np.max(gaps, axis=0)) > 0.01  # neither bound is the value itself


def test_the_upper_bound_is_estimated_from_the_orders_drawn(params, logits):
    """256 orders: the first half sets psi, the second estimates p / psi; equal steps of orders are computed once."""
    s = LikelihoodConfig(estimator="upper", draws=256)
    found = likelihood.log_likelihoods(MODEL, params, [Pair(PROMPT, text) for text in TEXTS], SPECIAL, s)
    plan = mask_plans.make_plan(Pair(PROMPT, TEXTS[0]), "upper", 256, MASK)
    scored_MA = plan.scored_RA[plan.row_MA]
    assert (scored_MA.sum(axis=2) == 1).all() and (scored_MA.sum(axis=1) == 1).all()
    order_MA = scored_MA.argmax(axis=2)
    np.testing.assert_array_equal(plan.masked_RA[plan.row_MA][:, 1], order_MA[:, :1] != np.arange(L)[None])
    index = {order: i for i, order in enumerate(itertools.permutations(range(L)))}
    of_order_M = [index[tuple(order)] for order in order_MA.tolist()]
    shares = np.bincount(of_order_M, minlength=6) / 256
    assert np.abs(shares - 1 / 6).max() < 4 * math.sqrt(5 / 36 / 256)
    for text, f in zip(TEXTS, found, strict=True):
        p_S = np.exp(any_order(logits, text))
        p_M = p_S[of_order_M]
        psi, rest = p_M[:128].mean(), p_M[128:]
        np.testing.assert_allclose(f.log_likelihood, math.log(psi) - 1 + rest.mean() / psi, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(f.stderr, rest.std(ddof=1) / psi / math.sqrt(128), rtol=1e-3, atol=1e-6)
        assert f.log_likelihood > math.log(p_S.mean()) - 5 * f.stderr - 1e-4
        assert (f.draws, f.rows, f.kind) == (256, 12, "bound from below")


def test_a_score_under_a_sampler_does_not_depend_on_its_batch(params):
    """Answers of four lengths under two tokens a step, alone and in batches of any size; rows count the steps."""
    config = dataclasses.replace(MODEL, max_length=32)
    rng = np.random.default_rng(0)
    pairs = [Pair(rng.integers(0, 3, p).tolist(), rng.integers(0, 3, a).tolist()) for p, a in ((0, 4), (3, 5), (2, 7))]
    s = LikelihoodConfig(estimator="sampler", steps=4, batch_tokens=64)
    together = likelihood.log_likelihoods(config, params, pairs, SPECIAL, s)
    assert [f.rows for f in together] == [4, 4, 4] and likelihood.passes(s, 7) == 4
    small = dataclasses.replace(s, batch_tokens=8)
    for pair, f in zip(pairs, together, strict=True):
        alone = likelihood.log_likelihoods(config, params, [pair], SPECIAL, small)[0]
        np.testing.assert_allclose(f.log_likelihood, alone.log_likelihood, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(temperature=0.0), "--temperature=0.0: .* above 0"),
        (dict(steps=4), "--steps=4 is more than the 3 positions"),
        (dict(steps=3, block_length=2), "--steps=3 must be a positive multiple of the 2 block"),
        (dict(block_length=4), "--block_length=4 must be between 1 and the 3 open"),
        (dict(confidence_threshold=1.5), "--confidence_threshold=1.5"),
        (dict(estimator="chain_rule", steps=3), "--steps=3 is for --estimator=sampler; chain_rule"),
        (dict(estimator="confidence_ordered", temperature=0.5), "--temperature=0.5 is for --estimator=sampler"),
        (dict(estimator="upper", draws=1), "--draws=1 must be at least 2 for --estimator=upper"),
    ],
)
def test_what_has_no_such_likelihood_is_refused(params, changes, words):
    settings = LikelihoodConfig(**{"estimator": "sampler"} | changes)
    with pytest.raises(UserError, match=words):
        likelihood.log_likelihoods(MODEL, params, [Pair(PROMPT, (0, 1, 2))], SPECIAL, settings)


def test_a_text_that_the_sampler_never_writes_is_refused(params):
    forbidden_V = np.array([False, False, True, False])
    s = LikelihoodConfig(estimator="sampler")
    pairs = [Pair(PROMPT, text) for text in itertools.product(range(2), repeat=3)]
    found = likelihood.log_likelihoods(MODEL, params, pairs, SPECIAL, s, forbidden_V=forbidden_V)
    assert abs(sum(math.exp(f.log_likelihood) for f in found) - 1) < 1e-6  # over what it can write
    with pytest.raises(UserError, match="token 2 stands in an answer, and samplers never write it"):
        likelihood.log_likelihoods(MODEL, params, [Pair(PROMPT, (0, 1, 2))], SPECIAL, s, forbidden_V=forbidden_V)
