"""Approximate reverse steps from cached keys and values (Fast-dLLM, arXiv 2505.22618).

A mask predictor's every state depends on every token, so a cache is stale as soon as a token is written. It is renewed
by an exact pass at the start of each block. Until the block is full, later passes compute some positions only:

                  before the block    the block    behind the block
    dual          cached              computed     cached
    prefix        cached              computed     computed

Shapes: as in `reverse_step`; Q positions computed in a cached pass.
"""

import functools

import jax
import jax.numpy as jnp

from llada.inference import guidance
from llada.inference.reverse_step import Block, Canvas, Task, repeat_until_full, step_from_hidden
from llada.model import cached
from llada.model.layers import take


def fill_block(task: Task, block: Block, canvas: Canvas, passes: jax.Array) -> tuple[Canvas, jax.Array]:
    """An exact step, whose pass renews the cache, then cached ones until the block is full; and the passes so far."""
    hidden_BKD, cache = _renew(task, canvas.tokens_BL, block.position_BK)
    canvas, passes = step_from_hidden(task, block, canvas, hidden_BKD), passes + 1
    if task.setup.settings.cache == "dual":
        return _fill_dual(task, block, cache, canvas, passes)
    # What follows the start of a block shrinks from block to block, but shapes are static: there is a loop for each
    # halving of it, and the smallest that suffices runs.
    sizes = _halvings(task.setup.suffix, task.setup.settings.block_length)
    ends_B = canvas.tokens_BL.shape[1] if task.rows.lengths_B is None else task.rows.lengths_B
    needed = jnp.max(ends_B - block.position_BK[:, 0])
    loops = [functools.partial(_fill_prefix, task, block, cache, size) for size in sizes]
    return jax.lax.switch(jnp.sum(needed <= jnp.array(sizes)) - 1, loops, canvas, passes)


def _renew(task: Task, tokens_BL: jax.Array, at_BK: jax.Array):
    """An exact pass: `hidden_BKD` of the positions `at_BK`, guided, and the cache of all rows that were run."""
    scale = task.setup.settings.cfg_scale
    with jax.named_scope("renew_cache"):
        hidden_BKD, cache = cached.prefill(
            task.setup.config,
            task.params,
            guidance.add_unconditional(tokens_BL, task.rows.open_BL, task.setup.special.mask_id, scale),
            guidance.duplicate(task.rows.lengths_B, scale),
            at_BR=guidance.duplicate(at_BK, scale),
        )
        return guidance.combine(hidden_BKD, scale), cache


def _fill_dual(task: Task, block: Block, cache, canvas: Canvas, passes: jax.Array) -> tuple[Canvas, jax.Array]:
    """Passes over the block's own positions."""
    at_BK = jnp.broadcast_to(jnp.arange(block.position_BK.shape[1]), block.position_BK.shape)
    return _fill(task, block, cache, block.position_BK, at_BK, canvas, passes)


def _fill_prefix(task: Task, block: Block, cache, Q: int, canvas: Canvas, passes) -> tuple[Canvas, jax.Array]:
    """Passes over Q positions of each row, from the block's start on."""
    first_B1 = block.position_BK[:, :1]
    return _fill(task, block, cache, first_B1 + jnp.arange(Q)[None, :], block.position_BK - first_B1, canvas, passes)


def _fill(task: Task, block: Block, cache, position_BQ, at_BK, canvas: Canvas, passes) -> tuple[Canvas, jax.Array]:
    """Passes over `position_BQ`, among which the block's positions stand at `at_BK`, until the block is full."""
    scale = task.setup.settings.cfg_scale
    position_BQ, at_BK, lengths_B = (guidance.duplicate(x, scale) for x in (position_BQ, at_BK, task.rows.lengths_B))

    def step(canvas: Canvas) -> Canvas:
        rows_BL = guidance.add_unconditional(canvas.tokens_BL, task.rows.open_BL, task.setup.special.mask_id, scale)
        with jax.named_scope("cached_pass"):
            tokens_BQ = take(rows_BL, position_BQ)
            hidden_BKD, _ = cached.extend(
                task.setup.config, task.params, tokens_BQ, position_BQ, cache, lengths_B, at_BR=at_BK
            )
        return step_from_hidden(task, block, canvas, guidance.combine(hidden_BKD, scale))

    return repeat_until_full(task, block, canvas, passes, step)


def _halvings(size: int, least: int) -> list[int]:
    """`size`, half of it, and so on down to `least`."""
    sizes = [size]
    while sizes[-1] > least:
        sizes.append(max(least, -(-sizes[-1] // 2)))
    return sizes
