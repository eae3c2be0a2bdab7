"""One Transformer for both families: bidirectional (the mask predictor) or causal (the ARM).

RMSNorm, SwiGLU, rotary embedding, no bias; t is not an input (LLaDA section 2.1, Table 5). The model ends at the
normalised hidden states; the vocabulary matrix is handed out beside them, so that an objective can turn hidden states
into nats without ever holding all logits. Everything outside this file sees a nested dict and the functions below.
Shapes: B sequences, L tokens, Q of them computed anew, R of those whose last state is wanted, D width, H query heads,
K key/value heads, C channels, F feed-forward, V vocabulary, N = B Q rows.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llada import fsdp
from llada.config import ModelConfig
from llada.mesh import constrain, platform
from llada.model import attention, layers

Parameters = dict

_JOINED = "query_key_value"
_INPUT = "layer_input"
_POLICIES = {
    # An attention kernel is no product to XLA, and would run again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, attention.save_residuals
    ),
    "attention": attention.save_residuals,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Cache(NamedTuple):
    """Keys (rotated) and values of every position, `(B, L, K, C)` in the compute dtype, the layers on axis 0 before it;
    of unstacked parameters a tuple of these, one a layer."""

    key: jax.Array
    value: jax.Array


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    config: ModelConfig
    return_cache: bool = False
    until_rows: bool = False  # stop before `block_end`, with its arguments
    joined: bool = False  # one matrix for queries, keys and values: see `unstacked`

    @nn.compact
    def __call__(self, x_BLD, cache, angles, lengths_B, position_BQ, segments_BL=None, at_BR=None):
        """Map the residual stream to itself; the second value is what `nn.scan` stacks: this layer's cache, if kept.

        With a `cache`, `x` holds only the positions `position_BQ`, whose keys and values replace the cached ones. With
        `at_BR` only those places of `x` go on behind the keys and values: `(B, R, D)`.
        """
        c = self.config
        D, H, K, C, F = c.width, c.heads, c.key_value_heads, c.head_size, c.ffn
        dtype = jnp.dtype(c.dtype)
        normal = nn.initializers.normal(c.init_std)
        # The residual stream sums 2 N branch outputs; scaling them keeps its variance independent of depth.
        branch_end = nn.initializers.normal(c.init_std / math.sqrt(2 * c.layers))
        ones = nn.initializers.ones_init()

        if c.remat == "offload":
            x_BLD = checkpoint_name(x_BLD, _INPUT)
        y = layers.rms_norm(x_BLD, self.param("attention_norm", ones, (D,)), c.norm_eps)
        if self.joined:
            joined = layers.to_heads(y, self.param(_JOINED, normal, (D, H + 2 * K, C)).astype(dtype))
            q_BLHC, k_BLKC, v_BLKC = jnp.split(joined, (H, H + K), axis=2)
        else:
            q_BLHC = layers.to_heads(y, self.param("query", normal, (D, H, C)).astype(dtype))
            k_BLKC = layers.to_heads(y, self.param("key", normal, (D, K, C)).astype(dtype))
            v_BLKC = layers.to_heads(y, self.param("value", normal, (D, K, C)).astype(dtype))
        query_angles, query_position_BQ = angles, position_BQ
        if at_BR is not None:
            x_BLD, query_angles = layers.take(x_BLD, at_BR), layers.angles_at(angles, at_BR)
            q_BLHC = layers.take(q_BLHC, at_BR)
            query_position_BQ = at_BR if position_BQ is None else layers.take(position_BQ, at_BR)
        if c.qk_norm:
            q_BLHC = layers.rms_norm(q_BLHC, self.param("query_norm", ones, (C,)), c.norm_eps)
            k_BLKC = layers.rms_norm(k_BLKC, self.param("key_norm", ones, (C,)), c.norm_eps)
        q_BLHC = layers.rotate(constrain(q_BLHC, "BLHC"), query_angles)
        k_BLKC = layers.rotate(constrain(k_BLKC, "BLHC"), angles)
        v_BLKC = constrain(v_BLKC, "BLHC")
        if cache is not None:
            at = (jnp.arange(len(k_BLKC))[:, None], position_BQ)
            k_BLKC = cache.key.at[at].set(k_BLKC, mode="drop")
            v_BLKC = cache.value.at[at].set(v_BLKC, mode="drop")
        mixed_BLHC = attention.attend(q_BLHC, k_BLKC, v_BLKC, c.causal, lengths_B, query_position_BQ, segments_BL)
        weights = {
            "output": self.param("output", branch_end, (H, C, D)),
            "ffn_norm": self.param("ffn_norm", ones, (D,)),
            "gate": self.param("gate", normal, (D, F)),
            "up": self.param("up", normal, (D, F)),
            "down": self.param("down", branch_end, (F, D)),
        }
        if self.until_rows:
            return (x_BLD, mixed_BLHC.reshape(*x_BLD.shape[:2], H * C)), None
        x_ND = block_end(c, weights, x_BLD, mixed_BLHC, constrain)
        x_BLD = constrain(x_ND.reshape(x_BLD.shape), "BLD")
        return x_BLD, Cache(k_BLKC, v_BLKC) if self.return_cache else None


def block_end(c: ModelConfig, weights: Parameters, x: jax.Array, mixed: jax.Array, pin=lambda x, name: x):
    """What a block does row by row, `x_ND`: output projection of the `mixed` values of all heads, then SwiGLU.

    `x` is BLD with `mixed` BLHC, or ND with NHC. `weights` are the block's own, those of the products in any dtype;
    `pin` places a named activation on the mesh.
    """
    dtype = x.dtype
    x_ND = pin((x + layers.from_heads(mixed, weights["output"].astype(dtype))).reshape(-1, c.width), "ND")
    y_ND = layers.rms_norm(x_ND, weights["ffn_norm"], c.norm_eps)
    gate_NF = pin(y_ND @ weights["gate"].astype(dtype), "NF")
    up_NF = pin(y_ND @ weights["up"].astype(dtype), "NF")
    return x_ND + layers.swiglu(gate_NF, up_NF) @ weights["down"].astype(dtype)


class Transformer(nn.Module):
    """Tokens to normalised hidden states."""

    config: ModelConfig
    return_cache: bool = False
    unstacked: bool = False
    until_rows: bool = False  # stop before the last block's `block_end`, with its arguments

    @nn.compact
    def __call__(self, tokens_BL, lengths_B=None, position_BQ=None, cache=None, at_BR=None, segments_BL=None):
        """Hidden states `hidden_BLD` in the compute dtype, and the cache if kept; the head is declared, not used."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        normal = nn.initializers.normal(c.init_std)
        embedding_VD = self.param("embedding", normal, (c.vocab_size, c.width))
        if not c.tie_embeddings:
            self.param("head", normal, (c.vocab_size, c.width))
        # Gathering the bf16 table once is cheaper than letting the partitioner reshard a lookup on a split table.
        table_VD = constrain(embedding_VD.astype(dtype), "VD_gathered")
        x_BLD = constrain(layers.look_up(table_VD, tokens_BL), "BLD")
        position = tokens_BL.shape[1] if position_BQ is None else position_BQ
        angles = layers.rotary_angles(position, c.head_size, c.rope_theta)
        if self.unstacked:
            kept = []
            for i in range(c.layers):
                at = at_BR if i + 1 == c.layers else None
                block = Block(c, self.return_cache, joined=True, name=f"layer_{i}")
                x_BLD, own = block(x_BLD, cache and cache[i], angles, lengths_B, position_BQ, segments_BL, at)
                kept.append(own)
            cache = tuple(kept)
        elif self.until_rows:
            if c.layers > 1:
                x_BLD, _ = self.scanned(c.layers - 1)(x_BLD, None, angles, lengths_B, position_BQ, segments_BL)
            return Block(c, until_rows=True, name="last")(x_BLD, None, angles, lengths_B, position_BQ, segments_BL)
        else:
            x_BLD, cache = self.scanned(c.layers)(x_BLD, cache, angles, lengths_B, position_BQ, segments_BL)
            x_BLD = x_BLD if at_BR is None else layers.take(x_BLD, at_BR)
        scale_D = self.param("final_norm", nn.initializers.ones_init(), (c.width,))
        return layers.rms_norm(x_BLD, scale_D, c.norm_eps), cache

    def scanned(self, count: int):
        """`count` blocks as one: compile time does not grow with their number."""
        c = self.config
        # Parts of a layer's parameters are put together inside what is done again: no layer stays whole.
        gather = functools.partial(fsdp.all_gather_params, dtype=jnp.dtype(c.dtype))
        block = Block if self.is_initializing() else nn.map_variables(Block, "params", trans_in_fn=gather)
        if c.remat != "none":
            block = nn.remat(block, policy=_POLICIES[c.remat], prevent_cse=False)
        # Turns of one layer copy weights and activations on CPU and GPU; on TPU they cost nothing, and compile quickly.
        unroll = {"cpu": 4, "gpu": c.layers}.get(platform(), 1) if c.scan_unroll is None else c.scan_unroll
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 4),
            length=count,
            unroll=min(unroll, count),
        )
        return stack(c, self.return_cache, name="layers")


def init(config: ModelConfig, key: jax.Array) -> Parameters:
    """Fresh float32 parameters: a nested dict, per-layer leaves stacked on axis 0."""
    return Transformer(config).init(key, jnp.zeros((1, 8), jnp.int32))["params"]


def unstacked(params: Parameters) -> Parameters:
    """The same parameters with a leaf per layer, for inference on CPU: copied once, not at every use of a layer.

    There a product with a slice of a stacked leaf first copies the slice, and one product for queries, keys and values
    is faster than three. Compile time grows with the number of layers, and memory holds the layers twice.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    joined = ("query", "key", "value")
    for i in range(len(params["layers"]["attention_norm"])):
        layer = {name: leaf[i] for name, leaf in params["layers"].items()}
        together = jnp.concatenate([layer[name] for name in joined], axis=1)
        rest[f"layer_{i}"] = {name: leaf for name, leaf in layer.items() if name not in joined} | {_JOINED: together}
    return rest


def hidden(
    config: ModelConfig,
    params: Parameters,
    tokens_BL: jax.Array,
    lengths_B: jax.Array | None = None,
    at_BR: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
):
    """Normalised last hidden states `hidden_BLD`; positions >= lengths_B are neither seen nor meaningful.

    With `at_BR` the states of those positions only, `(B, R, D)`: the last layer then leaves the others out.
    With `segments_BL` (int32 >= 0) positions see those of their own segment.
    """
    return _apply(config, params, False, tokens_BL, lengths_B, at_BR=at_BR, segments_BL=segments_BL)[0]


def unfinished(
    config: ModelConfig,
    params: Parameters,
    tokens_BL: jax.Array,
    lengths_B: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    embedding_VD: jax.Array | None = None,
):
    """`(rows, finish, weights)`: `finish(weights, rows)` of any flat rows is what `hidden` has for them.

    What is left to do is the last block's row-wise part and the final norm, for those rows an objective needs.
    `embedding_VD`: what `table` made of these parameters, if it is at hand.
    """
    dtype = jnp.dtype(config.dtype)
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    rest = fsdp.all_gather_params(rest | {"last": jax.tree.map(lambda leaf: leaf[-1], params["layers"])}, dtype)
    if embedding_VD is not None:
        rest["embedding"] = fsdp.reuse_gathered(rest["embedding"], embedding_VD)
    before, last = rest | {"layers": jax.tree.map(lambda leaf: leaf[:-1], params["layers"])}, rest["last"]
    rows, _ = Transformer(config, until_rows=True).apply(
        {"params": before}, tokens_BL, lengths_B, segments_BL=segments_BL
    )
    weights = {name: last[name].astype(dtype) for name in ("output", "gate", "up", "down")}
    norms = {"ffn_norm": last["ffn_norm"], "final_norm": params["final_norm"]}
    return rows, functools.partial(_finish, config), weights | norms


def _finish(config, weights, rows):
    x_ND, mixed_NE = rows
    mixed_NHC = mixed_NE.reshape(-1, config.heads, config.head_size)
    return layers.rms_norm(block_end(config, weights, x_ND, mixed_NHC), weights["final_norm"], config.norm_eps)


def prefill(
    config: ModelConfig,
    params: Parameters,
    tokens_BL: jax.Array,
    lengths_B: jax.Array | None = None,
    at_BR: jax.Array | None = None,
):
    """`hidden`, and the Cache of all positions beside it."""
    return _apply(config, params, True, tokens_BL, lengths_B, at_BR=at_BR)


def extend(
    config: ModelConfig,
    params: Parameters,
    tokens_BQ: jax.Array,
    position_BQ: jax.Array,
    cache: Cache | tuple[Cache, ...],
    lengths_B: jax.Array | None = None,
    return_cache: bool = False,
    at_BR: jax.Array | None = None,
):
    """Hidden states of the tokens at `position_BQ` only, and the renewed Cache if it is to be kept (else None).

    Keys and values of all other positions are the cached ones: exact for a causal model whose cached positions come
    before, an approximation for the mask predictor, whose every state depends on every token. Queries at positions
    >= L are padding: nothing sees them. With `at_BR` the states of those places among the Q only.
    """
    return _apply(config, params, return_cache, tokens_BQ, lengths_B, position_BQ, cache, at_BR)


def _apply(config, params, return_cache, *inputs, **more):
    module = Transformer(config, return_cache=return_cache, unstacked="layers" not in params)
    return module.apply({"params": params}, *inputs, **more)


def table(config: ModelConfig, params: Parameters, name: str = "embedding") -> jax.Array:
    """`embedding_VD` or `head_VD`: float32, or `fsdp.all_gather_params` from its parts."""
    return fsdp.all_gather_params({name: params[name]}, jnp.dtype(config.dtype))[name]


def head(config: ModelConfig, params: Parameters) -> jax.Array:
    """The vocabulary matrix `head_VD`, the embedding where they are tied; see `table`."""
    return table(config, params, "embedding" if config.tie_embeddings else "head")


def logits(config: ModelConfig, params: Parameters, tokens_BL: jax.Array, lengths_B: jax.Array | None = None):
    """All logits `logits_BLV`, float32: for inference on a canvas, never for training."""
    hidden_BLD = hidden(config, params, tokens_BL, lengths_B)
    return unembed(hidden_BLD, head(config, params))


def unembed(hidden_BLD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """`logits_BLV` in float32 from hidden states in the compute dtype."""
    return jnp.einsum("bld,vd->blv", hidden_BLD, head_VD.astype(hidden_BLD.dtype), preferred_element_type=jnp.float32)


@functools.cache
def abstract_parameters(config: ModelConfig) -> Parameters:
    """Shapes and dtypes of `init(config, key)`, with nothing allocated."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0, impl="threefry2x32"))
