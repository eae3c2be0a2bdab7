"""Masked diffusion: the forward process and the likelihood bound (LLaDA section 2.1, Eqs. (3) and (6)).

The mask predictor arrives as a function; nothing here knows the model. Two ways to corrupt estimate the same bound:
`forward_process` masks each token with probability t (training, Eq. (3)); `mask_exactly` masks l of L tokens
(evaluation, Eq. (6), lower variance). Both give the weight that makes the masked nats an unbiased estimate.
Shapes: B sequences, L tokens, D width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig
from llada.objectives import noise as noise_lib
from llada.objectives.contract import LossTerms, Predictor, SpecialTokens, is_valid, token_count
from llada.objectives.vocabulary_head import weighted_nats

ESTIMATORS = ("l_of_L", "bernoulli")


class Corruption(NamedTuple):
    """x_t, which of its tokens were replaced, and the weight of their nats in the bound."""

    xt_BL: jax.Array
    masked_BL: jax.Array
    weight_B: jax.Array


@jax.named_scope("forward_process")
def forward_process(
    x0_BL: jax.Array, t_B: jax.Array, uniform_BL: jax.Array, maskable_BL: jax.Array, mask_id: int, eps: float
) -> Corruption:
    """Mask every token independently with probability p = (1 - eps) t + eps; the weight is 1/p.

    With eps = 0 this is q(x_t | x_0) of the paper; the published code's eps = 1e-3 bounds the weight by 1000 and makes
    the estimate that of the integral over p in [eps, 1]. Only maskable tokens are masked.
    """
    p_B = (1 - eps) * t_B + eps
    masked_BL = (uniform_BL < p_B[:, None]) & maskable_BL
    return Corruption(jnp.where(masked_BL, mask_id, x0_BL), masked_BL, 1 / p_B)


@jax.named_scope("forward_process")
def mask_exactly(
    x0_BL: jax.Array, count_B: jax.Array, uniform_BL: jax.Array, maskable_BL: jax.Array, mask_id: int
) -> Corruption:
    """Mask exactly l = `count_B` of the L maskable tokens, without replacement; the weight is L/l: LLaDA Eq. (6)."""
    rank_BL = jnp.argsort(jnp.argsort(jnp.where(maskable_BL, uniform_BL, 2.0), axis=-1), axis=-1)
    masked_BL = rank_BL < count_B[:, None]
    weight_B = jnp.sum(maskable_BL, axis=-1) / count_B
    return Corruption(jnp.where(masked_BL, mask_id, x0_BL), masked_BL, weight_B)


def corrupt(
    x0_BL: jax.Array, u_B: jax.Array, uniform_BL: jax.Array, maskable_BL: jax.Array, mask_id: int, estimator: str
) -> Corruption:
    """One draw for an unbiased estimate of the bound, from u ~ U[0, 1) and a uniform number per token.

    `l_of_L`: LLaDA Eq. (6), l ~ U{1..L} of the L maskable tokens. `bernoulli`: LLaDA Eq. (4), t = u; weights 1/t are
    heavy-tailed, so it is there for reference. Where t masks nothing the weight is 0, for 0 x inf must be 0.
    """
    if estimator == "l_of_L":
        size_B = jnp.sum(maskable_BL, axis=-1)
        count_B = jnp.minimum(1 + (u_B * size_B).astype(jnp.int32), size_B)
        return mask_exactly(x0_BL, count_B, uniform_BL, maskable_BL, mask_id)
    corruption = forward_process(x0_BL, u_B, uniform_BL, maskable_BL, mask_id, eps=0.0)
    weight_B = jnp.where(jnp.any(corruption.masked_BL, axis=-1), corruption.weight_B, 0)
    return corruption._replace(weight_B=weight_B)


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
) -> jax.Array:
    """`nats_MB`: M = `draws` unbiased estimates of each row's bound, in nats per row; LLaDA Eq. (4) or (6).

    `row_B` are the rows' indices in the held-out set: a row meets the same masks whatever batch it is in. Over the
    draws of a row, l (or t) is stratified: draw m takes the m-th of M equal slices of [0, 1), shifted by one uniform
    number per row; each draw alone keeps its distribution (`corrupt`).
    """
    B, L = x0_BL.shape
    shift_B = noise_lib.uniform(noise_lib.held_out(0, row_B), noise_lib.EVALUATION_TIME)

    def draw(_, m):
        u_B = (shift_B + m.astype(jnp.float32) / draws) % 1.0
        uniform_BL = noise_lib.uniform(noise_lib.held_out(m, row_B), noise_lib.EVALUATION_MASK, (L,))
        corruption = corrupt(x0_BL, u_B, uniform_BL, jnp.ones((B, L), bool), special.mask_id, estimator)
        _, nats_BL = bound_terms(predict, head_VD, x0_BL, None, corruption, head_rows)
        return None, corruption.weight_B * jnp.sum(nats_BL, axis=1)

    return jax.lax.scan(draw, None, jnp.arange(draws, dtype=jnp.int32))[1]


def head_fraction(config: ObjectiveConfig) -> float:
    """Expected share of positions that are masked, and so meet the vocabulary head: E[p] = (1 + eps) / 2."""
    return (1 + config.eps) / 2


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
    counts only its own tokens, so every token weighs the same (the published code divides a cut batch by its own size).
    """
    B, L = x0_BL.shape
    lengths_B = noise_lib.lengths(noise, L, config.random_length_fraction)
    t_B = noise_lib.times(noise, config.time_sampling)
    uniform_BL = noise_lib.uniform(noise, noise_lib.MASK, (L,))
    valid_BL = is_valid(x0_BL, lengths_B)
    corruption = forward_process(x0_BL, t_B, uniform_BL, valid_BL, special.mask_id, config.eps)
    nats, nats_BL = bound_terms(predict, head_VD, x0_BL, lengths_B, corruption, config.head_rows)
    return LossTerms(
        nats, token_count(x0_BL, lengths_B), jnp.sum(nats_BL), jnp.sum(corruption.masked_BL, dtype=jnp.float32)
    )
