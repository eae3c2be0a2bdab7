"""Classifier-free guidance without labels, LLaDA Eq. (16), for samplers and likelihoods alike.

The unconditional branch sees the context masked. Both branches run as one batch of 2B rows, and because logits are
linear in the hidden state the branches are mixed before the vocabulary matrix: guidance costs one unembedding, not two.
A `scale` of 0 is no guidance, and nothing is added to the program.
"""

import jax
import jax.numpy as jnp


def branches(tokens_BL: jax.Array, open_BL: jax.Array, mask_id: int, scale: float) -> jax.Array:
    """The rows to run: `tokens`, and behind them the same with every position that is not open masked."""
    if not scale:
        return tokens_BL
    return jnp.concatenate([tokens_BL, jnp.where(open_BL, tokens_BL, mask_id)])


def both(x: jax.Array | None, scale: float) -> jax.Array | None:
    """An array with a row per sequence, repeated for the second branch."""
    return x if x is None or not scale else jnp.concatenate([x, x])


def mixed(hidden_BLD: jax.Array, scale: float) -> jax.Array:
    """(1 + w) h(conditional) - w h(unconditional): LLaDA Eq. (16), p(r|p)^(1+w) / p(r|m)^w, before the vocabulary."""
    if not scale:
        return hidden_BLD
    conditional, unconditional = jnp.split(hidden_BLD.astype(jnp.float32), 2)
    return ((1 + scale) * conditional - scale * unconditional).astype(hidden_BLD.dtype)
