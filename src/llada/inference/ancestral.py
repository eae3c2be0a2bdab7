"""Ancestral sampling of the ARM: one compiled loop with a key/value cache, a token per pass.

The cache is exact: a causal state depends on earlier tokens only. Noise is keyed as in the reverse process.
Shapes: B sequences, L canvas positions, P the longest prompt, V vocabulary, F forbidden ids.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada.config import ModelConfig
from llada.inference.choice import choose, position_keys
from llada.inference.compiled_loop import Array, Observer, Sample, by_row, forbidden_list, report, row_seeds, timed
from llada.inference.settings import check_temperature, usable_temperature
from llada.model import cached, transformer
from llada.objectives.autoregressive import shift_right
from llada.objectives.contract import SpecialTokens


class Setup(NamedTuple):
    """What a program is compiled for (hashable); no prompt of the batch is longer than `longest_prompt`."""

    config: ModelConfig
    special: SpecialTokens
    temperature: float
    longest_prompt: int
    observe: Observer | None = None


class Rows(NamedTuple):
    """What a program reads of the requests of a batch, besides their canvas."""

    prompt_length_B: Array
    seed_B: Array
    forbidden_F: Array


class _Text(NamedTuple):
    """What a step changes; `step_BL` is -1 where nothing was written, `ended_B` tells which rows have an end token."""

    tokens_BL: jax.Array
    step_BL: jax.Array
    ended_B: jax.Array


def ancestral(
    config: ModelConfig,
    params: transformer.Parameters,
    canvas_BL: np.ndarray,
    prompt_length_B: np.ndarray,
    special: SpecialTokens,
    forbidden_V: np.ndarray,
    temperature: float = 1.0,
    seed_B: np.ndarray | int = 0,
    observe: Observer | None = None,
    longest_prompt: int | None = None,
) -> Sample:
    """Continue each row's prompt, its first `prompt_length` tokens, by as many tokens as the longest prompt leaves.

    With `longest_prompt`, at least the longest, by as many as a prompt of that length leaves: batches of all shorter
    ones share a program.

    Stops when every row has written an end token; a row is all end-of-text after its own. Other arguments as in
    `sampler.reverse_process`.
    """
    check_temperature(temperature)
    canvas_BL = np.asarray(canvas_BL, np.int32)
    prompt_length_B = np.broadcast_to(prompt_length_B, len(canvas_BL)).astype(np.int32)
    longest = int(prompt_length_B.max()) if longest_prompt is None else longest_prompt
    setup = Setup(config, special, usable_temperature(temperature), longest, observe)
    rows = Rows(prompt_length_B, row_seeds(seed_B, len(canvas_BL)), forbidden_list(forbidden_V, special.mask))
    return timed(left_to_right, setup, cached.for_decoding(params), canvas_BL, rows)


@functools.partial(jax.jit, static_argnums=0)
def left_to_right(
    setup: Setup, params: transformer.Parameters, canvas_BL: Array, rows: Rows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The compiled program of `ancestral`: its tokens, steps and number of forward passes."""
    config, special, longest = setup.config, setup.special, setup.longest_prompt
    B, L = canvas_BL.shape
    canvas_BL = by_row(canvas_BL)
    rows = rows._replace(prompt_length_B=by_row(rows.prompt_length_B), seed_B=by_row(rows.seed_B))
    params = cached.with_whole_tables(config, params)
    head_VD = transformer.head(config, params)
    start_B1 = rows.prompt_length_B[:, None]
    # Position i sees the tokens before i, so the prompts and one more position are known from the start.
    inputs_BP = shift_right(canvas_BL, special.start)[:, : longest + 1]
    hidden_BPD, cache = cached.prefill(config, params, inputs_BP)
    pad = ((0, 0), (0, L - longest - 1), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 4) + pad), cache)
    first_B1D = jnp.take_along_axis(hidden_BPD, start_B1[:, :, None], axis=1)

    def unfinished(carry):
        i, _, text = carry
        return (i < L - longest) & ~jnp.all(text.ended_B)

    def step(carry):
        i, cache, text = carry
        position_B1 = start_B1 + i
        tokens_B1 = jnp.take_along_axis(text.tokens_BL, position_B1 - 1, axis=1)
        hidden_B1D, cache = cached.extend(config, params, tokens_B1, position_B1, cache)
        return i + 1, cache, _write(setup, rows, head_VD, i, hidden_B1D, text)

    # What follows an end token reads as end of text.
    after_prompt_BL = jnp.arange(L)[None, :] >= start_B1
    tokens_BL = jnp.where(after_prompt_BL, special.eos, canvas_BL)
    text = _Text(tokens_BL, jnp.full((B, L), -1, jnp.int32), jnp.zeros(B, bool))
    text = _write(setup, rows, head_VD, 0, first_B1D, text)
    passes, _, text = jax.lax.while_loop(unfinished, step, (jnp.int32(1), cache, text))
    return text.tokens_BL, text.step_BL, passes


def _write(setup: Setup, rows: Rows, head_VD: jax.Array, i: jax.Array | int, hidden_B1D: jax.Array, text: _Text):
    """The text after step `i`: token i behind each prompt, chosen from its hidden state."""
    B = len(text.ended_B)
    position_B1 = rows.prompt_length_B[:, None] + i
    keys_B1 = position_keys(rows.seed_B, jnp.full(B, i), position_B1)
    open_B1 = ~text.ended_B[:, None]
    with jax.named_scope("choose_tokens"):
        choice = choose(hidden_B1D, head_VD, open_B1, rows.forbidden_F, setup.temperature, keys_B1)
    token_B1 = jnp.where(open_B1, choice.token_BK, setup.special.eos)
    at = (jnp.arange(B)[:, None], position_B1)
    tokens_BL = text.tokens_BL.at[at].set(token_B1)
    step_BL = text.step_BL.at[at].set(jnp.where(open_B1, i, -1))
    is_over = report(setup.observe, tokens_BL, step_BL, i)
    ended_B = text.ended_B | jnp.isin(token_B1[:, 0], jnp.array(setup.special.ends)) | is_over
    return _Text(tokens_BL, step_BL, ended_B)
