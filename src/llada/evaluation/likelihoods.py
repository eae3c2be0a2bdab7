"""Held-out figures by the estimators of `inference.likelihood`: chain rules, samplers' exact values, the upper bound.

Each row is an answer without a prompt; where documents of a row do not see each other, each document is; an example of
dialogues is its prompt and its answer. Random orders belong to the row's index among those read, not to the model.
Shapes: N held-out rows, L tokens, A tokens of one answer.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llada.config import Config
from llada.data.tokenizer import Tokenizer
from llada.evaluation.validation import Scorer, rows_at_once
from llada.inference import canvas, likelihood
from llada.inference.likelihood import LikelihoodConfig, Pair
from llada.inference.row_batches import OnRows
from llada.model import transformer
from llada.objectives import families
from llada.objectives.contract import CONTEXT, Examples, SpecialTokens, segments

SAMPLER = {"temperature": 1.0, "cfg_scale": 0.0}  # the model's own distribution, a token a step
_MOST_BYTES = 2**26  # of the masks of one call


def by_pairs(config: Config, estimator: str | None) -> bool:
    """Whether `inference.likelihood` estimates the figure, and not the training's own evaluation."""
    family = families.of(config)
    return estimator is not None and not family.exact and estimator not in family.estimators


def settings_for(
    config: Config,
    estimator: str | None,
    mesh: jax.sharding.Mesh | None = None,
    of_sampler: Mapping[str, Any] = SAMPLER,
) -> LikelihoodConfig:
    """As many rows go through the model at once as in the run's own evaluation on the mesh.

    `of_sampler`: fields of `LikelihoodConfig` for the estimator `sampler`, heeded for no other.
    """
    rows = 1 if mesh is None else rows_at_once(config, mesh, config.train.batch_size)
    return LikelihoodConfig(
        estimator=estimator or LikelihoodConfig.estimator,
        draws=config.evaluate.draws,
        batch_tokens=rows * config.data.sequence_length,
        **(of_sampler if estimator == "sampler" else {}),
    )


def scorer_for(
    config: Config,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    estimator: str | None,
    of_sampler: Mapping[str, Any] = SAMPLER,
) -> Scorer | None:
    """The `Scorer` of an estimator; None where the figure is the family's own."""
    if not by_pairs(config, estimator):
        return None
    never = canvas.forbidden_ids(tokenizer, config.model.vocab_size)
    return scorer(config, tokenizer.special, settings_for(config, estimator, mesh, of_sampler), never)


def scorer(
    config: Config, special: SpecialTokens, settings: LikelihoodConfig, forbidden_V: np.ndarray | None
) -> Scorer:
    """How `Validator` gets the nats of its rows; `forbidden_V` as in `likelihood.log_likelihoods`."""

    def nats(params: transformer.Parameters, rows, progress: OnRows | None) -> tuple[np.ndarray, np.ndarray]:
        pairs, row_P = pairs_of(config, special, rows)
        scores = _in_pieces(config, params, pairs, special, settings, forbidden_V, progress)
        nats_N, variance_N = np.zeros(row_P[-1] + 1), np.zeros(row_P[-1] + 1)
        np.add.at(nats_N, row_P, [-score.log_likelihood for score in scores])
        np.add.at(variance_N, row_P, [score.stderr**2 for score in scores])
        return nats_N, variance_N

    drawn = settings.draws if settings.estimator in likelihood.DRAWN else 0
    return Scorer(settings.estimator, likelihood.KINDS[settings.estimator], drawn, nats)


def pairs_of(config: Config, special: SpecialTokens, rows) -> tuple[list[Pair], np.ndarray]:
    """What is scored of held-out rows, tokens (N, L) or `Examples`, and the row that each pair is of."""
    pairs, row_P = [], []
    if isinstance(rows, Examples):
        for n, (tokens_L, example_L, role_L) in enumerate(zip(*rows, strict=True)):
            is_answer_L = (example_L > 0) & (role_L != CONTEXT)  # what a diffusion model counts
            prompt_L = (example_L > 0) & (role_L == CONTEXT)
            pairs.append(Pair(tokens_L[prompt_L].tolist(), tokens_L[is_answer_L].tolist(), salt=n + 1))
            row_P.append(n)
        return pairs, np.array(row_P)
    segment_NL = segments(rows, special, config.objective)
    for n, tokens_L in enumerate(rows):
        starts = [] if segment_NL is None else (np.flatnonzero(np.diff(np.asarray(segment_NL[n]))) + 1).tolist()
        for start, document in zip([0, *starts], np.split(tokens_L, starts), strict=True):
            pairs.append(Pair([], document.tolist(), salt=1 + n * len(tokens_L) + start))
            row_P.append(n)
    return pairs, np.array(row_P)


def cost(settings: LikelihoodConfig, pairs: list[Pair]) -> int:
    """Forward passes of a row that scoring the pairs takes, at most. UserError for one that cannot be scored."""
    return sum(likelihood.passes(settings, len(pair.answer)) for pair in pairs)


def _in_pieces(config, params, pairs, special, settings, forbidden_V, progress) -> list[likelihood.LogLikelihood]:
    """`log_likelihoods` of as many pairs at a time as masks fit in memory."""
    A = max(len(pair.answer) for pair in pairs)
    rows = 1 if settings.estimator in likelihood.ORDERED else likelihood.passes(settings, A)
    size = max(1, _MOST_BYTES // (rows * A))
    total, found = math.ceil(len(pairs) / size), []
    for piece in range(total):

        def show(done, of, piece=piece):
            progress(piece * of + done, total * of)

        some = pairs[piece * size : (piece + 1) * size]
        onwards = None if progress is None else show
        found += likelihood.log_likelihoods(config.model, params, some, special, settings, onwards, forbidden_V)
    return found
