"""The ARM baseline: exact next-token nats, with the signature of the diffusion objective.

Every token of a row is predicted, the first from the end-of-text token alone (an imported model's own first token where
it has one), so that the ARM and the bound measure the same thing: nats of a whole row of L tokens.
"""

import jax
import jax.numpy as jnp

from llada.config import ObjectiveConfig
from llada.objectives import noise as noise_lib
from llada.objectives.contract import (
    ANSWER,
    Examples,
    LossTerms,
    Predictor,
    SpecialTokens,
    answer_weights,
    is_valid,
    token_count,
)
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


def with_masked_inputs(
    predict: Predictor, noise: noise_lib.Noise, special: SpecialTokens, config: ObjectiveConfig
) -> Predictor:
    """`predict` of inputs of which the mask token has replaced a share `input_masking` (arXiv 2510.04071).

    The start token stays, and so do the targets. ValueError without a mask token.
    """
    if config.input_masking == 0:
        return predict

    def predict_masked(inputs_BL, lengths_B):
        uniform_BL = noise_lib.uniform(noise, noise_lib.INPUT_MASK, inputs_BL.shape[1:])
        masked_BL = (uniform_BL < config.input_masking) & (inputs_BL != special.start)
        return predict(jnp.where(masked_BL, special.mask_id, inputs_BL), lengths_B)

    return predict_masked


def held_out_nats(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    row_B: jax.Array,
    special: SpecialTokens,
    draws: int,
    estimator: str,
    head_rows: int | None,
    counted_BL: jax.Array | None = None,
) -> jax.Array:
    """`nats_MB` with M = 1: the exact nats of each row, or of its counted tokens given those before them.

    `row_B`, `draws` and `estimator` matter to bounds only.
    """
    if counted_BL is None:
        _, nats_BL = row_nats(predict, head_VD, x0_BL, None, special, head_rows)
    else:
        hidden = predict(shift_right(x0_BL, special.start), None)
        _, nats_BL = weighted_nats(hidden, head_VD, x0_BL, counted_BL.astype(jnp.float32), head_rows)
    return jnp.sum(nats_BL, axis=1)[None]


def loss(
    predict: Predictor,
    head_VD: jax.Array,
    x0_BL: jax.Array,
    noise: noise_lib.Noise,
    special: SpecialTokens,
    config: ObjectiveConfig,
) -> LossTerms:
    """Next-token negative log-likelihood: LLaDA Eq. (1), the maximum likelihood that the bound replaces.

    With `input_masking` it is that of tokens behind a text with gaps, which is a regulariser and no likelihood.
    """
    predict = with_masked_inputs(predict, noise, special, config)
    lengths_B = noise_lib.lengths(noise, x0_BL.shape[1], config.random_length_fraction)
    nats, _ = row_nats(predict, head_VD, x0_BL, lengths_B, special, config.head_rows)
    tokens = token_count(x0_BL, lengths_B)
    return LossTerms(nats, tokens, nats, tokens)


def counted(batch: Examples) -> jax.Array:
    """Bool (B, L): tokens in the loss: answers, the token that ends them included, but no padding behind it."""
    return batch.role_BL == ANSWER


def answer_loss(
    predict: Predictor,
    head_VD: jax.Array,
    batch: Examples,
    noise: noise_lib.Noise,
    special: SpecialTokens,
    config: ObjectiveConfig,
) -> LossTerms:
    """Next-token loss of the answers alone: LLaDA Eq. (5)'s counterpart, on the same rows; its inputs as in `loss`."""
    predict = with_masked_inputs(predict, noise, special, config)
    weight_BL, count = answer_weights(batch, counted(batch), config.normalization)
    # The first token of every example follows `start`, not the example before it in the row.
    example_BL = batch.example_BL
    first_BL = example_BL != shift_right(example_BL, -1)
    inputs_BL = jnp.where(first_BL, special.start, shift_right(batch.tokens_BL, special.start))
    nats, nats_BL = weighted_nats(predict(inputs_BL, None), head_VD, batch.tokens_BL, weight_BL, config.head_rows)
    return LossTerms(nats, count, jnp.sum(nats_BL), jnp.sum(weight_BL > 0, dtype=jnp.float32))
