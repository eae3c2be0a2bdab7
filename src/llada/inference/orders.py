"""Texts under a sampler whose order of positions follows from the canvas alone: their exact log-probability.

At each of its steps such a sampler (`remasking="top_probability"`) chooses positions from the canvas, and draws their
tokens independently given it. So a text is reached in one way only, and

    log p(text) = sum over steps, and over the positions that the step writes, of log p(token | canvas before the step)

which is exact (DUEL, arXiv 2603.01367, Turok, De Sa, Kuleshov), whatever the number of tokens a step, the blocks, the
threshold and the guidance. Here the sampler's own loop runs with the text's tokens in place of drawn ones. Where
--remasking=low_confidence the order depends on the draws at temperatures above 0, and there is no such sum; at
temperature 0 a text has probability 1 or 0.
Shapes: B rows of a batch, L tokens, A answer tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import sampler
from llada.inference import settings as settings_lib
from llada.inference.compiled_loop import Array
from llada.inference.reverse_step import Rows, Setup
from llada.inference.settings import LEAST_TEMPERATURE, SamplerConfig
from llada.model import transformer
from llada.objectives.contract import SpecialTokens

REMASKING = "top_probability"


class Order(NamedTuple):
    """What rows that share a program have in common (hashable).

    blocks     of each row
    among_all  whether probabilities are over all ids, not only over those that the sampler may write
    """

    sampler: SamplerConfig
    blocks: int
    among_all: bool


def check_temperature(temperature: float) -> None:
    """UserError unless draws at this temperature have probabilities."""
    settings_lib.check_temperature(temperature)
    if temperature < LEAST_TEMPERATURE:
        raise UserError(
            f"--temperature={temperature}: --estimator=sampler is the probability of draws, which needs a temperature "
            "above 0; 1 is the model's own distribution"
        )


def order_for(
    A: int,
    steps: int | None,
    block_length: int | None,
    temperature: float,
    cfg_scale: float,
    confidence_threshold: float | None,
    among_all: bool,
) -> tuple[Order, int]:
    """How a sampler of these settings fills A positions, and its steps at most. UserError if it cannot.

    None: one block; one token a step.
    """
    block_length = A if block_length is None else block_length
    blocks = max(1, -(-A // max(1, block_length)))
    chosen = SamplerConfig(
        steps=blocks * block_length if steps is None else steps,
        block_length=block_length,
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=REMASKING,
        confidence_threshold=confidence_threshold,
    )
    settings_lib.check(chosen, A)
    each = chosen.steps // blocks
    passes = sum(min(each, min(block_length, A - start)) for start in range(0, A, block_length))
    if blocks == 1:
        # Answers of many lengths share a program: positions that are not there change no quota.
        K = max(32, 1 << (A - 1).bit_length())
        chosen = dataclasses.replace(chosen, block_length=K, steps=K if each >= A else each)
    return Order(chosen, blocks, among_all), passes


def setup_of(config: ModelConfig, special: SpecialTokens, order: Order) -> Setup:
    """What `sampler.score_blocks` is compiled for."""
    return Setup(config, order.sampler, special, order.blocks, suffix=0, among_all=order.among_all)


def nats(
    config: ModelConfig,
    special: SpecialTokens,
    forbidden_F: np.ndarray,
    order: Order,
    params: transformer.Parameters,
    text_BL: Array,
    open_BL: Array,
    lengths_B: Array | None,
) -> jax.Array:
    """`nats_B`: -log p of the open tokens of each row given its others. `params` as `cached.for_decoding` lays them."""
    log_p_BL, _, _ = scored(config, special, forbidden_F, order, params, text_BL, open_BL, lengths_B)
    return -jnp.sum(log_p_BL, axis=1)


def scored(
    config: ModelConfig,
    special: SpecialTokens,
    forbidden_F: np.ndarray,
    order: Order,
    params: transformer.Parameters,
    text_BL: Array,
    open_BL: Array,
    lengths_B: Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(log_p_BL, step_BL, passes)`: of each open token log p at its step, and that step; 0 and -1 elsewhere."""
    setup = setup_of(config, special, order)
    canvas_BL = np.where(open_BL, special.mask_id, text_BL).astype(np.int32)
    seed_B = np.zeros(len(text_BL), np.uint32)  # nothing is drawn
    return sampler.score_blocks(setup, params, canvas_BL, Rows(open_BL, seed_B, forbidden_F, lengths_B, text_BL))
