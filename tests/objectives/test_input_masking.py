"""The ARM's masked inputs: which tokens are replaced, and that nothing else changes."""

import dataclasses
import functools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada.config import ModelConfig, ObjectiveConfig
from llada.errors import UserError
from llada.model import transformer
from llada.objectives import autoregressive
from llada.objectives.contract import ANSWER, Examples, SpecialTokens
from llada.objectives.noise import Noise, root_key
from llada.training import corpus

V, B, L, SHARE = 50, 64, 24, 0.2
MODEL = ModelConfig(layers=1, width=8, heads=2, ffn=16, vocab_size=V, max_length=L, dtype="float32", causal=True)
SPECIAL = SpecialTokens(mask=3, eos=1)
MASKED = ObjectiveConfig(name="autoregressive", input_masking=SHARE, random_length_fraction=0.0, head_rows=16)
PLAIN = dataclasses.replace(MASKED, input_masking=0.0)
ROWS = np.random.default_rng(0).integers(4, V, (B, L)).astype(np.int32)
ROLE = np.tile([0, 0, 1, 1, 0, 1, 1, 1, 1, 2, 2, 2], (B, 2)).astype(np.int32)
EXAMPLE = np.tile(np.repeat([1, 2, 3, 4], [4, 8, 4, 8]), (B, 1)).astype(np.int32)
EXAMPLES = Examples(jnp.asarray(ROWS), jnp.asarray(EXAMPLE), jnp.asarray(ROLE))


@pytest.fixture(scope="module")
def params():
    return transformer.init(dataclasses.replace(MODEL, init_std=0.5), root_key(0))


def seen(params, objective, batch, config, step=0, sequence_B=None):
    """(inputs that the network met, the terms) of a loss."""
    met = []

    def predict(inputs_BL, lengths_B):
        assert lengths_B is None
        met.append(inputs_BL)
        return transformer.hidden(MODEL, params, inputs_BL)

    sequence_B = jnp.arange(B) if sequence_B is None else sequence_B
    noise = Noise(5, step, sequence_B, B)
    terms = objective(predict, transformer.head(MODEL, params), batch, noise, SPECIAL, config)
    return np.asarray(met[0]), terms


@pytest.mark.parametrize("objective", [autoregressive.loss, autoregressive.answer_loss])
def test_a_share_of_the_inputs_is_masked_and_the_loss_is_the_nll_of_the_same_targets_behind_them(params, objective):
    pre_training = objective is autoregressive.loss
    batch = jnp.asarray(ROWS) if pre_training else EXAMPLES
    inputs, terms = seen(params, objective, batch, MASKED)
    clean, plain = seen(params, objective, batch, PLAIN)
    start, changed = clean == SPECIAL.eos, inputs != clean
    assert start.sum() == (B if pre_training else 4 * B)
    assert np.all(inputs[changed] == SPECIAL.mask) and not np.any(changed & start)
    share = changed.sum() / (~start).sum()
    assert abs(share - SHARE) < 4.5 * np.sqrt(SHARE * (1 - SHARE) / (~start).sum())
    logits = transformer.logits(MODEL, params, inputs)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(ROWS))
    lengths = dict(zip((1, 2, 3, 4), (2, 4, 2, 4), strict=True))  # answers of the four examples, without padding
    weights = np.ones((B, L)) if pre_training else (ROLE == ANSWER) / np.vectorize(lengths.get)(EXAMPLE)
    np.testing.assert_allclose(terms.nats, np.sum(weights * nats), rtol=1e-5)
    assert terms.token_count == plain.token_count and terms.head_count == plain.head_count
    assert abs(terms.nats - plain.nats) > 1e-3 * plain.nats


def test_masks_belong_to_step_and_sequence(params):
    """A part of a batch meets the masks that it has in all of it; the next step others."""
    inputs, _ = seen(params, autoregressive.loss, jnp.asarray(ROWS), MASKED)
    part = jnp.array([9, 2, 40])
    np.testing.assert_array_equal(
        seen(params, autoregressive.loss, jnp.asarray(ROWS)[part], MASKED, sequence_B=part)[0], inputs[part]
    )
    later, _ = seen(params, autoregressive.loss, jnp.asarray(ROWS), MASKED, step=1)
    assert np.mean((later == SPECIAL.mask) & (inputs == SPECIAL.mask)) < 2 * SHARE**2


def test_held_out_figures_are_of_whole_texts(params):
    predict = functools.partial(transformer.hidden, MODEL, params)
    nats_MB = autoregressive.held_out_nats(
        lambda tokens, lengths: predict(tokens),
        params["head"],
        jnp.asarray(ROWS),
        jnp.arange(B),
        SPECIAL,
        1,
        "exact",
        16,
    )
    _, plain = seen(params, autoregressive.loss, jnp.asarray(ROWS), PLAIN)
    np.testing.assert_allclose(jnp.sum(nats_MB), plain.nats, rtol=1e-5)


def test_a_tokenizer_without_a_mask_token_is_refused(tiny):
    config = tiny("arm", {"objective.input_masking": SHARE})
    tokenizer = SimpleNamespace(vocab_size=config.model.vocab_size, mask_id=None)
    with pytest.raises(UserError, match="--config.objective.input_masking=0.2: the tokenizer has no mask token"):
        corpus.fitted(tokenizer, config)
    assert corpus.fitted(tokenizer, tiny("arm")) is tokenizer
