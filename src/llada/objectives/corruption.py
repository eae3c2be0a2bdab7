"""The forward process of masked diffusion: which tokens are masked, and what their nats weigh.

`forward_process` masks each token with probability t (training, LLaDA Eq. (3)), `mask_exactly` masks l of L tokens
(Eq. (6)). `drawn` is one draw of training, as `objective.time_law`, `weight`, `masks` and `clean_prefix` say; their
defaults are the paper's. Which of them estimate the likelihood bound: `estimates_bound`.
Shapes: B sequences, L tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig
from llada.objectives import noise as noise_lib
from llada.objectives import time_law


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


def paired(noise: noise_lib.Noise, o: ObjectiveConfig) -> tuple[noise_lib.Noise, jax.Array | None]:
    """`(noise, second_B)`: with complementary masks, sequences 2k and 2k + 1 share noise, and the latter is second."""
    if o.masks != "complementary":
        return noise, None
    second_B = noise.sequence_B % 2
    return noise._replace(sequence_B=noise.sequence_B - second_B), second_B == 1


def behind_prefix(valid_BL: jax.Array, noise: noise_lib.Noise, o: ObjectiveConfig) -> jax.Array:
    """The valid tokens that may be masked: of `clean_prefix` of the sequences, those behind n ~ U{1..length - 1}."""
    if o.clean_prefix == 0:
        return valid_BL
    chosen_B, size_B = jnp.unstack(noise_lib.uniform(noise, noise_lib.PREFIX, (2,)), axis=1)
    most_B = jnp.sum(valid_BL, axis=1) - 1
    prefix_B = jnp.minimum(1 + (size_B * most_B).astype(jnp.int32), most_B)
    prefix_B = jnp.where(chosen_B < o.clean_prefix, prefix_B, 0)
    return valid_BL & (jnp.arange(valid_BL.shape[1])[None] >= prefix_B[:, None])


@jax.named_scope("forward_process")
def drawn(
    x0_BL: jax.Array,
    t_B: jax.Array,
    uniform_BL: jax.Array,
    maskable_BL: jax.Array,
    second_B: jax.Array | None,
    mask_id: int,
    o: ObjectiveConfig,
) -> Corruption:
    """One draw of training for each sequence, from t of the config's law and a uniform number per token.

    With complementary masks p is between eps and 1 - eps, and the second of two sequences has those tokens masked that
    the first has not, each with probability 1 - p.
    """
    L = x0_BL.shape[1]
    if o.masks == "exact_count":
        size_B = jnp.sum(maskable_BL, axis=-1)
        count_B = jnp.minimum(1 + (t_B * size_B).astype(jnp.int32), size_B)
        corruption = mask_exactly(x0_BL, count_B, uniform_BL, maskable_BL, mask_id)
        below_B, p_B = (count_B - 1) / size_B, count_B / size_B
        density_B = size_B * (time_law.cumulative(p_B, o) - time_law.cumulative(below_B, o))
        return corruption._replace(weight_B=1 / divisor(p_B, density_B, L, o))
    if second_B is None:
        corruption, p_B = (
            forward_process(x0_BL, t_B, uniform_BL, maskable_BL, mask_id, o.eps),
            (1 - o.eps) * t_B + o.eps,
        )
    else:
        p_B = (1 - 2 * o.eps) * t_B + o.eps
        masked_BL = ((uniform_BL < p_B[:, None]) ^ second_B[:, None]) & maskable_BL
        p_B = jnp.where(second_B, 1 - p_B, p_B)
        corruption = Corruption(jnp.where(masked_BL, mask_id, x0_BL), masked_BL, 1 / p_B)
    return corruption._replace(weight_B=1 / divisor(p_B, time_law.density(t_B, o), L, o))


def divisor(p: jax.Array, density: jax.Array, length: int, o: ObjectiveConfig) -> jax.Array:
    """What a masked token's nats are divided by: p of the bound, or what the config has in its place.

    `density` is that of t, or L times the probability of l, by which estimates of the bound are importance-weighted.
    """
    if o.weight == "flat":
        return jnp.full_like(p, expected_p(o, length))
    if o.weight == "clipped":
        return jnp.maximum(p, jnp.float32(1 / (o.weight_bound or 1)))
    return p if o.weight == "paper" or o.time_law == "uniform" else p * density


def expected_p(o: ObjectiveConfig, length: int) -> float:
    """E[p] of a token that may be masked."""
    if o.masks == "complementary":
        return 0.5
    if o.masks == "exact_count":  # l = 1 + floor(t L), and the part cut off is 1/2 on average
        return time_law.mean(o) + 0.5 / length
    return (1 - o.eps) * time_law.mean(o) + o.eps


def head_fraction(o: ObjectiveConfig, length: int) -> float:
    """Expected share of positions that are masked, and so meet the vocabulary head: (1 + eps) / 2 for the paper's."""
    kept = 1 - o.clean_prefix / 2  # a prefix of n ~ U[1, L - 1] tokens leaves half of a row on average
    if o.masks == "exact_count":
        return time_law.mean(o) * kept + 0.5 / length
    return expected_p(o, length) * kept


def estimates_bound(o: ObjectiveConfig) -> bool:
    """Whether the training loss is an unbiased estimate of the likelihood bound, Eq. (3), up to eps."""
    weighted = o.weight == "elbo" or (o.weight == "paper" and o.time_law == "uniform")
    return weighted and o.clean_prefix == 0
