"""What every objective takes and returns, so that the training step need not know which family it trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig


class Unfinished(NamedTuple):
    """What hidden states are computed from, row by row, so that an objective computes them for the rows it needs only.

    rows     tree of arrays (B, L, ...); no gradient flows to integers
    finish   (weights, rows with flat axes (R, ...)) -> hidden_RD
    weights  tree of arrays, the parameters of that work
    """

    rows: Any
    finish: Callable[[Any, Any], jax.Array]
    weights: Any


# (tokens_BL, lengths_B or None) -> hidden_BLD, finished or not
Predictor = Callable[[jax.Array, jax.Array | None], jax.Array | Unfinished]


class SpecialTokens(NamedTuple):
    """Ids that objectives and samplers need from the tokenizer, None where there is no such token.

    mask  replaces masked tokens in the diffusion objective; an ARM needs none
    eot   ends a turn of a dialogue
    bos   what texts of an imported ARM begin with; the models trained here begin with `eos`
    """

    mask: int | None
    eos: int
    eot: int | None = None
    bos: int | None = None

    @property
    def mask_id(self) -> int:
        """`mask`, where there has to be one."""
        if self.mask is None:
            raise ValueError("a diffusion objective needs a mask token, and this tokenizer has none")
        return self.mask

    @property
    def start(self) -> int:
        """What an ARM reads before the first token of a text."""
        return self.eos if self.bos is None else self.bos

    @property
    def ends(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        return (self.eos,) if self.eot is None else (self.eos, self.eot)


# What a token of an example is: given; masked and predicted; padding that is predicted like the answer it follows.
CONTEXT, ANSWER, PADDING = 0, 1, 2


class Examples(NamedTuple):
    """Rows of fine-tuning: examples, each a prompt and its answer, one or several to a row. All int32 (B, L).

    tokens_BL
    example_BL  the number of the token's example within its row, from 1; 0 where there is none. Attention stays within
                an example
    role_BL     CONTEXT, ANSWER or PADDING
    """

    tokens_BL: Any
    example_BL: Any
    role_BL: Any


TIME_BINS = 10  # equal parts of [0, 1) by which a fine-tuning loss is logged


class AnswerTerms(NamedTuple):
    """More sums of a fine-tuning loss, float32. T = TIME_BINS.

    padding_nats  the part of `LossTerms.nats` that padding is
    nats_T        unweighted nats of the answers' masked tokens, by their example's t
    count_T       how many those were
    """

    padding_nats: jax.Array
    nats_T: jax.Array
    count_T: jax.Array


class LossTerms(NamedTuple):
    """Sums, divided once by the global `token_count` after all microbatches and devices.

    nats         float32, the objective summed over tokens
    token_count  float32, tokens the sum stands for (B x L less what was cut); in fine-tuning with one weight for each
                 example, the number of examples
    head_nats    float32, unweighted nats of the rows that met the vocabulary matrix
    head_count   float32, how many rows those were
    answers      in fine-tuning of a mask predictor
    """

    nats: jax.Array
    token_count: jax.Array
    head_nats: jax.Array
    head_count: jax.Array
    answers: AnswerTerms | None = None

    @classmethod
    def zero(cls, answers: bool = False) -> "LossTerms":
        """Where a sum over microbatches starts."""
        scalar, of_bins = jnp.float32(0), jnp.zeros(TIME_BINS)
        return cls(scalar, scalar, scalar, scalar, AnswerTerms(scalar, of_bins, of_bins) if answers else None)


def is_valid(x0_BL: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """Boolean (B, L): positions before a sequence's length; all of them where nothing was cut."""
    if lengths_B is None:
        return jnp.ones(x0_BL.shape, bool)
    return jnp.arange(x0_BL.shape[1])[None, :] < lengths_B[:, None]


def segments(x0_BL: jax.Array, special: SpecialTokens, config: ObjectiveConfig) -> jax.Array | None:
    """Int32 (B, L): which document of its row a token belongs to, its end-of-text token being its last.

    None where attention may cross them. An ARM's input at i is the token before i, so its segments are these too: a
    document then begins with that `eos`.
    """
    if not config.block_cross_document_attention:
        return None
    ends_BL = (x0_BL == special.eos).astype(jnp.int32)
    return jnp.cumsum(ends_BL, axis=1) - ends_BL


def answer_weights(batch: Examples, counted_BL: jax.Array, normalization: str) -> tuple[jax.Array, jax.Array]:
    """`(weight_BL, count)`: what each counted token weighs, and what the sum over the batch is to be divided by.

    "sequence": 1/L' with L' the counted tokens of its example, and the number of examples; "token": 1, and their number
    over all examples.
    """
    counted_BL = counted_BL.astype(jnp.float32)
    if normalization == "token":
        return counted_BL, jnp.sum(counted_BL)
    L = counted_BL.shape[1]
    per_example_BE = jax.vmap(lambda example_L, counted_L: jnp.zeros(L + 1).at[example_L].add(counted_L))(
        batch.example_BL, counted_BL
    )
    length_BL = jnp.take_along_axis(per_example_BE, batch.example_BL, axis=1)
    return counted_BL / jnp.maximum(length_BL, 1), jnp.sum(jnp.max(batch.example_BL, axis=1), dtype=jnp.float32)


def token_count(x0_BL: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """Tokens that count, as float32 (exact below 2^24 a microbatch)."""
    return jnp.float32(x0_BL.size) if lengths_B is None else jnp.sum(lengths_B, dtype=jnp.float32)
