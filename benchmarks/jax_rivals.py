"""How other JAX projects compute the same weighted nats, each written after its algorithm, on plain arrays.

  md4_one_hot      github.com/google-deepmind/md4: log-softmax of all rows times one-hot targets; automatic gradients
  vocab_blocks     Levanter's fused loss: a running logsumexp over blocks of the vocabulary, logits recomputed in the
                   backward pass
  token_tiles      MaxText's vocabulary tiling, which tiles tokens: a scan over tiles with one-hot targets, every tile's
                   forward pass recomputed in the backward pass

All take `(hidden_ND, head_VD, targets_N, weights_N)` and return the sum of weight x nats; all multiply every row with
the vocabulary matrix, those of weight zero too. Shapes: N rows, D width, V vocabulary, T tiles, R rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp


def md4_one_hot(hidden_ND, head_VD, targets_N, weights_N):
    """Logits, log-probabilities and one-hot targets of all rows at once."""
    log_p_NV = jax.nn.log_softmax(hidden_ND @ head_VD.T)
    one_hot_NV = jax.nn.one_hot(targets_N, len(head_VD))
    picked_NV = jnp.where(one_hot_NV != 0, one_hot_NV * log_p_NV, 0.0)
    return -jnp.sum(weights_N * jnp.sum(picked_NV, axis=-1))


def _block(hidden_ND, head_VD, targets_N, index, blocks):
    """One block of the vocabulary: `(its rows of the head, logits, one-hot targets)`."""
    size = len(head_VD) // blocks
    block_VD = jax.lax.dynamic_slice_in_dim(head_VD, index * size, size)
    return block_VD, hidden_ND @ block_VD.T, jax.nn.one_hot(targets_N - index * size, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def vocab_blocks(hidden_ND, head_VD, targets_N, weights_N, blocks=8):
    """Never more than one block of logits; `blocks` must divide V."""
    return _vocab_blocks_forward(hidden_ND, head_VD, targets_N, weights_N, blocks)[0]


def _vocab_blocks_forward(hidden_ND, head_VD, targets_N, weights_N, blocks):
    def step(index, carry):
        picked_N, log_z_N = carry
        _, logits_NV, one_hot_NV = _block(hidden_ND, head_VD, targets_N, index, blocks)
        return picked_N + jnp.sum(logits_NV * one_hot_NV, -1), jnp.logaddexp(log_z_N, jax.nn.logsumexp(logits_NV, -1))

    N = len(hidden_ND)
    picked_N, log_z_N = jax.lax.fori_loop(0, blocks, step, (jnp.zeros(N), jnp.full(N, -jnp.inf)))
    return jnp.sum(weights_N * (log_z_N - picked_N)), (hidden_ND, head_VD, targets_N, weights_N, log_z_N)


def _vocab_blocks_backward(blocks, saved, scale):
    hidden_ND, head_VD, targets_N, weights_N, log_z_N = saved

    def step(index, carry):
        d_hidden_ND, d_head_VD = carry
        block_VD, logits_NV, one_hot_NV = _block(hidden_ND, head_VD, targets_N, index, blocks)
        d_logits_NV = scale * weights_N[:, None] * (jnp.exp(logits_NV - log_z_N[:, None]) - one_hot_NV)
        d_block_VD = d_logits_NV.T @ hidden_ND
        d_head_VD = jax.lax.dynamic_update_slice_in_dim(d_head_VD, d_block_VD, index * len(block_VD), 0)
        return d_hidden_ND + d_logits_NV @ block_VD, d_head_VD

    zeros = (jnp.zeros_like(hidden_ND), jnp.zeros_like(head_VD))
    return *jax.lax.fori_loop(0, blocks, step, zeros), None, None


vocab_blocks.defvjp(_vocab_blocks_forward, _vocab_blocks_backward)


def _tile(hidden_RD, head_VD, targets_R, weights_R):
    logits_RV = hidden_RD @ head_VD.T
    one_hot_RV = jax.nn.one_hot(targets_R, len(head_VD))
    nats_R = jax.nn.logsumexp(logits_RV, axis=-1) - jnp.sum(logits_RV * one_hot_RV, axis=-1)
    return jnp.sum(weights_R * nats_R)


def _tiles(tiles, *arrays):
    return tuple(a.reshape(tiles, -1, *a.shape[1:]) for a in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_tiles(hidden_ND, head_VD, targets_N, weights_N, tiles=8):
    """Never more than one tile of logits; `tiles` must divide N."""
    return _token_tiles_forward(hidden_ND, head_VD, targets_N, weights_N, tiles)[0]


def _token_tiles_forward(hidden_ND, head_VD, targets_N, weights_N, tiles):
    def step(total, tile):
        hidden_RD, targets_R, weights_R = tile
        return total + _tile(hidden_RD, head_VD, targets_R, weights_R), None

    total, _ = jax.lax.scan(step, jnp.zeros(()), _tiles(tiles, hidden_ND, targets_N, weights_N))
    return total, (hidden_ND, head_VD, targets_N, weights_N)


def _token_tiles_backward(tiles, saved, scale):
    hidden_ND, head_VD, targets_N, weights_N = saved

    def step(d_head_VD, tile):
        hidden_RD, targets_R, weights_R = tile
        _, pull = jax.vjp(lambda x, head: _tile(x, head, targets_R, weights_R), hidden_RD, head_VD)
        d_hidden_RD, d_tile_VD = pull(scale)
        return d_head_VD + d_tile_VD, d_hidden_RD

    tiled = _tiles(tiles, hidden_ND, targets_N, weights_N)
    d_head_VD, d_hidden_TRD = jax.lax.scan(step, jnp.zeros_like(head_VD), tiled)
    return d_hidden_TRD.reshape(hidden_ND.shape), d_head_VD, None, None


token_tiles.defvjp(_token_tiles_forward, _token_tiles_backward)

ALL = {"md4": md4_one_hot, "levanter": vocab_blocks, "maxtext": token_tiles}
