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
    """Shapes, dtypes and shardings of a TrainState; optimizer moments lie where their parameters do."""
    state = jax.eval_shape(functools.partial(init_state, config))
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, mesh_lib.parameter_shardings(mesh, state))


def state_shardings(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The shardings alone."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))


def train_step(state: TrainState, batch_BL: jax.Array, config: Config, special: SpecialTokens):
    """`(next state, metrics)` for the int32 batch of step `state.step`.

    The loss is a sum over all tokens of the step divided once by their number, so any number of microbatches gives the
    same gradient; noise belongs to sequences, not to microbatches, so they see the same draws too.
    metrics: float32 scalars, names and units as in `training/metrics.py`.
    """
    B = len(batch_BL)
    sums = fsdp.batch_sums(functools.partial(_gradient_sums, config, special, B))
    gradients, terms = sums(state.params, (batch_BL, jnp.arange(B)), state.step)
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


def _gradient_sums(config: Config, special: SpecialTokens, batch_size: int, params, batch, step):
    """Gradients and LossTerms, as sums over the sequences of `batch`: (tokens_BL, which of the step's they are)."""
    tokens_BL, sequence_B = batch
    B, L = tokens_BL.shape
    G = config.train.microbatches
    loss = families.of(config).loss
    # Once for all microbatches: a forward pass begins with it, and has nothing to do while it is gathered.
    embedding_VD = transformer.table(config.model, params)

    def microbatch_loss(params, tokens_BL, sequence_B):
        segments_BL = segments(tokens_BL, special, config.objective)

        def predict(inputs_BL, lengths_B):
            return Unfinished(
                *transformer.up_to_last_attention(config.model, params, inputs_BL, lengths_B, segments_BL, embedding_VD)
            )

        noise = Noise(config.seed, step, sequence_B, batch_size)
        terms = loss(predict, transformer.head(config.model, params), tokens_BL, noise, special, config.objective)
        return terms.nats, terms

    gradient = jax.grad(microbatch_loss, has_aux=True)
    if G == 1:
        return gradient(params, tokens_BL, sequence_B)
    # Neighbours stay together, as their times are dealt so that every such part has as many rows to do.
    split_GBL, split_GB = tokens_BL.reshape(G, B // G, L), sequence_B.reshape(G, B // G)

    def accumulate(carry, microbatch):
        own = gradient(params, *microbatch)
        if mesh_lib.platform() == "tpu":
            # Hides reduce-scatters from XLA's while-loop-all-reduce-code-motion, which fails on them.
            own = jax.lax.optimization_barrier(own)
        return jax.tree.map(jnp.add, carry, own), None

    zeros = (jax.tree.map(jnp.zeros_like, params), LossTerms(*(jnp.float32(0),) * len(LossTerms._fields)))
    return jax.lax.scan(accumulate, zeros, (split_GBL, split_GB))[0]


def compile_step(config: Config, special: SpecialTokens, mesh: jax.sharding.Mesh):
    """The jitted step: state donated, every input and output placed by the table in `mesh.py`."""
    places = state_shardings(config, mesh)
    replicated = mesh_lib.sharding(mesh, "replicated")
    return jax.jit(
        functools.partial(train_step, config=config, special=special),
        in_shardings=(places, mesh_lib.sharding(mesh, "BL")),
        out_shardings=(places, replicated),
        donate_argnums=0,
        compiler_options=fsdp.compiler_options(mesh, config.mesh.tpu_options),
    )
