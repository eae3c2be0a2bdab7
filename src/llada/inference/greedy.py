"""Whether an answer is the one that a model writes by itself when it always takes what is most likely.

Of an ARM: every token is the most likely one after those before it. A mask predictor has no such order of its own; of
it the answer is what the reverse process writes on exactly as many masks at temperature 0, one token a step where it is
most confident, all in one block. The first step that would write another token decides, so nothing is generated.
Shapes: as in `likelihood`; F forbidden ids, P pairs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llada import mesh as mesh_lib
from llada.config import ModelConfig
from llada.inference import likelihood
from llada.inference.choice import choose, equalize_if_blank
from llada.inference.compiled_loop import Array, by_row
from llada.inference.likelihood import LikelihoodConfig
from llada.inference.mask_plans import Pair, single_row
from llada.inference.row_batches import Row, Rows, values_of_rows
from llada.model import cached, transformer
from llada.objectives import autoregressive
from llada.objectives.contract import SpecialTokens, is_valid
from llada.objectives.vocabulary_head import scoring_tokens


def are_greedy(
    config: ModelConfig,
    params: transformer.Parameters,
    pairs: Sequence[Pair],
    special: SpecialTokens,
    forbidden_F: Array,
    settings: LikelihoodConfig,
) -> np.ndarray:
    """Bool, for each pair; `forbidden_F` are ids that are never written. Guidance is that of `settings`.

    Batches are full: `likelihood.log_likelihoods`.
    """
    rows = []
    for pair in pairs:
        likelihood.check_pair(config, pair, special)
        plan = single_row(len(pair.answer), masked=not config.causal)
        rows.append(Row(pair, plan.masked_RA[0], plan.scored_RA[0]))
    same = matches_left_to_right if config.causal else matches_by_confidence
    of_batch = functools.partial(same, config, special, settings.cfg_scale, params, np.asarray(forbidden_F))
    batch_tokens = settings.batch_tokens or scoring_tokens(True)
    return values_of_rows(lambda _, *batch: of_batch(*batch), rows, batch_tokens, full=True) > 0


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def matches_left_to_right(
    config: ModelConfig,
    special: SpecialTokens,
    scale: float,
    params: transformer.Parameters,
    forbidden_F: Array,
    tokens_BL: Array,
    rows: Rows,
) -> jax.Array:
    """Of an ARM: 1 where each scored token is the most likely one, else 0; one pass. It knows no `scale`."""
    inputs_BL = autoregressive.shift_right(mesh_lib.constrain(tokens_BL, "BL"), special.start)
    hidden_BLD = likelihood.guided_hidden(config, special, scale, params, inputs_BL, rows.open_BL, rows.lengths_B)
    choice = choose(hidden_BLD, transformer.head(config, params), rows.scored_BL, forbidden_F, temperature=0)
    return jnp.all((choice.token_BK == tokens_BL) | ~rows.scored_BL, axis=1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def matches_by_confidence(
    config: ModelConfig,
    special: SpecialTokens,
    scale: float,
    params: transformer.Parameters,
    forbidden_F: Array,
    tokens_BL: Array,
    rows: Rows,
) -> jax.Array:
    """Of a mask predictor: 1 where each step writes the answer's token, else 0; a pass a token until one differs."""
    params = cached.with_whole_tables(config, params)
    head_VD = transformer.head(config, params)
    tokens_BL, *of_rows = map(by_row, (tokens_BL, *rows))
    rows = Rows(*of_rows)
    inside_BL = is_valid(tokens_BL, rows.lengths_B)

    def step(carry):
        masked_BL, same_B = carry
        inputs_BL = jnp.where(masked_BL, special.mask_id, tokens_BL)
        hidden_BLD = likelihood.guided_hidden(config, special, scale, params, inputs_BL, rows.open_BL, rows.lengths_B)
        choice = choose(hidden_BLD, head_VD, masked_BL, forbidden_F, temperature=0)
        confidence_BL = equalize_if_blank(choice.confidence_BK, inside_BL & ~masked_BL)
        best_B1 = jnp.argmax(jnp.where(masked_BL, confidence_BL, -jnp.inf), axis=1, keepdims=True)
        written_BL = (jnp.arange(masked_BL.shape[1])[None, :] == best_B1) & masked_BL
        same_B &= ~jnp.any(written_BL & (choice.token_BK != tokens_BL), axis=1)
        return masked_BL & ~written_BL & same_B[:, None], same_B

    start = (jnp.asarray(rows.open_BL), jnp.ones(len(tokens_BL), bool))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), step, start)[1].astype(jnp.float32)
