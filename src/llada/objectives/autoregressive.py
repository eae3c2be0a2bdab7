"""The ARM baseline: exact next-token nats, with the signature of the diffusion objective.

Every token of a row is predicted, the first from the end-of-text token alone (an imported model's own first token where
it has one), so that the ARM and the bound measure the same thing: nats of a whole row of L tokens.
"""

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig
from llada.objectives import noise as noise_lib
from llada.objectives.contract import LossTerms, Predictor, SpecialTokens, is_valid, token_count
from llada.objectives.vocabulary_head import weighted_nats


def shift_right(x0_BL: jax.Array, start: int) -> jax.Array:
    """Inputs whose position i sees tokens before i: the row moved right by one, begun with `start`."""
    return jnp.pad(x0_BL[:, :-1], ((0, 0), (1, 0)), constant_values=start)


def row_nats(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    lengths_B: jax.Array | None,
    special: SpecialTokens,
    head_rows: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(x_i | x_<i) over the valid tokens, and `nats_BL`. Gradients flow through the first value only."""
    hidden = predict(shift_right(x0_BL, special.start), lengths_B)
    weights_BL = is_valid(x0_BL, lengths_B).astype(jnp.float32)
    return weighted_nats(hidden, head_VD, x0_BL, weights_BL, head_rows)


def held_out_nats(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    row_B: jax.Array,
    special: SpecialTokens,
    draws: int,
    estimator: str,
    head_rows: int | None,
) -> jax.Array:
    """`nats_MB` with M = 1: the exact nats of each row. `row_B`, `draws` and `estimator` matter to bounds only."""
    _, nats_BL = row_nats(predict, head_VD, x0_BL, None, special, head_rows)
    return jnp.sum(nats_BL, axis=1)[None]


def loss(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    noise: noise_lib.Noise,
    special: SpecialTokens,
    config: ObjectiveConfig,
) -> LossTerms:
    """Next-token negative log-likelihood: LLaDA Eq. (1), the maximum likelihood that the bound replaces."""
    lengths_B = noise_lib.lengths(noise, x0_BL.shape[1], config.random_length_fraction)
    nats, _ = row_nats(predict, head_VD, x0_BL, lengths_B, special, config.head_rows)
    tokens = token_count(x0_BL, lengths_B)
    return LossTerms(nats, tokens, nats, tokens)
