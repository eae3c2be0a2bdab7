"""log p(answer | prompt): Monte Carlo bounds, chain rules in two orders, and the ARM's exact value.

Every estimator turns a pair into rows, the answer with some of its tokens masked, of which some are scored
(`mask_plans`); `confidence_ordered` alone finds its masks as it goes, in one row. Rows of all pairs are batched
together by length; a result does not depend on the batch that it was computed in.
Shapes: B rows of a batch, L tokens, A answer tokens, R rows of one pair.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada.config import ModelConfig
from llada.errors import UserError
from llada.inference import guidance
from llada.inference.choice import choose, equalize_if_blank
from llada.inference.compiled_loop import Array
from llada.inference.mask_plans import Pair, Plan, make_plan, padded_length, single_row
from llada.inference.settings import check_guidance, check_types
from llada.model import transformer
from llada.objectives import autoregressive, diffusion
from llada.objectives.contract import SpecialTokens, is_valid
from llada.objectives.vocabulary_head import scoring_rows, scoring_tokens, weighted_nats

ESTIMATORS = (*diffusion.ESTIMATORS, "chain_rule", "confidence_ordered")
MOST_DRAWS = 65_536  # of an answer as long as a context, their masks are some gigabytes
OnRows = Callable[[int, int], None]  # (rows done, of so many)


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How to estimate log p(answer | prompt); an ARM's is exact and needs none of it.

    estimator      l_of_L: the bound of LLaDA Eq. (6); bernoulli: that of Eq. (4), weights 1/t;
                   chain_rule: sum of log p(a_i | prompt, a_<i), what follows being masked;
                   confidence_ordered: the chain rule in the order of the model's own confidence, which at every step
                   reveals the position whose most likely token is the most probable
    draws          masks per answer, stratified over l (or t). An answer so short that it has no more masks than that
                   is enumerated by l_of_L: its bound is then exact; one draw is exact for one token
    cfg_scale      w of LLaDA Eq. (16); 0 is off
    batch_tokens   tokens per forward pass: rows are batched up to that many; None suits the kind of device
    """

    estimator: str = "l_of_L"
    draws: int = 128
    cfg_scale: float = 0.0
    batch_tokens: int | None = None


class LogLikelihood(NamedTuple):
    """An answer's log-likelihood, or the bound on it that `estimator` estimates, in nats.

    stderr  over the Monte Carlo draws: 0 where nothing was drawn, NaN for a single draw
    tokens  of the answer
    draws   Monte Carlo draws, 0 where the value is exact
    rows    how many rows went through the model; masks that were drawn twice count once
    """

    log_likelihood: float
    stderr: float
    tokens: int
    estimator: str
    draws: int
    rows: int


class Rows(NamedTuple):
    """What a program reads of a batch of rows besides its tokens.

    masked_BL, scored_BL  bool
    open_BL               bool, the answer: what guidance's unconditional branch sees, too
    lengths_B             int32, positions from there on are padding; None where there is none
    """

    masked_BL: Array
    scored_BL: Array
    open_BL: Array
    lengths_B: Array | None


class Row(NamedTuple):
    """One row of a plan, on its way into a batch."""

    pair: Pair
    masked_A: np.ndarray
    scored_A: np.ndarray


def log_likelihoods(
    config: ModelConfig,
    params: transformer.Parameters,
    pairs: Sequence[Pair],
    special: SpecialTokens,
    settings: LikelihoodConfig = LikelihoodConfig(),
    progress: OnRows | None = None,
    full: bool = False,
) -> list[LogLikelihood]:
    """`log p(answer | prompt)` of every pair, in their order. UserError for one that cannot be, before any is scored.

    Rows are spread over the batch axes of the mesh that is set. `progress(done, total)` counts rows. With `full` all
    batches of a length have one size, filled up where rows are few: a pair then gets the same bits whatever the others.
    """
    check_settings(config, settings)
    for pair in pairs:
        check_pair(config, pair, special)
    if not pairs:
        return []
    plans = [_plan(config, pair, special, settings) for pair in pairs]
    rows = [
        Row(pair, *row)
        for pair, plan in zip(pairs, plans, strict=True)
        for row in zip(plan.masked_RA, plan.scored_RA, strict=True)
    ]
    ordered = settings.estimator == "confidence_ordered" and not config.causal
    program = functools.partial(order_nats if ordered else row_nats, config, special, settings.cfg_scale, params)
    nats = values_of_rows(program, rows, settings.batch_tokens or scoring_tokens(full), progress, full)
    results, start = [], 0
    for pair, plan in zip(pairs, plans, strict=True):
        R, A = len(plan.masked_RA), len(pair.answer)
        value, stderr = plan.estimate(nats[start : start + R])
        results.append(
            LogLikelihood(
                log_likelihood=float(-value),
                stderr=stderr,
                tokens=A,
                estimator="exact" if config.causal else settings.estimator,
                draws=len(plan.row_M) if plan.sampled else 0,
                rows=A if ordered else R,
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
) -> LogLikelihood:
    """`log p` of a text of any length, as the sum over windows of `window` tokens (default: half the context).

    Each window is conditioned on as many of the tokens before it as the context holds beside it. Masks of windows are
    drawn independently, so their variances add.
    """
    pairs = windows(config, ids, window)
    return joined(log_likelihoods(config, params, pairs, special, settings, progress))


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


def _plan(config: ModelConfig, pair: Pair, special: SpecialTokens, settings: LikelihoodConfig) -> Plan:
    """The rows of a pair; one that is all masked where `order_nats` reveals it step by step."""
    if config.causal or settings.estimator == "confidence_ordered":
        return single_row(len(pair.answer), masked=not config.causal)
    return make_plan(pair, settings.estimator, settings.draws, special.mask_id)


def values_of_rows(
    program: Callable, rows: list[Row], batch_tokens: int, progress: OnRows | None = None, full: bool = False
) -> np.ndarray:
    """A number for every row, by `program(tokens_BL, Rows)`, which gives one for each, on batches of rows."""
    nats, done = np.zeros(len(rows)), 0
    lengths = np.array([len(row.pair.prompt) + len(row.pair.answer) for row in rows])
    for index, L in _batches(lengths, batch_tokens):
        B = _batch_size(batch_tokens, L) if full else 1 << (len(index) - 1).bit_length()
        nats[index] = mesh_lib.on_host(program(*_stacked([rows[i] for i in index], B, L, full)))[: len(index)]
        done += len(index)
        if progress is not None:
            progress(done, len(rows))
    return nats


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pairs (indices, L): rows of similar length together, at most `batch_tokens` tokens, L few different numbers."""
    order = np.argsort(lengths, kind="stable")
    padded = np.array([padded_length(length) for length in lengths])
    for L in np.unique(padded):
        indices = order[padded[order] == L]
        size = _batch_size(batch_tokens, L)
        for start in range(0, len(indices), size):
            yield indices[start : start + size], int(L)


def _batch_size(batch_tokens: int, L: int) -> int:
    """Rows of a full batch: a power of two."""
    return 1 << (max(1, batch_tokens // int(L)).bit_length() - 1)


def _stacked(rows: list[Row], B: int, L: int, full: bool) -> tuple[np.ndarray, Rows]:
    """The rows as a batch of B rows of L tokens. Rows that fill it up score nothing.

    B, a power of two (few shapes, few compilations), is rounded up to the devices of the mesh. With `full` lengths are
    given even where all are L, so that there is one program for each L.
    """
    B = mesh_lib.local_batch(B, jax.sharding.get_abstract_mesh())
    tokens_BL = np.zeros((B, L), np.int32)
    masked_BL, scored_BL, open_BL = (np.zeros((B, L), bool) for _ in range(3))
    lengths_B = np.full(B, L, np.int32)
    for b, (pair, masked_A, scored_A) in enumerate(rows):
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.answer)
        tokens_BL[b, :start], tokens_BL[b, start:end] = pair.prompt, pair.answer
        masked_BL[b, start:end], scored_BL[b, start:end] = masked_A, scored_A
        open_BL[b, start:end], lengths_B[b] = True, end
    padded = full or bool((lengths_B != L).any())
    return tokens_BL, Rows(masked_BL, scored_BL, open_BL, lengths_B if padded else None)


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def order_nats(
    config: ModelConfig,
    special: SpecialTokens,
    scale: float,
    params: transformer.Parameters,
    tokens_BL: Array,
    rows: Rows,
) -> jax.Array:
    """`nats_B`: the chain rule over the open positions, in the order of the model's confidence.

    All of them are masked at first; each step scores the most confident one and reveals its true token. The order never
    depends on a token that is not revealed yet, so this is the likelihood under a proper distribution over texts.
    """
    head_VD = transformer.head(config, params)
    forbidden_F = jnp.array([special.mask_id])
    inside_BL = is_valid(tokens_BL, rows.lengths_B)

    def step(carry):
        masked_BL, nats_B = carry
        inputs_BL = jnp.where(masked_BL, special.mask_id, tokens_BL)
        hidden_BLD = guided_hidden(config, special, scale, params, inputs_BL, rows.open_BL, rows.lengths_B)
        confidence_BL = choose(hidden_BLD, head_VD, masked_BL, forbidden_F, temperature=0).confidence_BK
        confidence_BL = equalize_if_blank(confidence_BL, inside_BL & ~masked_BL)
        best_B1 = jnp.argmax(jnp.where(masked_BL, confidence_BL, -jnp.inf), axis=1, keepdims=True)
        revealed_BL = (jnp.arange(masked_BL.shape[1])[None, :] == best_B1) & masked_BL
        _, nats_BL = weighted_nats(hidden_BLD, head_VD, tokens_BL, revealed_BL.astype(jnp.float32), scoring_rows())
        return masked_BL & ~revealed_BL, nats_B + jnp.sum(nats_BL, axis=1)

    with jax.named_scope("likelihood_order"):
        start = (jnp.asarray(rows.open_BL), jnp.zeros(len(tokens_BL)))
        return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), step, start)[1]


def guided_hidden(config, special, scale, params, inputs_BL, open_BL, lengths_B) -> jax.Array:
    """`hidden_BLD` of a mask predictor's or an ARM's inputs, guided where `scale` is not 0."""
    if scale:
        inputs_BL = guidance.add_unconditional(inputs_BL, open_BL, special.mask_id, scale)
    hidden_BLD = transformer.hidden(config, params, inputs_BL, guidance.duplicate(lengths_B, scale))
    return guidance.combine(hidden_BLD, scale)
