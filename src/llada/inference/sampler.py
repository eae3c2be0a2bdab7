"""The reverse process of masked diffusion: one compiled loop from masks to text (LLaDA section 2.4, Appendix A.3).

It starts from a canvas whose open positions hold the mask token and, step by step, predicts those of the current block
and keeps some of the predictions. Noise is keyed by (the sequence's seed, step, position), so a sample does not depend
on the batch it is in. Caches and the confidence threshold are approximations of that process and say so.
Shapes: B sequences, L canvas positions, K positions of a block, Q positions computed in a cached pass, V vocabulary.
F forbidden ids.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import guidance
from llada.inference.choice import Choice, choose, level
from llada.inference.settings import SamplerConfig, check, usable_temperature
from llada.model import transformer
from llada.model.layers import take
from llada.objectives import noise as noise_lib
from llada.objectives.contract import SpecialTokens

# Called after every step with the first sequence: (tokens_L, step_L, step).
Observer = Callable[[np.ndarray, np.ndarray, int], None]


class Sample(NamedTuple):
    """`tokens_BL`; `step_BL`, the step at which each position was filled (-1: given); forward passes of the model.

    A pass counts once per batch, twice with guidance; a cached pass over part of the canvas counts like a whole one,
    and so does a speculative one over several canvases.
    `seconds` of the compiled loop, without those its observer took, and `compile_seconds` before it (about 0 where the
    shapes were seen before).
    """

    tokens_BL: np.ndarray
    step_BL: np.ndarray
    forward_passes: int
    seconds: float
    compile_seconds: float


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
    settings = dataclasses.replace(settings, temperature=usable_temperature(settings.temperature))
    more = special.ends if settings.eos == "no_logits" else ()
    forbidden_F = ids_of(forbidden_V, special.mask, *more)
    # Positions from a block's start to the canvas's end: what a pass over the prefix cache has to compute.
    suffix = int(np.max(ends_B - open_BL.argmax(axis=1)))
    params = repeated(params)
    sample = timed(
        fill_blocks,
        *(config, settings, special, int(blocks_B.max()), suffix, observe),
        *(params, canvas_BL, open_BL, seeds(seed_B, B), forbidden_F, None if lengths_B is None else ends_B),
    )
    return sample._replace(forward_passes=sample.forward_passes * (2 if settings.cfg_scale else 1))


def timed(loop, *arguments) -> Sample:
    """The Sample of a jitted loop that returns (tokens_BL, step_BL, passes), compiled before the clock starts."""
    start = time.perf_counter()
    loop.lower(*arguments).compile()
    compiled, observed = time.perf_counter(), _observed.seconds
    tokens_BL, step_BL, passes = mesh_lib.on_host(loop(*arguments))
    seconds = time.perf_counter() - compiled - (_observed.seconds - observed)
    return Sample(tokens_BL, step_BL, int(passes), max(seconds, 1e-9), compiled - start)


class _Observed:
    """How long observers have taken so far: what they draw, and how long they wait, is not sampling."""

    seconds = 0.0


_observed = _Observed()


def repeated(params: transformer.Parameters) -> transformer.Parameters:
    """The parameters as many passes of one compiled loop read them best on the device there is."""
    return transformer.unstacked(params) if mesh_lib.platform() == "cpu" else params


def ids_of(forbidden_V: np.ndarray, *more: int | None) -> np.ndarray:
    """The ids marked in `forbidden_V` and some `more`, ascending; None is none."""
    return np.union1d(np.flatnonzero(forbidden_V), [token for token in more if token is not None]).astype(np.int32)


def report(observe: Observer | None, tokens_BL: jax.Array, step_BL: jax.Array, step: jax.Array) -> None:
    """From within a compiled loop, show the observer the first sequence."""
    if observe is not None:

        def call(*arrays):
            start = time.perf_counter()
            tokens_L, step_L, step = map(np.asarray, arrays)
            observe(tokens_L, step_L, int(step))
            _observed.seconds += time.perf_counter() - start

        jax.experimental.io_callback(call, None, tokens_BL[0], step_BL[0], step, ordered=True)


def seeds(seed_B: np.ndarray | int, B: int) -> np.ndarray:
    """A seed for each of B rows: those given, or the number given and the next ones."""
    return np.asarray(seed_B + np.arange(B) if np.ndim(seed_B) == 0 else seed_B, np.uint32)


class _State(NamedTuple):
    """What a step changes: the canvas, when its positions were filled, and how many steps this block has had."""

    tokens_BL: jax.Array
    step_BL: jax.Array
    done_B1: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def fill_blocks(config, settings, special, blocks, suffix, observe, params, canvas_BL, *rows):
    """The compiled loop of `reverse_process`: tokens and steps as there, and the number of forward passes."""
    process = _Process(config, settings, special, blocks, suffix, observe, params, *rows)
    never_BL = jnp.full(canvas_BL.shape, -1, jnp.int32)
    start = _State(canvas_BL, never_BL, jnp.zeros((len(canvas_BL), 1), jnp.int32))
    state, passes = jax.lax.fori_loop(0, blocks, process.fill_block, (start, jnp.int32(0)))
    return state.tokens_BL, state.step_BL, passes


class _Process:
    """The loop's body while it is being traced."""

    def __init__(
        self, config, settings, special, blocks, suffix, observe, params, open_BL, seed_B, forbidden_F, lengths_B
    ):
        self.config, self.settings, self.special, self.observe = config, settings, special, observe
        self.params, self.head_VD = params, transformer.head(config, params)
        self.open_BL, self.seed_B, self.forbidden_F, self.lengths_B = open_BL, seed_B, forbidden_F, lengths_B
        self.L, K, self.suffix = open_BL.shape[1], settings.block_length, suffix
        self.steps_per_block = settings.steps // blocks
        # Open positions of each row from left to right; slots that a short last block leaves over point off the canvas.
        order_BL = jnp.argsort(~open_BL, axis=1, stable=True)
        order_BS = jnp.pad(order_BL, ((0, 0), (0, blocks * K)))[:, : blocks * K]
        used_BS = jnp.arange(blocks * K) < jnp.sum(open_BL, axis=1, keepdims=True)
        self.slots_BS = jnp.where(used_BS, order_BS, self.L)

    def fill_block(self, block, carry):
        """Steps until no position of the block is masked; `carry` is the state and the passes so far."""
        state, passes = carry
        K = self.settings.block_length
        position_BK = jax.lax.dynamic_slice_in_dim(self.slots_BS, block * K, K, axis=1)
        carry = state._replace(done_B1=jnp.zeros_like(state.done_B1)), passes
        if self.settings.speculate > 1:
            return self.loop_speculative(block, position_BK, carry)
        if self.settings.cache == "none":
            return self.loop(lambda *given: self.whole_canvas(*given)[0], block, position_BK, carry)
        # The block's first pass is a whole one: it renews the cache and counts as a step.
        hidden_BKD, cache = self.whole_canvas(state.tokens_BL, position_BK, return_cache=True)
        carry = self.step(hidden_BKD, block, position_BK, carry)
        if self.settings.cache == "dual":
            return self.loop_cached(K, cache, block, position_BK, carry)
        # What lies behind a prefix shrinks from block to block; shapes are static, so there is a loop for each halving.
        sizes = [self.suffix]
        while sizes[-1] > K:
            sizes.append(max(K, -(-sizes[-1] // 2)))
        ends_B = self.L if self.lengths_B is None else self.lengths_B
        needed = jnp.max(ends_B - position_BK[:, 0])
        loops = [functools.partial(self.loop_cached, size, cache, block, position_BK) for size in sizes]
        return jax.lax.switch(jnp.sum(needed <= jnp.array(sizes)) - 1, loops, carry)

    def loop_cached(self, size, cache, block, position_BK, carry):
        """Steps that compute `size` positions of each row: the block's own, or those from its start on."""
        if self.settings.cache == "dual":
            position_BQ, place_BK = position_BK, jnp.broadcast_to(jnp.arange(size), position_BK.shape)
        else:
            position_BQ = position_BK[:, :1] + jnp.arange(size)
            place_BK = position_BK - position_BK[:, :1]
        position_BQ, lengths_B = self.both(position_BQ), self.both(self.lengths_B)

        def hidden(tokens_BL, at_BK):
            inputs = take(self.branches(tokens_BL), position_BQ), position_BQ, cache, lengths_B
            hidden_BKD, _ = transformer.extend(self.config, self.params, *inputs, at_BR=self.both(at_BK))
            return guidance.mixed(hidden_BKD, self.settings.cfg_scale)

        return self.loop(hidden, block, position_BK, carry, place_BK)

    def loop(self, hidden, block, position_BK, carry, place_BK=None):
        """Steps from `hidden(tokens_BL, at_BK)`, with the block's positions at `place_BK`, until the block is full."""
        place_BK = position_BK if place_BK is None else place_BK

        def unfinished(carry):
            return jnp.any(self.masked(carry[0].tokens_BL, position_BK))

        def step(carry):
            return self.step(hidden(carry[0].tokens_BL, place_BK), block, position_BK, carry)

        return jax.lax.while_loop(unfinished, step, carry)

    def loop_speculative(self, block, position_BK, carry):
        """Steps taken several a pass: drafts from the last predictions, kept as far as fresh predictions confirm them.

        A step is a function of canvas and step number alone, noise included, so a confirmed draft is the exact next
        canvas. Sequences advance each at its own speed.
        """
        copies = self.settings.speculate
        tall = functools.partial(jnp.tile, reps=(copies, 1))

        def turn(carry):
            state, passes, chosen = carry
            drafts = [state]
            while len(drafts) < copies:
                drafts.append(self.advance(drafts[-1], chosen, block, position_BK))
            tokens, done = (jnp.concatenate([draft[i] for draft in drafts]) for i in (0, 2))
            hidden, _ = self.whole_canvas(tokens, tall(position_BK), copies=copies)
            fresh = self.choose(hidden, tokens, done, block, tall(position_BK), copies)
            right_B1 = jnp.ones_like(state.done_B1, bool)
            for i, part in enumerate(zip(*(jnp.split(x, copies) for x in fresh), strict=True)):
                after = self.advance(drafts[i], Choice(*part), block, position_BK)
                state, chosen = jax.tree.map(
                    functools.partial(jnp.where, right_B1), (after, Choice(*part)), (state, chosen)
                )
                if i + 1 < copies:
                    right_B1 &= jnp.all(after.tokens_BL == drafts[i + 1].tokens_BL, axis=1, keepdims=True)
            report(self.observe, state.tokens_BL, state.step_BL, jnp.max(state.step_BL[0]))
            return state, passes + 1, chosen

        nothing = Choice(jnp.full(position_BK.shape, self.special.mask), jnp.zeros(position_BK.shape))
        start = (*carry, nothing)  # the first drafts change nothing, and are never confirmed
        return jax.lax.while_loop(lambda carry: jnp.any(self.masked(carry[0].tokens_BL, position_BK)), turn, start)[:2]

    def step(self, hidden_BKD, block, position_BK, carry):
        """One pass's step: predictions for the masked positions of the block, some of them kept."""
        state, passes = carry
        chosen = self.choose(hidden_BKD, state.tokens_BL, state.done_B1, block, position_BK)
        step = block * self.steps_per_block + state.done_B1[0, 0]
        state = self.advance(state, chosen, block, position_BK)
        report(self.observe, state.tokens_BL, state.step_BL, step)
        return state, passes + 1

    def choose(self, hidden_BKD, tokens_BL, done_B1, block, position_BK, copies=1):
        """A token and its confidence for each masked position of the block."""
        temperature, lengths_B = self.settings.temperature, self.lengths_B
        keys_BK = self.keys(jnp.tile(self.seed_B, copies), done_B1, block, position_BK, 0)
        masked_BK = self.masked(tokens_BL, position_BK)
        chosen = choose(hidden_BKD, self.head_VD, masked_BK, self.forbidden_F, temperature, keys_BK)
        if temperature > 0:
            return chosen
        visible_BL = tokens_BL != self.special.mask
        if lengths_B is not None:
            visible_BL &= jnp.arange(self.L) < jnp.tile(lengths_B, copies)[:, None]
        return chosen._replace(confidence_BK=level(chosen.confidence_BK, visible_BL))

    def advance(self, state, chosen, block, position_BK):
        """The state after one step that keeps some of the `chosen`."""
        masked_BK = self.masked(state.tokens_BL, position_BK)
        keys_BK = self.keys(self.seed_B, state.done_B1, block, position_BK, 1)
        steps_left_B1 = self.steps_per_block - state.done_B1
        keep_BK = _kept(self.settings, self.special, chosen, masked_BK, steps_left_B1, keys_BK)
        at = (jnp.arange(len(position_BK))[:, None], jnp.where(keep_BK, position_BK, self.L))
        tokens_BL = state.tokens_BL.at[at].set(chosen.token_BK, mode="drop")
        step_BL = state.step_BL.at[at].set(block * self.steps_per_block + state.done_B1, mode="drop")
        return _State(tokens_BL, step_BL, state.done_B1 + 1)

    def keys(self, seed_B, done_B1, block, position_BK, use):
        """A key for each position: use 0 is what is drawn, 1 what is kept."""
        keys_BK = position_keys(seed_B, block * self.steps_per_block + done_B1[:, 0], position_BK)
        return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, use)))(keys_BK)

    def whole_canvas(self, tokens_BL, at_BK, return_cache=False, copies=1):
        """Hidden states of the positions asked for, branches mixed, and the cache of both branches if kept."""
        run = transformer.prefill if return_cache else lambda *given: (transformer.hidden(*given), None)
        lengths_B = None if self.lengths_B is None else self.both(jnp.tile(self.lengths_B, copies))
        given = self.branches(tokens_BL, copies), lengths_B, self.both(at_BK)
        hidden_BKD, cache = run(self.config, self.params, *given)
        return guidance.mixed(hidden_BKD, self.settings.cfg_scale), cache

    def branches(self, tokens_BL, copies=1):
        """The rows to run: twice as many with guidance."""
        open_BL = jnp.tile(self.open_BL, (copies, 1))
        return guidance.branches(tokens_BL, open_BL, self.special.mask, self.settings.cfg_scale)

    def both(self, x):
        """One row per row to run."""
        return guidance.both(x, self.settings.cfg_scale)

    def masked(self, tokens_BL, position_BK):
        """Which positions of the block are still to be filled."""
        return (take(tokens_BL, position_BK) == self.special.mask) & (position_BK < self.L)


def _kept(settings, special, chosen, masked_BK, steps_left_B1, keys_BK):
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
        return masked_BK & (score_BK * steps_left_B1 < 1)
    remaining_B1 = jnp.sum(masked_BK, axis=1, keepdims=True)
    quota_B1 = (remaining_B1 + steps_left_B1 - 1) // jnp.maximum(steps_left_B1, 1)
    rank_BK = jnp.argsort(jnp.argsort(jnp.where(masked_BK, -score_BK, jnp.inf), axis=1), axis=1)
    keep_BK = rank_BK < quota_B1
    if settings.confidence_threshold is not None:
        keep_BK |= score_BK >= math.log(settings.confidence_threshold)
    return masked_BK & keep_BK


def position_keys(seed_B: jax.Array, step_B: jax.Array, position_BK: jax.Array) -> jax.Array:
    """A key for each (sequence, step, position) of sampling."""
    keys_B = jax.vmap(lambda seed, step: noise_lib.step_key(seed, step, noise_lib.SAMPLING))(seed_B, step_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, position_BK)
