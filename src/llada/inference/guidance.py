"""Classifier-free guidance without labels, LLaDA Eq. (16), for samplers and likelihoods alike.

The unconditional branch sees the context masked. Both branches run as one batch of 2B rows, and because logits are
linear in the hidden state the branches are combined before the vocabulary matrix: guidance costs one unembedding, not
two. With `scale` 0 there is no guidance, and nothing is added to the program.
"""

import jax
import jax.numpy as jnp


def add_unconditional(tokens_BL: jax.Array, open_BL: jax.Array, mask_id: int, scale: float) -> jax.Array:
    """The rows to run: `tokens_BL`, then the same rows with every position masked that is not open."""
    if not scale:
        return tokens_BL
    return jnp.concatenate([tokens_BL, jnp.where(open_BL, tokens_BL, mask_id)])


def duplicate(x: jax.Array | None, scale: float) -> jax.Array | None:
    """An array with an entry per row, repeated for the unconditional rows."""
    return x if x is None or not scale else jnp.concatenate([x, x])


def combine(hidden_BLD: jax.Array, scale: float) -> jax.Array:
    """(1 + w) h(conditional) - w h(unconditional): LLaDA Eq. (16), p(r|p)^(1+w) / p(r|m)^w, before the vocabulary."""
    if not scale:
        return hidden_BLD
    conditional, unconditional = jnp.split(hidden_BLD.astype(jnp.float32), 2)
    return ((1 + scale) * conditional - scale * unconditional).astype(hidden_BLD.dtype)
