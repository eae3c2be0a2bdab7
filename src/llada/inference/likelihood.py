"""log p(answer | prompt): Monte Carlo bounds, chain rules, exact values under samplers, and the ARM's exact value.

Every estimator turns a pair into rows, the answer with some of its tokens masked, of which some are scored
(`mask_plans`); `sampler` and its special case `confidence_ordered` find their masks as they go, in one row (`orders`).
Rows of all pairs are batched together by length; a result does not depend on the batch that it was computed in.
Shapes: B rows of a batch, L tokens, A answer tokens, R rows of one pair.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import guidance, orders
from llada.inference.compiled_loop import Array, forbidden_list
from llada.inference.mask_plans import OrdersPlan, Pair, Plan, make_plan, single_row
from llada.inference.row_batches import OnRows, Row, Rows, values_of_rows
from llada.inference.settings import check_guidance, check_types
from llada.model import cached, transformer
from llada.objectives import autoregressive, diffusion
from llada.objectives.contract import SpecialTokens
from llada.objectives.vocabulary_head import scoring_rows, scoring_tokens, weighted_nats

ORDERED = ("confidence_ordered", "sampler")  # by rows that find their masks as they go
DRAWN = (*diffusion.ESTIMATORS, "upper")
ESTIMATORS = (*diffusion.ESTIMATORS, "chain_rule", "chain_rule_reversed", *ORDERED, "upper")

# What an estimate is, of the negative log-likelihood. A bound, from above or below, is one on the mean over all orders
# (LLaDA Eq. (15)); the exact ones are exact under a distribution of their own each, and not ordered among themselves.
KINDS = dict.fromkeys(diffusion.ESTIMATORS, "bound") | {
    "chain_rule": "exact in its order",
    "chain_rule_reversed": "exact in its order",
    "confidence_ordered": "exact in its order",
    "sampler": "exact under its sampler",
    "upper": "bound from below",
    "exact": "NLL",
}
MOST_DRAWS = 65_536  # of an answer as long as a context, their masks are some gigabytes


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How to estimate log p(answer | prompt); an ARM's is exact and needs none of it.

    estimator      l_of_L: the bound of LLaDA Eq. (6); bernoulli: that of Eq. (4), weights 1/t;
                   chain_rule: sum of log p(a_i | prompt, a_<i), what follows being masked;
                   chain_rule_reversed: sum of log p(a_i | prompt, a_>i), what precedes being masked;
                   confidence_ordered: the chain rule in the order of the model's own confidence, which at every step
                   reveals the position whose most likely token is the most probable;
                   sampler: what `llada sample --remasking=top_probability` writes this answer with (`orders`), over the
                   ids that it may write; the others count the mask token's probability as lost;
                   upper: the log-likelihood from above, of the mean over all orders (`mask_plans.OrdersPlan`)
    draws          masks per answer, stratified over l (or t). An answer so short that it has no more masks than that
                   is enumerated by l_of_L: its bound is then exact; one draw is exact for one token. Of upper: orders
    steps, block_length, temperature, confidence_threshold
                   of the sampler, as in `SamplerConfig`; None: one token a step, one block, no threshold
    cfg_scale      w of LLaDA Eq. (16); 0 is off
    batch_tokens   tokens per forward pass: rows are batched up to that many; None suits the kind of device
    """

    estimator: str = "l_of_L"
    draws: int = 128
    cfg_scale: float = 0.0
    batch_tokens: int | None = None
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 1.0
    confidence_threshold: float | None = None


class LogLikelihood(NamedTuple):
    """An answer's log-likelihood, or the bound on it that `estimator` estimates, in nats.

    stderr  over the Monte Carlo draws: 0 where nothing was drawn, NaN for a single draw
    tokens  of the answer
    draws   Monte Carlo draws, 0 where the value is exact
    rows    how many rows went through the model, at most; masks that were drawn twice count once
    """

    log_likelihood: float
    stderr: float
    tokens: int
    estimator: str
    draws: int
    rows: int

    @property
    def kind(self) -> str:
        """What it is: see KINDS."""
        return KINDS[self.estimator]


def log_likelihoods(
    config: ModelConfig,
    params: transformer.Parameters,
    pairs: Sequence[Pair],
    special: SpecialTokens,
    settings: LikelihoodConfig = LikelihoodConfig(),
    progress: OnRows | None = None,
    forbidden_V: np.ndarray | None = None,
    full: bool = False,
) -> list[LogLikelihood]:
    """`log p(answer | prompt)` of every pair, in their order. UserError for one that cannot be, before any is scored.

    Rows are spread over the batch axes of the mesh that is set. `progress(done, total)` counts rows. `forbidden_V`:
    ids that `sampler` never writes, beside the mask token. With `full` all batches of a length have one size, filled up
    where rows are few: a pair then gets the same bits whatever the others.
    """
    check_settings(config, settings)
    for pair in pairs:
        check_pair(config, pair, special)
        if settings.estimator == "upper" and settings.draws < 2 and len(pair.answer) > 1:
            raise UserError(
                f"--draws={settings.draws} must be at least 2 for --estimator=upper: half of the orders choose the "
                "bound, the others estimate it"
            )
    if not pairs:
        return []
    ordered = settings.estimator in ORDERED and not config.causal
    forbidden_F = np.zeros(0, np.int32)
    if ordered:
        if forbidden_V is None or settings.estimator != "sampler":
            forbidden_V = np.zeros(config.vocab_size, bool)
        forbidden_F = forbidden_list(forbidden_V, special.mask)
        _check_writable(pairs, forbidden_F)
    order_for = functools.lru_cache(None)(lambda A: order_of(settings, A) if ordered else (None, 0))
    passes = [order_for(len(pair.answer))[1] for pair in pairs]
    plans = [_plan(config, pair, special, settings) for pair in pairs]
    rows = [
        Row(pair, *row, order_for(len(pair.answer))[0])
        for pair, plan in zip(pairs, plans, strict=True)
        for row in zip(plan.masked_RA, plan.scored_RA, strict=True)
    ]
    program = _program(config, special, settings.cfg_scale, params, forbidden_F if ordered else None)
    nats = values_of_rows(program, rows, settings.batch_tokens or scoring_tokens(full), progress, full)
    results, start = [], 0
    for pair, plan, steps in zip(pairs, plans, passes, strict=True):
        R, A = len(plan.masked_RA), len(pair.answer)
        value, stderr = plan.estimate(nats[start : start + R])
        results.append(
            LogLikelihood(
                log_likelihood=float(-value),
                stderr=stderr,
                tokens=A,
                estimator="exact" if config.causal else settings.estimator,
                draws=plan.draws,
                rows=steps if ordered else R,
            )
        )
        start += R
    return results


def rolling(
    config: ModelConfig,
    params: transformer.Parameters,
    ids: Sequence[int],
    special: SpecialTokens,
    settings: LikelihoodConfig = LikelihoodConfig(),
    window: int | None = None,
    progress: OnRows | None = None,
    forbidden_V: np.ndarray | None = None,
) -> LogLikelihood:
    """`log p` of a text of any length, as the sum over windows of `window` tokens (default: half the context).

    Each window is conditioned on as many of the tokens before it as the context holds beside it. Masks of windows are
    drawn independently, so their variances add.
    """
    pairs = windows(config, ids, window)
    return joined(log_likelihoods(config, params, pairs, special, settings, progress, forbidden_V))


def windows(config: ModelConfig, ids: Sequence[int], window: int | None = None) -> list[Pair]:
    """What `rolling` scores of a text, one pair after the other. UserError where it has no token."""
    window = window_of(config, window)
    if not len(ids):
        raise UserError("--answer is empty; there is nothing to score")
    room = config.max_length - window
    return [
        Pair(ids[max(0, start - room) : start], ids[start : start + window], salt=start)
        for start in range(0, len(ids), window)
    ]


def joined(parts: Sequence[LogLikelihood]) -> LogLikelihood:
    """The sum of the windows of one text."""
    return LogLikelihood(
        log_likelihood=math.fsum(one.log_likelihood for one in parts),
        stderr=math.sqrt(math.fsum(one.stderr**2 for one in parts)),
        tokens=sum(one.tokens for one in parts),
        estimator=parts[0].estimator,
        draws=max(one.draws for one in parts),
        rows=sum(one.rows for one in parts),
    )


def check_settings(config: ModelConfig, settings: LikelihoodConfig) -> None:
    """UserError for settings that cannot work, or not for this model."""
    check_types(vars(settings), LikelihoodConfig.__annotations__)
    if settings.estimator not in ESTIMATORS:
        raise UserError(f"--estimator={settings.estimator} is not one of {', '.join(ESTIMATORS)}")
    if not 1 <= settings.draws <= MOST_DRAWS:
        raise UserError(f"--draws={settings.draws} must be at least 1 and at most {MOST_DRAWS}")
    if settings.batch_tokens is not None and settings.batch_tokens < 1:
        raise UserError(f"--batch_tokens={settings.batch_tokens} must be at least 1")
    check_guidance(settings.cfg_scale)
    if config.causal and settings.cfg_scale:
        raise UserError(f"--cfg_scale={settings.cfg_scale} needs a diffusion model; this one is an ARM")
    if config.causal and settings.estimator != LikelihoodConfig.estimator:
        raise UserError(f"--estimator={settings.estimator} is for diffusion models; this ARM's likelihood is exact")
    if settings.estimator == "sampler":
        orders.check_temperature(settings.temperature)
        return
    for name in OF_SAMPLER:
        if (value := getattr(settings, name)) != getattr(LikelihoodConfig, name):
            raise UserError(f"--{name}={value} is for --estimator=sampler; {settings.estimator} has no such steps")


OF_SAMPLER = ("steps", "block_length", "temperature", "confidence_threshold")


def passes(settings: LikelihoodConfig, A: int) -> int:
    """How many rows of an answer of A tokens go through a diffusion model, at most. UserError as `log_likelihoods`."""
    if settings.estimator in ORDERED:
        rows = order_of(settings, A)[1]
    elif settings.estimator in diffusion.ESTIMATORS:
        rows = min(settings.draws, 2**A - 1) if settings.estimator == "l_of_L" else settings.draws
    else:
        rows = A * settings.draws if settings.estimator == "upper" else A
    return rows * (2 if settings.cfg_scale else 1)


def check_pair(config: ModelConfig, pair: Pair, special: SpecialTokens) -> None:
    """UserError for a pair that cannot be scored."""
    if not len(pair.answer):
        raise UserError("--answer is empty; there is nothing to score")
    length = len(pair.prompt) + len(pair.answer)
    if length > config.max_length:
        raise UserError(
            f"--prompt and --answer have {length} tokens and the model's context is "
            f"model.max_length={config.max_length}; shorten them, or use --rolling for a long text"
        )
    ids = np.array([*pair.prompt, *pair.answer])
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(f"token ids run from {ids.min()} to {ids.max()}; this model has 0 to {config.vocab_size - 1}")
    if special.mask is not None and special.mask in ids:
        raise UserError(f"the mask token {special.mask} stands in the text; the model knows no likelihood of it")


def window_of(config: ModelConfig, window: int | None) -> int:
    """Tokens per window of `rolling`. UserError for more than the context, or none."""
    check_types({"window": window}, {"window": int | None})
    if window is not None and not 1 <= window <= config.max_length:
        raise UserError(f"--window={window} must be between 1 and model.max_length={config.max_length}")
    return max(1, config.max_length // 2) if window is None else window


def _check_writable(pairs: Sequence[Pair], forbidden_F: np.ndarray) -> None:
    """UserError for an answer that the sampler cannot write."""
    for pair in pairs:
        if len(never := np.intersect1d(pair.answer, forbidden_F)):
            raise UserError(
                f"token {never[0]} stands in an answer, and samplers never write it: its probability is 0 for "
                "--estimator=sampler; use another estimator"
            )


def order_of(settings: LikelihoodConfig, A: int) -> tuple[orders.Order, int]:
    """The order in which `settings`, of an ORDERED estimator, reveal A tokens, and the steps at most."""
    among_all = settings.estimator == "confidence_ordered"  # as the other estimators of one model are
    of_sampler = (settings.temperature, settings.cfg_scale, settings.confidence_threshold)
    return orders.order_for(A, settings.steps, settings.block_length, *of_sampler, among_all)


def _plan(config: ModelConfig, pair: Pair, special: SpecialTokens, settings: LikelihoodConfig) -> Plan | OrdersPlan:
    """The rows of a pair; one that is all masked where it is revealed step by step."""
    if config.causal or settings.estimator in ORDERED:
        return single_row(len(pair.answer), masked=not config.causal)
    return make_plan(pair, settings.estimator, settings.draws, special.mask_id)


def _program(config: ModelConfig, special: SpecialTokens, scale: float, params, forbidden_F: np.ndarray | None):
    """`(order, tokens_BL, Rows) -> nats_B`; with ids that are never written, by order."""
    if forbidden_F is None:
        return lambda _, tokens_BL, rows: row_nats(config, special, scale, params, tokens_BL, rows)
    params = cached.for_decoding(params)

    def by_order(order, tokens_BL, rows):
        return orders.nats(config, special, forbidden_F, order, params, tokens_BL, rows.open_BL, rows.lengths_B)

    return by_order


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def row_nats(
    config: ModelConfig,
    special: SpecialTokens,
    scale: float,
    params: transformer.Parameters,
    tokens_BL: Array,
    rows: Rows,
) -> jax.Array:
    """`nats_B`: the sum over the scored positions of -log p(token | the row with its masks)."""
    with jax.named_scope("likelihood_draw"):
        tokens_BL, masked_BL, scored_BL, open_BL = (mesh_lib.constrain(x, "BL") for x in (tokens_BL, *rows[:3]))
        if config.causal:
            inputs_BL = autoregressive.shift_right(tokens_BL, special.start)
        else:
            inputs_BL = jnp.where(masked_BL, special.mask_id, tokens_BL)
        hidden_BLD = guided_hidden(config, special, scale, params, inputs_BL, open_BL, rows.lengths_B)
        head_VD = transformer.head(config, params)
        _, nats_BL = weighted_nats(hidden_BLD, head_VD, tokens_BL, scored_BL.astype(jnp.float32), scoring_rows())
        return jnp.sum(nats_BL, axis=1)


def guided_hidden(config, special, scale, params, inputs_BL, open_BL, lengths_B) -> jax.Array:
    """`hidden_BLD` of a mask predictor's or an ARM's inputs, guided where `scale` is not 0."""
    if scale:
        inputs_BL = guidance.add_unconditional(inputs_BL, open_BL, special.mask_id, scale)
    hidden_BLD = transformer.hidden(config, params, inputs_BL, guidance.duplicate(lengths_B, scale))
    return guidance.combine(hidden_BLD, scale)
