"""The compiled samplers against a plain step-by-step reading of the algorithm, and what they must never do."""

import jax
import numpy as np
import pytest

from llada.config import ModelConfig
from llada.inference import sampler
from llada.inference.sampler import SamplerConfig
from llada.model import transformer
from llada.objectives.autoregressive import shift_right
from llada.objectives.contract import SpecialTokens

V, MASK, EOS = 12, 3, 1
SPECIAL = SpecialTokens(mask=MASK, eos=EOS)
MODEL = ModelConfig(layers=2, width=16, heads=2, ffn=24, vocab_size=V, max_length=24, init_std=0.5, dtype="float32")
FORBIDDEN = np.isin(np.arange(V), [0, 2, MASK])


@pytest.fixture(scope="module")
def params():
    return transformer.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def canvas_BL():
    """Two rows with ten masks each, at different places."""
    canvas = np.random.default_rng(1).integers(4, V, (2, 16)).astype(np.int32)
    canvas[0, 4:14] = MASK
    canvas[1, [0, 1, 3, 5, 6, 7, 10, 11, 14, 15]] = MASK
    return canvas


def read_plainly(params, canvas_L, settings):
    """One row, greedy, low-confidence remasking (LLaDA Algorithm 5, integer quota), guided by Eq. (16) if asked."""
    tokens = canvas_L.copy()
    positions = np.flatnonzero(canvas_L == MASK)
    blocks = [positions[i : i + settings.block_length] for i in range(0, len(positions), settings.block_length)]
    steps = settings.steps // len(blocks)
    for block in blocks:
        base, extra = divmod(len(block), steps)
        for step in range(steps):
            logits = np.asarray(transformer.logits(MODEL, params, tokens[None]), np.float64)[0]
            if settings.cfg_scale:
                blind = np.full_like(tokens, MASK)
                blind[positions] = tokens[positions]
                without = np.asarray(transformer.logits(MODEL, params, blind[None]), np.float64)[0]
                logits = without + (settings.cfg_scale + 1) * (logits - without)
            logits[:, FORBIDDEN] = -np.inf
            probability = np.exp(logits - logits.max(axis=1, keepdims=True))
            probability /= probability.sum(axis=1, keepdims=True)
            still = [i for i in block if tokens[i] == MASK]
            still.sort(key=lambda i: -probability[i].max())
            for i in still[: base + (step < extra)]:
                tokens[i] = probability[i].argmax()
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        SamplerConfig(steps=10, block_length=10),
        SamplerConfig(steps=4, block_length=10),
        SamplerConfig(steps=9, block_length=4),
        SamplerConfig(steps=5, block_length=10, cfg_scale=1.5),
    ],
    ids=["one token a step", "quotas 3 3 2 2", "blocks of 4, 4, 2", "guided"],
)
def test_greedy_sampling_equals_the_plain_reading_token_for_token(params, canvas_BL, settings):
    got = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN)
    wanted = [read_plainly(params, row, settings) for row in canvas_BL]
    np.testing.assert_array_equal(got.tokens_BL, wanted)
    assert got.forward_passes == settings.steps * (2 if settings.cfg_scale else 1)


@pytest.mark.parametrize("remasking", sampler.REMASKING)
def test_context_stays_and_forbidden_ids_are_never_written(params, canvas_BL, remasking):
    settings = SamplerConfig(steps=6, block_length=5, temperature=3.0, remasking=remasking)
    for seed in range(5):
        got = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN, seed)
        tokens, steps = np.asarray(got.tokens_BL), np.asarray(got.step_BL)
        given = canvas_BL != MASK
        np.testing.assert_array_equal(tokens[given], canvas_BL[given])
        assert not FORBIDDEN[tokens[~given]].any()
        assert (steps[given] == -1).all() and set(steps[~given]) == set(range(6))
        for row in range(2):  # ten masks, two blocks, quotas 2 2 1 each: left block first
            filled = steps[row][~given[row]]
            assert filled[:5].max() < filled[5:].min()


def test_a_sample_does_not_depend_on_the_rows_behind_it(params, canvas_BL):
    settings = SamplerConfig(steps=10, block_length=10, temperature=1.0)
    both = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN, 7)
    alone = sampler.reverse_process(MODEL, params, canvas_BL[:1], settings, SPECIAL, FORBIDDEN, 7)
    np.testing.assert_array_equal(both.tokens_BL[0], alone.tokens_BL[0])
    other = sampler.reverse_process(MODEL, params, canvas_BL[:1], settings, SPECIAL, FORBIDDEN, 8)
    assert (np.asarray(other.tokens_BL) != np.asarray(alone.tokens_BL)).any()


def test_sampling_at_temperature_one_follows_the_models_law(params):
    """One open position: its law is the model's own, renormalised over the ids that may be written."""
    canvas = np.full((4000, 6), 5, np.int32)
    canvas[:, 2] = MASK
    settings = SamplerConfig(steps=1, block_length=1, temperature=1.0)
    got = sampler.reverse_process(MODEL, params, canvas, settings, SPECIAL, FORBIDDEN)
    logits = np.asarray(transformer.logits(MODEL, params, canvas[:1]))[0, 2].astype(np.float64)
    law = np.where(FORBIDDEN, 0, np.exp(logits - logits.max()))
    law /= law.sum()
    counts = np.bincount(np.asarray(got.tokens_BL)[:, 2], minlength=V)
    expected = law * len(canvas)
    used = expected > 5
    assert used.sum() >= 3
    chi_square = np.sum((counts[used] - expected[used]) ** 2 / expected[used])
    assert chi_square < 30  # nine ids at most: P < 5e-4


def test_the_arms_greedy_text_equals_the_plain_reading(params):
    causal = ModelConfig(**{**vars(MODEL), "causal": True})
    prompt = np.array([[5, 6, 7]], np.int32)
    canvas = np.concatenate([prompt, np.full((1, 8), MASK, np.int32)], axis=1)
    got = sampler.ancestral(causal, params, canvas, 3, SPECIAL, FORBIDDEN, temperature=0.0)
    tokens = prompt[0].tolist()
    for _ in range(8):
        inputs = shift_right(np.array([[*tokens, 0]], np.int32), EOS)
        logits = np.asarray(transformer.logits(causal, params, inputs))[0, -1]
        tokens.append(int(np.where(FORBIDDEN, -np.inf, logits).argmax()))
    assert np.asarray(got.tokens_BL)[0].tolist() == tokens
    assert got.forward_passes == 8
