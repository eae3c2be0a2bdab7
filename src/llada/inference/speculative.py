"""Speculation: several exact steps for one forward pass over several canvases (FreeDave, arXiv 2510.00294).

A draft of the next canvases is made as if the last predictions stayed as they are. One pass then predicts from the
present canvas and from all drafts, and a draft is confirmed if the fresh predictions lead to it:

    present canvas   draft 1   draft 2      one pass over all three
         |              |
         +-> step ------+-> step -> ...     a canvas that differs from its draft is the last one taken

A step depends on canvas and step number alone, noise included, so confirmed drafts are the exact next canvases, and
text is the same with and without speculation. Rows advance each at its own speed.
Slower than plain steps wherever it was measured; only `sampler._block_filler` knows of this file.
Shapes: as in `reverse_step`; the copies of a batch stand one below the other, `copies * B` rows.
"""

import functools

import jax
import jax.numpy as jnp

from llada.inference.choice import Choice
from llada.inference.compiled_loop import report
from llada.inference.reverse_step import (
    Block,
    Canvas,
    Rows,
    Task,
    advance,
    choose_tokens,
    end_if,
    hidden_states,
    masked,
)


def fill_block(task: Task, block: Block, canvas: Canvas, passes: jax.Array) -> tuple[Canvas, jax.Array]:
    """Passes over the canvas and its drafts until the block is full; and the passes so far."""
    copies = task.setup.settings.speculate
    all_task = task._replace(rows=_tile_rows(task.rows, copies))
    all_block = block._replace(position_BK=jnp.tile(block.position_BK, (copies, 1)))

    def unfinished(carry):
        canvas, _, _ = carry
        return jnp.any(masked(task, block, canvas))

    def body(carry):
        canvas, passes, choice = carry
        drafts = [canvas]
        while len(drafts) < copies:
            drafts.append(advance(task, block, drafts[-1], choice))
        all_canvas = jax.tree.map(lambda *x: jnp.concatenate(x), *drafts)
        hidden_BKD = hidden_states(all_task, all_canvas.tokens_BL, all_block.position_BK)
        all_choice = choose_tokens(all_task, all_block, all_canvas, hidden_BKD)
        choices = [Choice(*x) for x in zip(*(jnp.split(x, copies) for x in all_choice[:2]), strict=True)]
        canvas, choice = _confirm(task, block, canvas, choice, drafts, choices)
        is_over = report(task.setup.observe, canvas.tokens_BL, canvas.step_BL, jnp.max(canvas.step_BL))
        return end_if(task, is_over, canvas), passes + 1, choice

    # The first drafts write masks, so they change nothing and are never confirmed.
    shape_BK = block.position_BK.shape
    no_choice = Choice(jnp.full(shape_BK, task.setup.special.mask_id), jnp.zeros(shape_BK))
    canvas, passes, _ = jax.lax.while_loop(unfinished, body, (canvas, passes, no_choice))
    return canvas, passes


def _confirm(
    task: Task, block: Block, canvas: Canvas, choice: Choice, drafts: list[Canvas], choices: list[Choice]
) -> tuple[Canvas, Choice]:
    """Per row, the canvas after the last step whose start was a confirmed draft, and that step's choice."""
    confirmed_B1 = jnp.ones_like(canvas.done_B1, bool)
    for i, (draft, fresh_choice) in enumerate(zip(drafts, choices, strict=True)):
        after = advance(task, block, draft, fresh_choice)
        take_confirmed = functools.partial(jnp.where, confirmed_B1)
        canvas, choice = jax.tree.map(take_confirmed, (after, fresh_choice), (canvas, choice))
        if i + 1 < len(drafts):
            confirmed_B1 &= jnp.all(after.tokens_BL == drafts[i + 1].tokens_BL, axis=1, keepdims=True)
    return canvas, choice


def _tile_rows(rows: Rows, copies: int) -> Rows:
    return Rows(
        jnp.tile(rows.open_BL, (copies, 1)),
        jnp.tile(rows.seed_B, copies),
        rows.forbidden_F,
        None if rows.lengths_B is None else jnp.tile(rows.lengths_B, copies),
    )
