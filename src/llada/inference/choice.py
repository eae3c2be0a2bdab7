"""From hidden states to a token and its confidence, for the rows that need one.

Only needed rows meet the vocabulary matrix, a block at a time; confidence is a logit minus a logsumexp, so no softmax
over the vocabulary is ever stored. Logits are (V, R): on CPU a product with the matrix on the left is faster.
Shapes: B sequences, K candidate positions of each, D width, N = B K flat rows of one device, R rows of a block,
V vocabulary, F forbidden ids.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada.mesh import ACTIVATIONS, on_each_device
from llada.objectives import noise as noise_lib
from llada.objectives.vocabulary_head import choosing_rows


class Choice(NamedTuple):
    """A token for each row, and its log-probability under the model's own distribution.

    That is without temperature and without noise: ranking by noised confidences is a known flaw of other samplers
    (LLaDA issue 42).

    log_p_BK  of tokens that were given and not chosen (`score`), under the distribution that they would be drawn from
    """

    token_BK: jax.Array
    confidence_BK: jax.Array
    log_p_BK: jax.Array | None = None


def choose(
    hidden_BKD: jax.Array,
    head_VD: jax.Array,
    needed_BK: jax.Array,
    forbidden_F: jax.Array,
    temperature: float,
    keys_BK: jax.Array | None = None,
    of_likeliest: bool = False,
) -> Choice:
    """The most likely token of every needed row (temperature 0), or a draw from softmax(logits / temperature).

    `forbidden_F`: ids that are not chosen and have no probability. `keys_BK`: a key for each row's noise, needed where
    temperature > 0. `of_likeliest`: the confidence is that of the most likely token, whichever is drawn. Entries of
    rows that are not needed are arbitrary.
    """
    if temperature == 0 or keys_BK is None:
        data_BK2 = jnp.zeros((*needed_BK.shape, 0), jnp.uint32)
    else:
        data_BK2 = jax.random.key_data(keys_BK)

    def of_rows(hidden_RD, head_VD, forbidden_F, data_R2):
        return _choose_rows(hidden_RD, head_VD, forbidden_F, temperature, data_R2, of_likeliest)

    return Choice(*_on_devices(of_rows, hidden_BKD, head_VD, needed_BK, forbidden_F, data_BK2))


def score(
    hidden_BKD: jax.Array,
    head_VD: jax.Array,
    needed_BK: jax.Array,
    forbidden_F: jax.Array,
    temperature: float,
    token_BK: jax.Array,
    among_all: bool = False,
) -> Choice:
    """`token_BK` as if `choose` had drawn them, temperature > 0: their log-probability in `log_p_BK`.

    That is the one they are drawn with, over all ids but the forbidden ones; `among_all`: over these, too. The
    confidence is that of the most likely token, which is never a forbidden one.
    """

    def of_rows(hidden_RD, head_VD, forbidden_F, token_R1):
        return _score_rows(hidden_RD, head_VD, forbidden_F, temperature, token_R1, among_all)

    return Choice(token_BK, *_on_devices(of_rows, hidden_BKD, head_VD, needed_BK, forbidden_F, token_BK[..., None]))


def _on_devices(of_rows, hidden_BKD, head_VD, needed_BK, forbidden_F, data_BKX) -> tuple[jax.Array, jax.Array]:
    """Both results of `of_rows(hidden_RD, head_VD, forbidden_F, data_RX)` for the needed rows, each (B, K)."""

    def on_one_device(hidden, head, needed, forbidden, data):
        N = needed.size
        found = _of_needed(
            of_rows, hidden.reshape(N, -1), head, needed.reshape(N), forbidden, data.reshape(N, data.shape[-1])
        )
        return jax.tree.map(lambda x_N: x_N.reshape(needed.shape), found)

    # Rows are independent: each device does its own, and their loops may differ in length.
    per_row, gathered = ACTIVATIONS["BL"], ACTIVATIONS["VD_gathered"]
    specs = (ACTIVATIONS["BLD"], gathered, per_row, ACTIVATIONS["replicated"], ACTIVATIONS["BLD"])
    on_all = on_each_device(on_one_device, specs, (per_row, per_row))
    return on_all(hidden_BKD, head_VD.astype(hidden_BKD.dtype), needed_BK, forbidden_F, data_BKX)


def equalize_if_blank(confidence_BK: jax.Array, visible_BL: jax.Array) -> jax.Array:
    """Confidences of most likely tokens, made equal in sequences that show no token at all.

    There all positions have the same distribution, as only differences of positions enter the model: rounding alone,
    and so the shape of the batch, would rank them. Equal ones are ranked from left to right.
    """
    return jnp.where(jnp.any(visible_BL, axis=1, keepdims=True), confidence_BK, confidence_BK[:, :1])


def position_keys(seed_B: jax.Array, step_B: jax.Array, position_BK: jax.Array) -> jax.Array:
    """A key for the noise of each (row's seed, step, position) of sampling."""
    keys_B = jax.vmap(lambda seed, step: noise_lib.step_key(seed, step, noise_lib.SAMPLING))(seed_B, step_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, position_BK)


def _of_needed(of_rows, hidden_ND, head_VD, needed_N, forbidden_F, data_NX):
    """Both results of `of_rows`: needed rows are moved to the front, then as many blocks are done as they fill."""
    N = len(needed_N)
    sizes = sorted({min(N, size) for size in choosing_rows()}, reverse=True)
    if sizes == [N]:
        return of_rows(hidden_ND, head_VD, forbidden_F, data_NX)
    order_N = jnp.argsort(~needed_N, stable=True)
    order = jnp.pad(order_N, (0, sizes[0]))

    def block(size, start, carry):
        at_R = jax.lax.dynamic_slice_in_dim(order, start, size)
        found = of_rows(hidden_ND[at_R], head_VD, forbidden_F, data_NX[at_R])
        return jax.tree.map(lambda all_, x: jax.lax.dynamic_update_slice_in_dim(all_, x, start, 0), carry, found)

    kinds = jax.eval_shape(of_rows, hidden_ND, head_VD, forbidden_F, data_NX)
    found = tuple(jnp.zeros(len(order), kind.dtype) for kind in kinds)
    full_blocks, rest = jnp.divmod(jnp.sum(needed_N), sizes[0])
    found = jax.lax.fori_loop(0, full_blocks, lambda i, carry: block(sizes[0], i * sizes[0], carry), found)
    # The smallest block that the rest fits, or none.
    branches = [functools.partial(block, size, full_blocks * sizes[0]) for size in sizes] + [lambda carry: carry]
    found = jax.lax.switch(jnp.sum(rest <= jnp.array([*sizes[1:], 0])), branches, found)
    rank_N = jnp.argsort(order_N)
    return tuple(x[rank_N] for x in found)


def _logits(hidden_RD, head_VD):
    return jnp.einsum("vd,rd->vr", head_VD, hidden_RD, preferred_element_type=jnp.float32)


def _log_z(logits_VR, top_R, temperature=1.0):
    """log sum exp(logits / temperature)."""
    above_VR = logits_VR - top_R[None, :]
    return top_R / temperature + jnp.log(_sum(jnp.exp(above_VR if temperature == 1 else above_VR / temperature)))


def _score_rows(hidden_RD, head_VD, forbidden_F, temperature, token_R1, among_all):
    """(confidence_R, log_p_R) of the tokens given."""
    logits_VR = _logits(hidden_RD, head_VD)
    forbidden_FR = logits_VR[forbidden_F]
    logits_VR = logits_VR.at[forbidden_F].set(-jnp.inf)
    top_R = jnp.max(jnp.max(_grouped(logits_VR, -jnp.inf), axis=1), axis=0)
    log_z_R = _log_z(logits_VR, top_R)
    drawn_from_R = log_z_R if temperature == 1 else _log_z(logits_VR, top_R, temperature)
    if among_all:
        drawn_from_R = jnp.logaddexp(drawn_from_R, jax.nn.logsumexp(forbidden_FR / temperature, axis=0))
    own_R = jnp.take_along_axis(logits_VR, token_R1.T, axis=0)[0]
    return top_R - log_z_R, own_R / temperature - drawn_from_R


def _choose_rows(hidden_RD, head_VD, forbidden_F, temperature, data_R2, of_likeliest=False):
    """(token_R, confidence_R)."""
    logits_VR = _logits(hidden_RD, head_VD)
    logits_VR = logits_VR.at[forbidden_F].set(-jnp.inf)  # in place: a mask over V would cost a pass over all logits
    top_R, token_R = _max_and_argmax(logits_VR)
    log_z_R = _log_z(logits_VR, top_R)
    if temperature == 0:
        return token_R, top_R - log_z_R

    def gumbel(data):
        # mode="high": noise made of one float32 uniform cannot be large, which cuts the tail off (arXiv 2409.02908).
        return jax.random.gumbel(
            jax.random.wrap_key_data(data, impl=noise_lib.GENERATOR), logits_VR.shape[:1], jnp.float32, mode="high"
        )

    _, token_R = _max_and_argmax(logits_VR / temperature + jax.vmap(gumbel, out_axes=1)(data_R2))
    if of_likeliest:
        return token_R, top_R - log_z_R
    return token_R, jnp.take_along_axis(logits_VR, token_R[None], axis=0)[0] - log_z_R


# The vocabulary is reduced in groups: XLA shares a reduction among CPU cores by its outputs, and rows alone are too few
# of them; and a plain argmax takes several times as long on CPU.
_GROUP = 64


def _sum(x_VR):
    return jnp.sum(jnp.sum(_grouped(x_VR, 0.0), axis=1), axis=0)


def _max_and_argmax(x_VR):
    """The maximum over the vocabulary and its first index."""
    x_GIR = _grouped(x_VR, -jnp.inf)
    # The barrier keeps XLA from computing the maximum of all a second time, from all entries.
    top_GR = jax.lax.optimization_barrier(jnp.max(x_GIR, axis=1))
    best_R = jnp.argmax(top_GR, axis=0)
    inside_R = jnp.argmax(jnp.take_along_axis(x_GIR, best_R[None, None], axis=0)[0], axis=0)
    return jnp.max(top_GR, axis=0), (best_R * _GROUP + inside_R).astype(jnp.int32)


def _grouped(x_VR, filler):
    V, R = x_VR.shape
    return jnp.pad(x_VR, ((0, -V % _GROUP), (0, 0)), constant_values=filler).reshape(-1, _GROUP, R)
