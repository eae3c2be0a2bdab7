"""Numbers that go wrong while training, drawn from a seed, and what comes of it.

A fault hits one sequence of a batch, or all of it (a spike). The update must not be made: the run must go on with the
bits of one in which that update was left out by hand. Four runs of both families, with and without microbatches, half
of them with a guard against spikes, on two devices by data or by fsdp where a process of its own can have them.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from faults.goal import Outcome

NUMBER = "R9"
TITLE = "Loss, gradient not finite, or a spike"
DEMAND = "exactly one update skipped: the bits of a run in which it is left out, before and after"
FULL, SAMPLE = 100, 4

RIGHT = "one update skipped"
# name -> what is added to one element of the gradient, added to the loss alone, and what the loss is multiplied by
KINDS = {
    "gradient NaN": (float("nan"), 0.0, 1.0),
    "gradient inf": (float("inf"), 0.0, 1.0),
    "gradient -inf": (float("-inf"), 0.0, 1.0),
    "gradient too large for its norm": (1e30, 0.0, 1.0),
    "loss NaN": (0.0, float("nan"), 1.0),
    "loss inf": (0.0, float("inf"), 1.0),
    "loss and gradient NaN": (0.0, 0.0, float("nan")),
    "spike": (0.0, 0.0, 50.0),  # finite
}
LEAVES = 12  # of the parameters
QUIET = 70  # steps before the first fault: a spike is told by the norms of 64


class Fault(NamedTuple):
    """At `step`, by way of one sequence of the batch, to one leaf of the parameters."""

    step: int
    kind: str
    sequence: int
    leaf: int


def draw(rng: random.Random, count: int, config) -> list[Fault]:
    """`count` faults, some of them on neighbouring steps; kinds take turns, spikes where there is a guard."""
    guarded = config.optimizer.spike_factor is not None
    kinds, first = [kind for kind in KINDS if guarded or kind != "spike"], QUIET if guarded else 3
    rng.shuffle(kinds)
    steps = sorted(rng.sample(range(first, first + 2 * count), count))
    return [
        Fault(step, kinds[i % len(kinds)], rng.randrange(config.train.batch_size), rng.randrange(LEAVES))
        for i, step in enumerate(steps)
    ]


def with_faults(loss, faults: list[Fault]):
    """`training.step.loss` with the faults in it."""
    import jax
    import jax.numpy as jnp

    table = {f.step: (*KINDS[f.kind], -1 if f.kind == "spike" else f.sequence, f.leaf) for f in faults}
    last = max(table, default=0) + 1
    quiet = (0.0, 0.0, 1.0, 0, 0)
    columns = [jnp.array(column) for column in zip(*(table.get(s, quiet) for s in range(last + 1)), strict=True)]

    @jax.custom_vjp
    def disturbed(leaf, amount):
        return leaf

    def backward(amount, gradient):
        return gradient.at[(0,) * gradient.ndim].add(amount), jnp.zeros_like(amount)

    disturbed.defvjp(lambda leaf, amount: (leaf, amount), backward)

    def faulty(params, batch, noise, *rest):
        added, to_loss, factor, sequence, which = (column[jnp.minimum(noise.step, last)] for column in columns)
        hit = (sequence < 0) | (noise.sequence_B == sequence).any()
        leaves, structure = jax.tree.flatten(params)
        amounts = [jnp.where(hit & (which == i), added, 0.0) for i in range(len(leaves))]
        params = jax.tree.unflatten(structure, map(disturbed, leaves, amounts))
        nats, terms = loss(params, batch, noise, *rest)
        factor, to_loss = jnp.where(hit, factor, 1.0), jnp.where(hit, to_loss, 0.0)
        return nats * factor, terms._replace(nats=terms.nats * factor + to_loss)

    return faulty


def left_out(state):
    """The state after a step whose update is not made, by hand."""
    scale, (adam, decay, schedule) = state.optimizer_state
    schedule = schedule._replace(count=schedule.count + 1)
    return state._replace(step=state.step + 1, optimizer_state=(scale, (adam, decay, schedule)))


def verdicts(config, faults: list[Fault]) -> Iterator[Outcome]:
    """What came of every fault; after them what is wrong besides, if anything."""
    import jax
    import numpy as np
    from faults.r4_damaged_checkpoints import bits

    from llada import mesh as mesh_lib
    from llada.objectives.contract import SpecialTokens
    from llada.training import step as step_lib

    mesh = mesh_lib.make(config.mesh)
    B, L, V = config.train.batch_size, config.data.sequence_length, config.model.vocab_size
    rows = np.random.default_rng(0).integers(4, V, (8, B, L)).astype(np.int32)
    at = {fault.step: fault.kind for fault in faults}
    plain = step_lib.loss
    step_lib.loss = with_faults(plain, faults)
    jax.clear_caches()  # or the program of other faults would serve
    try:
        with jax.set_mesh(mesh):
            train_step = step_lib.compile_step(config, SpecialTokens(mask=3, eos=1), mesh)
            batches = [jax.device_put(rows_BL, mesh_lib.sharding(mesh, "BL")) for rows_BL in rows]
            state, reference = (step_lib.first_state(config, mesh) for _ in range(2))
            for step in range(max(at, default=QUIET) + 3):
                state, metrics = train_step(state, batches[step % len(rows)])
                if step not in at:
                    reference, _ = train_step(reference, batches[step % len(rows)])
                    if float(metrics["skipped"]):
                        yield Outcome(f"step {step}, no fault", "skipped", "an update without a fault was skipped")
                    continue
                reference = left_out(reference)
                same = bits(mesh_lib.on_host(state)) == bits(mesh_lib.on_host(reference))
                skipped = bool(metrics["skipped"])
                wrong = "" if same and skipped else f"skipped: {skipped}; the bits are right: {same}"
                yield Outcome(f"{at[step]} at step {step}", RIGHT if skipped else "not skipped", wrong)
            if bits(mesh_lib.on_host(state)) != bits(mesh_lib.on_host(reference)):
                yield Outcome("the steps after the last fault", "other bits", "other bits than without those updates")
    finally:
        step_lib.loss = plain
        jax.clear_caches()


def build(family: str, microbatches: int, guard: bool, mesh: dict[str, int]):
    """A config with a small model, seconds to run."""
    from llada import config as config_lib

    c, causal = config_lib.default_config(), family == "arm"
    c.model.update(dict(layers=2, width=32, heads=2, ffn=48, vocab_size=64, max_length=16, dtype="float32"))
    c.model.causal, c.objective.name = causal, "autoregressive" if causal else "diffusion"
    c.objective.random_length_fraction = 0.0 if causal else 0.25
    c.data.sequence_length = 16
    c.optimizer.update(dict(schedule="0:0 50%:1 100%:0", spike_factor=10.0 if guard else None))
    c.train.update(dict(batch_size=8, microbatches=microbatches, steps=400))
    c.mesh.update(mesh)
    return config_lib.from_config_dict(c)


def runs(devices: int) -> list:
    """Configs of the four runs."""
    fsdp, data = dict(data=1, fsdp=devices), dict(data=devices, fsdp=1)
    kinds = [("llada", 2, True, fsdp), ("arm", 1, False, data), ("llada", 1, False, data), ("arm", 2, True, fsdp)]
    return [build(*kind) for kind in kinds]


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Case i is fault i // 4 of run i % 4."""
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):  # of no effect where JAX has its devices already
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=2"
    import jax

    configs = runs(min(2, jax.device_count()))
    for i, config in enumerate(configs):
        faults = draw(random.Random(f"R9 {seed} {i}"), FULL // len(configs), config)
        if mine := len(range(i, count, len(configs))):
            yield from verdicts(config, faults[:mine])
