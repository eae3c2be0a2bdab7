"""The validation figure: Monte Carlo bound for LLaDA, exact NLL for the ARM, on the same held-out rows.

Draws are fixed by (row, draw): the same masks for every checkpoint, model and batch size, so figures compare in pairs.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada.config import Config, EvaluateConfig
from llada.data.checksums import CheckedRows
from llada.data.examples import HeldOut
from llada.data.rows import chain_digest
from llada.errors import DataError, UserError
from llada.model import transformer
from llada.objectives import families
from llada.objectives.contract import ANSWER, Examples, SpecialTokens, segments
from llada.objectives.estimates import stratified_variance

MOST_TOKENS = 16_384  # that a device takes at once: an 8B's feed-forward layer makes 0.8 GB of them


class Validation(NamedTuple):
    """`nats_per_token` with its standard errors; nan and inf where there is no such number.

    stderr              over rows: how far the figure may be from that of all such text; nan for one row
    monte_carlo_stderr  over draws, the rows given: how far from that of these rows; it is what runs differ by; nan for
                        one draw
    perplexity          inf above 709 nats
    kind                bound | NLL, or of a `Scorer` its own; `estimator` says how it was estimated
    tokens              of the rows; of examples, of their answers
    eval_rows_digest    of the rows: figures of equal digests and draws compare in pairs
    """

    nats_per_token: float
    stderr: float
    monte_carlo_stderr: float
    bits_per_byte: float
    perplexity: float
    kind: str
    estimator: str
    rows: int
    tokens: int
    draws: int
    eval_rows_digest: str


class Scorer(NamedTuple):
    """Another way to the nats of held-out rows than the family's own (`likelihoods.scorer`).

    kind   what its figure is
    draws  Monte Carlo draws per row; 0 where nothing is drawn
    nats   `(params, rows, progress) -> (nats_N, variance_N)`, the Monte Carlo variance of each
    """

    estimator: str
    kind: str
    draws: int
    nats: Callable


class Validator:
    """Compiled once, called at every evaluation of a run. Call it inside the mesh it was made for."""

    def __init__(
        self,
        config: Config,
        special: SpecialTokens,
        token_bytes_V: np.ndarray,
        held_out: np.ndarray | CheckedRows | HeldOut,
        mesh: jax.sharding.Mesh,
        estimator: str | None = None,
        rows: int | None = None,
        scorer: Scorer | None = None,
    ):
        """Take the held-out side: rows (N, L), or examples whose answers are to be predicted.

        rows    how many of them, instead of the config's; spread over the whole side, too
        scorer  instead of `estimator`
        """
        self.family, self.scorer = families.of(config), scorer
        self.estimator = scorer.estimator if scorer else estimator_for(config, estimator)
        self.kind = scorer.kind if scorer else self.family.measure
        self.draws = scorer.draws if scorer else 1 if self.family.exact else config.evaluate.draws
        self.mesh = mesh
        if len(held_out) == 0:
            raise DataError("there are no held-out rows; see --config.data.holdout_fraction")
        # As many rows as the config asks for, on any mesh; how many are done at once is another matter.
        self.count = min(rows or config.evaluate.batches * config.train.batch_size, len(held_out))
        self.batch = rows_at_once(config, mesh, self.count)
        # Neighbouring rows come from one document; rows spread over the whole side are closer to independent.
        read = held_out[np.linspace(0, len(held_out) - 1, self.count).astype(int)]
        tokens_NL = read.tokens_BL if isinstance(read, Examples) else np.asarray(read, np.int32)
        self.rows = read if isinstance(read, Examples) else tokens_NL
        if (most := int(tokens_NL.max())) >= len(token_bytes_V):
            raise DataError(f"the held-out rows have id {most}, and the tokenizer {len(token_bytes_V)} ids")
        self.rows_digest = chain_digest("", *jax.tree.leaves(self.rows))
        # Nats are given per token of an answer, whatever padding is predicted with it: that has no text.
        answers_NL = read.role_BL == ANSWER if isinstance(read, Examples) else np.ones(tokens_NL.shape, bool)
        self.length_N = answers_NL.sum(axis=1)
        self.bytes = float((token_bytes_V[tokens_NL] * answers_NL).sum())
        if scorer is None:
            self.nats = jitted(config, special, mesh, self.estimator)

    def __call__(
        self, params: transformer.Parameters, progress: Callable[[int, int], None] | None = None
    ) -> Validation:
        """Evaluate `params` on the held-out rows. `progress(done, total)` counts rows that went through the model."""
        N = self.count
        if self.scorer is not None:
            nats_N, variance_N = self.scorer.nats(params, self.rows, progress)
        else:
            nats_N, variance_N = self._of_batches(params, progress)
        length = float(self.length_N.mean())
        mean = float(nats_N.mean() / length)
        return Validation(
            nats_per_token=mean,
            # Of a ratio of two means, by its linearisation.
            stderr=float((nats_N - mean * self.length_N).std(ddof=1) / math.sqrt(N) / length) if N > 1 else math.nan,
            monte_carlo_stderr=float(math.sqrt(variance_N.sum()) / N / length),
            bits_per_byte=float(nats_N.sum() / self.bytes / math.log(2)) if self.bytes else math.nan,
            perplexity=perplexity(mean),
            kind=self.kind,
            estimator=self.estimator,
            rows=N,
            tokens=int(self.length_N.sum()),
            draws=self.draws,
            eval_rows_digest=self.rows_digest,
        )

    def _of_batches(self, params, progress) -> tuple[np.ndarray, np.ndarray]:
        """`(nats_N, variance_N)` by the family's own estimator."""
        N, of_batches = self.count, []
        for start in range(0, N, self.batch):
            index_B = np.arange(start, start + self.batch)
            # The last batch wraps; its surplus is dropped.
            rows = jax.tree.map(operator.itemgetter(index_B % N), self.rows)
            rows = mesh_lib.shard_batch(self.mesh, rows, np.arange(self.batch), self.batch)
            of_batches.append([np.asarray(x_B, np.float64) for x_B in self.nats(params, rows, index_B)])
            if progress is not None:
                progress(min(start + self.batch, N), N)
        nats_N, variance_N = (np.concatenate(x)[:N] for x in zip(*of_batches, strict=True))
        return nats_N, variance_N


def estimator_for(config: Config, asked: str | None = None) -> str:
    """The estimator `asked` for, or else the family's default. UserError for one that the family does not have."""
    family = families.of(config)
    if asked in (None, *family.estimators):
        return asked or family.estimators[0]
    if family.exact:
        raise UserError(f"--estimator={asked} is for diffusion models; this {family.title}'s likelihood is exact")
    raise UserError(f"--estimator={asked} is not one of {', '.join(family.estimators)}")


def perplexity(nats_per_token: float) -> float:
    """e to the nats; inf where that is no float64."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def rows_at_once(config: Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int) -> int:
    """How many of so many rows go through the model together.

    As many as a microbatch of training has; and no more than a small device has room for, whatever trained the model.
    """
    microbatch = max(1, config.train.batch_size // config.train.microbatches)
    of_device = max(1, MOST_TOKENS // config.data.sequence_length)
    return mesh_lib.local_batch(min(microbatch, rows, of_device * mesh_lib.batch_shards(mesh)), mesh)


def jitted(config: Config, special: SpecialTokens, mesh: jax.sharding.Mesh, estimator: str):
    """`(params, rows, row_B) -> (nats_B, variance_B)` of some rows, to be compiled: see `_row_nats`.

    One program for all configs that it cannot tell apart.
    """
    draws = EvaluateConfig(draws=config.evaluate.draws)
    return _jitted(Config(model=config.model, objective=config.objective, evaluate=draws), special, mesh, estimator)


@functools.lru_cache(maxsize=8)
def _jitted(config: Config, special: SpecialTokens, mesh: jax.sharding.Mesh, estimator: str):
    return jax.jit(
        functools.partial(_row_nats, config, special, config.evaluate.draws, estimator),
        out_shardings=mesh_lib.sharding(mesh, "replicated"),
    )


def _row_nats(config, special, draws, estimator, params, rows, row_B):
    """Nats of each row (B,), mean over draws, and the Monte Carlo variance of that mean (B,).

    `rows` are tokens (B, L), or `Examples`, of which only what the family counts is predicted.
    """
    family, head_rows = families.of(config), config.objective.head_rows
    if isinstance(rows, Examples):
        x0_BL, segments_BL, counted_BL = rows.tokens_BL, rows.example_BL, family.counted(rows)
    else:
        x0_BL, segments_BL, counted_BL = rows, segments(rows, special, config.objective), None
    predict = functools.partial(transformer.hidden, config.model, params, segments_BL=segments_BL)
    head_VD = transformer.head(config.model, params)
    nats_MB = family.held_out_nats(predict, head_VD, x0_BL, row_B, special, draws, estimator, head_rows, counted_BL)
    variance_B = jnp.zeros(len(x0_BL)) if family.exact else stratified_variance(nats_MB, circular=True)
    return jnp.mean(nats_MB, axis=0), variance_B
