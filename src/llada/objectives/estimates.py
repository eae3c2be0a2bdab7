"""The error of a Monte Carlo estimate whose draws are stratified."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def stratified_variance(values_M: jax.Array | np.ndarray, circular: bool):
    """Variance of the mean of M values, one drawn from each of M neighbouring strata; nan for a single one.

    Strata are on axis 0; each entry of other axes is an estimate of its own. `circular`: the last stratum and the first
    are neighbours, too.

    One value tells no variance within its stratum, so neighbours stand in for two draws of one ("collapsed strata",
    Cochran, Sampling Techniques, 5A.12): half of each squared difference. What the strata's means differ by is counted
    too, so the estimate errs upwards; the spread of all values would count their whole trend.
    """
    xp = jnp if isinstance(values_M, jax.Array) else np
    M = len(values_M)
    if M < 2:
        return xp.full(values_M.shape[1:], math.nan)
    differences = values_M - xp.roll(values_M, 1, axis=0)
    if not circular:
        differences = differences[1:]
    return xp.sum(differences**2, axis=0) / (2 * len(differences) * M)
