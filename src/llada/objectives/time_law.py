"""The laws that training may draw t from: the paper's uniform one, a bell-shaped one, a part of [0, 1).

A law is given by its distribution function F and its quantile F^-1. `noise.times` draws u ~ U[0, 1), stratified and
dealt to devices; t = F^-1(u) rises with u, so it stays stratified, and what is far apart stays so.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig

_BITS = 24  # t is a multiple of 2^-24, as a uniform float32 is


def quantile(u: jax.Array, o: ObjectiveConfig) -> jax.Array:
    """t = F^-1(u) in [0, 1), of the shape of u in [0, 1), float32."""
    if o.time_law == "band":
        low, high = _band(o)
        return jnp.minimum(low + (high - low) * u, jnp.float32(1 - 2**-_BITS))
    if o.time_law == "uniform":
        return u

    def halve(i, t):
        middle = t + jnp.exp2(-1.0 - i.astype(jnp.float32))
        return jnp.where(cumulative(middle, o) <= u, middle, t)

    # By bisection: a mixture with the uniform law has no closed form.
    return jax.lax.fori_loop(0, _BITS, halve, jnp.zeros_like(u))


def cumulative(t: jax.Array, o: ObjectiveConfig) -> jax.Array:
    """F(t), of the shape of t in [0, 1], float32."""
    if o.time_law == "band":
        low, high = _band(o)
        return jnp.clip((t - low) / (high - low), 0.0, 1.0)
    if o.time_law == "uniform":
        return t
    share = o.time_uniform_share or 0.0
    return (1 - share) * jax.scipy.special.ndtr(_standardised(t, o)) + share * t


def density(t: jax.Array, o: ObjectiveConfig) -> jax.Array:
    """q(t) = F'(t), of the shape of t in [0, 1), float32."""
    if o.time_law == "band":
        low, high = _band(o)
        return jnp.full_like(t, 1 / (high - low))
    if o.time_law == "uniform":
        return jnp.ones_like(t)
    share, t = o.time_uniform_share or 0.0, jnp.clip(t, 2 ** -(_BITS + 1), 1 - 2**-_BITS)
    bell = jax.scipy.stats.norm.pdf(_standardised(t, o)) / (_logit_normal(o)[1] * t * (1 - t))
    return (1 - share) * bell + share


@functools.cache
def mean(o: ObjectiveConfig) -> float:
    """E[t], to 1e-5 at least."""
    if o.time_law == "band":
        return sum(_band(o)) / 2
    if o.time_law == "uniform":
        return 0.5
    (location, scale), share, count = _logit_normal(o), o.time_uniform_share or 0.0, 4096
    normal = statistics.NormalDist(location, scale)
    bell = sum(1 / (1 + math.exp(-normal.inv_cdf((i + 0.5) / count))) for i in range(count)) / count
    return (1 - share) * bell + share / 2


def _band(o: ObjectiveConfig) -> tuple[float, float]:
    assert o.time_low is not None and o.time_high is not None  # config_rules.py
    return o.time_low, o.time_high


def _logit_normal(o: ObjectiveConfig) -> tuple[float, float]:
    return 0.0 if o.time_mean is None else o.time_mean, 1.0 if o.time_std is None else o.time_std


def _standardised(t: jax.Array, o: ObjectiveConfig) -> jax.Array:
    location, scale = _logit_normal(o)
    return (jnp.log(t) - jnp.log1p(-t) - location) / scale
