"""The Transformer against a plain numpy reading of it, and the properties each of its switches promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada.config import ModelConfig
from llada.model import cached, layers, projections, transformer
from llada.objectives.contract import Unfinished
from llada.objectives.vocabulary_head import weighted_nats

L = 6
TINY = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=24, vocab_size=11, max_length=8, dtype="float32")
TOKENS = np.array([[3, 1, 4, 10, 5, 9], [2, 6, 0, 5, 3, 7]], np.int32)


def initialise(config):
    """Random parameters of the model's shapes; norm scales are drawn too, so that none can be forgotten."""
    rng = np.random.default_rng(0)

    def draw(path, a):
        return jnp.array(
            rng.uniform(0.5, 1.5, a.shape) if "norm" in path[-1].key else 0.3 * rng.normal(size=a.shape), a.dtype
        )

    return jax.tree_util.tree_map_with_path(draw, transformer.abstract_parameters(config))


@functools.cache
def hidden_of(config):
    return jax.jit(functools.partial(transformer.hidden, config))


def numpy_hidden(c: ModelConfig, params, tokens):
    """The forward pass in float64 loops over heads and positions: LLaDA section 2.1 in words, nothing shared."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_eps) * scale

    def rotated(vector, position):
        """Channels i and i + C/2 are one complex number, turned by position x theta^(-2i/C)."""
        half = len(vector) // 2
        turned = (vector[:half] + 1j * vector[half:]) * np.exp(
            1j * position * c.rope_theta ** (-2 * np.arange(half) / len(vector))
        )
        return np.concatenate([turned.real, turned.imag])

    group = c.heads // c.key_value_heads
    out = []
    for row in tokens:
        x = params["embedding"][row]
        for n in range(c.layers):
            p = {name: a[n] for name, a in params["layers"].items()}
            y = norm(x, p["attention_norm"])
            branch = np.zeros_like(x)
            for h in range(c.heads):
                q, k, v = y @ p["query"][:, h], y @ p["key"][:, h // group], y @ p["value"][:, h // group]
                if c.qk_norm:
                    q, k = norm(q, p["query_norm"]), norm(k, p["key_norm"])
                q, k = (np.stack([rotated(a[i], i) for i in range(len(a))]) for a in (q, k))
                for i in range(len(row)):
                    seen = i + 1 if c.causal else len(row)
                    weight = np.exp(k[:seen] @ q[i] / np.sqrt(c.head_size))
                    branch[i] += weight / weight.sum() @ v[:seen] @ p["output"][h]
            x = x + branch
            y = norm(x, p["ffn_norm"])
            gate = y @ p["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ p["up"])) @ p["down"]
        out.append(norm(x, params["final_norm"]))
    return np.stack(out)


@pytest.mark.fast
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_forward_pass_equals_a_numpy_reimplementation(causal, qk_norm):
    """Two layers of grouped-query attention, hidden states and logits, to 1e-5."""
    config = dataclasses.replace(TINY, causal=causal, qk_norm=qk_norm)
    params = initialise(config)
    wanted = numpy_hidden(config, params, TOKENS)
    np.testing.assert_allclose(hidden_of(config)(params, TOKENS), wanted, atol=1e-5)
    np.testing.assert_allclose(
        transformer.unembed(jnp.float32(wanted), transformer.head(config, params)),
        wanted @ np.asarray(params["head"], np.float64).T,
        atol=1e-5,
    )


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_which_inputs_reach_which_outputs(causal):
    """Jacobian of every output with respect to every input embedding: all non-zero, or exactly the lower triangle.

    With lengths, no position before the length sees one at or beyond it.
    """
    config = dataclasses.replace(TINY, causal=causal)
    params = initialise(config)
    tokens = jnp.array([[3, 1, 4, 10, 5, 9]])  # all different: row v of the embedding is the input of one position

    @jax.jit
    def influence(lengths):
        def outputs(embedding_VD):
            hidden = transformer.hidden(config, {**params, "embedding": embedding_VD}, tokens, lengths)[0]
            return hidden @ jnp.linspace(1, 2, config.width)

        return jnp.linalg.norm(jax.jacrev(outputs)(params["embedding"]), axis=-1)[:, tokens[0]]

    reached = np.asarray(influence(jnp.array([L])))
    allowed = np.tril(np.ones((L, L), bool)) if causal else np.ones((L, L), bool)
    assert np.all(reached[allowed] > 1e-4)
    assert np.all(reached[~allowed] == 0)
    for length in (1, 4):
        cut = np.asarray(influence(jnp.array([length])))
        assert np.all(cut[:length, :length][allowed[:length, :length]] > 1e-4)
        assert np.all(cut[:length, length:] == 0)


def test_positions_before_a_length_are_those_of_the_shorter_sequence():
    """Each row of a batch has its own length; what lies beyond changes nothing, bit for bit, and is not even needed."""
    params, lengths = initialise(TINY), np.array([4, 6])
    changed = TOKENS.copy()
    changed[0, 4:] = 8
    hidden = hidden_of(TINY)(params, TOKENS, lengths)
    np.testing.assert_array_equal(hidden[0, :4], hidden_of(TINY)(params, changed, lengths)[0, :4])
    np.testing.assert_allclose(hidden[0, :4], numpy_hidden(TINY, params, TOKENS[:1, :4])[0], atol=1e-5)
    np.testing.assert_allclose(hidden[1], hidden_of(TINY)(params, TOKENS)[1], atol=1e-6)


def test_grouped_queries_equal_full_attention_with_repeated_keys_and_values():
    """Query head h of H uses key/value head h // (H / K)."""
    params = initialise(TINY)
    full = dataclasses.replace(TINY, kv_heads=None)
    group = TINY.heads // TINY.kv_heads
    repeated = {name: jnp.repeat(params["layers"][name], group, axis=2) for name in ("key", "value")}
    got = hidden_of(full)({**params, "layers": {**params["layers"], **repeated}}, TOKENS)
    np.testing.assert_allclose(got, hidden_of(TINY)(params, TOKENS), atol=1e-5)


def test_rotary_scores_depend_on_relative_position_only():
    """The same query and key at every pair of 40 positions: scores are constant along diagonals, and differ across."""
    length, C = 40, 8
    rng = np.random.default_rng(0)
    angles = layers.rotary_angles(jnp.arange(length), C, 10_000.0)
    q, k = (jnp.array(np.tile(rng.normal(size=C), (1, length, 1, 1)), jnp.float32) for _ in range(2))
    scores = np.asarray(layers.rotate(q, angles)[0, :, 0] @ layers.rotate(k, angles)[0, :, 0].T)
    for shift in range(1 - length, length):
        diagonal = np.diagonal(scores, shift)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.std(scores[0]) > 0.1
    np.testing.assert_array_equal(layers.rotate(q, angles)[:, 0], q[:, 0])  # position 0 is not turned


def test_rms_norm_adds_eps_to_the_mean_square_in_float32():
    """Inputs as small as eps, where it decides the result; bfloat16 in, bfloat16 out, float32 between."""
    rng = np.random.default_rng(0)
    x, scale, eps = rng.normal(size=(2, 3, 64)) * 1e-3, rng.normal(size=64), 1e-5
    wanted = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(layers.rms_norm(jnp.float32(x), jnp.float32(scale), eps), wanted, rtol=1e-5, atol=1e-7)
    half = jnp.bfloat16(x)
    exact = layers.rms_norm(half.astype(jnp.float32), jnp.float32(scale), eps)
    assert layers.rms_norm(half, jnp.float32(scale), eps).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layers.rms_norm(half, jnp.float32(scale), eps), exact.astype(jnp.bfloat16))


def test_a_tied_head_is_the_embedding_and_receives_both_gradients():
    """One matrix less; the gradient of the shared one is the sum of what the untied two would get."""
    params = initialise(TINY)
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert set(transformer.abstract_parameters(tied)) == set(params) - {"head"}

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(config, params):
        return jax.grad(lambda p: jnp.sum(jnp.sin(transformer.logits(config, p, TOKENS))))(params)

    shared = {name: a for name, a in params.items() if name != "head"}
    assert transformer.head(tied, shared) is shared["embedding"]
    both = gradient(TINY, {**params, "head": params["embedding"]})
    np.testing.assert_allclose(gradient(tied, shared)["embedding"], both["embedding"] + both["head"], atol=1e-4)


def test_rematerialisation_and_unrolling_change_no_gradient():
    """remat none, dots, attention, full, offload and scan_unroll are ways to execute one function."""
    params = initialise(TINY)

    def gradient(**switches):
        config = dataclasses.replace(TINY, **switches)
        loss = lambda p: jnp.sum(jnp.sin(transformer.hidden(config, p, TOKENS)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    plain = gradient()
    for switches in (
        {"remat": "dots", "scan_unroll": 1},
        {"remat": "attention"},
        {"remat": "full"},
        {"remat": "offload"},
    ):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-5), gradient(**switches), plain)


def test_what_a_tpu_gets_is_the_same_function(monkeypatch):
    """Heads before positions from the product on, rotation by a product: only the order of memory differs."""
    params = initialise(TINY)
    loss = lambda p: jnp.sum(jnp.sin(transformer.hidden(TINY, p, TOKENS)))  # noqa: E731
    here = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(projections, "platform", lambda: "tpu")
    there = jax.jit(lambda p: jax.value_and_grad(loss)(p))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), there, here)


def test_bfloat16_is_the_dtype_of_products_only():
    """Parameters and their gradients stay float32; hidden states are bfloat16 and close to the float32 ones."""
    config = dataclasses.replace(TINY, dtype="bfloat16", qk_norm=True)
    params = initialise(config)

    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_hidden(params):
        hidden = transformer.hidden(config, params, TOKENS)
        return jnp.sum(hidden.astype(jnp.float32)), hidden

    gradient, hidden = jax.jit(gradient_and_hidden)(params)
    assert {a.dtype for a in jax.tree.leaves((params, gradient))} == {jnp.dtype("float32")}
    assert hidden.dtype == jnp.bfloat16
    logits = transformer.unembed(hidden, params["head"])
    assert logits.dtype == jnp.float32
    wanted = numpy_hidden(config, params, TOKENS)
    assert np.linalg.norm(np.asarray(hidden, np.float64) - wanted) < 0.02 * np.linalg.norm(wanted)


def test_the_gradient_of_a_token_that_is_half_of_all_does_not_stand_still_in_bfloat16():
    """A masked diffusion model's mask token: 4,096 gradients for one row, whose running sum in bfloat16 would stop."""
    gradient = jax.grad(lambda table: jnp.sum(layers.look_up(table, jnp.zeros(4096, jnp.int32))))
    # Read, not run: with the flags of conftest.py XLA adds bfloat16 in float32 whatever it is told.
    assert "f32[2,3] = scatter-add" in str(jax.make_jaxpr(gradient)(jnp.zeros((2, 3), jnp.bfloat16)))
    config = dataclasses.replace(TINY, dtype="bfloat16", max_length=512)
    params = initialise(config)
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((16, 512)) < 0.5, TINY.vocab_size - 1, rng.integers(0, TINY.vocab_size - 1, (16, 512)))

    def row(dtype):
        c = dataclasses.replace(config, dtype=dtype)
        loss = lambda p: jnp.sum(transformer.hidden(c, p, tokens).astype(jnp.float32)[..., 0])  # noqa: E731
        return np.asarray(jax.jit(jax.grad(loss))(params)["embedding"])[-1]

    exact = row("float32")
    assert np.linalg.norm(row("bfloat16") - exact) < 0.02 * np.linalg.norm(exact)


def test_initial_parameters_have_the_configured_spread_and_every_layer_its_own():
    """Normal with init_std, branch ends divided by sqrt(2 layers), norms one; `abstract_parameters` tells shapes."""
    config = ModelConfig(layers=3, width=64, heads=4, ffn=96, vocab_size=50, qk_norm=True, init_std=0.05)
    params = jax.jit(functools.partial(transformer.init, config))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if "norm" in name:
            assert np.all(leaf == 1)
            continue
        wanted = 0.05 / (np.sqrt(6) if name in ("output", "down") else 1)
        assert abs(np.std(leaf) / wanted - 1) < 4 / np.sqrt(2 * leaf.size), name
        assert len(np.unique(leaf)) > 0.9 * leaf.size, name  # no layer repeats another
    described = jax.tree.map(lambda a: (a.shape, a.dtype), transformer.abstract_parameters(config))
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype), params)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": True}, {"layers": 1}], ids=str)
def test_finishing_needed_rows_only_gives_the_same_loss_and_gradients(changes):
    """The last block's row-wise half in the vocabulary loop, for rows with a weight, against all of them before it."""
    config = dataclasses.replace(TINY, **changes)
    params = initialise(config)
    weights = (jnp.arange(TOKENS.size).reshape(TOKENS.shape) % 3 == 0) * 1.5

    def loss(params, predict):
        return weighted_nats(predict(params), transformer.head(config, params), jnp.asarray(TOKENS), weights, 4)[0]

    def unfinished(params):
        return Unfinished(*transformer.up_to_last_attention(config, params, TOKENS))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    wanted = gradient(params, lambda params: transformer.hidden(config, params, TOKENS))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, gradient(params, unfinished), wanted)


def test_unstacked_parameters_and_wanted_positions_give_the_same_states():
    config = dataclasses.replace(TINY, qk_norm=True)
    params = initialise(config)
    at_BR = jnp.array([[3, 0], [1, 1]])[: len(TOKENS)]
    wanted, cache = cached.prefill(config, params, TOKENS)
    some, caches = cached.prefill(config, cached.unstacked(params), TOKENS, None, at_BR)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(some, jnp.take_along_axis(wanted, at_BR[..., None], axis=1))
    close(cached.hidden(config, params, TOKENS, None, at_BR), some)
    close(transformer.hidden(config, params, TOKENS), wanted)
    for i, layer in enumerate(caches):
        jax.tree.map(close, layer, jax.tree.map(lambda leaf, i=i: leaf[i], cache))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rotating_by_a_product_is_the_same(dtype):
    """Values to the last bits, and the gradient that turning back gives."""
    q = jax.random.normal(jax.random.key(0), (2, 5, 3, 16)).astype(dtype)
    positions = jnp.array([[0, 3, 4, 7, 2000], [1, 2, 3, 5, 8]])
    angles = layers.rotary_angles(positions, 16, 500_000.0)
    cos, sin = (table[:, None] for table in angles)
    weights = jax.random.normal(jax.random.key(1), q.shape).astype(dtype)

    def by_product(q):
        return projections.rotate_by_product(q.swapaxes(1, 2), cos, sin).swapaxes(1, 2)

    rtol = 1e-6 if dtype == "float32" else 1e-2
    plain = functools.partial(layers.rotate, angles=angles)
    for way in (lambda f: f(q), lambda f: jax.vjp(f, q)[1](weights)[0]):
        np.testing.assert_allclose(*(np.asarray(way(f), np.float32) for f in (by_product, plain)), rtol=rtol, atol=rtol)
