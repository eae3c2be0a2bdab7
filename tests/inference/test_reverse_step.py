"""One reverse step by itself: what the compiled sampler repeats, and what its stages return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada.config import ModelConfig
from llada.inference import reverse_step as steps
from llada.inference import sampler
from llada.inference.settings import SamplerConfig
from llada.model import transformer
from llada.objectives.contract import SpecialTokens

V, MASK = 12, 3
SPECIAL = SpecialTokens(mask=MASK, eos=1)
MODEL = ModelConfig(layers=2, width=16, heads=2, ffn=24, vocab_size=V, max_length=24, init_std=0.5, dtype="float32")
FORBIDDEN_F = np.array([0, 2, MASK], np.int32)


@pytest.fixture(scope="module")
def params():
    return transformer.init(MODEL, jax.random.key(0))


def task_of(params, canvas_BL, settings) -> steps.Task:
    setup = steps.Setup(MODEL, settings, SPECIAL, blocks=1, suffix=canvas_BL.shape[1])
    rows = steps.Rows(canvas_BL == MASK, np.array([5, 6], np.uint32), FORBIDDEN_F, lengths_B=None)
    return steps.Task(setup, params, transformer.head(MODEL, params), rows)


@pytest.mark.parametrize(
    "settings",
    [SamplerConfig(steps=3, block_length=6), SamplerConfig(steps=3, block_length=6, temperature=1.0, cfg_scale=0.5)],
    ids=["greedy", "drawn, guided"],
)
def test_steps_taken_by_hand_are_those_of_the_sampler(params, settings):
    canvas_BL = np.random.default_rng(1).integers(5, V, (2, 10)).astype(np.int32)
    canvas_BL[0, 2:8] = canvas_BL[1, 4:10] = MASK
    task = task_of(params, canvas_BL, settings)
    block = steps.Block(jnp.array([range(2, 8), range(4, 10)]), first_step=0)
    canvas = steps.new_canvas(canvas_BL)
    for step in range(1, 4):
        canvas = steps.reverse_step(task, block, canvas)
        assert np.sum(canvas.step_BL >= 0, axis=1).tolist() == [2 * step] * 2
        assert np.sum(steps.masked(task, block, canvas), axis=1).tolist() == [6 - 2 * step] * 2
    forbidden_V = np.isin(np.arange(V), FORBIDDEN_F)
    sample = sampler.reverse_process(MODEL, params, canvas_BL, settings, SPECIAL, forbidden_V, seed_B=5)
    np.testing.assert_array_equal(canvas.tokens_BL, sample.tokens_BL)
    np.testing.assert_array_equal(canvas.step_BL, sample.step_BL)


def test_a_choice_is_the_most_likely_token_and_its_probability_without_the_forbidden_ones(params):
    canvas_BL = np.full((2, 6), 5, np.int32)
    canvas_BL[:, 1:4] = MASK
    canvas_BL[1, 5] = 7
    task = task_of(params, canvas_BL, SamplerConfig(steps=3, block_length=3))
    block, canvas = steps.Block(jnp.array([[1, 2, 3]] * 2), first_step=0), steps.new_canvas(canvas_BL)
    hidden_BKD = steps.hidden_states(task, canvas.tokens_BL, block.position_BK)
    choice = steps.choose_tokens(task, block, canvas, hidden_BKD)
    logits = np.asarray(transformer.logits(MODEL, params, canvas_BL), np.float64)[:, 1:4]
    logits[..., FORBIDDEN_F] = -np.inf
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    np.testing.assert_array_equal(choice.token_BK, log_p.argmax(axis=-1))
    np.testing.assert_allclose(choice.confidence_BK, log_p.max(axis=-1), atol=1e-5)
    selected_BK = steps.select_positions(task, block, canvas, choice)
    np.testing.assert_array_equal(selected_BK, np.arange(3)[None] == log_p.max(axis=-1).argmax(axis=-1)[:, None])
