"""What the reverse process samples from, against full enumeration: three ordinary tokens, three open positions.

The law of a text is the sum over everything a step can draw and keep, in float64; 27 texts are counted and compared.
One token stands before the open positions: on a canvas of masks alone all positions have the same law, and which of two
equally confident ones is kept would be a matter of rounding.
"""

import itertools
import math

import jax
import numpy as np
import pytest

from llada.config import ModelConfig
from llada.inference import sampler
from llada.inference import settings as settings_lib
from llada.inference.settings import SamplerConfig
from llada.model import transformer
from llada.objectives.contract import SpecialTokens

L, MASK = 3, 3
SPECIAL = SpecialTokens(mask=MASK, eos=2)
MODEL = ModelConfig(layers=1, width=8, heads=2, ffn=16, vocab_size=4, max_length=8, init_std=0.7, dtype="float32")
PROMPT = 1
CANVASES = list(itertools.product(range(4), repeat=L))
TEXTS = list(itertools.product(range(3), repeat=L))
SAMPLES = 30_000
# The 0.9995 quantile of chi-square with 26 degrees of freedom: a right sampler fails once in 2,000 seeds, and the seed
# is fixed.
CHI_SQUARE = 56.4


@pytest.fixture(scope="module")
def params():
    return transformer.init(MODEL, jax.random.key(1))


@pytest.fixture(scope="module")
def law(params):
    """`law[canvas][i]`: probabilities of the three ordinary tokens at open position i, the mask token left out."""
    rows = np.array([(PROMPT, *canvas) for canvas in CANVASES], np.int32)
    logits = np.asarray(transformer.logits(MODEL, params, rows), np.float64)[:, 1:, :3]
    table = np.exp(logits - logits.max(axis=-1, keepdims=True))
    table /= table.sum(axis=-1, keepdims=True)
    assert table.max() > 0.9  # far from uniform, or the tests below prove little
    return dict(zip(CANVASES, table, strict=True))


def text_law(law, settings) -> dict:
    """P(text), by following every draw of every step through all canvases."""
    blocks = [range(i, min(i + settings.block_length, L)) for i in range(0, L, settings.block_length)]
    steps = settings.steps // len(blocks)
    now = {(MASK,) * L: 1.0}
    for block in blocks:
        for done in range(steps):
            after: dict = {}
            for canvas, mass in now.items():
                for tokens, kept, p in outcomes(law, canvas, block, steps - done, settings):
                    new = tuple(tokens[i] if i in kept else canvas[i] for i in range(L))
                    after[new] = after.get(new, 0.0) + mass * p
            now = after
    return now


def outcomes(law, canvas, block, steps_left, settings):
    """(tokens by position, kept positions, probability) of one step."""
    masked = [i for i in block if canvas[i] == MASK]
    if not masked:
        yield {}, (), 1.0
        return
    quota = math.ceil(len(masked) / steps_left)
    tempered = law[canvas] ** (1 / settings.temperature)
    tempered /= tempered.sum(axis=-1, keepdims=True)
    for drawn in itertools.product(range(3), repeat=len(masked)):
        tokens = dict(zip(masked, drawn, strict=True))
        p = math.prod(tempered[i, v] for i, v in tokens.items())
        if settings.remasking == "low_confidence":  # ranked by the clean law, whatever the temperature
            yield tokens, sorted(masked, key=lambda i: -law[canvas][i, tokens[i]])[:quota], p
        elif settings.remasking == "top_probability":
            yield tokens, sorted(masked, key=lambda i: -law[canvas][i].max())[:quota], p
        elif settings.remasking == "random":
            subsets = list(itertools.combinations(masked, quota))
            for kept in subsets:
                yield tokens, kept, p / len(subsets)
        else:
            for size in range(len(masked) + 1):
                for kept in itertools.combinations(masked, size):
                    stay = 1 / steps_left
                    yield tokens, kept, p * stay**size * (1 - stay) ** (len(masked) - size)


@pytest.mark.parametrize(
    "settings",
    [
        SamplerConfig(steps=3, block_length=3, temperature=1.0, remasking="random"),
        SamplerConfig(steps=2, block_length=3, temperature=1.0, remasking="random"),
        SamplerConfig(steps=3, block_length=3, temperature=1.0, remasking="random_binomial"),
        SamplerConfig(steps=2, block_length=3, temperature=1.0, remasking="random_binomial"),
        SamplerConfig(steps=3, block_length=3, temperature=1.0),
        SamplerConfig(steps=2, block_length=3, temperature=0.6),
        SamplerConfig(steps=2, block_length=2, temperature=1.5),
        SamplerConfig(steps=3, block_length=1, temperature=1.0),
    ],
    ids=lambda s: f"{s.remasking}, {s.steps} steps, blocks of {s.block_length}, temperature {s.temperature}",
)
def test_texts_come_with_their_enumerated_probability(params, law, settings):
    expected = text_law(law, settings)
    assert sum(expected.values()) == pytest.approx(1)
    canvas_BL = np.full((SAMPLES, 1 + L), MASK, np.int32)
    canvas_BL[:, 0] = PROMPT
    got = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, np.zeros(4, bool), seed_B=17)
    counts = np.bincount(got.tokens_BL[:, 1:] @ [9, 3, 1], minlength=27)
    wanted = SAMPLES * np.array([expected.get(text, 0.0) for text in TEXTS])
    rare = wanted < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum() + 1e-9)
    if wanted[-1] < 5:  # too few to test on their own: they join the smallest of the others
        smallest = wanted[:-1].argmin()
        observed[smallest] += observed[-1]
        wanted[smallest] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    assert np.sum((observed - wanted) ** 2 / wanted) < CHI_SQUARE


def test_random_remasking_with_a_step_per_token_is_ancestral_sampling_in_a_random_order(law):
    """The law enumerated above is the mean over all orders of the chain rule: any-order ancestral sampling."""
    settings = SamplerConfig(steps=3, block_length=3, temperature=1.0, remasking="random")
    by_steps = text_law(law, settings)
    for text in TEXTS:
        orders = []
        for order in itertools.permutations(range(L)):
            canvas, p = [MASK] * L, 1.0
            for i in order:
                p *= law[tuple(canvas)][i, text[i]]
                canvas[i] = text[i]
            orders.append(p)
        assert by_steps[text] == pytest.approx(np.mean(orders), rel=1e-9)


def test_one_token_steps_and_low_confidence_are_other_laws(law):
    """Or the cases above could not tell the remaskings apart."""
    laws = [
        text_law(law, SamplerConfig(steps=steps, block_length=3, temperature=1.0, remasking=remasking))
        for remasking, steps in itertools.product(settings_lib.REMASKING, (2, 3))
    ]
    for one, other in itertools.combinations(laws, 2):
        distance = 0.5 * sum(abs(one.get(text, 0) - other.get(text, 0)) for text in TEXTS)
        assert 4 * SAMPLES * distance**2 > 2 * CHI_SQUARE  # chi-square is at least 4 n (total variation)^2
