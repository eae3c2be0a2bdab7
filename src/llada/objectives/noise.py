"""All randomness of training and evaluation, as a pure function of (seed, step, sequence, purpose).

No key is stored or split between steps, so a sequence gets the same noise on any mesh, for any number of microbatches
and after any resume. `sequence` is the index of a sequence in the global batch (training) or in the
held-out set (evaluation).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Purposes: one integer each, never reused, so that a new use of noise leaves the bits of the others unchanged.
TIME = 0
MASK = 1
LENGTH = 2
EVALUATION_TIME = 3
EVALUATION_MASK = 4
SAMPLING = 5
LIKELIHOOD_TIME = 6
LIKELIHOOD_MASK = 7
TIME_DRAW = 8
PREFIX = 9
INPUT_MASK = 11
DROPOUT = 12


class Noise(NamedTuple):
    """Identifies noise: `step` and `sequence_B` may be traced, `batch_size` (of the global batch) may not."""

    seed: int | jax.Array
    step: int | jax.Array
    sequence_B: jax.Array
    batch_size: int


def held_out(draw: int | jax.Array, row_B: jax.Array) -> Noise:
    """Noise of one draw for rows of the held-out set: seed 0, not the run's, so that figures compare in pairs."""
    return Noise(0, draw, row_B, len(row_B))


# JAX's default, by name. Another one set for all of JAX has other bits, and `rbg` under vmap uses the first key only.
GENERATOR = "threefry2x32"


def root_key(seed) -> jax.Array:
    """The key of a seed."""
    return jax.random.key(seed, impl=GENERATOR)


def step_key(seed, step, purpose: int) -> jax.Array:
    """The key that all sequences of a step share for one purpose."""
    return jax.random.fold_in(jax.random.fold_in(root_key(seed), purpose), step)


def sequence_keys(noise: Noise, purpose: int) -> jax.Array:
    """`key_B`: each sequence's own key for one purpose."""
    key = step_key(noise.seed, noise.step, purpose)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(noise.sequence_B)


def uniform(noise: Noise, purpose: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """Uniform [0, 1) float32 of shape (B, *shape), each sequence from its own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(sequence_keys(noise, purpose))


def times(noise: Noise, sampling: str) -> jax.Array:
    """t_B in [0, 1): `iid`, or `stratified` over the global batch by one shared shift of an even grid.

    Each t is uniform either way; stratified ones are negatively dependent (VDM appendix I.1), which lowers the variance
    of the batch loss. Either way neighbouring sequences get times that are far apart: each device and microbatch takes
    neighbouring sequences, so all have about the same number of masked rows.
    """
    n = noise.batch_size
    shift_key, draw_key = step_key(noise.seed, noise.step, TIME), step_key(noise.seed, noise.step, TIME_DRAW)
    # An even grid of n points p on the circle [0, 1), shifted by one uniform number, then folded to t = |2p - 1|:
    #
    #   t  1 |\        /|    p ~ U[0, 1) gives t ~ U[0, 1).
    #        |  \    /  |    Opposite points p and p + 1/2 give t and 1 - t, so any evenly spaced subset of an even
    #      0 |____\/____|    number of points has mean 1/2 whatever the shift. Taken as t itself, such a subset
    #    p   0   1/2   1    would have a mean that moves with the shift, and the device that holds it more rows.
    p_n = (jax.random.uniform(shift_key, (), jnp.float32) + (_van_der_corput(n) / n).astype(np.float32)) % 1.0
    t_n = jnp.minimum(jnp.abs(2 * p_n - 1), jnp.float32(1 - 2**-24))
    if sampling == "iid":
        # n independent draws, dealt to the sequences in the rank order of those times. The order does not depend on the
        # data, so for exchangeable sequences this is the distribution of one independent draw for each.
        t_n = jnp.sort(jax.random.uniform(draw_key, (n,), jnp.float32))[jnp.argsort(jnp.argsort(t_n))]
    return t_n[noise.sequence_B]


def example_times(noise: Noise, sampling: str, example_BL: jax.Array) -> jax.Array:
    """t_BL in [0, 1): a time for each example of a row, 1, 2, ... in `example_BL`.

    The first has the sequence's own time, the next ones are golden-ratio steps away on the circle [0, 1): each is
    uniform, and those of one row are spread over all of it.
    """
    return (times(noise, sampling)[:, None] + (example_BL - 1) * jnp.float32((math.sqrt(5) - 1) / 2)) % 1.0


def lengths(noise: Noise, length: int, fraction: float) -> jax.Array | None:
    """lengths_B: `fraction` of the sequences keep a number of tokens drawn from U{1..length}; None when fraction is 0.

    The published snippet cuts whole batches; cutting single sequences keeps shapes static and batches full.
    """
    if fraction == 0:
        return None
    chosen_B, size_B = jnp.unstack(uniform(noise, LENGTH, (2,)), axis=1)
    return jnp.where(chosen_B < fraction, 1 + (size_B * length).astype(jnp.int32), length)


def _van_der_corput(n: int) -> np.ndarray:
    """A permutation of 0..n-1 in which aligned runs of neighbours are spread evenly: van der Corput's sequence.

    Digits of i in the mixed radix (2, odd part of n, rest) are read in reverse. Neighbours 2k, 2k + 1 are n / 2 apart
    where n is even; aligned runs of 2 x odd part x a power of two are spread evenly. For n = 8: 0 4 2 6 1 5 3 7.
    """
    odd = n // (n & -n)
    rank, unit, i = np.zeros(n, np.int64), n, np.arange(n)
    for radix in (n,) if n % 2 else (2, odd, n // odd // 2):
        unit //= radix
        rank += _bit_reversed(radix)[i % radix] * unit
        i //= radix
    return rank


def _bit_reversed(n: int) -> np.ndarray:
    """0..n-1 in the order of their reversed bits, as ranks."""
    bits = max(1, (n - 1).bit_length())
    return np.argsort(np.argsort([int(format(i, f"0{bits}b")[::-1], 2) for i in range(n)]))
