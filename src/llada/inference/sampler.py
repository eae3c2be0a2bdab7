"""The reverse process of masked diffusion: one compiled loop from masks to text (LLaDA section 2.4, Appendix A.3).

It starts from a canvas whose open positions hold the mask token and, step by step, predicts those of the current block
and keeps some of the predictions. Noise is keyed by (the sequence's seed, step, position), so a sample does not depend
on the batch it is in. Caches and the confidence threshold are approximations of that process and say so.
Shapes: B sequences, L canvas positions, K positions of a block, Q positions computed in a cached pass, V vocabulary.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import guidance
from llada.inference.choice import choose, level
from llada.model import transformer
from llada.objectives import noise as noise_lib
from llada.objectives.contract import SpecialTokens

REMASKING = ("low_confidence", "random", "random_binomial")
CACHES = ("none", "prefix", "dual")
EOS = ("keep", "no_logits", "no_confidence")

# Called after every step with the first sequence: (tokens_L, step_L, step).
Observer = Callable[[np.ndarray, np.ndarray, int], None]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to run the reverse process.

    steps          over all blocks, a multiple of their number; each block gets as many
    block_length   open positions per block; blocks are filled left to right, later ones in view as masks. All of them
                   at once is pure diffusion, 1 is autoregressive order
    temperature    0 takes the most likely token; else a draw from softmax(logits / temperature)
    cfg_scale      w of classifier-free guidance without labels: LLaDA Eq. (16); 0 is off
    remasking      which predictions a step keeps:
                     low_confidence   an equal quota per step, the most probable ones (Algorithm 5)
                     random           the same quota, any of them (the published code's "random")
                     random_binomial  each with probability 1 - s/t (Algorithm 4 of the paper)
    eos            keep; no_logits: end tokens are never written; no_confidence: they are kept last in their block
    Approximations of the above:
    cache          none; dual: within a block, other positions keep the keys and values of the block's first pass;
                   prefix: positions before the block do (Fast-dLLM, arXiv 2505.22618)
    confidence_threshold  besides its quota a step keeps every prediction at least this probable (Fast-dLLM)
    """

    steps: int
    block_length: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    eos: str = "keep"
    cache: str = "none"
    confidence_threshold: float | None = None


class Sample(NamedTuple):
    """`tokens_BL`; `step_BL`, the step at which each position was filled (-1: given); forward passes of the model.

    A pass counts once per batch, twice with guidance; a cached pass over part of the canvas counts like a whole one.
    `seconds` of the compiled loop, and `compile_seconds` before it (about 0 where the shapes were seen before).
    """

    tokens_BL: np.ndarray
    step_BL: np.ndarray
    forward_passes: int
    seconds: float
    compile_seconds: float


def check(settings: SamplerConfig, open_count: int) -> None:
    """UserError unless `settings` can fill `open_count` positions."""
    for name, allowed in (("remasking", REMASKING), ("cache", CACHES), ("eos", EOS)):
        if getattr(settings, name) not in allowed:
            raise UserError(f"--{name}={getattr(settings, name)} is not one of {', '.join(allowed)}")
    check_temperature(settings.temperature)
    if not 0 <= settings.cfg_scale < float("inf"):
        raise UserError(f"--cfg_scale={settings.cfg_scale} must not be negative; 0 is off")
    threshold = settings.confidence_threshold
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(f"--confidence_threshold={threshold} must be a probability above 0, at most 1")
    if settings.remasking != "low_confidence" and (threshold is not None or settings.eos == "no_confidence"):
        flag = "--eos=no_confidence" if threshold is None else f"--confidence_threshold={threshold}"
        raise UserError(f"{flag} ranks by confidence; --remasking={settings.remasking} does not: use low_confidence")
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


def check_temperature(temperature: float) -> None:
    """UserError unless it is a finite number of at least 0."""
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"--temperature={temperature} must be 0 (greedy), 1 (the model's own law) or another number >= 0"
        )


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
    counts_B = open_BL.sum(axis=1)
    blocks_B = -(-counts_B // settings.block_length) if settings.block_length > 0 else counts_B
    if blocks_B.min() != blocks_B.max():
        raise UserError(f"rows of one batch need equally many blocks, not {blocks_B.min()} to {blocks_B.max()}")
    check(settings, int(counts_B.max()))
    forbidden_V = np.asarray(forbidden_V) | (np.arange(config.vocab_size) == special.mask)
    if settings.eos == "no_logits":
        forbidden_V = forbidden_V | np.isin(np.arange(config.vocab_size), special.ends)
    # Positions from a block's start to the canvas's end: what a pass over the prefix cache has to compute.
    suffix = int(np.max(ends_B - open_BL.argmax(axis=1)))
    sample = timed(
        _reverse_process,
        *(config, settings, special, int(blocks_B.max()), suffix, observe),
        *(params, canvas_BL, open_BL, seeds(seed_B, B), forbidden_V, None if lengths_B is None else ends_B),
    )
    return sample._replace(forward_passes=sample.forward_passes * (2 if settings.cfg_scale else 1))


def timed(loop, *arguments) -> Sample:
    """The Sample of a jitted loop that returns (tokens_BL, step_BL, passes), compiled before the clock starts."""
    start = time.perf_counter()
    loop.lower(*arguments).compile()
    compiled = time.perf_counter()
    tokens_BL, step_BL, passes = jax.device_get(loop(*arguments))
    return Sample(tokens_BL, step_BL, int(passes), time.perf_counter() - compiled, compiled - start)


def report(observe: Observer | None, tokens_BL: jax.Array, step_BL: jax.Array, step: jax.Array) -> None:
    """From within a compiled loop, show the observer the first sequence."""
    if observe is not None:

        def call(*arrays):
            tokens_L, step_L, step = map(np.asarray, arrays)
            observe(tokens_L, step_L, int(step))

        jax.experimental.io_callback(call, None, tokens_BL[0], step_BL[0], step, ordered=True)


def seeds(seed_B: np.ndarray | int, B: int) -> np.ndarray:
    """A seed for each of B rows: those given, or the number given and the next ones."""
    return np.asarray(seed_B + np.arange(B) if np.ndim(seed_B) == 0 else seed_B, np.uint32)


class _State(NamedTuple):
    """What a step changes: the canvas, when its positions were filled, steps done in this block, passes so far."""

    tokens_BL: jax.Array
    step_BL: jax.Array
    done: jax.Array
    passes: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _reverse_process(config, settings, special, blocks, suffix, observe, params, canvas_BL, *rows):
    process = _Process(config, settings, special, blocks, suffix, observe, params, *rows)
    never_BL = jnp.full(canvas_BL.shape, -1, jnp.int32)
    start = _State(canvas_BL, never_BL, jnp.int32(0), jnp.int32(0))
    state = jax.lax.fori_loop(0, blocks, process.fill_block, start)
    return state.tokens_BL, state.step_BL, state.passes


class _Process:
    """The loop's body while it is being traced."""

    def __init__(
        self, config, settings, special, blocks, suffix, observe, params, open_BL, seed_B, forbidden_V, lengths_B
    ):
        self.config, self.settings, self.special, self.observe = config, settings, special, observe
        self.params, self.head_VD = params, transformer.head(config, params)
        self.open_BL, self.seed_B, self.forbidden_V, self.lengths_B = open_BL, seed_B, forbidden_V, lengths_B
        self.L, K, self.suffix = open_BL.shape[1], settings.block_length, suffix
        self.steps_per_block = settings.steps // blocks
        # Open positions of each row from left to right; slots that a short last block leaves over point off the canvas.
        order_BL = jnp.argsort(~open_BL, axis=1, stable=True)
        order_BS = jnp.pad(order_BL, ((0, 0), (0, blocks * K)))[:, : blocks * K]
        used_BS = jnp.arange(blocks * K) < jnp.sum(open_BL, axis=1, keepdims=True)
        self.slots_BS = jnp.where(used_BS, order_BS, self.L)

    def fill_block(self, block, state):
        """Steps until no position of the block is masked."""
        K = self.settings.block_length
        position_BK = jax.lax.dynamic_slice_in_dim(self.slots_BS, block * K, K, axis=1)
        state = state._replace(done=jnp.int32(0))
        if self.settings.cache == "none":
            return self.loop(lambda tokens_BL: self.whole_canvas(tokens_BL)[0], block, position_BK, state)
        # The block's first pass is a whole one: it renews the cache and counts as a step.
        hidden_BLD, cache = self.whole_canvas(state.tokens_BL, keep_cache=True)
        state = self.step(_take(hidden_BLD, position_BK), block, position_BK, state)
        if self.settings.cache == "dual":
            return self.loop_cached(K, cache, block, position_BK, state)
        # What lies behind a prefix shrinks from block to block; shapes are static, so there is a loop for each halving.
        sizes = [self.suffix]
        while sizes[-1] > K:
            sizes.append(max(K, -(-sizes[-1] // 2)))
        ends_B = self.L if self.lengths_B is None else self.lengths_B
        needed = jnp.max(ends_B - position_BK[:, 0])
        loops = [functools.partial(self.loop_cached, size, cache, block, position_BK) for size in sizes]
        return jax.lax.switch(jnp.sum(needed <= jnp.array(sizes)) - 1, loops, state)

    def loop_cached(self, size, cache, block, position_BK, state):
        """Steps that compute `size` positions of each row: the block's own, or those from its start on."""
        if self.settings.cache == "dual":
            position_BQ, place_BK = position_BK, jnp.broadcast_to(jnp.arange(size), position_BK.shape)
        else:
            position_BQ = position_BK[:, :1] + jnp.arange(size)
            place_BK = position_BK - position_BK[:, :1]
        position_BQ, lengths_B = self.both(position_BQ), self.both(self.lengths_B)

        def hidden(tokens_BL):
            tokens_BQ = _take(self.branches(tokens_BL), position_BQ)
            hidden_BQD, _ = transformer.extend(self.config, self.params, tokens_BQ, position_BQ, cache, lengths_B)
            return guidance.mixed(hidden_BQD, self.settings.cfg_scale)

        return self.loop(hidden, block, position_BK, state, place_BK)

    def loop(self, hidden, block, position_BK, state, place_BK=None):
        """Steps from `hidden(tokens_BL)`, where the block's positions stand at `place_BK`, until the block is full.

        Only masked positions meet the vocabulary matrix. Shapes are static, so as they get fewer the loop is left for
        one with half as many, twice; not in small blocks, nor with a prefix cache, which has a loop for every suffix.
        """
        place_BK = position_BK if place_BK is None else place_BK
        K = position_BK.shape[1]
        sizes = [K] if K < 16 or self.settings.cache == "prefix" else [K, -(-K // 2), -(-K // 4)]
        for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):

            def unfinished(state, smaller=smaller):
                return jnp.any(jnp.sum(self.masked(state.tokens_BL, position_BK), axis=1) > smaller)

            def step(state, size=size):
                first_BK = jnp.argsort(~self.masked(state.tokens_BL, position_BK), axis=1, stable=True)[:, :size]
                at_BK, position = (jnp.take_along_axis(x, first_BK, axis=1) for x in (place_BK, position_BK))
                return self.step(_take(hidden(state.tokens_BL), at_BK), block, position, state)

            state = jax.lax.while_loop(unfinished, step, state)
        return state

    def step(self, hidden_BKD, block, position_BK, state):
        """Choose a token for each masked position of the block and keep some of them."""
        masked_BK = self.masked(state.tokens_BL, position_BK)
        step = block * self.steps_per_block + state.done
        keys_BK = position_keys(self.seed_B, step, position_BK)
        temperature = self.settings.temperature
        chosen = choose(hidden_BKD, self.head_VD, masked_BK, self.forbidden_V, temperature, _fold(keys_BK, 0))
        if temperature == 0:
            chosen = chosen._replace(confidence_BK=level(chosen.confidence_BK, self.visible(state.tokens_BL)))
        steps_left = self.steps_per_block - state.done
        keep_BK = _kept(self.settings, self.special, chosen, masked_BK, steps_left, _fold(keys_BK, 1))
        at = (jnp.arange(len(position_BK))[:, None], jnp.where(keep_BK, position_BK, self.L))
        tokens_BL = state.tokens_BL.at[at].set(chosen.token_BK, mode="drop")
        step_BL = state.step_BL.at[at].set(step, mode="drop")
        report(self.observe, tokens_BL, step_BL, step)
        return _State(tokens_BL, step_BL, state.done + 1, state.passes + 1)

    def whole_canvas(self, tokens_BL, keep_cache=False):
        """Hidden states of every position, branches mixed, and the cache of both branches if kept."""
        run = transformer.prefill if keep_cache else lambda *given: (transformer.hidden(*given), None)
        hidden_BLD, cache = run(self.config, self.params, self.branches(tokens_BL), self.both(self.lengths_B))
        return guidance.mixed(hidden_BLD, self.settings.cfg_scale), cache

    def branches(self, tokens_BL):
        """The rows to run: twice as many with guidance."""
        return guidance.branches(tokens_BL, self.open_BL, self.special.mask, self.settings.cfg_scale)

    def both(self, x):
        """One row per row to run."""
        return guidance.both(x, self.settings.cfg_scale)

    def visible(self, tokens_BL):
        """Which positions of the canvas show a token."""
        inside = True if self.lengths_B is None else jnp.arange(self.L) < self.lengths_B[:, None]
        return (tokens_BL != self.special.mask) & inside

    def masked(self, tokens_BL, position_BK):
        """Which positions of the block are still to be filled."""
        return (_take(tokens_BL, position_BK) == self.special.mask) & (position_BK < self.L)


def _kept(settings, special, chosen, masked_BK, steps_left, keys_BK):
    """Which predictions a step keeps; all that remain when it is the last."""
    if settings.remasking == "low_confidence":
        score_BK = chosen.confidence_BK
        if settings.eos == "no_confidence":
            ends = jnp.isin(chosen.token_BK, jnp.array(special.ends))
            score_BK = jnp.where(ends, jnp.finfo(jnp.float32).min, score_BK)
    else:
        score_BK = jax.vmap(jax.vmap(jax.random.uniform))(keys_BK)
    if settings.remasking == "random_binomial":
        # Algorithm 4 remasks with probability s/t; on an even grid of times 1 - s/t = 1 / steps_left.
        return masked_BK & (score_BK * steps_left < 1)
    remaining_B1 = jnp.sum(masked_BK, axis=1, keepdims=True)
    quota_B1 = (remaining_B1 + steps_left - 1) // steps_left
    rank_BK = jnp.argsort(jnp.argsort(jnp.where(masked_BK, -score_BK, jnp.inf), axis=1), axis=1)
    keep_BK = rank_BK < quota_B1
    if settings.confidence_threshold is not None:
        keep_BK |= score_BK >= math.log(settings.confidence_threshold)
    return masked_BK & keep_BK


def _take(x_BL, position_BK):
    """x[b, position[b, k]] of `x_BL` or `x_BLD`; a position off the canvas reads the last one."""
    position_BK = jnp.minimum(position_BK, x_BL.shape[1] - 1)
    return jnp.take_along_axis(x_BL, position_BK if x_BL.ndim == 2 else position_BK[..., None], axis=1)


def position_keys(seed_B: jax.Array, step: jax.Array, position_BK: jax.Array) -> jax.Array:
    """A key for each (sequence, step, position) of sampling."""
    keys_B = jax.vmap(lambda seed: noise_lib.step_key(seed, step, noise_lib.SAMPLING))(seed_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, position_BK)


def _fold(keys_BK, use):
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, use)))(keys_BK)
