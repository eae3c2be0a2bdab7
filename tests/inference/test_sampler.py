"""The compiled samplers against a plain step-by-step reading of the algorithm, and what they must never do."""

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest

from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import choice, compiled_loop, sampler
from llada.inference import settings as settings_lib
from llada.inference.ancestral import ancestral
from llada.inference.settings import SamplerConfig
from llada.model import cached, transformer
from llada.objectives.autoregressive import shift_right
from llada.objectives.contract import SpecialTokens

V, MASK, EOS, BOS = 12, 3, 1, 6
SPECIAL = SpecialTokens(mask=MASK, eos=EOS, eot=4)
MODEL = ModelConfig(layers=2, width=16, heads=2, ffn=24, vocab_size=V, max_length=24, init_std=0.5, dtype="float32")
# One layer: keys and values depend on a position's own token only, so no cache is stale before its position changes.
SHALLOW = ModelConfig(**{**vars(MODEL), "layers": 1})
CAUSAL = ModelConfig(**{**vars(MODEL), "causal": True, "kv_heads": 1})
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


@jax.jit
def logits_of(params, tokens_BL):
    return transformer.logits(MODEL, params, tokens_BL)


def read_plainly(params, canvas_L, settings):
    """One row, greedy, low-confidence remasking (LLaDA Algorithm 5, integer quota), guided by Eq. (16) if asked."""
    tokens = canvas_L.copy()
    positions = np.flatnonzero(canvas_L == MASK)
    blocks = [positions[i : i + settings.block_length] for i in range(0, len(positions), settings.block_length)]
    steps = settings.steps // len(blocks)
    for block in blocks:
        base, extra = divmod(len(block), steps)
        for step in range(steps):
            logits = np.asarray(logits_of(params, tokens[None]), np.float64)[0]
            if settings.cfg_scale:
                blind = np.full_like(tokens, MASK)
                blind[positions] = tokens[positions]
                without = np.asarray(logits_of(params, blind[None]), np.float64)[0]
                logits = without + (settings.cfg_scale + 1) * (logits - without)
            logits[:, FORBIDDEN] = -np.inf
            if settings.eos == "no_logits":
                logits[:, list(SPECIAL.ends)] = -np.inf
            probability = np.exp(logits - logits.max(axis=1, keepdims=True))
            probability /= probability.sum(axis=1, keepdims=True)
            guess = probability.argmax(axis=1)
            confidence = probability.max(axis=1)
            if settings.eos == "no_confidence":
                confidence[np.isin(guess, SPECIAL.ends)] = 0
            still = [i for i in block if tokens[i] == MASK]
            still.sort(key=lambda i: -confidence[i])
            kept = still[: base + (step < extra)]
            if settings.confidence_threshold is not None:
                kept = still[:1] + [i for i in still[1:] if confidence[i] >= settings.confidence_threshold]
            tokens[kept] = guess[kept]
    return tokens


PLAIN = {
    "one token a step": SamplerConfig(steps=10, block_length=10),
    "quotas 3 3 2 2": SamplerConfig(steps=4, block_length=10),
    "blocks of 4, 4, 2": SamplerConfig(steps=9, block_length=4),
    "autoregressive order": SamplerConfig(steps=10, block_length=1),
    "guided": SamplerConfig(steps=5, block_length=10, cfg_scale=1.5),
    "no end tokens": SamplerConfig(steps=10, block_length=5, eos="no_logits"),
    "end tokens last": SamplerConfig(steps=10, block_length=5, eos="no_confidence"),
    "threshold": SamplerConfig(steps=10, block_length=5, confidence_threshold=0.3),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", PLAIN)
def test_greedy_sampling_equals_the_plain_reading_token_for_token(params, canvas_BL, name):
    settings = PLAIN[name]
    got = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN)
    wanted = [read_plainly(params, row, settings) for row in canvas_BL]
    np.testing.assert_array_equal(got.tokens_BL, wanted)
    if settings.confidence_threshold is None:
        sizes = [min(settings.block_length, 10 - start) for start in range(0, 10, settings.block_length)]
        passes = sum(min(size, settings.steps // len(sizes)) for size in sizes)  # a full block needs no further step
        assert got.forward_passes == passes * (2 if settings.cfg_scale else 1)
    else:
        assert got.forward_passes < settings.steps


def test_the_end_token_rules_change_this_models_texts(params, canvas_BL):
    """Or the two cases above would prove nothing."""
    found = {
        eos: sampler.reverse_process(
            MODEL, params, canvas_BL, SamplerConfig(steps=10, block_length=5, eos=eos), SPECIAL, FORBIDDEN
        )
        for eos in settings_lib.EOS
    }
    assert np.isin(found["keep"].tokens_BL[canvas_BL == MASK], SPECIAL.ends).any()
    assert (found["keep"].step_BL != found["no_confidence"].step_BL).any()
    hot = SamplerConfig(steps=10, block_length=5, eos="no_logits", temperature=5.0)
    got = sampler.reverse_process(MODEL, params, np.repeat(canvas_BL, 20, 0), hot, SPECIAL, FORBIDDEN)
    assert not np.isin(got.tokens_BL[np.repeat(canvas_BL, 20, 0) == MASK], SPECIAL.ends).any()


def test_temperatures_that_float32_cannot_divide_by_are_zero(params, canvas_BL):
    """The least and the largest that it can divide by are used: no noise is seen, and nothing but noise."""
    for temperature in (1e-38, 1e-320, 1e-31):
        cold = dataclasses.replace(PLAIN["one token a step"], temperature=temperature)
        got = sampler.reverse_process(MODEL, params, canvas_BL, cold, SPECIAL, FORBIDDEN)
        greedy = sampler.reverse_process(MODEL, params, canvas_BL, PLAIN["one token a step"], SPECIAL, FORBIDDEN)
        np.testing.assert_array_equal(got.tokens_BL, greedy.tokens_BL)
        np.testing.assert_array_equal(got.step_BL, greedy.step_BL)
    hidden_RD = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    head_VD = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    forbidden_F, data_R2 = np.array([2, 5]), jax.random.key_data(jax.random.split(jax.random.key(0), 500))
    rows = jax.jit(choice._choose_rows, static_argnums=3)
    greedy_R, cold_R, hot_R = (rows(hidden_RD, head_VD, forbidden_F, t, data_R2)[0] for t in (0.0, 1e-30, 1e30))
    np.testing.assert_array_equal(cold_R, greedy_R)
    counts = np.bincount(hot_R, minlength=8)
    assert (counts[forbidden_F] == 0).all() and counts[[0, 1, 3, 4, 6, 7]].min() > 50


def test_the_time_that_an_observer_takes_is_not_sampling_time():
    seen = []

    def observe(tokens_BL, step_BL, step):
        seen.append((tokens_BL.tolist(), step))
        time.sleep(0.1)

    @jax.jit
    def loop(tokens_BL):
        for step in range(3):
            compiled_loop.report(observe, tokens_BL, tokens_BL, step)
        return tokens_BL, tokens_BL, 3

    start = time.perf_counter()
    sample = compiled_loop.timed(loop, np.arange(6).reshape(2, 3))
    elapsed = time.perf_counter() - start
    assert seen == [([[0, 1, 2], [3, 4, 5]], step) for step in range(3)]
    assert 0 < sample.seconds < elapsed - sample.compile_seconds - 0.29


@pytest.mark.parametrize("remasking", settings_lib.REMASKING)
def test_context_stays_and_forbidden_ids_are_never_written(params, canvas_BL, remasking):
    settings = SamplerConfig(steps=6, block_length=5, temperature=3.0, remasking=remasking)
    for seed in range(5):
        got = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN, seed)
        given = canvas_BL != MASK
        np.testing.assert_array_equal(got.tokens_BL[given], canvas_BL[given])
        assert not FORBIDDEN[got.tokens_BL[~given]].any()
        assert (got.step_BL[given] == -1).all() and set(got.step_BL[~given]) <= set(range(6))
        for row in range(2):  # ten masks, two blocks: left block first
            filled = got.step_BL[row][~given[row]]
            assert filled[:5].max() <= 2 < filled[5:].min()
            if remasking != "random_binomial":
                assert np.bincount(filled).tolist() == [2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize(
    "settings",
    [
        SamplerConfig(steps=6, block_length=6, temperature=1.0),
        SamplerConfig(steps=4, block_length=3, temperature=1.0, remasking="random", cfg_scale=0.7),
        SamplerConfig(steps=6, block_length=6, temperature=0.8, remasking="random_binomial"),
        SamplerConfig(steps=6, block_length=3, temperature=1.0, cache="dual", confidence_threshold=0.5),
        SamplerConfig(steps=6, block_length=2, temperature=1.0, cache="prefix"),
    ],
    ids=["pure", "guided blocks", "binomial", "dual cache, threshold", "prefix cache"],
)
def test_a_sample_does_not_depend_on_its_batch(params, settings):
    """Prompts of different lengths padded into one batch, the shortest again alone and unpadded: the same tokens.

    No empty prompt: on a canvas of masks alone all positions have the same logits, and rounding alone ranks them.
    """
    rng = np.random.default_rng(2)
    prompts = [rng.integers(5, V, n).astype(np.int32) for n in (1, 10, 7)]
    rows = [np.concatenate([prompt, np.full(6, MASK, np.int32)]) for prompt in prompts]
    lengths_B, seed_B = np.array([len(row) for row in rows]), np.array([7, 8, 9])
    canvas_BL = np.full((3, 16), 5, np.int32)
    for row, canvas_L in zip(rows, canvas_BL, strict=True):
        canvas_L[: len(row)] = row
    together = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN, seed_B, lengths_B)
    row = rows[0]
    alone = sampler.reverse_process(MODEL, params, row[None], settings, SPECIAL, FORBIDDEN, seed_B[:1])
    np.testing.assert_array_equal(together.tokens_BL[0, : len(row)], alone.tokens_BL[0])
    np.testing.assert_array_equal(together.step_BL[0, : len(row)], alone.step_BL[0])
    other = sampler.reverse_process(MODEL, params, row[None], settings, SPECIAL, FORBIDDEN, 100)
    assert (other.tokens_BL[0] != together.tokens_BL[0, : len(row)]).any()


def test_a_canvas_of_masks_alone_begins_at_the_left_whatever_pads_it(params):
    """Nothing is to be seen, so all positions have one law; tokens behind the canvas are not to be seen either."""
    canvas_BL = np.full((4, 16), 5, np.int32)
    for row, length in zip(canvas_BL, (6, 7, 10, 16), strict=True):
        row[length - 6 : length] = MASK
    canvas_BL[1, 0] = MASK  # seven masks
    settings = SamplerConfig(steps=7, block_length=7)
    got = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN, 0, np.array([6, 7, 10, 16]))
    assert got.step_BL[:2, 0].tolist() == [0, 0]


def test_sampling_at_temperature_one_follows_the_models_law(params):
    """One open position: its law is the model's own, renormalised over the ids that may be written."""
    canvas = np.full((4000, 6), 5, np.int32)
    canvas[:, 2] = MASK
    settings = SamplerConfig(steps=1, block_length=1, temperature=1.0)
    got = sampler.reverse_process(MODEL, params, canvas, settings, SPECIAL, FORBIDDEN)
    logits = np.asarray(logits_of(params, canvas[:1]))[0, 2].astype(np.float64)
    law = np.where(FORBIDDEN, 0, np.exp(logits - logits.max()))
    law /= law.sum()
    counts = np.bincount(got.tokens_BL[:, 2], minlength=V)
    expected = law * len(canvas)
    used = expected > 5
    assert used.sum() >= 3
    chi_square = np.sum((counts[used] - expected[used]) ** 2 / expected[used])
    assert chi_square < 30  # nine ids at most: P < 5e-4


@pytest.mark.parametrize(
    "settings",
    [
        SamplerConfig(steps=10, block_length=5),
        SamplerConfig(steps=10, block_length=10, cfg_scale=1.5),
        SamplerConfig(steps=10, block_length=5, confidence_threshold=0.5),
        SamplerConfig(steps=10, block_length=10, temperature=0.7),
        SamplerConfig(steps=6, block_length=5, temperature=0.3, remasking="random_binomial"),
    ],
    ids=["greedy", "guided", "threshold", "drawn", "binomial"],
)
def test_speculation_changes_passes_and_nothing_else(params, canvas_BL, settings):
    """Rows advance each at its own speed, and every position is filled at the step of the plain process."""
    lengths_B = np.array([16, 16])
    plain = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN, 3, lengths_B)
    ahead = dataclasses.replace(settings, speculate=3)
    quick = sampler.reverse_process(MODEL, params, canvas_BL, ahead, SPECIAL, FORBIDDEN, 3, lengths_B)
    np.testing.assert_array_equal(quick.tokens_BL, plain.tokens_BL)
    np.testing.assert_array_equal(quick.step_BL, plain.step_BL)
    assert quick.forward_passes < plain.forward_passes


@pytest.mark.parametrize("cache, cfg_scale", [("prefix", 0.0), ("dual", 1.2)])
def test_caches_change_nothing_where_nothing_is_approximated(params, canvas_BL, cache, cfg_scale):
    """One layer (no state depends on other tokens), or one step per block (no pass is a cached one)."""
    shallow = transformer.init(SHALLOW, jax.random.key(5))
    deep = dict(steps=5, block_length=2)
    for config, weights, options in ((SHALLOW, shallow, dict(steps=9, block_length=4)), (MODEL, params, deep)):
        texts = [
            sampler.reverse_process(
                config,
                weights,
                canvas_BL,
                SamplerConfig(cache=kind, cfg_scale=cfg_scale, temperature=0.7, **options),
                SPECIAL,
                FORBIDDEN,
                3,
                np.array([16, 16]) if kind == cache else None,
            )
            for kind in ("none", cache)
        ]
        np.testing.assert_array_equal(texts[0].tokens_BL, texts[1].tokens_BL)
        assert texts[0].forward_passes == texts[1].forward_passes


@pytest.mark.parametrize("config", [MODEL, CAUSAL], ids=["bidirectional", "causal, grouped"])
def test_a_fresh_cache_gives_the_states_of_a_whole_pass(config):
    """Some positions computed anew against the cache of the same tokens; one query off the canvas changes nothing."""
    weights = transformer.init(config, jax.random.key(2))
    tokens_BL = np.random.default_rng(3).integers(0, V, (3, 10)).astype(np.int32)
    lengths_B = np.array([10, 7, 9])
    prefill, hidden = (jax.jit(f, static_argnums=0) for f in (cached.prefill, transformer.hidden))
    whole, cache = prefill(config, weights, tokens_BL, lengths_B)
    np.testing.assert_allclose(whole, hidden(config, weights, tokens_BL, lengths_B), atol=5e-6)
    position_BQ = np.array([[2, 5, 10], [0, 6, 10], [8, 1, 10]])
    tokens_BQ = np.take_along_axis(tokens_BL, np.minimum(position_BQ, 9), axis=1)
    extend = jax.jit(functools.partial(cached.extend, config))
    some, renewed = extend(weights, tokens_BQ, position_BQ, cache, lengths_B)
    expected = np.take_along_axis(np.asarray(whole), position_BQ[:, :2, None], axis=1)
    np.testing.assert_allclose(some[:, :2], expected, atol=5e-6)
    for before, after in zip(cache, renewed, strict=True):
        np.testing.assert_allclose(before, after, atol=5e-6)


def test_the_arms_greedy_text_equals_the_plain_reading():
    """Cached, with prompts of different lengths in one batch, an empty one among them; text stops at an end token.

    The model is one that was imported: its texts begin with a token of their own, and it has no mask token.
    """
    weights, special = transformer.init(CAUSAL, jax.random.key(9)), SPECIAL._replace(mask=None, bos=BOS)
    prompts, ended = [[], [5, 6, 7], [8, 9, 10, 11, 5]], 0
    canvas_BL = np.full((3, 13), MASK, np.int32)
    for row, prompt in zip(canvas_BL, prompts, strict=True):
        row[: len(prompt)] = prompt
    given = (CAUSAL, weights, canvas_BL, np.array([0, 3, 5]), special, FORBIDDEN)
    got = ancestral(*given, temperature=0.0)
    np.testing.assert_array_equal(ancestral(*given, temperature=1e-38).tokens_BL, got.tokens_BL)
    logits_of = jax.jit(lambda tokens_BL: transformer.logits(CAUSAL, weights, shift_right(tokens_BL, BOS)))
    for b, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(8):
            padded = np.array([tokens + [0] * (13 - len(tokens))], np.int32)  # later tokens are not seen
            logits = np.asarray(logits_of(padded))[0, len(tokens)]
            tokens.append(int(np.where(FORBIDDEN, -np.inf, logits).argmax()))
            if tokens[-1] in SPECIAL.ends:
                tokens += [EOS] * (len(prompt) + 8 - len(tokens))
                ended += 1
                break
        assert got.tokens_BL[b, : len(prompt) + 8].tolist() == tokens
    assert got.forward_passes == 8 and 0 < ended < 3


def test_the_arms_samples_do_not_depend_on_their_batch():
    weights = transformer.init(CAUSAL, jax.random.key(9))
    canvas_BL = np.full((2, 12), MASK, np.int32)
    canvas_BL[0, :2], canvas_BL[1, :5] = [5, 6], [7, 8, 9, 10, 11]
    both = ancestral(CAUSAL, weights, canvas_BL, np.array([2, 5]), SPECIAL, FORBIDDEN, 1.0, np.array([3, 3]))
    alone = ancestral(CAUSAL, weights, canvas_BL[:1, :9], np.array([2]), SPECIAL, FORBIDDEN, 1.0, np.array([3]))
    np.testing.assert_array_equal(both.tokens_BL[0, :9], alone.tokens_BL[0])
    np.testing.assert_array_equal(both.step_BL[0, :9], alone.step_BL[0])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(steps=0), ["--steps=0"]),
        (dict(block_length=0), ["--block_length=0"]),
        (dict(steps=7, block_length=4), ["--steps=7", "3 block(s)"]),
        (dict(temperature=float("nan")), ["--temperature=nan"]),
        (dict(temperature=1e39), ["--temperature=1e+39", "at most"]),
        (dict(cfg_scale=1e39), ["--cfg_scale=1e+39", "at most"]),
        (dict(speculate=65), ["--speculate=65", "64"]),
        (dict(speculate=0), ["--speculate=0"]),
        (dict(cfg_scale=-0.5), ["--cfg_scale=-0.5"]),
        (dict(cache="both"), ["--cache=both", "none, prefix, dual"]),
        (dict(eos="never"), ["--eos=never", "no_logits"]),
        (dict(speculate=2, cache="dual"), ["--speculate=2", "--cache=dual"]),
        (dict(confidence_threshold=0.0), ["--confidence_threshold=0.0"]),
        (dict(confidence_threshold=0.9, remasking="random"), ["--confidence_threshold=0.9", "low_confidence"]),
        (dict(eos="no_confidence", remasking="random_binomial"), ["--eos=no_confidence", "low_confidence"]),
    ],
)
def test_settings_that_cannot_work_are_refused(params, canvas_BL, changes, words):
    settings = SamplerConfig(**{"steps": 10, "block_length": 10, **changes})
    with pytest.raises(UserError) as caught:
        sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, FORBIDDEN)
    assert all(word in str(caught.value) for word in words), caught.value
