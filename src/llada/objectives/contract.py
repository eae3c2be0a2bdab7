"""What every objective takes and returns, so that the training step need not know which family it trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig


class Unfinished(NamedTuple):
    """What hidden states are computed from, row by row, so that an objective computes them for the rows it needs only.

    rows     tree of arrays (B, L, ...)
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


class LossTerms(NamedTuple):
    """Sums, divided once by the global `token_count` after all microbatches and devices.

    nats         float32, the objective summed over tokens
    token_count  float32, tokens the sum stands for (B x L less what was cut)
    head_nats    float32, unweighted nats of the rows that met the vocabulary matrix
    head_count   float32, how many rows those were
    """

    nats: jax.Array
    token_count: jax.Array
    head_nats: jax.Array
    head_count: jax.Array

    @classmethod
    def zero(cls) -> "LossTerms":
        """Where a sum over microbatches starts."""
        return cls(*(jnp.float32(0) for _ in cls._fields))


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


def token_count(x0_BL: jax.Array, lengths_B: jax.Array | None) -> jax.Array:
    """Tokens that count, as float32 (exact below 2^24 a microbatch)."""
    return jnp.float32(x0_BL.size) if lengths_B is None else jnp.sum(lengths_B, dtype=jnp.float32)
