"""One optimizer step: microbatches, one division by the global token count, clip, AdamW. Pure, jitted once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llada import fsdp
from llada import mesh as mesh_lib
from llada.config import Config
from llada.model import transformer
from llada.objectives import families
from llada.objectives.contract import LossTerms, SpecialTokens, Unfinished, segments
from llada.objectives.noise import Noise, root_key
from llada.training import optimizer


class TrainState(NamedTuple):
    """Arrays only: what a checkpoint must hold for the next step to be the same, bit for bit."""

    step: jax.Array
    params: transformer.Parameters
    optimizer_state: optax.OptState


def init_state(config: Config) -> TrainState:
    """Step 0, from `config.seed` alone."""
    params = transformer.init(config.model, root_key(config.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.make(config).init(params))


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; optimizer moments are sharded as their parameters are."""
    state = jax.eval_shape(functools.partial(init_state, config))
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, mesh_lib.parameter_shardings(mesh, state))


def state_shardings(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The shardings alone."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))


def train_step(
    state: TrainState, batch_BL: jax.Array, config: Config, special: SpecialTokens
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`(next state, metrics)` for the int32 batch of step `state.step`.

    The loss is a sum over all tokens of the step divided once by their number, so any number of microbatches gives the
    same gradient; noise belongs to sequences, not to microbatches, so they see the same draws too.
    metrics: float32 scalars, names and units as in `training/metrics.py`.
    """
    # `batch_sums` is a shard_map over the mesh axes `data` and `fsdp`: within `gradients_of_batch` the batch is the
    # sequences of one device, the parameters are its shards, and both results come back added up over devices.
    of_batch = fsdp.batch_sums(functools.partial(gradients_of_batch, config, special, len(batch_BL)))
    gradients, terms = of_batch(state.params, (batch_BL, jnp.arange(len(batch_BL))), state.step)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(gradients) / terms.token_count
        updates, optimizer_state = optimizer.make(config).update(
            gradients, state.optimizer_state, state.params, token_count=terms.token_count, norm=grad_norm
        )
        params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss_nats_per_token": terms.nats / terms.token_count,
        "head_nats_per_row": terms.head_nats / jnp.maximum(terms.head_count, 1),
        "head_fraction": terms.head_count / terms.token_count,
        "grad_norm": grad_norm,
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": optimizer.learning_rate(config)(state.step),
        "token_count": terms.token_count,
    }
    return TrainState(state.step + 1, params, optimizer_state), metrics


def gradients_of_batch(
    config: Config,
    special: SpecialTokens,
    batch_size: int,
    params: transformer.Parameters,
    batch: tuple[jax.Array, jax.Array],
    step: jax.Array,
) -> tuple[transformer.Parameters, LossTerms]:
    """Gradients and LossTerms, as sums over the sequences of `batch`: (tokens_BL, their numbers in the step's batch).

    `batch_size` is that of the whole step.
    """
    tokens_BL, sequence_B = batch
    B, L = tokens_BL.shape
    G = config.train.microbatches
    # Gathered once for all microbatches: a forward pass begins with it, and has nothing to do while it waits.
    embedding_VD = transformer.table(config.model, params)

    def gradient(tokens_BL, sequence_B):
        noise = Noise(config.seed, step, sequence_B, batch_size)
        return jax.grad(loss, has_aux=True)(params, tokens_BL, noise, embedding_VD, config, special)

    if G == 1:
        return gradient(tokens_BL, sequence_B)
    # Neighbours stay together: their times give all microbatches about the same number of masked rows.
    split_GBL, split_GB = tokens_BL.reshape(G, B // G, L), sequence_B.reshape(G, B // G)

    def accumulate(sums, microbatch):
        return jax.tree.map(jnp.add, sums, fsdp.reduce_in_loop(gradient(*microbatch))), None

    zeros = (jax.tree.map(jnp.zeros_like, params), LossTerms.zero())
    return jax.lax.scan(accumulate, zeros, (split_GBL, split_GB))[0]


def loss(
    params: transformer.Parameters,
    tokens_BL: jax.Array,
    noise: Noise,
    embedding_VD: jax.Array,
    config: Config,
    special: SpecialTokens,
) -> tuple[jax.Array, LossTerms]:
    """The objective summed over the tokens of a microbatch, to be differentiated, and all of its LossTerms."""
    segments_BL = segments(tokens_BL, special, config.objective)

    def predict(inputs_BL, lengths_B):
        return Unfinished(
            *transformer.up_to_last_attention(config.model, params, inputs_BL, lengths_B, segments_BL, embedding_VD)
        )

    head_VD = transformer.head(config.model, params)
    terms = families.of(config).loss(predict, head_VD, tokens_BL, noise, special, config.objective)
    return terms.nats, terms


def compile_step(config: Config, special: SpecialTokens, mesh: jax.sharding.Mesh):
    """The jitted step: state donated, shardings of inputs and outputs from the table in `mesh.py`."""
    shardings = state_shardings(config, mesh)
    replicated = mesh_lib.sharding(mesh, "replicated")
    return jax.jit(
        functools.partial(train_step, config=config, special=special),
        in_shardings=(shardings, mesh_lib.sharding(mesh, "BL")),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=fsdp.compiler_options(mesh, config.mesh.tpu_options),
    )
