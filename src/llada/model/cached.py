"""Decoding: forward passes that keep keys and values, and the parameter layout that repeated passes read fastest.

Inference only; nothing that `llada train` imports reaches this file. Both layouts of parameters are taken: stacked, as
`transformer.init` makes them, and unstacked, as `for_decoding` does on CPU.
Shapes: B sequences, L tokens, Q of them computed in this pass, R of those whose last state is wanted, D width, H query
heads, K key/value heads, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada.config import ModelConfig
from llada.mesh import constrain
from llada.model import layers, projections, transformer
from llada.model.attention import Allowed, attend
from llada.model.transformer import Heads, Parameters

_JOINED = "query_key_value"
_SEPARATE = ("query", "key", "value")


class Cache(NamedTuple):
    """Keys (rotated) and values of every position, `(B, L, K, C)` in the compute dtype.

    Of stacked parameters with a leading axis of layers; of unstacked ones there is a tuple of caches, one a layer.
    """

    key: jax.Array
    value: jax.Array


Caches = Cache | tuple[Cache, ...]


def for_decoding(params: Parameters) -> Parameters:
    """The parameters in the layout that many passes of one compiled loop read fastest on this platform."""
    return unstacked(params) if projections.decodes_unstacked() else params


def unstacked(params: Parameters) -> Parameters:
    """The same parameters with a leaf per layer, for inference on CPU: copied once, not at every use of a layer.

    There a product with a slice of a stacked leaf first copies the slice, and one product for queries, keys and values
    is faster than three. Compile time grows with the number of layers, and memory holds the layers twice.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    for i in range(len(params["layers"]["attention_norm"])):
        layer = {name: leaf[i] for name, leaf in params["layers"].items()}
        joined_DJC = jnp.concatenate([layer[name] for name in _SEPARATE], axis=1)  # J = H + 2 K heads
        rest[f"layer_{i}"] = {n: leaf for n, leaf in layer.items() if n not in _SEPARATE} | {_JOINED: joined_DJC}
    return rest


def with_whole_tables(config: ModelConfig, params: Parameters) -> Parameters:
    """Within a program: parameters whose vocabulary matrices lie whole on every device, in the compute dtype.

    A loop of passes takes these, else each pass would gather both from their shards.
    """
    tables = {name: params[name].astype(jnp.dtype(config.dtype)) for name in ("embedding", "head") if name in params}
    return params | {name: constrain(table_VD, "VD_gathered") for name, table_VD in tables.items()}


def hidden(
    config: ModelConfig,
    params: Parameters,
    tokens_BL: jax.Array,
    lengths_B: jax.Array | None = None,
    at_BR: jax.Array | None = None,
) -> jax.Array:
    """Normalised last hidden states `hidden_BLD`; positions >= lengths_B are neither seen nor meaningful.

    With `at_BR` the states of those positions only, `(B, R, D)`: the last layer then leaves the others out where
    parameters are unstacked.
    """
    return prefill(config, params, tokens_BL, lengths_B, at_BR)[0]


def prefill(
    config: ModelConfig,
    params: Parameters,
    tokens_BL: jax.Array,
    lengths_B: jax.Array | None = None,
    at_BR: jax.Array | None = None,
) -> tuple[jax.Array, Caches]:
    """`hidden`, and the Cache of all positions beside it."""
    return _pass(config, params, tokens_BL, None, None, lengths_B, at_BR)


def extend(
    config: ModelConfig,
    params: Parameters,
    tokens_BQ: jax.Array,
    position_BQ: jax.Array,
    cache: Caches,
    lengths_B: jax.Array | None = None,
    at_BR: jax.Array | None = None,
) -> tuple[jax.Array, Caches]:
    """Hidden states of the tokens at `position_BQ` only, and the Cache with their keys and values in it.

    Keys and values of all other positions are the cached ones: exact for a causal model whose cached positions come
    before, an approximation for the mask predictor, whose every state depends on every token. Queries at positions
    >= L are padding: nothing sees them. With `at_BR` the states of those entries among the Q only.
    """
    return _pass(config, params, tokens_BQ, position_BQ, cache, lengths_B, at_BR)


def _pass(
    c: ModelConfig,
    params: Parameters,
    tokens_BQ: jax.Array,
    position_BQ: jax.Array | None,
    cache: Caches | None,
    lengths_B: jax.Array | None,
    at_BR: jax.Array | None,
) -> tuple[jax.Array, Caches]:
    """`hidden_BQD` or `hidden_BRD`, and the caches of all layers."""
    x_BQD = transformer.embed(c, params["embedding"], tokens_BQ)
    position = tokens_BQ.shape[1] if position_BQ is None else position_BQ
    angles = layers.rotary_angles(position, c.head_size, c.rope_theta)

    def block(x_BQD, layer, at_BR=None):
        weights, cache = layer
        return _block(c, weights, x_BQD, angles, cache, position_BQ, lengths_B, at_BR)

    if "layers" in params:
        stacked = params["layers"], cache
        x_BQD, caches = jax.lax.scan(block, x_BQD, stacked, unroll=min(transformer.layers_unrolled(c), c.layers))
        x_BQD = x_BQD if at_BR is None else layers.take(x_BQD, at_BR)
    else:
        renewed = []
        for i in range(c.layers):
            layer = params[f"layer_{i}"], cache and cache[i]
            x_BQD, layer_cache = block(x_BQD, layer, at_BR if i + 1 == c.layers else None)
            renewed.append(layer_cache)
        caches = tuple(renewed)
    return layers.rms_norm(x_BQD, params["final_norm"], c.norm_eps), caches


def _block(
    c: ModelConfig,
    weights: Parameters,
    x_BQD: jax.Array,
    angles: layers.Angles,
    cache: Cache | None,
    position_BQ: jax.Array | None,
    lengths_B: jax.Array | None,
    at_BR: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """A block of `transformer` for the Q positions of this pass, or R of them; keys and values of all L."""
    q_BQHC, k_BQKC, v_BQKC = (_project_joined if _JOINED in weights else transformer.project)(c, weights, x_BQD)
    query_angles, query_position_BQ = angles, position_BQ
    if at_BR is not None:
        x_BQD, q_BQHC = layers.take(x_BQD, at_BR), layers.take(q_BQHC, at_BR)
        query_angles = layers.angles_at(angles, at_BR)
        query_position_BQ = at_BR if position_BQ is None else layers.take(position_BQ, at_BR)
    q_BQHC, k_BLKC, v_BLKC = transformer.rotated(c, weights, (q_BQHC, k_BQKC, v_BQKC), query_angles, angles)
    if cache is not None:
        at = (jnp.arange(len(k_BLKC))[:, None], position_BQ)
        k_BLKC = cache.key.at[at].set(k_BLKC, mode="drop")
        v_BLKC = cache.value.at[at].set(v_BLKC, mode="drop")
    mixed_BQHC = attend(q_BQHC, k_BLKC, v_BLKC, Allowed(c.causal, lengths_B, query_position_BQ))
    x_ND = transformer.block_end(c, weights, x_BQD, mixed_BQHC, constrain)
    return constrain(x_ND.reshape(x_BQD.shape), "BLD"), Cache(k_BLKC, v_BLKC)


def _project_joined(c: ModelConfig, weights: Parameters, x_BQD: jax.Array) -> Heads:
    """`transformer.project` in one product."""
    y_BQD = layers.rms_norm(x_BQD, weights["attention_norm"], c.norm_eps)
    joined_BQJC = projections.to_heads(y_BQD, weights[_JOINED].astype(x_BQD.dtype))
    q_BQHC, k_BQKC, v_BQKC = jnp.split(joined_BQJC, (c.heads, c.heads + c.key_value_heads), axis=2)
    return q_BQHC, k_BQKC, v_BQKC
