"""The reverse process of masked diffusion: one compiled loop from masks to text (LLaDA section 2.4, Appendix A.3).

It starts from a canvas whose open positions hold the mask token and fills it block by block, each block by as many
steps of `reverse_step`. Caches (`cached_sampler`) and the confidence threshold are approximations of that process;
speculation (`speculative`) is not.
Shapes: B sequences, L canvas positions, K positions of a block, S open positions of a row, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import cached_sampler, speculative
from llada.inference.compiled_loop import Array, Observer, Sample, by_row, forbidden_list, row_seeds, timed
from llada.inference.reverse_step import Block, Canvas, Rows, Setup, Task, new_canvas, repeat_until_full, reverse_step
from llada.inference.settings import SamplerConfig, check, usable_temperature
from llada.model import cached, transformer
from llada.objectives.contract import SpecialTokens


def reverse_process(
    config: ModelConfig,
    params: transformer.Parameters,
    canvas_BL: np.ndarray,
    settings: SamplerConfig,
    special: SpecialTokens,
    forbidden_V: np.ndarray,
    seed_B: np.ndarray | int = 0,
    lengths_B: np.ndarray | None = None,
    observe: Observer | None = None,
) -> Sample:
    """Fill every position of `canvas_BL` that holds the mask token; the others are context and stay.

      canvas_BL    int32; each row has masks for equally many blocks
      forbidden_V  bool, ids that must not be written (the mask token always among them)
      seed_B       of each row's noise; a number stands for rows of that seed and the next ones
      lengths_B    positions from there on are padding, not canvas; None: there is none
    Raises UserError for settings that cannot fill the canvas.
    """
    canvas_BL = np.asarray(canvas_BL, np.int32)
    B, L = canvas_BL.shape
    ends_B = np.full(B, L) if lengths_B is None else np.asarray(lengths_B)
    open_BL = (canvas_BL == special.mask) & (np.arange(L) < ends_B[:, None])
    count_B = open_BL.sum(axis=1)
    blocks_B = -(-count_B // settings.block_length) if settings.block_length > 0 else count_B
    if blocks_B.min() != blocks_B.max():
        raise UserError(f"rows of one batch need equally many blocks, not {blocks_B.min()} to {blocks_B.max()}")
    check(settings, int(count_B.max()))
    setup = Setup(
        config,
        dataclasses.replace(settings, temperature=usable_temperature(settings.temperature)),
        special,
        blocks=int(blocks_B.max()),
        suffix=int(np.max(ends_B - open_BL.argmax(axis=1))),
        observe=observe,
    )
    more_forbidden = special.ends if settings.eos == "no_logits" else ()
    rows = Rows(
        open_BL,
        row_seeds(seed_B, B),
        forbidden_list(forbidden_V, special.mask, *more_forbidden),
        None if lengths_B is None else ends_B,
    )
    sample = timed(fill_blocks, setup, cached.for_decoding(params), canvas_BL, rows)
    return sample._replace(forward_passes=sample.forward_passes * (2 if settings.cfg_scale else 1))


@functools.partial(jax.jit, static_argnums=0)
def fill_blocks(
    setup: Setup, params: transformer.Parameters, canvas_BL: Array, rows: Rows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The compiled loop of `reverse_process`: tokens and steps as there, and the number of forward passes."""
    canvas, passes = _filled(setup, params, new_canvas(by_row(canvas_BL)), rows)
    return canvas.tokens_BL, canvas.step_BL, passes


@functools.partial(jax.jit, static_argnums=0)
def score_blocks(
    setup: Setup, params: transformer.Parameters, canvas_BL: Array, rows: Rows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same loop where the text of `rows` is written: `log_p_BL` of its tokens, their steps, and forward passes.

    Sums over a row are the text's log-probability where the order does not depend on what is drawn: with
    `remasking="top_probability"` (DUEL, arXiv 2603.01367).
    """
    canvas, passes = _filled(setup, params, new_canvas(by_row(canvas_BL), scored=True), rows)
    assert canvas.log_p_BL is not None  # it was scored
    return canvas.log_p_BL, canvas.step_BL, passes


def _filled(setup: Setup, params: transformer.Parameters, canvas: Canvas, rows: Rows) -> tuple[Canvas, jax.Array]:
    """The canvas, filled block by block, and the forward passes."""
    of_rows = {name: by_row(x) for name, x in rows._asdict().items() if name != "forbidden_F"}
    params = cached.with_whole_tables(setup.config, params)
    task = Task(setup, params, transformer.head(setup.config, params), rows._replace(**of_rows))
    fill_block = _block_filler(setup.settings)
    K = setup.settings.block_length
    position_BS = _positions(task.rows.open_BL, setup.blocks * K)

    def fill_next(index, carry):
        canvas, passes = carry
        position_BK = jax.lax.dynamic_slice_in_dim(position_BS, index * K, K, axis=1)
        block = Block(position_BK, index * setup.steps_per_block)
        return fill_block(task, block, canvas._replace(done_B1=jnp.zeros_like(canvas.done_B1)), passes)

    return jax.lax.fori_loop(0, setup.blocks, fill_next, (canvas, jnp.int32(0)))


def _block_filler(settings: SamplerConfig) -> Callable[..., tuple[Canvas, jax.Array]]:
    """`(task, block, canvas, passes) -> (canvas, passes)`: how one block is filled."""
    if settings.speculate > 1:
        return speculative.fill_block
    return _fill_exactly if settings.cache == "none" else cached_sampler.fill_block


def _fill_exactly(task: Task, block: Block, canvas: Canvas, passes: jax.Array) -> tuple[Canvas, jax.Array]:
    """Exact steps until the block is full."""
    return repeat_until_full(task, block, canvas, passes, functools.partial(reverse_step, task, block))


def _positions(open_BL: jax.Array, S: int) -> jax.Array:
    """`position_BS`: the open positions of each row from left to right, then L where a row has fewer than S."""
    order_BS = jnp.pad(jnp.argsort(~open_BL, axis=1, stable=True), ((0, 0), (0, S)))[:, :S]
    is_open_BS = jnp.arange(S)[None, :] < jnp.sum(open_BL, axis=1, keepdims=True)
    return jnp.where(is_open_BS, order_BS, open_BL.shape[1])
