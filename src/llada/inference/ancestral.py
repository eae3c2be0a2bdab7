"""Ancestral sampling of the ARM: one compiled loop with a key/value cache, a token per pass.

The cache is exact: a causal state depends on earlier tokens only. Noise is keyed as in the reverse process.
Shapes: B sequences, L canvas positions, P the longest prompt, V vocabulary, F forbidden ids.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llada.config import ModelConfig
from llada.inference.choice import choose
from llada.inference.sampler import Observer, Sample, ids_of, position_keys, repeated, report, seeds, timed
from llada.inference.settings import check_temperature, usable_temperature
from llada.model import transformer
from llada.objectives.autoregressive import shift_right
from llada.objectives.contract import SpecialTokens


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
) -> Sample:
    """Continue each row's prompt, its first `prompt_length` tokens, by as many tokens as the longest prompt leaves.

    Stops when every row has written an end token; a row is all end-of-text after its own. Other arguments as in
    `sampler.reverse_process`.
    """
    check_temperature(temperature)
    prompt_length_B = np.broadcast_to(prompt_length_B, len(canvas_BL)).astype(np.int32)
    longest = int(prompt_length_B.max())
    forbidden_F = ids_of(forbidden_V, special.mask)
    return timed(
        left_to_right,
        *(config, special, usable_temperature(temperature), longest, observe),
        *(repeated(params), np.asarray(canvas_BL, np.int32)),
        *(prompt_length_B, forbidden_F, seeds(seed_B, len(canvas_BL))),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def left_to_right(
    config, special, temperature, longest, observe, params, canvas_BL, prompt_length_B, forbidden_F, seed_B
):
    """The compiled program of `ancestral`: its tokens, steps and number of forward passes."""
    B, L = canvas_BL.shape
    head_VD = transformer.head(config, params)
    # Position i sees the tokens before i, so the prompts and one more position are known from the start.
    inputs_BP = shift_right(canvas_BL, special.start)[:, : longest + 1]
    hidden_BPD, cache = transformer.prefill(config, params, inputs_BP)
    pad = ((0, 0), (0, L - longest - 1), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 4) + pad), cache)
    first_B1D = jnp.take_along_axis(hidden_BPD, prompt_length_B[:, None, None], axis=1)

    def write(i, hidden_B1D, tokens_BL, step_BL, ended_B):
        position_B1 = prompt_length_B[:, None] + i
        keys_B1 = position_keys(seed_B, jnp.full(B, i), position_B1)
        needed_B1 = ~ended_B[:, None]
        chosen = choose(hidden_B1D, head_VD, needed_B1, forbidden_F, temperature, keys_B1)
        token_B1 = jnp.where(needed_B1, chosen.token_BK, special.eos)
        at = (jnp.arange(B)[:, None], position_B1)
        tokens_BL, step_BL = tokens_BL.at[at].set(token_B1), step_BL.at[at].set(jnp.where(needed_B1, i, -1))
        report(observe, tokens_BL, step_BL, i)
        return tokens_BL, step_BL, ended_B | jnp.isin(token_B1[:, 0], jnp.array(special.ends))

    def unfinished(carry):
        i, _, (_, _, ended_B) = carry
        return (i < L - longest) & ~jnp.all(ended_B)

    def step(carry):
        i, cache, (tokens_BL, step_BL, ended_B) = carry
        position_B1 = prompt_length_B[:, None] + i
        tokens_B1 = jnp.take_along_axis(tokens_BL, position_B1 - 1, axis=1)
        hidden_B1D, cache = transformer.extend(config, params, tokens_B1, position_B1, cache, return_cache=True)
        return i + 1, cache, write(i, hidden_B1D, tokens_BL, step_BL, ended_B)

    # What an end token leaves open reads as end of text.
    after_BL = jnp.arange(L) >= prompt_length_B[:, None]
    start = (jnp.where(after_BL, special.eos, canvas_BL), jnp.full((B, L), -1, jnp.int32), jnp.zeros(B, bool))
    start = write(0, first_B1D, *start)
    passes, _, (tokens_BL, step_BL, _) = jax.lax.while_loop(unfinished, step, (jnp.int32(1), cache, start))
    return tokens_BL, step_BL, passes
