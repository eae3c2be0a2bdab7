"""Which masks of an answer an estimator of log p(answer | prompt) scores, and what it makes of their nats.

A plan lists R *rows*, the answer with some of its tokens masked, and says how the nats of the scored ones combine:

    exact        1 row, nothing masked, all tokens scored: the ARM's log-likelihood
    chain_rule   A rows; row i masks tokens i.. and scores token i: sum_i log p(a_i | prompt, a_<i); reversed, ..i
    l_of_L       rows with l ~ U{1..A} masked tokens, weight A/l: the bound of LLaDA Eq. (6), by draws, or exactly where
                 an answer has no more masks than draws
    bernoulli    rows whose tokens are masked with probability t ~ U[0, 1), weight 1/t: the bound of Eq. (4), by draws
    upper        the A rows of each of M random orders: the other side of the bound (`OrdersPlan`)

Masks are made on the host, from keys that depend on the prompt and the answer's length only: two checkpoints, or two
answers of one length to the same question, are compared on the same masks, whatever batch they are in.
Shapes: M draws, A answer tokens, R distinct masks of one request.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada.objectives import noise as noise_lib
from llada.objectives.corruption import corrupt
from llada.objectives.estimates import stratified_variance

_SEED = 0  # not the user's: which masks are used is part of what a likelihood means


class Pair(NamedTuple):
    """A prompt (may be empty) and the answer whose likelihood is wanted. Another `salt` means other masks."""

    prompt: Sequence[int]
    answer: Sequence[int]
    salt: int = 0


class Plan(NamedTuple):
    """The rows of one answer, and how their nats combine.

    masked_RA  which answer tokens are masked in each row
    scored_RA  which tokens' nats are summed in each row
    row_M      the row that each draw is: equal masks are computed once
    weight_M   draw m is worth weight x nats of its row
    sampled    whether draws are averaged, with a standard error, or summed
    """

    masked_RA: np.ndarray
    scored_RA: np.ndarray
    row_M: np.ndarray
    weight_M: np.ndarray
    sampled: bool

    @property
    def draws(self) -> int:
        """Monte Carlo draws, 0 where the value is exact."""
        return len(self.row_M) if self.sampled else 0

    def estimate(self, nats_R: np.ndarray) -> tuple[float, float]:
        """The answer's nats and their standard error, 0 where nothing was drawn."""
        draws_M = self.weight_M * nats_R[self.row_M]
        if not self.sampled:
            return draws_M.sum(), 0.0
        # Draws are in the order of l (or t), so the last and the first are no neighbours.
        return draws_M.mean(), float(math.sqrt(stratified_variance(draws_M, circular=False)))


class OrdersPlan(NamedTuple):
    """The rows of M random orders of an answer: an upper bound on its log-likelihood, from above.

    As any-order model, p(a) is the mean over all orders of p(a | order), the product of the order's chain rule, as in
    LLaDA Eq. (15); the bounds of Eqs. (4) and (6) are means of its logarithm. A tangent lies above the logarithm, so
    for any number psi > 0

        log p(a)  <=  log psi - 1 + p(a) / psi,

    whose right side has an unbiased estimate, the mean over orders of p(a | order) / psi (TUBE, arXiv 2605.24292). It
    is smallest at psi = p(a). Here psi is the mean of p(a | order) over the first half of the orders, and the second
    half, drawn independently, estimates the right side. That psi is a choice of ours, not the paper's. p(a | order)
    spreads over many nats where answers are long; psi is then too small and the bound loose: it is for short ones.

    masked_RA, scored_RA  as in `Plan`
    row_MA                the row of each order's steps
    """

    masked_RA: np.ndarray
    scored_RA: np.ndarray
    row_MA: np.ndarray

    @property
    def draws(self) -> int:
        """Orders drawn; 0 where there is but one."""
        return len(self.row_MA) if self.row_MA.shape[1] > 1 else 0

    def estimate(self, nats_R: np.ndarray) -> tuple[float, float]:
        """The bound as nats, and its standard error, given psi; infinite where float64 cannot hold p(a) / psi."""
        log_p_M = -nats_R[self.row_MA].sum(axis=1)
        if not self.draws:
            return float(-log_p_M[0]), 0.0
        first, second = np.split(log_p_M, [len(log_p_M) // 2])
        log_psi = np.logaddexp.reduce(first) - math.log(len(first))
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = np.exp(second - log_psi)
            stderr = ratio.std(ddof=1) / math.sqrt(len(ratio)) if len(ratio) > 1 else math.nan
            return float(1 - log_psi - ratio.mean()), float(stderr)


def make_plan(pair: Pair, estimator: str, draws: int, mask_id: int) -> Plan | OrdersPlan:
    """What `estimator`, one of a diffusion model's, computes for a pair."""
    A = len(pair.answer)
    if estimator in ("chain_rule", "chain_rule_reversed"):
        towards = np.triu if estimator == "chain_rule" else np.tril
        return Plan(towards(np.ones((A, A), bool)), np.eye(A, dtype=bool), np.arange(A), np.ones(A), sampled=False)
    if estimator == "upper":
        return _orders_plan(pair, draws)
    if A == 1 or (estimator == "l_of_L" and draws >= 2**A - 1):
        return _all_masks(A)
    masked_MA, weight_M = draw_masks(pair, estimator, draws, mask_id)
    masked_RA, row_M = np.unique(masked_MA, axis=0, return_inverse=True)
    return Plan(masked_RA, masked_RA, row_M.reshape(-1), weight_M, sampled=True)


def most_rows(A: int, estimator: str, draws: int) -> int:
    """How many rows `make_plan` makes of an answer of A tokens at most: masks that are drawn twice count once."""
    if estimator in ("chain_rule", "chain_rule_reversed"):
        return A
    if estimator == "upper":
        return draws * A
    return 1 if A == 1 else min(draws, 2**A - 1) if A < 63 else draws


def single_row(A: int, masked: bool) -> Plan:
    """All tokens scored in one row, where all or none of them are masked."""
    return Plan(np.full((1, A), masked), np.ones((1, A), bool), np.zeros(1, int), np.ones(1), sampled=False)


def _all_masks(A: int) -> Plan:
    """The bound of Eq. (6) itself: each of the C(A, l) masks of l tokens has probability 1/A C(A, l), weight A/l."""
    masked_RA = np.array(list(itertools.product((False, True), repeat=A)))[1:]
    count_R = masked_RA.sum(axis=1)
    weight_R = np.array([1 / (count * math.comb(A, count)) for count in count_R])
    return Plan(masked_RA, masked_RA, np.arange(len(masked_RA)), weight_R, sampled=False)


def _orders_plan(pair: Pair, draws: int) -> OrdersPlan:
    """Random orders of a pair's answer; steps that mask and score alike are one row."""
    digest, A = _mask_key(pair)
    order_MA = np.random.default_rng([_SEED, digest, A]).permuted(np.tile(np.arange(A), (draws, 1)), axis=1)
    rank_MA = np.argsort(order_MA, axis=1)
    # At its step s an order masks what comes at s or later, and scores what comes at s.
    step_A11 = np.arange(A)[:, None, None]
    masked_AMA, scored_AMA = rank_MA[None] >= step_A11, rank_MA[None] == step_A11
    both, row = np.unique(
        np.concatenate([masked_AMA, scored_AMA], axis=2).reshape(-1, 2 * A), axis=0, return_inverse=True
    )
    return OrdersPlan(both[:, :A], both[:, A:], row.reshape(A, draws).T)


def draw_masks(pair: Pair, estimator: str, draws: int, mask_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The masks of a pair's answer, `(masked_MA, weight_M)`, draws in the order of l (or t)."""
    digest, A = _mask_key(pair)
    masked_MA, weight_M = _masks_of(draws, padded_length(A), estimator, mask_id, digest, A)
    return np.asarray(masked_MA)[:, :A], np.asarray(weight_M, np.float64)


def _mask_key(pair: Pair) -> tuple[int, int]:
    """What the masks of a pair depend on: a 31-bit digest of the prompt and salt, and the answer's length."""
    digest = hashlib.sha256(np.asarray([pair.salt, *pair.prompt], np.int64).tobytes()).digest()
    return int.from_bytes(digest[:4], "big") >> 1, len(pair.answer)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _masks_of(M, A, estimator, mask_id, digest, length):
    """M masks of the first `length` of A positions; u is stratified by one shift and sorted over the draws."""
    digest_1 = jnp.asarray(digest, jnp.int32)[None]
    noise = functools.partial(noise_lib.Noise, _SEED, sequence_B=digest_1, batch_size=1)
    shift = noise_lib.uniform(noise(step=0), noise_lib.LIKELIHOOD_TIME)
    u_M = (jnp.arange(M) + shift) / M

    def draw(m):
        return noise_lib.uniform(noise(step=m), noise_lib.LIKELIHOOD_MASK, (A,))[0]

    x0_MA, maskable_MA = jnp.zeros((M, A), jnp.int32), jnp.broadcast_to(jnp.arange(A) < length, (M, A))
    corruption = corrupt(x0_MA, u_M, jax.vmap(draw)(jnp.arange(M)), maskable_MA, mask_id, estimator)
    return corruption.masked_BL, corruption.weight_B


def padded_length(length: int) -> int:
    """The length rounded up to one of eight per octave: few shapes, and at most an eighth of a row is padding."""
    step = max(8, 1 << max(0, int(length).bit_length() - 4))
    return -(-int(length) // step) * step
