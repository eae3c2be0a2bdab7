"""One step of the reverse process, given a canvas (LLaDA section 2.4, Algorithms 4 and 5).

`reverse_step(task, block, canvas)` is the next canvas. Its stages can be called by themselves:

    hidden_states      the forward pass: hidden states of the block's positions, guided
    choose_tokens      a token and its confidence for every masked position of the block
    select_positions   which of those tokens this step writes; all other positions stay masked ("remasking")
    advance            the canvas with these tokens written

A step depends on the canvas and on its number alone, noise included: noise is keyed by (the row's seed, step,
position), so a sample does not depend on the batch it is in.
Shapes: B sequences, L canvas positions, K positions of a block, D width, V vocabulary, F forbidden ids.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada.config import ModelConfig
from llada.inference import guidance
from llada.inference.choice import Choice, choose, equalize_if_blank, position_keys, score
from llada.inference.compiled_loop import Array, Observer, report
from llada.inference.settings import RANKED, SamplerConfig
from llada.model import cached, transformer
from llada.model.layers import take
from llada.objectives.contract import SpecialTokens, is_valid

# What a position's noise is for: the token that is drawn there, or whether that token is written.
_DRAW, _SELECT = 0, 1


class Setup(NamedTuple):
    """What a sampling program is compiled for (hashable).

    blocks   of every row; each gets `steps / blocks` steps
    suffix   positions from a block's start to the end of the canvas, at most: what a prefix-cached pass computes
    among_all  where a text is scored: over all ids, not over those only that may be written
    """

    config: ModelConfig
    settings: SamplerConfig
    special: SpecialTokens
    blocks: int
    suffix: int
    observe: Observer | None = None
    among_all: bool = False

    @property
    def steps_per_block(self) -> int:
        """Steps that fill one block."""
        return self.settings.steps // self.blocks


class Rows(NamedTuple):
    """What a program reads of the requests of a batch, besides their canvas.

    open_BL      bool, the positions to be filled
    seed_B       uint32, of each row's noise
    forbidden_F  int32, ids that are never written
    lengths_B    int32, positions from there on are padding; None where there is none
    text_BL      int32, a text to be scored: its tokens are written, and none are drawn
    """

    open_BL: Array
    seed_B: Array
    forbidden_F: Array
    lengths_B: Array | None
    text_BL: Array | None = None


class Task(NamedTuple):
    """All that a step reads and does not change; `head_VD` is `transformer.head` of the parameters."""

    setup: Setup
    params: transformer.Parameters
    head_VD: jax.Array
    rows: Rows


class Block(NamedTuple):
    """The positions of each row that are filled together.

    position_BK  ascending; L, off the canvas, where a row's last block is short
    first_step   the number of the block's first step
    """

    position_BK: jax.Array
    first_step: jax.Array | int


class Canvas(NamedTuple):
    """What a step changes.

    tokens_BL  the mask token where none is written yet
    step_BL    at which step each token was written, -1 where none was
    done_B1    how many steps the present block has had
    log_p_BL   of a text that is scored, log p of each token at its step; 0 where none is written yet
    """

    tokens_BL: jax.Array
    step_BL: jax.Array
    done_B1: jax.Array
    log_p_BL: jax.Array | None = None


def new_canvas(tokens_BL: Array, scored: bool = False) -> Canvas:
    """The canvas before its first step; open positions of `tokens_BL` (int32) hold the mask token."""
    B, L = tokens_BL.shape
    log_p_BL = jnp.zeros((B, L), jnp.float32) if scored else None
    return Canvas(jnp.asarray(tokens_BL), jnp.full((B, L), -1, jnp.int32), jnp.zeros((B, 1), jnp.int32), log_p_BL)


def reverse_step(task: Task, block: Block, canvas: Canvas) -> Canvas:
    """The canvas after one exact step: tokens of the block are predicted from all of the canvas, some are written."""
    return step_from_hidden(task, block, canvas, hidden_states(task, canvas.tokens_BL, block.position_BK))


def step_from_hidden(task: Task, block: Block, canvas: Canvas, hidden_BKD: jax.Array) -> Canvas:
    """The canvas after a step from these hidden states of the block's positions, however they were computed."""
    step = block.first_step + canvas.done_B1[0, 0]
    canvas = advance(task, block, canvas, choose_tokens(task, block, canvas, hidden_BKD))
    return end_if(task, report(task.setup.observe, canvas.tokens_BL, canvas.step_BL, step), canvas)


def end_if(task: Task, is_over: jax.Array | bool, canvas: Canvas) -> Canvas:
    """The canvas, without masks if `is_over`: then there is nothing left to do in this block, nor in the next ones."""
    if is_over is False:
        return canvas
    ended_BL = is_over & (canvas.tokens_BL == task.setup.special.mask_id)
    return canvas._replace(tokens_BL=jnp.where(ended_BL, task.setup.special.eos, canvas.tokens_BL))


def hidden_states(task: Task, tokens_BL: jax.Array, at_BK: jax.Array) -> jax.Array:
    """`hidden_BKD`: an exact forward pass over the canvas, guided; states of the positions `at_BK` only."""
    scale = task.setup.settings.cfg_scale
    with jax.named_scope("forward_pass"):
        hidden_BKD = cached.hidden(
            task.setup.config,
            task.params,
            guidance.add_unconditional(tokens_BL, task.rows.open_BL, task.setup.special.mask_id, scale),
            guidance.duplicate(task.rows.lengths_B, scale),
            at_BR=guidance.duplicate(at_BK, scale),
        )
        return guidance.combine(hidden_BKD, scale)


def choose_tokens(task: Task, block: Block, canvas: Canvas, hidden_BKD: jax.Array) -> Choice:
    """A token and its confidence for every masked position of the block; entries of other positions are arbitrary.

    Of a text that is scored it is the text's token, with its log-probability.
    """
    temperature, rows = task.setup.settings.temperature, task.rows
    by_canvas = task.setup.settings.remasking == "top_probability"
    with jax.named_scope("choose_tokens"):
        masked_BK, needs = masked(task, block, canvas), (hidden_BKD, task.head_VD)
        if rows.text_BL is None:
            keys_BK = _keys(task, block, canvas, _DRAW)
            choice = choose(*needs, masked_BK, rows.forbidden_F, temperature, keys_BK, by_canvas)
        else:
            text_BK = take(rows.text_BL, block.position_BK)
            choice = score(*needs, masked_BK, rows.forbidden_F, temperature, text_BK, task.setup.among_all)
        if temperature > 0 and not by_canvas:
            return choice
        visible_BL = (canvas.tokens_BL != task.setup.special.mask_id) & is_valid(canvas.tokens_BL, rows.lengths_B)
        return choice._replace(confidence_BK=equalize_if_blank(choice.confidence_BK, visible_BL))


def select_positions(task: Task, block: Block, canvas: Canvas, choice: Choice) -> jax.Array:
    """Bool (B, K): the masked positions that this step writes; all that remain when it is the block's last step."""
    settings = task.setup.settings
    masked_BK = masked(task, block, canvas)
    steps_left_B1 = task.setup.steps_per_block - canvas.done_B1
    if settings.remasking in RANKED:
        score_BK = choice.confidence_BK
        if settings.eos == "no_confidence":
            is_end_BK = jnp.isin(choice.token_BK, jnp.array(task.setup.special.ends))
            score_BK = jnp.where(is_end_BK, jnp.finfo(jnp.float32).min, score_BK)
    else:
        score_BK = jax.vmap(jax.vmap(jax.random.uniform))(_keys(task, block, canvas, _SELECT))
    if settings.remasking == "random_binomial":
        # Algorithm 4 remasks with probability s/t; on an even grid of times 1 - s/t = 1 / steps_left.
        return masked_BK & (score_BK * steps_left_B1 < 1)
    remaining_B1 = jnp.sum(masked_BK, axis=1, keepdims=True)
    quota_B1 = (remaining_B1 + steps_left_B1 - 1) // jnp.maximum(steps_left_B1, 1)
    rank_BK = jnp.argsort(jnp.argsort(jnp.where(masked_BK, -score_BK, jnp.inf), axis=1), axis=1)
    selected_BK = rank_BK < quota_B1
    if settings.confidence_threshold is not None:
        selected_BK |= score_BK >= math.log(settings.confidence_threshold)
    return masked_BK & selected_BK


def advance(task: Task, block: Block, canvas: Canvas, choice: Choice) -> Canvas:
    """The canvas after a step that chose these tokens."""
    with jax.named_scope("select_positions"):
        selected_BK = select_positions(task, block, canvas, choice)
    B, L = canvas.tokens_BL.shape
    at = (jnp.arange(B)[:, None], jnp.where(selected_BK, block.position_BK, L))
    log_p_BL = canvas.log_p_BL
    return Canvas(
        canvas.tokens_BL.at[at].set(choice.token_BK, mode="drop"),
        canvas.step_BL.at[at].set(block.first_step + canvas.done_B1, mode="drop"),
        canvas.done_B1 + 1,
        None if log_p_BL is None else log_p_BL.at[at].set(choice.log_p_BK, mode="drop"),
    )


def repeat_until_full(
    task: Task, block: Block, canvas: Canvas, passes: jax.Array, step: Callable[[Canvas], Canvas]
) -> tuple[Canvas, jax.Array]:
    """`step`, one forward pass each, until no position of the block is masked; the passes are added to `passes`."""

    def unfinished(carry):
        canvas, _ = carry
        return jnp.any(masked(task, block, canvas))

    def body(carry):
        canvas, passes = carry
        with jax.named_scope("reverse_step"):
            return step(canvas), passes + 1

    return jax.lax.while_loop(unfinished, body, (canvas, passes))


def masked(task: Task, block: Block, canvas: Canvas) -> jax.Array:
    """Bool (B, K): which positions of the block are still to be filled."""
    tokens_BK, L = take(canvas.tokens_BL, block.position_BK), canvas.tokens_BL.shape[1]
    return (tokens_BK == task.setup.special.mask_id) & (block.position_BK < L)


def _keys(task: Task, block: Block, canvas: Canvas, purpose: int) -> jax.Array:
    """A key for each position of the block at the step that each row is at."""
    step_B = block.first_step + canvas.done_B1[:, 0]
    keys_BK = position_keys(task.rows.seed_B, step_B, block.position_BK)
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, purpose)))(keys_BK)
