"""Sampling: the reverse process of masked diffusion, and ancestral sampling of the ARM. One compiled loop each.

The reverse process starts from a canvas whose open positions hold the mask token and fills a quota of them per step
(LLaDA section 2.4, Algorithms 4 and 5 in the integer-quota form of the published code). Noise is keyed by (seed, step,
sequence), so a sample does not depend on the batch it is in.
Shapes: B sequences, L canvas positions, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada.config import ModelConfig
from llada.errors import UserError
from llada.model import transformer
from llada.objectives import noise as noise_lib
from llada.objectives.autoregressive import shift_right
from llada.objectives.contract import SpecialTokens

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to run the reverse process. One block as long as the answer is pure diffusion; shorter ones go left to right.

    steps         forward passes (twice as many with guidance); a multiple of the number of blocks
    temperature   0 takes the most likely token; else logits / temperature + Gumbel noise
    cfg_scale     w of classifier-free guidance without labels: LLaDA Eq. (16); 0 is off
    remasking     which predictions to keep: low_confidence keeps the most probable ones, random any
    """

    steps: int
    block_length: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"


class Sample(NamedTuple):
    """`tokens_BL`; `step_BL`, the step at which each position was filled (-1: given); forward passes of the model."""

    tokens_BL: jax.Array
    step_BL: jax.Array
    forward_passes: int


def check(settings: SamplerConfig, open_count: int) -> None:
    """UserError unless `settings` can fill `open_count` positions."""
    if settings.remasking not in REMASKING:
        raise UserError(f"--remasking={settings.remasking} is not one of {', '.join(REMASKING)}")
    if settings.temperature < 0:
        raise UserError(f"--temperature={settings.temperature} is negative; 0 is greedy, 1 samples the model's law")
    if settings.cfg_scale < 0:
        raise UserError(f"--cfg_scale={settings.cfg_scale} is negative; 0 is off")
    if not 1 <= settings.block_length <= open_count:
        raise UserError(f"--block_length={settings.block_length} must be between 1 and the {open_count} open positions")
    blocks = -(-open_count // settings.block_length)
    if settings.steps < blocks or settings.steps % blocks:
        raise UserError(
            f"--steps={settings.steps} must be a positive multiple of the {blocks} block(s) that "
            f"--block_length={settings.block_length} makes of {open_count} positions"
        )
    if settings.steps > blocks * settings.block_length:
        raise UserError(f"--steps={settings.steps} is more than the {open_count} positions to fill; lower it")


def reverse_process(
    config: ModelConfig,
    params: transformer.Parameters,
    canvas_BL: np.ndarray,
    settings: SamplerConfig,
    special: SpecialTokens,
    forbidden_V: np.ndarray,
    seed: int = 0,
) -> Sample:
    """Fill every position of `canvas_BL` that holds the mask token; the others are context and stay.

      canvas_BL    int32; every row has the same number of mask tokens
      forbidden_V  bool, ids that must not be written (the mask token always among them)
    Raises UserError for settings that cannot fill the canvas.
    """
    counts = np.sum(np.asarray(canvas_BL) == special.mask, axis=1)
    if counts.min() != counts.max():
        raise UserError(f"the rows of a canvas need equally many masks, not {counts.min()} to {counts.max()}")
    check(settings, int(counts[0]))
    forbidden_V = np.asarray(forbidden_V) | (np.arange(config.vocab_size) == special.mask)
    tokens_BL, step_BL = _reverse_process(config, settings, special.mask, params, canvas_BL, forbidden_V, seed)
    return Sample(tokens_BL, step_BL, settings.steps * (2 if settings.cfg_scale else 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _reverse_process(config, settings, mask_id, params, canvas_BL, forbidden_V, seed):
    B, L = canvas_BL.shape
    open_BL = canvas_BL == mask_id
    ordinal_BL = jnp.cumsum(open_BL, axis=1) - 1
    block_BL = ordinal_BL // settings.block_length
    blocks = jnp.max(jnp.where(open_BL, block_BL, 0)) + 1
    steps_per_block = settings.steps // blocks

    def predict(tokens_BL):
        logits_BLV = transformer.logits(config, params, tokens_BL)
        if settings.cfg_scale:
            # Eq. (16): the unconditional branch sees the context masked.
            hidden_context_BL = jnp.where(open_BL, tokens_BL, mask_id)
            without_BLV = transformer.logits(config, params, hidden_context_BL)
            logits_BLV = without_BLV + (settings.cfg_scale + 1) * (logits_BLV - without_BLV)
        return jnp.where(forbidden_V, -jnp.inf, logits_BLV)

    def step(s, carry):
        tokens_BL, step_BL = carry
        logits_BLV = predict(tokens_BL)
        noise_key_B = _sequence_keys(seed, s, B)
        guess_BL = _draw(logits_BLV, settings.temperature, noise_key_B)
        if settings.remasking == "random":
            score_BL = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (L,)))(noise_key_B)
        else:
            # log p of the guess under the clean model: noise in the ranking is a known flaw of other samplers.
            chosen_BL = jnp.take_along_axis(logits_BLV, guess_BL[..., None], axis=-1)[..., 0]
            score_BL = chosen_BL - jax.nn.logsumexp(logits_BLV, axis=-1)
        eligible_BL = (tokens_BL == mask_id) & open_BL & (block_BL == s // steps_per_block)
        remaining_B = jnp.sum(eligible_BL, axis=1)
        steps_left = steps_per_block - s % steps_per_block
        quota_B = (remaining_B + steps_left - 1) // steps_left
        rank_BL = jnp.argsort(jnp.argsort(jnp.where(eligible_BL, -score_BL, jnp.inf), axis=1), axis=1)
        keep_BL = eligible_BL & (rank_BL < quota_B[:, None])
        return jnp.where(keep_BL, guess_BL, tokens_BL), jnp.where(keep_BL, s, step_BL)

    never_BL = jnp.full((B, L), -1, jnp.int32)
    return jax.lax.fori_loop(0, settings.steps, step, (jnp.asarray(canvas_BL, jnp.int32), never_BL))


def ancestral(
    config: ModelConfig,
    params: transformer.Parameters,
    canvas_BL: np.ndarray,
    prompt_length: int,
    special: SpecialTokens,
    forbidden_V: np.ndarray,
    temperature: float = 1.0,
    seed: int = 0,
) -> Sample:
    """Continue the ARM's prompt, the first `prompt_length` tokens of each row, to the end of the canvas.

    One forward pass over the canvas per token; no key/value cache. Arguments as in `reverse_process`.
    """
    if temperature < 0:
        raise UserError(f"--temperature={temperature} is negative; 0 is greedy, 1 samples the model's law")
    tokens_BL, step_BL = _ancestral(config, special, temperature, params, canvas_BL, prompt_length, forbidden_V, seed)
    return Sample(tokens_BL, step_BL, canvas_BL.shape[1] - prompt_length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _ancestral(config, special, temperature, params, canvas_BL, prompt_length, forbidden_V, seed):
    B, L = canvas_BL.shape

    def step(position, carry):
        tokens_BL, step_BL = carry
        hidden_BLD = transformer.hidden(config, params, shift_right(tokens_BL, special.eos))
        here_B1D = jax.lax.dynamic_slice_in_dim(hidden_BLD, position, 1, axis=1)
        logits_B1V = transformer.unembed(here_B1D, transformer.head(config, params))
        logits_B1V = jnp.where(forbidden_V, -jnp.inf, logits_B1V)
        token_B = _draw(logits_B1V, temperature, _sequence_keys(seed, position, B))[:, 0]
        return tokens_BL.at[:, position].set(token_B), step_BL.at[:, position].set(position - prompt_length)

    never_BL = jnp.full((B, L), -1, jnp.int32)
    return jax.lax.fori_loop(prompt_length, L, step, (jnp.asarray(canvas_BL, jnp.int32), never_BL))


def _sequence_keys(seed, step, B):
    key = noise_lib.step_key(seed, step, noise_lib.SAMPLING)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(B))


def _draw(logits_BLV, temperature, key_B):
    """Tokens (B, L) by Gumbel-max; `mode="high"` because coarse Gumbel noise truncates the tail (arXiv 2409.02908)."""
    if temperature == 0:
        return jnp.argmax(logits_BLV, axis=-1).astype(jnp.int32)
    shape = logits_BLV.shape[1:]
    gumbel_BLV = jax.vmap(lambda key: jax.random.gumbel(key, shape, mode="high"))(key_B)
    return jnp.argmax(logits_BLV / temperature + gumbel_BLV, axis=-1).astype(jnp.int32)
