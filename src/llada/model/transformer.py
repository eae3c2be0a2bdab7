"""One Transformer for both families: bidirectional (the mask predictor) or causal (the ARM).

RMSNorm, SwiGLU, rotary embedding, no bias; t is not an input (LLaDA section 2.1, Table 5). The model ends at the
normalised hidden states; the vocabulary matrix is handed out beside them, so that an objective can turn hidden states
into nats without ever holding all logits. Everything outside this folder sees a nested dict and the functions below.
A block is three plain functions, `project`, `rotated` and `block_end`, around `attend`: `Block` composes them for whole
sequences, `cached.py` for decoding.
Shapes: B sequences, L tokens, D width, H query heads, K key/value heads, C channels, F feed-forward, V vocabulary,
N = B L rows, E = H C. Of dropout's random keys: J the embedding and the layers, W words of one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llada import fsdp
from llada.config import ModelConfig
from llada.mesh import constrain
from llada.model import layers, projections
from llada.model.attention import Allowed, attend, save_residuals

Parameters = dict[str, Any]
Heads = tuple[jax.Array, jax.Array, jax.Array]  # queries BLHC, keys BLKC, values BLKC

_ATTENTION, _FFN, _EMBEDDING = range(3)  # what dropout draws for

_INPUT = "layer_input"
_POLICIES = {
    # An attention kernel is no product to XLA, and would run again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, save_residuals
    ),
    "attention": save_residuals,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        angles: layers.Angles,
        lengths_B: jax.Array | None,
        segments_BL: jax.Array | None,
        dropout_BL: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        """Map the residual stream to itself; the second value, which `nn.scan` would stack, is None."""
        c = self.config
        weights = {name: self.param(name, *declared) for name, declared in _block_parameters(c).items()}
        if c.remat == "offload":
            x_BLD = checkpoint_name(x_BLD, _INPUT)
        mixed_BLHC = _attention(c, weights, x_BLD, angles, lengths_B, segments_BL)
        x_ND = block_end(c, weights, x_BLD, mixed_BLHC, constrain, dropout_BL)
        return constrain(x_ND.reshape(x_BLD.shape), "BLD"), None


def _block_parameters(c: ModelConfig) -> dict[str, tuple[nn.initializers.Initializer, tuple[int, ...]]]:
    """Initialiser and shape of each; their order decides which random numbers each gets."""
    D, H, K, C, F = c.width, c.heads, c.key_value_heads, c.head_size, c.ffn
    normal = nn.initializers.normal(c.init_std)
    # The residual stream sums 2 N branch outputs; scaling them keeps its variance independent of depth.
    branch_end = nn.initializers.normal(c.init_std / math.sqrt(2 * c.layers))
    ones = nn.initializers.ones_init()
    head_norms = {"query_norm": (ones, (C,)), "key_norm": (ones, (C,))}
    return {
        "attention_norm": (ones, (D,)),
        "query": (normal, (D, H, C)),
        "key": (normal, (D, K, C)),
        "value": (normal, (D, K, C)),
        **(head_norms if c.qk_norm else {}),
        "output": (branch_end, (H, C, D)),
        "ffn_norm": (ones, (D,)),
        "gate": (normal, (D, F)),
        "up": (normal, (D, F)),
        "down": (branch_end, (F, D)),
    }


@jax.named_scope("attention")
def _attention(
    c: ModelConfig,
    weights: Parameters,
    x_BLD: jax.Array,
    angles: layers.Angles,
    lengths_B: jax.Array | None,
    segments_BL: jax.Array | None,
) -> jax.Array:
    """`mixed_BLHC`: the values that each query mixes, of whole sequences."""
    heads = rotated(c, weights, project(c, weights, x_BLD), angles, angles)
    return attend(*heads, Allowed(c.causal, lengths_B, None, segments_BL, segments_BL))


def project(c: ModelConfig, weights: Parameters, x_BLD: jax.Array) -> Heads:
    """Queries, keys and values of every head."""
    y_BLD = layers.rms_norm(x_BLD, weights["attention_norm"], c.norm_eps)
    q_BLHC, k_BLKC, v_BLKC = (
        projections.to_heads(y_BLD, weights[name].astype(x_BLD.dtype)) for name in ("query", "key", "value")
    )
    return q_BLHC, k_BLKC, v_BLKC


def rotated(
    c: ModelConfig, weights: Parameters, heads: Heads, query_angles: layers.Angles, key_angles: layers.Angles
) -> Heads:
    """Queries and keys normalised, where the model does that, and rotated; values as they are."""
    q_BLHC, k_BLKC, v_BLKC = heads
    if c.qk_norm:
        q_BLHC = layers.rms_norm(q_BLHC, weights["query_norm"], c.norm_eps)
        k_BLKC = layers.rms_norm(k_BLKC, weights["key_norm"], c.norm_eps)
    q_BLHC = layers.rotate(constrain(q_BLHC, "BLHC"), query_angles)
    k_BLKC = layers.rotate(constrain(k_BLKC, "BLHC"), key_angles)
    return q_BLHC, k_BLKC, constrain(v_BLKC, "BLHC")


def block_end(
    c: ModelConfig,
    weights: Parameters,
    x: jax.Array,
    mixed: jax.Array,
    pin: Callable[[jax.Array, str], jax.Array] = lambda x, name: x,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """`x_ND`, the row-wise second half of a block: output projection of the `mixed` values of all heads, then SwiGLU.

    `x` is BLD with `mixed` BLHC, or ND with NHC. `weights` are the block's own, those of the products in any dtype;
    `pin` is `mesh.constrain`, or nothing where rows are those of one device. With `dropout`, a random key for
    each row (BL or N), both branches drop out.
    """
    dtype = x.dtype
    with jax.named_scope("attention"):
        branch = projections.from_heads(mixed, weights["output"].astype(dtype))
        x_ND = pin((x + layers.dropout(branch, dropout, _ATTENTION, c.dropout)).reshape(-1, c.width), "ND")
    with jax.named_scope("ffn"):
        y_ND = layers.rms_norm(x_ND, weights["ffn_norm"], c.norm_eps)
        gate_NF = pin(y_ND @ weights["gate"].astype(dtype), "NF")
        up_NF = pin(y_ND @ weights["up"].astype(dtype), "NF")
        branch_ND = layers.swiglu(gate_NF, up_NF) @ weights["down"].astype(dtype)
        return x_ND + layers.dropout(branch_ND, dropout, _FFN, c.dropout)


class Transformer(nn.Module):
    """Tokens to the residual stream behind the first `blocks` layers; declares all parameters."""

    config: ModelConfig
    blocks: int

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        lengths_B: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        dropout_JBL: jax.Array | None = None,
    ) -> tuple[jax.Array, layers.Angles]:
        """`x_BLD` in the compute dtype, and the rotary angles of its positions.

        `dropout_JBL`: random keys of the rows, with which the embedding and the blocks drop out.
        """
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        embedding_VD = self.param("embedding", normal, (c.vocab_size, c.width))
        if not c.tie_embeddings:
            self.param("head", normal, (c.vocab_size, c.width))
        x_BLD = embed(c, embedding_VD, tokens_BL)
        if dropout_JBL is not None:
            x_BLD, dropout_JBL = layers.dropout(x_BLD, dropout_JBL[0], _EMBEDDING, c.dropout), dropout_JBL[1:]
        angles = layers.rotary_angles(tokens_BL.shape[1], c.head_size, c.rope_theta)
        if self.blocks:
            x_BLD, _ = self._scanned()(x_BLD, angles, lengths_B, segments_BL, dropout_JBL)
        self.param("final_norm", nn.initializers.ones_init(), (c.width,))
        return x_BLD, angles

    def _scanned(self):
        """The blocks as one that runs `blocks` times: compile time does not grow with their number."""
        c = self.config
        # A layer's shards are gathered inside what remat recomputes: no gathered layer is saved.
        gather = functools.partial(fsdp.all_gather_params, dtype=jnp.dtype(c.dtype))
        block = Block if self.is_initializing() else nn.map_variables(Block, "params", trans_in_fn=gather)
        if c.remat != "none":
            block = nn.remat(block, policy=_POLICIES[c.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=self.blocks,
            unroll=min(layers_unrolled(c), self.blocks),
        )
        return stack(c, name="layers")


def layers_unrolled(c: ModelConfig) -> int:
    """How many layers one iteration of the scan holds."""
    return projections.layers_unrolled(c.layers) if c.scan_unroll is None else c.scan_unroll


@jax.named_scope("embedding")
def embed(c: ModelConfig, embedding_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """`x_BLD` in the compute dtype."""
    # Gathering the bf16 table once is cheaper than letting the partitioner reshard a lookup on a split table.
    table_VD = constrain(embedding_VD.astype(jnp.dtype(c.dtype)), "VD_gathered")
    return constrain(layers.look_up(table_VD, tokens_BL), "BLD")


def init(config: ModelConfig, key: jax.Array) -> Parameters:
    """Fresh float32 parameters: a nested dict, per-layer leaves stacked on axis 0."""
    return Transformer(config, config.layers).init(key, jnp.zeros((1, 8), jnp.int32))["params"]


def hidden(
    config: ModelConfig,
    params: Parameters,
    tokens_BL: jax.Array,
    lengths_B: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """Normalised last hidden states `hidden_BLD`; positions >= lengths_B are neither seen nor meaningful.

    With `segments_BL` (int32 >= 0) positions see those of their own segment.
    """
    x_BLD, _ = Transformer(config, config.layers).apply({"params": params}, tokens_BL, lengths_B, segments_BL)
    return layers.rms_norm(x_BLD, params["final_norm"], config.norm_eps)


def up_to_last_attention(
    config: ModelConfig,
    params: Parameters,
    tokens_BL: jax.Array,
    lengths_B: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    embedding_VD: jax.Array | None = None,
    dropout_B: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], Callable, Parameters]:
    """`(rows, finish, weights)`: `hidden` up to its last row-wise part, which only rows with a target need.

      embedding > layer 1 > ... > layer n: attention | output projection > SwiGLU > final norm
      '-- every position: `rows`, here ------------' '-- `finish(weights, rows)`, any flat rows -'

    `rows` are `(x_BLD, mixed_BLE, words_BLW)`; `finish` of them flat, `(x_ND, mixed_NE, words_NW)`, is `hidden_ND`. Of
    a masked batch half the rows have a target. `embedding_VD`: what `table` returned for these parameters, to gather it
    once. `dropout_B`: a random key for each sequence, to drop out with; `words_BLW` are then those of the last layer's
    rows, uint32, else None.
    """
    dtype = jnp.dtype(config.dtype)
    outside = {name: leaf for name, leaf in params.items() if name != "layers"}
    last = jax.tree.map(lambda leaf: leaf[-1], params["layers"])
    outside, last = fsdp.all_gather_params((outside, last), dtype)
    if embedding_VD is not None:
        outside["embedding"] = fsdp.reuse_gathered(outside["embedding"], embedding_VD)
    before = outside | {"layers": jax.tree.map(lambda leaf: leaf[:-1], params["layers"])}
    dropout_JBL = words_BLW = generator = None
    if dropout_B is not None:
        dropout_JBL = layers.row_keys(dropout_B, 1 + config.layers, tokens_BL.shape[1])
        words_BLW, generator = jax.random.key_data(dropout_JBL[-1]), jax.random.key_impl(dropout_B)
        dropout_JBL = dropout_JBL[:-1]
    before_last = Transformer(config, config.layers - 1)
    stream: Any = before_last.apply({"params": before}, tokens_BL, lengths_B, segments_BL, dropout_JBL)
    x_BLD, angles = stream
    mixed_BLHC = _attention(config, last, x_BLD, angles, lengths_B, segments_BL)
    weights = {name: last[name].astype(dtype) for name in ("output", "gate", "up", "down")}
    norms = {"ffn_norm": last["ffn_norm"], "final_norm": params["final_norm"]}
    rows = x_BLD, mixed_BLHC.reshape(*x_BLD.shape[:2], -1), words_BLW
    return rows, functools.partial(_finish, config, generator), weights | norms


def _finish(config, generator, weights, rows):
    x_ND, mixed_NE, words_NW = rows
    dropout_N = None if words_NW is None else jax.random.wrap_key_data(words_NW, impl=generator)
    mixed_NHC = mixed_NE.reshape(-1, config.heads, config.head_size)
    x_ND = block_end(config, weights, x_ND, mixed_NHC, dropout=dropout_N)
    return layers.rms_norm(x_ND, weights["final_norm"], config.norm_eps)


def table(config: ModelConfig, params: Parameters, name: str = "embedding") -> jax.Array:
    """`embedding_VD` or `head_VD`: float32, or all-gathered in the compute dtype from its shards."""
    return fsdp.all_gather_params({name: params[name]}, jnp.dtype(config.dtype))[name]


def head(config: ModelConfig, params: Parameters) -> jax.Array:
    """The vocabulary matrix `head_VD`, the embedding where they are tied; see `table`."""
    return table(config, params, "embedding" if config.tie_embeddings else "head")


def logits(
    config: ModelConfig, params: Parameters, tokens_BL: jax.Array, lengths_B: jax.Array | None = None
) -> jax.Array:
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
