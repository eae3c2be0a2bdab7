"""All noise is a pure function of (seed, step, sequence, purpose), and has the law it is said to have."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llada.objectives import noise as noise_lib
from llada.objectives.contract import is_valid
from llada.objectives.corruption import forward_process, mask_exactly
from llada.objectives.noise import Noise

PURPOSES = (
    noise_lib.TIME,
    noise_lib.MASK,
    noise_lib.LENGTH,
    noise_lib.EVALUATION_TIME,
    noise_lib.EVALUATION_MASK,
    noise_lib.SAMPLING,
    noise_lib.LIKELIHOOD_TIME,
    noise_lib.LIKELIHOOD_MASK,
    noise_lib.TIME_DRAW,
    noise_lib.PREFIX,
    noise_lib.INPUT_MASK,
    noise_lib.DROPOUT,
)
MASK_ID = 99


def test_a_sequence_meets_the_same_noise_in_any_slice_of_its_batch():
    """Microbatches and devices take parts of a batch, in any order; a traced step is the same as a plain one."""
    batch = 12
    whole = jnp.arange(batch)

    def everything(sequence_B, step):
        noise = Noise(5, step, sequence_B, batch)
        return (
            noise_lib.uniform(noise, noise_lib.MASK, (4,)),
            noise_lib.times(noise, "iid"),
            noise_lib.times(noise, "stratified"),
            noise_lib.lengths(noise, 9, 0.5),
        )

    all_of_it, of_a_part = everything(whole, 3), jax.jit(everything)
    for part in (whole[2:6], whole[1::3], whole[::-3]):
        for got, want in zip(of_a_part(part, jnp.int32(3)), all_of_it, strict=True):
            np.testing.assert_array_equal(got, want[part])


def test_seeds_steps_sequences_and_purposes_share_no_noise():
    """Four uniform numbers for each of 2 x 3 x 6 x 16 combinations: all rows differ, and jointly look independent."""
    draw = jax.jit(lambda seed, step, purpose: noise_lib.uniform(Noise(seed, step, jnp.arange(16), 16), purpose, (4,)))
    rows = np.array([draw(*which) for which in itertools.product((0, 1), (0, 1, 2), PURPOSES)]).reshape(-1, 4)
    assert (
        len(set(PURPOSES))
        == len(PURPOSES)
        == len([n for n, value in vars(noise_lib).items() if n.isupper() and isinstance(value, int)])
    )
    assert len(np.unique(rows, axis=0)) == 2 * 3 * len(PURPOSES) * 16
    assert uniform_distance(rows.ravel()) < 1.95 / math.sqrt(rows.size)
    correlation = np.corrcoef(rows.T)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 4 / math.sqrt(len(rows))
    # The shift that stratified times share comes from the step's own key, unlike every sequence's.
    shift = jax.random.uniform(noise_lib.step_key(0, 0, noise_lib.TIME))
    assert shift not in rows


@pytest.mark.parametrize(("name", "value"), [("jax_default_prng_impl", "rbg"), ("jax_enable_x64", True)])
def test_what_a_user_has_set_for_jax_changes_no_bit(name, value):
    def drawn():
        noise = Noise(3, jnp.int32(1), jnp.arange(4), 4)
        draws = [noise_lib.times(noise, kind) for kind in ("iid", "stratified")]
        return [np.asarray(x) for x in (*draws, noise_lib.uniform(noise, noise_lib.MASK, (2,)))]

    usual, before = drawn(), getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        for got, want in zip(drawn(), usual, strict=True):
            assert got.dtype == want.dtype and np.array_equal(got, want)
    finally:
        jax.config.update(name, before)


@functools.partial(jax.jit, static_argnums=(0, 1))
def times_of_steps(n, sampling):
    return jax.vmap(lambda step: noise_lib.times(Noise(0, step, jnp.arange(n), n), sampling))(jnp.arange(1000))


@pytest.mark.parametrize("n", [1, 5, 8, 32])
def test_stratified_times_put_one_sequence_in_each_slice_and_each_is_uniform_alone(n):
    """Over 1000 steps: one t in every [k/n, (k+1)/n); the law of any one sequence over steps is U[0, 1)."""
    times = np.asarray(times_of_steps(n, "stratified"), np.float64)
    assert times.min() >= 0 and times.max() < 1
    np.testing.assert_array_equal(np.sort(np.floor(times * n), axis=1), np.tile(np.arange(n), (len(times), 1)))
    for sequence in range(n):
        assert uniform_distance(times[:, sequence]) < 1.95 / math.sqrt(len(times))


def test_every_aligned_half_and_quarter_of_a_batch_sees_all_times():
    """A device or microbatch holding m of 32 neighbouring sequences has one in each of m equal slices."""
    times = np.asarray(times_of_steps(32, "stratified"), np.float64)
    for m in (16, 8):
        parts = times.reshape(len(times), 32 // m, m)
        np.testing.assert_array_equal(np.sort(np.floor(parts * m), axis=-1), np.broadcast_to(np.arange(m), parts.shape))


@pytest.mark.parametrize("n", [1, 5, 8])
def test_iid_times_are_a_batch_of_independent_ones_and_each_is_uniform_alone(n):
    """The paper's sampling: as a set, n draws from U[0, 1), whose order statistics are Beta(k, n + 1 - k)."""
    times = np.asarray(times_of_steps(n, "iid"), np.float64)
    for sequence in range(n):
        assert uniform_distance(times[:, sequence]) < 1.95 / math.sqrt(len(times))
    for k, of_rank in enumerate(np.sort(times, axis=1).T, start=1):
        assert stats.kstest(of_rank, stats.beta(k, n + 1 - k).cdf).pvalue > 1e-4
    total = times.sum(axis=1)  # of dependent ones it would have another variance
    assert abs(total.var() / (n / 12) - 1) < 5 * math.sqrt(2 / len(times))


@pytest.mark.parametrize(
    "sampling, devices, rows, most",
    [("stratified", 4, 8, 1.001), ("stratified", 8, 10, 1.001), ("stratified", 16, 5, 1.14), ("iid", 4, 8, 1.05)],
)
def test_every_device_has_about_as_much_to_do(sampling, devices, rows, most):
    """The most that a device has to mask over the mean; 1.21 where each of 4 x 8 sequences draws for itself."""
    times = np.asarray(times_of_steps(devices * rows, sampling), np.float64)
    share = times.reshape(-1, devices, rows).mean(axis=2)
    assert np.mean(share.max(axis=1) / share.mean(axis=1)) < most


def test_the_chosen_fraction_of_sequences_is_cut_to_uniform_lengths():
    """P(length = n) = fraction / L, plus 1 - fraction at n = L; a fraction of 0 asks for no lengths at all."""
    L, count, fraction = 7, 20_000, 0.3
    noise = Noise(0, 0, jnp.arange(count), count)
    assert noise_lib.lengths(noise, L, 0) is None
    frequency = np.bincount(noise_lib.lengths(noise, L, fraction), minlength=L + 1) / count
    law = np.array([0] + [fraction / L] * L)
    law[L] += 1 - fraction
    assert frequency.shape == law.shape and frequency[0] == 0
    assert np.all(np.abs(frequency - law)[1:] < 4 * np.sqrt(law * (1 - law) / count)[1:])
    everything_cut = np.bincount(noise_lib.lengths(noise, L, 1.0), minlength=L + 1) / count
    assert np.abs(everything_cut[1:] - 1 / L).max() < 4 * math.sqrt(1 / L / count)


def test_forward_process_masks_each_token_with_probability_p_and_weighs_by_its_inverse():
    """p = (1 - eps) t + eps on an even grid of uniforms is exact, and on training's noise within 4 std. errors."""
    L, eps = 1000, 1e-3
    t_B = jnp.array([0.0, 0.25, 0.5, 1.0])
    p_B = np.asarray((1 - eps) * t_B + eps)
    x0_BL = jnp.arange(4 * L).reshape(4, L) + 100
    grid_BL = jnp.tile((jnp.arange(L) + 0.5) / L, (4, 1))
    drawn_BL = noise_lib.uniform(Noise(0, 0, jnp.arange(4), 4), noise_lib.MASK, (L,))
    for uniform_BL, tolerance in ((grid_BL, 0.5 / L), (drawn_BL, 4 * np.sqrt(p_B * (1 - p_B) / L))):
        corruption = forward_process(x0_BL, t_B, uniform_BL, jnp.ones(x0_BL.shape, bool), MASK_ID, eps)
        ratio = np.mean(corruption.masked_BL, axis=1)
        assert np.all(np.abs(ratio - p_B) <= tolerance + 1e-6)
        np.testing.assert_array_equal(corruption.xt_BL, np.where(corruption.masked_BL, MASK_ID, x0_BL))
        np.testing.assert_allclose(corruption.weight_B, 1 / p_B, rtol=1e-6)


def test_mask_exactly_masks_l_of_the_valid_tokens_and_every_set_equally_often():
    """All (length, l) pairs at once, ties among the uniforms included; then the law of the sets for l = 2 of 4."""
    L = 6
    length_B, count_B = jnp.array([(n, k) for n in range(1, L + 1) for k in range(1, n + 1)]).T
    B = len(length_B)
    x0_BL = jnp.arange(B * L).reshape(B, L) + 100
    drawn_BL = noise_lib.uniform(Noise(0, 0, jnp.arange(B), B), noise_lib.MASK, (L,))
    for uniform_BL in (drawn_BL, jnp.zeros((B, L)), jnp.round(drawn_BL)):
        corruption = mask_exactly(x0_BL, count_B, uniform_BL, is_valid(x0_BL, length_B), MASK_ID)
        np.testing.assert_array_equal(corruption.masked_BL.sum(axis=1), count_B)
        assert not np.any(corruption.masked_BL & (np.arange(L)[None] >= length_B[:, None]))
        np.testing.assert_array_equal(corruption.xt_BL, np.where(corruption.masked_BL, MASK_ID, x0_BL))
        np.testing.assert_allclose(corruption.weight_B, length_B / count_B, rtol=1e-6)

    N = 12_000
    uniform_BL = noise_lib.uniform(Noise(0, 1, jnp.arange(N), N), noise_lib.MASK, (L,))
    x0_BL = jnp.zeros((N, L), jnp.int32)
    valid_BL = is_valid(x0_BL, jnp.full(N, 4))
    masked_BL = mask_exactly(x0_BL, jnp.full(N, 2), uniform_BL, valid_BL, MASK_ID).masked_BL
    sets, times = np.unique(np.asarray(masked_BL), axis=0, return_counts=True)
    assert len(sets) == math.comb(4, 2)
    assert np.abs(times / N - 1 / 6).max() < 4 * math.sqrt(1 / 6 * 5 / 6 / N)


def test_only_replaced_tokens_count_as_masked():
    """A mask id that is in the data stays a token of the data, and positions beyond a length are left alone."""
    x0_BL = jnp.full((2, 8), MASK_ID).at[:, ::2].set(1)
    uniform_BL = jnp.tile(jnp.linspace(0, 0.99, 8), (2, 1))
    valid_BL = is_valid(x0_BL, jnp.array([8, 3]))
    for corruption in (
        forward_process(x0_BL, jnp.full(2, 0.5), uniform_BL, valid_BL, MASK_ID, 0.0),
        mask_exactly(x0_BL, jnp.array([4, 3]), uniform_BL, valid_BL, MASK_ID),
    ):
        expected = np.array([[True] * 4 + [False] * 4, [True] * 3 + [False] * 5])
        np.testing.assert_array_equal(corruption.masked_BL, expected)
        np.testing.assert_array_equal(corruption.xt_BL, np.where(expected, MASK_ID, x0_BL))


def uniform_distance(samples: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance to U[0, 1); 1.95 / sqrt(n) is exceeded once in 1000."""
    ordered = np.sort(samples)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return max(np.abs(ordered - steps[1:]).max(), np.abs(ordered - steps[:-1]).max())
