"""The validation figure: Monte Carlo bound for LLaDA, exact NLL for the ARM, on the same held-out rows.

Draws are fixed by (row, draw): the same masks for every checkpoint, model and batch size, so figures compare in pairs.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada.config import Config
from llada.data.rows import chain_digest
from llada.errors import UserError
from llada.model import transformer
from llada.objectives import autoregressive, diffusion
from llada.objectives import noise as noise_lib
from llada.objectives.contract import Predictor, SpecialTokens, segments

_SEED = 0  # not the run's: runs with different seeds are evaluated on the same masks


class Validation(NamedTuple):
    """`nats_per_token` with its standard errors; `estimator` says what kind of figure it is.

    stderr              over rows: how far the figure may be from that of all such text
    monte_carlo_stderr  over draws, the rows given: how far from that of these rows; it is what runs differ by
    """

    nats_per_token: float
    stderr: float
    monte_carlo_stderr: float
    bits_per_byte: float
    perplexity: float
    estimator: str
    rows: int
    tokens: int
    draws: int


def bound_draws(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    row_B: jax.Array,
    draws: int,
    mask_id: int,
    estimator: str,
    head_rows: int | None,
) -> jax.Array:
    """`nats_MB`: M = `draws` unbiased estimates of each row's bound, in nats per row; LLaDA Eq. (4) or (6).

    Over the draws of a row, l (or t) is stratified: draw m takes the m-th of M equal slices of [0, 1), shifted by one
    uniform number per row; each draw alone keeps its law (`diffusion.corrupt`).
    """
    B, L = x0_BL.shape
    shift_B = noise_lib.uniform(noise_lib.Noise(_SEED, 0, row_B, B), noise_lib.EVALUATION_TIME)

    def draw(_, m):
        u_B = (shift_B + m / draws) % 1.0
        uniform_BL = noise_lib.uniform(noise_lib.Noise(_SEED, m, row_B, B), noise_lib.EVALUATION_MASK, (L,))
        corruption = diffusion.corrupt(x0_BL, u_B, uniform_BL, jnp.ones((B, L), bool), mask_id, estimator)
        _, nats_BL = diffusion.bound_terms(predict, head_VD, x0_BL, None, corruption, head_rows)
        return None, corruption.weight_B * jnp.sum(nats_BL, axis=1)

    return jax.lax.scan(draw, None, jnp.arange(draws))[1]


class Validator:
    """Compiled once, called at every evaluation of a run. Call it inside the mesh it was made for."""

    def __init__(
        self,
        config: Config,
        special: SpecialTokens,
        token_bytes_V: np.ndarray,
        holdout_NL: np.ndarray,
        mesh: jax.sharding.Mesh,
        estimator: str | None = None,
    ):
        exact = config.objective.name == "autoregressive"
        if exact and estimator not in (None, "exact"):
            raise UserError(f"--estimator={estimator} is for diffusion models; this ARM's likelihood is exact")
        if not exact and estimator not in (None, *diffusion.ESTIMATORS):
            raise UserError(f"--estimator={estimator} is not one of {', '.join(diffusion.ESTIMATORS)}")
        self.estimator = "exact" if exact else estimator or "l_of_L"
        self.draws = 1 if exact else config.evaluate.draws
        self.mesh = mesh
        self.batch = mesh_lib.local_batch(min(config.train.batch_size, len(holdout_NL)), mesh)
        count = min(config.evaluate.batches * self.batch, len(holdout_NL))
        # Neighbouring rows come from one document; rows spread over the whole side are closer to independent.
        self.rows_NL = np.asarray(holdout_NL[np.linspace(0, len(holdout_NL) - 1, count).astype(int)], np.int32)
        self.rows_digest = chain_digest("", self.rows_NL)
        self.bytes = int(token_bytes_V[self.rows_NL].sum())
        self.nats = jax.jit(
            functools.partial(_row_nats, config, special, self.draws, self.estimator),
            out_shardings=mesh_lib.placement(mesh, "replicated"),
        )

    def __call__(self, params: transformer.Parameters) -> Validation:
        """Evaluate `params` on the held-out rows."""
        R, L = self.rows_NL.shape
        nats, variances = [], []
        for start in range(0, R, self.batch):
            index_B = np.arange(start, start + self.batch)
            rows_BL = self.rows_NL[index_B % R]  # the last batch wraps; its surplus is dropped
            rows_BL = mesh_lib.place_batch(self.mesh, rows_BL, np.arange(self.batch), self.batch)
            for values, found in zip((nats, variances), self.nats(params, rows_BL, index_B), strict=True):
                values.append(np.asarray(found))
        nats_R, variance_R = (np.concatenate(values)[:R].astype(np.float64) for values in (nats, variances))
        mean = float(nats_R.mean() / L)
        return Validation(
            nats_per_token=mean,
            stderr=float(nats_R.std(ddof=1) / math.sqrt(R) / L) if R > 1 else math.nan,
            monte_carlo_stderr=float(math.sqrt(variance_R.sum()) / R / L),
            bits_per_byte=float(nats_R.sum() / self.bytes / math.log(2)),
            perplexity=math.exp(mean),
            estimator=self.estimator,
            rows=R,
            tokens=R * L,
            draws=self.draws,
        )


def _row_nats(config, special, draws, estimator, params, x0_BL, row_B):
    """Nats of each row (B,), mean over draws, and the Monte Carlo variance of that mean (B,)."""
    segments_BL = segments(x0_BL, special, config.objective)
    predict = functools.partial(transformer.hidden, config.model, params, segments_BL=segments_BL)
    head_VD = transformer.head(config.model, params)
    rows = config.objective.head_rows
    if estimator == "exact":
        _, nats_BL = autoregressive.row_nats(predict, head_VD, x0_BL, None, special, rows)
        return jnp.sum(nats_BL, axis=1), jnp.zeros(len(x0_BL))
    nats_MB = bound_draws(predict, head_VD, x0_BL, row_B, draws, special.mask, estimator, rows)
    return jnp.mean(nats_MB, axis=0), stratified_variance(nats_MB)


def stratified_variance(values_MB: jax.Array) -> jax.Array:
    """(B,) Variance of the mean of M values, one from each of M strata in a circle; nan for a single one.

    A stratum's one value tells no variance, so neighbours stand in for two draws of one stratum ("collapsed strata",
    Cochran, Sampling Techniques, 5A.12). What their means differ by is counted too: the estimate errs upwards.
    """
    M = len(values_MB)
    if M < 2:
        return jnp.full(values_MB.shape[1:], jnp.nan)
    return jnp.sum((values_MB - jnp.roll(values_MB, 1, axis=0)) ** 2, axis=0) / (2 * M * M)
