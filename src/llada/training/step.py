"""One optimizer step: microbatches, one division by the global token count, clip, AdamW. Pure, jitted once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llada import fsdp
from llada import mesh as mesh_lib
from llada.config import Config, DataConfig, TrainConfig
from llada.model import transformer
from llada.objectives import families
from llada.objectives.contract import Examples, LossTerms, SpecialTokens, Unfinished, segments
from llada.objectives.noise import DROPOUT, Noise, root_key, sequence_keys
from llada.training import guard, optimizer
from llada.training.metrics import BY_TIME, PARTS

_PROGRAMS = 8  # of so many configs are kept in a process

Batch = jax.Array | Examples  # of pre-training and of fine-tuning; arrays (B, L), int32


class TrainState(NamedTuple):
    """Arrays only: what a checkpoint must hold for the next step to be the same, bit for bit."""

    step: jax.Array
    params: transformer.Parameters
    optimizer_state: optax.OptState
    norms_W: jax.Array | None = None  # of the latest updates' gradients, where there is a guard against spikes


def init_state(config: Config) -> TrainState:
    """Step 0, from `config.seed` alone."""
    params = transformer.init(config.model, root_key(config.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.make(config).init(params), guard.start(config))


def seen(config: Config) -> Config:
    """The part of `config` that a step depends on, its other keys at their defaults: what programs are shared by."""
    train = TrainConfig(
        batch_size=config.train.batch_size, microbatches=config.train.microbatches, steps=config.steps or None
    )
    return Config(
        seed=config.seed,
        model=config.model,
        objective=config.objective,
        data=DataConfig(sequence_length=config.data.sequence_length),
        optimizer=config.optimizer,
        mesh=config.mesh,
        train=train,
    )


def first_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """`init_state`, made where its shards belong."""
    return _compiled_init(seen(config), mesh)()


@functools.lru_cache(maxsize=_PROGRAMS)
def _compiled_init(config: Config, mesh: jax.sharding.Mesh):
    return jax.jit(functools.partial(init_state, config), out_shardings=state_shardings(config, mesh))


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; optimizer moments are sharded as their parameters are."""
    return _abstract_state(seen(config), mesh)


@functools.lru_cache(maxsize=_PROGRAMS)
def _abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    state = jax.eval_shape(functools.partial(init_state, config))
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, mesh_lib.parameter_shardings(mesh, state))


def state_shardings(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The shardings alone."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))


def train_step(
    state: TrainState, batch: Batch, config: Config, special: SpecialTokens
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`(next state, metrics)` for the batch of step `state.step`.

    The loss is a sum over all tokens of the step divided once by their number, so any number of microbatches gives the
    same gradient; noise belongs to sequences, not to microbatches, so they see the same draws too.
    A step whose update `training/guard.py` decides against changes nothing but its number and the schedule's.
    metrics: float32 scalars, names and units as in `training/metrics.py`; `skipped`: 1 for such a step, else 0.
    """
    # `batch_sums` is a shard_map over the mesh axes `data` and `fsdp`: within `gradients_of_batch` the batch is the
    # sequences of one device, the parameters are its shards, and both results come back added up over devices.
    batch_size = len(jax.tree.leaves(batch)[0])
    of_batch = fsdp.batch_sums(functools.partial(gradients_of_batch, config, special, batch_size))
    gradients, terms = of_batch(state.params, (batch, jnp.arange(batch_size)), state.step)
    positions = jnp.float32(config.tokens_per_step) if isinstance(batch, Examples) else terms.token_count
    loss_nats_per_token = terms.nats / terms.token_count
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(gradients) / terms.token_count
        made, norms_W = guard.decide(config, state.norms_W, loss_nats_per_token, grad_norm)
        factor = optimizer.clip_factor(config.optimizer.clip_norm, grad_norm, terms.token_count)

        def update():
            updates, optimizer_state = optimizer.make(config).update(
                gradients, state.optimizer_state, state.params, factor=factor
            )
            return optax.apply_updates(state.params, updates), optimizer_state

        # Not jnp.where: old and new parameters would both have to be held, and on CPU copied.
        params, optimizer_state = jax.lax.cond(
            made, update, lambda: (state.params, optimizer.pass_over(state.optimizer_state))
        )
    metrics = {
        "loss_nats_per_token": loss_nats_per_token,
        "head_nats_per_row": terms.head_nats / jnp.maximum(terms.head_count, 1),
        "head_fraction": terms.head_count / positions,
        "grad_norm": grad_norm,
        "clipped_share": (grad_norm > config.optimizer.clip_norm).astype(jnp.float32),
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": optimizer.learning_rate(config)(state.step),
        "token_count": terms.token_count,
        "skipped": 1.0 - made,
    }
    if terms.answers is not None:
        metrics |= metrics_of_answers(terms)
    return TrainState(state.step + 1, params, optimizer_state, norms_W), metrics


def gradients_of_batch(
    config: Config,
    special: SpecialTokens,
    batch_size: int,
    params: transformer.Parameters,
    batch: tuple[Batch, jax.Array],
    step: jax.Array,
) -> tuple[transformer.Parameters, LossTerms]:
    """Gradients and LossTerms, as sums over the sequences of `batch`, which have numbers in the step's batch.

    `batch_size` is that of the whole step.
    """
    G = config.train.microbatches
    # Gathered once for all microbatches: a forward pass begins with it, and has nothing to do while it waits.
    embedding_VD = transformer.table(config.model, params)

    def gradient(batch, sequence_B):
        noise = Noise(config.seed, step, sequence_B, batch_size)
        return jax.grad(loss, has_aux=True)(params, batch, noise, embedding_VD, config, special)

    if G == 1:
        return gradient(*batch)
    # Neighbours stay together: their times give all microbatches about the same number of masked rows.
    split = jax.tree.map(lambda x: x.reshape(G, len(x) // G, *x.shape[1:]), batch)

    def accumulate(sums, microbatch):
        return jax.tree.map(jnp.add, sums, fsdp.reduce_in_loop(gradient(*microbatch))), None

    by_time = isinstance(batch[0], Examples) and families.of(config).masks
    zeros = (jax.tree.map(jnp.zeros_like, params), LossTerms.zero(by_time))
    return jax.lax.scan(accumulate, zeros, split)[0]


def loss(
    params: transformer.Parameters,
    batch: Batch,
    noise: Noise,
    embedding_VD: jax.Array,
    config: Config,
    special: SpecialTokens,
) -> tuple[jax.Array, LossTerms]:
    """The objective summed over the tokens of a microbatch, to be differentiated, and all of its LossTerms."""
    family = families.of(config)
    if isinstance(batch, Examples):
        segments_BL, objective = batch.example_BL, family.answer_loss
    else:
        segments_BL, objective = segments(batch, special, config.objective), family.loss

    dropout_B = sequence_keys(noise, DROPOUT) if config.model.dropout else None

    def predict(inputs_BL, lengths_B):
        return Unfinished(
            *transformer.up_to_last_attention(
                config.model, params, inputs_BL, lengths_B, segments_BL, embedding_VD, dropout_B
            )
        )

    head_VD = transformer.head(config.model, params)
    terms = objective(predict, head_VD, batch, noise, special, config.objective)
    return terms.nats, terms


def metrics_of_answers(terms: LossTerms) -> dict[str, jax.Array]:
    """What fine-tuning also logs: pairs `NAME:sum` and `NAME:count`, to be divided over a window of steps."""
    answers = terms.answers
    assert answers is not None
    pairs = {"padding_share": (answers.padding_nats, terms.nats)}
    pairs |= {name: (answers.nats_T[i], answers.count_T[i]) for i, name in enumerate(BY_TIME)}
    return {f"{name}:{part}": value for name, pair in pairs.items() for part, value in zip(PARTS, pair, strict=True)}


def compile_step(config: Config, special: SpecialTokens, mesh: jax.sharding.Mesh):
    """The jitted step: state donated, shardings of inputs and outputs from the table in `mesh.py`.

    One program for all configs that a step cannot tell apart: runs that follow each other in a process share it.
    """
    return _compiled_step(seen(config), special, mesh)


@functools.lru_cache(maxsize=_PROGRAMS)
def _compiled_step(config: Config, special: SpecialTokens, mesh: jax.sharding.Mesh):
    shardings = state_shardings(config, mesh)
    replicated = mesh_lib.sharding(mesh, "replicated")
    return jax.jit(
        functools.partial(train_step, config=config, special=special),
        in_shardings=(shardings, mesh_lib.sharding(mesh, "BL")),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=fsdp.compiler_options(mesh, config.mesh.tpu_options),
    )
