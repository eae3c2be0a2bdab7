"""Masked diffusion: the training loss and the likelihood bound (LLaDA sections 2.1 and 2.3, Eqs. (3), (5) and (6)).

The mask predictor arrives as a function; nothing here knows the model. Which tokens are masked, and the weight that
makes their nats an unbiased estimate of the bound, is `corruption.py`.
Shapes: B sequences, L tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig
from llada.objectives import noise as noise_lib
from llada.objectives import time_law
from llada.objectives.contract import (
    ANSWER,
    CONTEXT,
    PADDING,
    TIME_BINS,
    AnswerTerms,
    Examples,
    LossTerms,
    Predictor,
    SpecialTokens,
    answer_weights,
    is_valid,
    token_count,
)
from llada.objectives.corruption import Corruption, behind_prefix, corrupt, divisor, drawn, mask_exactly, paired
from llada.objectives.vocabulary_head import weighted_nats

ESTIMATORS = ("l_of_L", "bernoulli")


def bound_terms(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    lengths_B: jax.Array | None,
    corruption: Corruption,
    head_rows: int | None,
) -> tuple[jax.Array, jax.Array]:
    """One draw of the bound: sum over masked tokens of weight x nats, and those `nats_BL` unweighted.

    Summed, not averaged: divide by the global token count once. Gradients flow through the first value only.
    """
    hidden = predict(corruption.xt_BL, lengths_B)
    weights_BL = jnp.where(corruption.masked_BL, corruption.weight_B[:, None], 0.0)
    return weighted_nats(hidden, head_VD, x0_BL, weights_BL, head_rows)


def held_out_nats(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    row_B: jax.Array,
    special: SpecialTokens,
    draws: int,
    estimator: str,
    head_rows: int | None,
    counted_BL: jax.Array | None = None,
) -> jax.Array:
    """`nats_MB`: M = `draws` unbiased estimates of each row's bound, in nats per row; LLaDA Eq. (4) or (6).

    `row_B` are the rows' indices in the held-out set: a row meets the same masks whatever batch it is in. Over the
    draws of a row, l (or t) is stratified: draw m takes the m-th of M equal slices of [0, 1), shifted by one uniform
    number per row; each draw alone keeps its distribution (`corrupt`). With `counted_BL` the bound is that of these
    tokens given the others, which are never masked.
    """
    B, L = x0_BL.shape
    maskable_BL = jnp.ones((B, L), bool) if counted_BL is None else counted_BL
    shift_B = noise_lib.uniform(noise_lib.held_out(0, row_B), noise_lib.EVALUATION_TIME)

    def draw(_, m):
        u_B = (shift_B + m.astype(jnp.float32) / draws) % 1.0
        uniform_BL = noise_lib.uniform(noise_lib.held_out(m, row_B), noise_lib.EVALUATION_MASK, (L,))
        corruption = corrupt(x0_BL, u_B, uniform_BL, maskable_BL, special.mask_id, estimator)
        _, nats_BL = bound_terms(predict, head_VD, x0_BL, None, corruption, head_rows)
        return None, corruption.weight_B * jnp.sum(nats_BL, axis=1)

    return jax.lax.scan(draw, None, jnp.arange(draws, dtype=jnp.int32))[1]


def nats_by_time(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    row_B: jax.Array,
    special: SpecialTokens,
    times: tuple[float, ...],
    head_rows: int | None,
    counted_BL: jax.Array,
    shown_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`(nats_TB, count_TB)`: for each t of a fixed grid, the nats of masked tokens that are shown, and their number.

    Masked are t of the counted tokens, at least one. The masks of a row are the same for every model, and grow with t.
    """
    uniform_BL = noise_lib.uniform(noise_lib.held_out(0, row_B), noise_lib.EVALUATION_MASK, (x0_BL.shape[1],))
    size_B = jnp.sum(counted_BL, axis=1)

    def at(_, t):
        count_B = jnp.clip(jnp.round(t * size_B).astype(jnp.int32), 1, size_B)
        corruption = mask_exactly(x0_BL, count_B, uniform_BL, counted_BL, special.mask_id)
        _, nats_BL = bound_terms(predict, head_VD, x0_BL, None, corruption, head_rows)
        masked_BL = corruption.masked_BL & shown_BL
        return None, (jnp.sum(jnp.where(masked_BL, nats_BL, 0.0), axis=1), jnp.sum(masked_BL, axis=1))

    return jax.lax.scan(at, None, jnp.array(times, jnp.float32))[1]


def loss(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    noise: noise_lib.Noise,
    special: SpecialTokens,
    config: ObjectiveConfig,
) -> LossTerms:
    """The pre-training objective: LLaDA Eq. (3), one draw of (t, masks) per sequence.

    -E_t E_{x_t} [ 1/t sum_i 1[x_t^i = M] log p(x_0^i | x_t) ] as a sum over the sequences of `x0_BL`, to be divided by
    the number of tokens, as in the published code: by all positions, not by the masked ones. A sequence that was cut
    counts only its own tokens, so every token weighs the same (the published code divides a cut batch by its own size);
    a prefix that is never masked does not count. Variants of t, weights and masks: `corruption.drawn`.
    """
    L = x0_BL.shape[1]
    noise, second_B = paired(noise, config)
    lengths_B = noise_lib.lengths(noise, L, config.random_length_fraction)
    t_B = time_law.quantile(noise_lib.times(noise, config.time_sampling), config)
    uniform_BL = noise_lib.uniform(noise, noise_lib.MASK, (L,))
    maskable_BL = behind_prefix(is_valid(x0_BL, lengths_B), noise, config)
    corruption = drawn(x0_BL, t_B, uniform_BL, maskable_BL, second_B, special.mask_id, config)
    nats, nats_BL = bound_terms(predict, head_VD, x0_BL, lengths_B, corruption, config.head_rows)
    count = token_count(x0_BL, lengths_B) if config.clean_prefix == 0 else jnp.sum(maskable_BL, dtype=jnp.float32)
    return LossTerms(nats, count, jnp.sum(nats_BL), jnp.sum(corruption.masked_BL, dtype=jnp.float32))


def counted(batch: Examples) -> jax.Array:
    """Bool (B, L): tokens that are masked, and in the loss: answers and the padding behind them."""
    return batch.role_BL != CONTEXT


def answer_loss(
    predict: Predictor,
    head_VD: jax.Array,
    batch: Examples,
    noise: noise_lib.Noise,
    special: SpecialTokens,
    config: ObjectiveConfig,
) -> LossTerms:
    """The fine-tuning objective: LLaDA Eq. (5), one draw of (t, masks) per example.

    -E_t E_{r_t} [ 1/(t L') sum_i 1[r_t^i = M] log p(r_0^i | p_0, r_t) ] as a sum over the examples of the batch: only
    the answer r_0 of L' tokens is masked, the prompt p_0 is given. Padding that is predicted belongs to the answer, as
    in the paper. With `normalization` "token" the sum of all answers' nats is divided by the number of their tokens.
    """
    x0_BL, counted_BL = batch.tokens_BL, counted(batch)
    weight_BL, count = answer_weights(batch, counted_BL, config.normalization)
    with jax.named_scope("forward_process"):
        t_BL = time_law.quantile(noise_lib.example_times(noise, config.time_sampling, batch.example_BL), config)
        p_BL = (1 - config.eps) * t_BL + config.eps
        masked_BL = (noise_lib.uniform(noise, noise_lib.MASK, (x0_BL.shape[1],)) < p_BL) & counted_BL
        xt_BL = jnp.where(masked_BL, special.mask_id, x0_BL)
        divisor_BL = divisor(p_BL, time_law.density(t_BL, config), x0_BL.shape[1], config)
        weight_BL = jnp.where(masked_BL, weight_BL / divisor_BL, 0.0)
    nats, nats_BL = weighted_nats(predict(xt_BL, None), head_VD, x0_BL, weight_BL, config.head_rows)
    answers_BL = masked_BL & (batch.role_BL == ANSWER)
    bin_BLT = jnp.floor(t_BL * TIME_BINS)[:, :, None] == jnp.arange(TIME_BINS)[None, None]
    in_bin_BLT = (bin_BLT & answers_BL[:, :, None]).astype(jnp.float32)
    answers = AnswerTerms(
        padding_nats=jnp.sum(jnp.where(batch.role_BL == PADDING, weight_BL * nats_BL, 0.0)),
        nats_T=jnp.sum(in_bin_BLT * nats_BL[:, :, None], axis=(0, 1)),
        count_T=jnp.sum(in_bin_BLT, axis=(0, 1)),
    )
    return LossTerms(nats, count, jnp.sum(nats_BL), jnp.sum(masked_BL, dtype=jnp.float32), answers)
