"""A mask predictor's loss on held-out answers at fixed times t: what the bound, its mean over t, does not show."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada.config import Config, ModelConfig, ObjectiveConfig
from llada.evaluation.validation import Validator
from llada.model import transformer
from llada.objectives import diffusion, families
from llada.objectives.contract import ANSWER, Examples, SpecialTokens

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


class AtTime(NamedTuple):
    """Nats per masked answer token at `t`, with its standard error over examples; of so many masked `tokens`."""

    t: float
    nats_per_token: float
    stderr: float
    tokens: int


def losses_by_time(
    config: Config, special: SpecialTokens, validator: Validator, params: transformer.Parameters
) -> list[AtTime]:
    """One for each of TIMES, on the examples of `validator`, which must be of dialogues; call it inside the mesh.

    Of answer and padding, t times their number are masked, the same ones for every model; padding is not counted.
    """
    rows, N = validator.rows, validator.count
    compiled = _compiled(config.model, config.objective, special, validator.mesh)
    batches = []
    for start in range(0, N, validator.batch):
        index_B = np.arange(start, start + validator.batch)
        batch = jax.tree.map(operator.itemgetter(index_B % N), rows)  # the last one wraps; its surplus is dropped
        batch = mesh_lib.shard_batch(validator.mesh, batch, np.arange(validator.batch), validator.batch)
        batches.append([np.asarray(x_TB, np.float64) for x_TB in compiled(params, batch, index_B)])
    nats_TN, count_TN = (np.concatenate(x, axis=1)[:, :N] for x in zip(*batches, strict=True))
    return [_ratio(t, *sums) for t, *sums in zip(TIMES, nats_TN, count_TN, strict=True)]


def _ratio(t: float, nats_N: np.ndarray, count_N: np.ndarray) -> AtTime:
    tokens, N = count_N.sum(), len(count_N)
    if not tokens:
        return AtTime(t, np.nan, np.nan, 0)
    mean = nats_N.sum() / tokens
    # Of a ratio of two means, by its linearisation.
    spread = (nats_N - mean * count_N).std(ddof=1) if N > 1 else np.nan
    return AtTime(t, float(mean), float(spread * np.sqrt(N) / tokens), int(tokens))


@functools.lru_cache(maxsize=8)  # a run evaluates again and again
def _compiled(model: ModelConfig, objective: ObjectiveConfig, special: SpecialTokens, mesh: jax.sharding.Mesh):
    config = Config(model=model, objective=objective)
    return jax.jit(functools.partial(_sums, config, special), out_shardings=mesh_lib.sharding(mesh, "replicated"))


def _sums(config: Config, special: SpecialTokens, params, rows: Examples, row_B):
    """Nats of the masked answer tokens (T, B), and how many those are."""
    predict = functools.partial(transformer.hidden, config.model, params, segments_BL=rows.example_BL)
    head_VD, head_rows = transformer.head(config.model, params), config.objective.head_rows
    counted_BL, answers_BL = families.of(config).counted(rows), rows.role_BL == ANSWER
    tokens_BL = jnp.asarray(rows.tokens_BL)
    return diffusion.nats_by_time(predict, head_VD, tokens_BL, row_B, special, TIMES, head_rows, counted_BL, answers_BL)
