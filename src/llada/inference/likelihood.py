"""log p(answer | prompt): Monte Carlo bounds, chain rules in two orders, and the ARM's exact value.

Every non-adaptive score is a weighted sum over *masked rows*: a request with some of its answer masked, of which some
positions are scored. So a request becomes a plan (masks and weights, made on the host from fixed keys), equal rows of a
plan are computed once, and the rows of all requests are batched together by length.
Masks depend on the prompt and the answer's length only: two checkpoints, or two answers of one length to the same
question, are compared on the same masks, and a result does not depend on the batch it was computed in.
Shapes: B rows, L tokens, M draws, A answer tokens, R distinct masks of one request.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
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
from llada.inference.settings import check_guidance, check_types
from llada.model import transformer
from llada.objectives import autoregressive, diffusion
from llada.objectives import noise as noise_lib
from llada.objectives.contract import SpecialTokens, is_valid
from llada.objectives.vocabulary_head import weighted_nats

ESTIMATORS = (*diffusion.ESTIMATORS, "chain_rule", "confidence_ordered")
MOST_DRAWS = 65_536  # of an answer as long as a context, their masks are some gigabytes
_SEED = 0  # nobody's own: the masks are part of the measure
Progress = Callable[[int, int], None]


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


class Pair(NamedTuple):
    """A prompt (may be empty) and the answer whose likelihood is asked. `salt` gives it masks of its own."""

    prompt: Sequence[int]
    answer: Sequence[int]
    salt: int = 0


class LogLikelihood(NamedTuple):
    """In nats. `stderr` is of the Monte Carlo draws: 0 where nothing was drawn, NaN where one draw cannot tell.

    `rows`: how many rows went through the model for it (masks that came up twice count once).
    """

    log_likelihood: float
    stderr: float
    tokens: int
    estimator: str
    draws: int
    rows: int


class _Plan(NamedTuple):
    """Masks of one answer, which masked positions are scored, and how draws are made of the rows' nats."""

    masked_RA: np.ndarray
    scored_RA: np.ndarray
    row_M: np.ndarray  # the row that draw m is
    weight_M: np.ndarray  # draw m is weight x nats of its row
    sampled: bool  # mean over draws with a standard error, rather than a sum


def log_likelihoods(
    config: ModelConfig,
    params: transformer.Parameters,
    pairs: Sequence[Pair],
    special: SpecialTokens,
    settings: LikelihoodConfig = LikelihoodConfig(),
    progress: Progress | None = None,
) -> list[LogLikelihood]:
    """log p(answer | prompt) of every pair, in their order. UserError for one that cannot be scored, before any is.

    Rows are spread over the batch axes of the mesh that is set. `progress(done, total)` counts rows.
    """
    check_settings(config, settings)
    for pair in pairs:
        check_pair(config, pair, special)
    if not pairs:
        return []
    if settings.estimator == "confidence_ordered" and not config.causal:
        return _confidence_ordered(config, params, pairs, special, settings, progress)
    plans = [_scored_once(len(pair.answer)) for pair in pairs] if config.causal else _plans(pairs, special, settings)
    owner = np.repeat(np.arange(len(pairs)), [len(plan.masked_RA) for plan in plans])
    row_of = np.concatenate([np.arange(len(plan.masked_RA)) for plan in plans])
    nats = np.zeros(len(owner))
    lengths = np.array([len(pair.prompt) + len(pair.answer) for pair in pairs])[owner]
    run = functools.partial(row_nats, config, special, settings.cfg_scale)
    done = 0
    for index, L in _batches(lengths, settings):
        batch = _Rows.empty(len(index), L)
        for b, i in enumerate(index):
            batch.put(b, pairs[owner[i]], plans[owner[i]].masked_RA[row_of[i]], plans[owner[i]].scored_RA[row_of[i]])
        nats[index] = mesh_lib.on_host(run(params, *batch.placed()))[: len(index)]
        done += len(index)
        if progress is not None:
            progress(done, len(owner))
    starts = np.concatenate([[0], np.cumsum([len(plan.masked_RA) for plan in plans])])
    estimator = "exact" if config.causal else settings.estimator
    found = []
    for k, (pair, plan) in enumerate(zip(pairs, plans, strict=True)):
        draws_M = plan.weight_M * nats[starts[k] : starts[k + 1]][plan.row_M]
        value, stderr = (draws_M.mean(), _stderr(draws_M)) if plan.sampled else (draws_M.sum(), 0.0)
        drawn = len(draws_M) if plan.sampled else 0
        found.append(LogLikelihood(float(-value), stderr, len(pair.answer), estimator, drawn, len(plan.masked_RA)))
    return found


def rolling(
    config: ModelConfig,
    params: transformer.Parameters,
    ids: Sequence[int],
    special: SpecialTokens,
    settings: LikelihoodConfig = LikelihoodConfig(),
    window: int | None = None,
    progress: Progress | None = None,
) -> LogLikelihood:
    """log p of a text of any length: the sum over windows of `window` tokens (default: half the context), each given as
    many of the tokens before it as the context holds. Windows are drawn independently, so their variances add.
    """
    window = window_of(config, window)
    if not len(ids):
        raise UserError("--answer is empty; there is nothing to score")
    room = config.max_length - window
    pairs = [
        Pair(ids[max(0, start - room) : start], ids[start : start + window], salt=start)
        for start in range(0, len(ids), window)
    ]
    parts = log_likelihoods(config, params, pairs, special, settings, progress)
    return LogLikelihood(
        log_likelihood=math.fsum(part.log_likelihood for part in parts),
        stderr=math.sqrt(math.fsum(part.stderr**2 for part in parts)),
        tokens=len(ids),
        estimator=parts[0].estimator,
        draws=max(part.draws for part in parts),
        rows=sum(part.rows for part in parts),
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


def _plans(pairs, special, settings) -> list[_Plan]:
    plans = []
    for pair in pairs:
        A = len(pair.answer)
        if settings.estimator == "chain_rule":
            scored_RA = np.eye(A, dtype=bool)
            plans.append(_Plan(np.triu(np.ones((A, A), bool)), scored_RA, np.arange(A), np.ones(A), False))
        elif _enumerable(A, settings):
            masked_RA = np.array(list(itertools.product((False, True), repeat=A)))[1:]
            count_R = masked_RA.sum(axis=1)
            # P(l) = 1/A, each of C(A, l) masks, weight A/l.
            weight_R = np.array([1 / (count * math.comb(A, count)) for count in count_R])
            plans.append(_Plan(masked_RA, masked_RA, np.arange(len(masked_RA)), weight_R, False))
        else:
            masked_MA, weight_M = draw_masks(pair, special, settings)
            masked_RA, row_M = np.unique(masked_MA, axis=0, return_inverse=True)
            plans.append(_Plan(masked_RA, masked_RA, row_M.reshape(-1), weight_M, True))
    return plans


def _scored_once(A: int) -> _Plan:
    """The ARM's plan: nothing masked, every answer token scored."""
    return _Plan(np.zeros((1, A), bool), np.ones((1, A), bool), np.zeros(1, int), np.ones(1), False)


def _enumerable(A: int, settings: LikelihoodConfig) -> bool:
    return A == 1 or (settings.estimator == "l_of_L" and settings.draws >= 2**A - 1)


def _mask_key(pair: Pair) -> tuple[int, int]:
    """What the masks of a pair depend on: a 31-bit digest of the prompt and salt, and the answer's length."""
    digest = hashlib.sha256(np.asarray([pair.salt, *pair.prompt], np.int64).tobytes()).digest()
    return int.from_bytes(digest[:4], "big") >> 1, len(pair.answer)


def draw_masks(pair: Pair, special: SpecialTokens, settings: LikelihoodConfig) -> tuple[np.ndarray, np.ndarray]:
    """The masks of a pair's answer, `(masked_MA, weight_M)`, draws in the order of l (or t)."""
    digest, A = _mask_key(pair)
    masked_MA, weight_M = _masks_of(settings.draws, _bucket(A), settings.estimator, special.mask, digest, A)
    return np.asarray(masked_MA)[:, :A], np.asarray(weight_M, np.float64)


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
    corruption = diffusion.corrupt(x0_MA, u_M, jax.vmap(draw)(jnp.arange(M)), maskable_MA, mask_id, estimator)
    return corruption.masked_BL, corruption.weight_B


def _stderr(draws_M: np.ndarray) -> float:
    """Standard error of the mean of draws stratified over l: from the differences between neighbouring strata.

    The spread of all draws would count the trend over l, which stratification has removed.
    """
    M = len(draws_M)
    return float(math.sqrt(np.sum(np.diff(draws_M) ** 2) / (2 * (M - 1)) / M)) if M > 1 else math.nan


class _Rows(NamedTuple):
    """Rows of one batch, on the host; rows that no request fills score nothing."""

    tokens_BL: np.ndarray
    masked_BL: np.ndarray
    scored_BL: np.ndarray
    open_BL: np.ndarray
    lengths_B: np.ndarray

    @classmethod
    def empty(cls, count: int, L: int) -> "_Rows":
        """Room for `count` rows, rounded up to a power of two (few shapes, few compilations) and to the mesh."""
        mesh = jax.sharding.get_abstract_mesh()
        B = 1 << (count - 1).bit_length()
        B = B if mesh.empty else mesh_lib.local_batch(B, mesh)
        flags = [np.zeros((B, L), bool) for _ in range(3)]
        return cls(np.zeros((B, L), np.int32), *flags, np.full(B, L, np.int32))

    def put(self, b: int, pair: Pair, masked_A: np.ndarray, scored_A: np.ndarray) -> None:
        """Fill row b."""
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.answer)
        self.tokens_BL[b, :start], self.tokens_BL[b, start:end] = pair.prompt, pair.answer
        self.masked_BL[b, start:end], self.scored_BL[b, start:end] = masked_A, scored_A
        self.open_BL[b, start:end], self.lengths_B[b] = True, end

    def placed(self) -> tuple:
        """The arrays as arguments; lengths are None where no row is shorter than the batch."""
        full = bool((self.lengths_B == self.tokens_BL.shape[1]).all())
        return (*self[:4], None if full else self.lengths_B)


def _batches(lengths: np.ndarray, settings: LikelihoodConfig):
    """Pairs (indices, L): rows of similar length together, at most `batch_tokens` tokens, L few different numbers."""
    # On CPU larger batches only fall out of the caches.
    batch_tokens = settings.batch_tokens or (4096 if mesh_lib.platform() == "cpu" else 16_384)
    order = np.argsort(lengths, kind="stable")
    padded = np.array([_bucket(length) for length in lengths])
    for L in np.unique(padded):
        here = order[padded[order] == L]
        size = max(1, batch_tokens // int(L))
        size = 1 << (size.bit_length() - 1)
        for start in range(0, len(here), size):
            yield here[start : start + size], int(L)


def head_rows(platform: str) -> int:
    """Rows per block of the vocabulary head. The last block is part padding: on CPU that is time lost."""
    return 64 if platform == "cpu" else 512


def _bucket(length: int) -> int:
    """The length rounded up to one of eight per octave: at most an eighth of a row is padding."""
    step = max(8, 1 << max(0, int(length).bit_length() - 4))
    return -(-int(length) // step) * step


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def row_nats(config, special, scale, params, tokens_BL, masked_BL, scored_BL, open_BL, lengths_B):
    """Sum over the scored positions of -log p(token | the row with its masks)."""
    tokens_BL, masked_BL, scored_BL, open_BL = (
        mesh_lib.constrain(x, "BL") for x in (tokens_BL, masked_BL, scored_BL, open_BL)
    )
    if config.causal:
        inputs_BL = autoregressive.shift_right(tokens_BL, special.start)
    else:
        inputs_BL = jnp.where(masked_BL, special.mask, tokens_BL)
    rows_BL = guidance.add_unconditional(inputs_BL, open_BL, special.mask, scale)
    hidden_BLD = transformer.hidden(config, params, rows_BL, guidance.duplicate(lengths_B, scale))
    head_VD = transformer.head(config, params)
    weights_BL = scored_BL.astype(jnp.float32)
    _, nats_BL = weighted_nats(
        guidance.combine(hidden_BLD, scale), head_VD, tokens_BL, weights_BL, head_rows(mesh_lib.platform())
    )
    return jnp.sum(nats_BL, axis=1)


def _confidence_ordered(config, params, pairs, special, settings, progress) -> list[LogLikelihood]:
    lengths = np.array([len(pair.prompt) + len(pair.answer) for pair in pairs])
    found: dict[int, LogLikelihood] = {}
    for index, L in _batches(lengths, settings):
        batch = _Rows.empty(len(index), L)
        for b, i in enumerate(index):
            whole = np.ones(len(pairs[i].answer), bool)
            batch.put(b, pairs[i], whole, whole)
        tokens_BL, masked_BL, _, _, lengths_B = batch.placed()
        run = functools.partial(_order_nats, config, special, settings.cfg_scale)
        nats_B = mesh_lib.on_host(run(params, tokens_BL, masked_BL, lengths_B))
        for b, i in enumerate(index):
            A = len(pairs[i].answer)
            found[i] = LogLikelihood(float(-nats_B[b]), 0.0, A, settings.estimator, 0, A)
        if progress is not None:
            progress(len(found), len(pairs))
    return [found[i] for i in range(len(pairs))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _order_nats(config, special, scale, params, tokens_BL, open_BL, lengths_B):
    """The chain rule in the order of the model's confidence. The order never looks at a token not yet revealed, so this
    is the likelihood under a proper distribution over texts."""
    head_VD = transformer.head(config, params)
    forbidden_F = jnp.array([special.mask])
    inside_BL = is_valid(tokens_BL, lengths_B)

    def step(carry):
        masked_BL, nats_B = carry
        inputs_BL = jnp.where(masked_BL, special.mask, tokens_BL)
        rows_BL = guidance.add_unconditional(inputs_BL, open_BL, special.mask, scale)
        hidden_BLD = transformer.hidden(config, params, rows_BL, guidance.duplicate(lengths_B, scale))
        hidden_BLD = guidance.combine(hidden_BLD, scale)
        confidence_BL = choose(hidden_BLD, head_VD, masked_BL, forbidden_F, temperature=0).confidence_BK
        confidence_BL = equalize_if_blank(confidence_BL, inside_BL & ~masked_BL)
        best_B1 = jnp.argmax(jnp.where(masked_BL, confidence_BL, -jnp.inf), axis=1, keepdims=True)
        picked_BL = (jnp.arange(masked_BL.shape[1]) == best_B1) & masked_BL
        _, nats_BL = weighted_nats(
            hidden_BLD, head_VD, tokens_BL, picked_BL.astype(jnp.float32), head_rows(mesh_lib.platform())
        )
        return masked_BL & ~picked_BL, nats_B + jnp.sum(nats_BL, axis=1)

    start = (jnp.asarray(open_BL), jnp.zeros(len(tokens_BL)))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), step, start)[1]
