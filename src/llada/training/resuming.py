"""What a run goes on from: state and cursor of its newest or an earlier checkpoint, the summary of a finished run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llada import changes, json_files, processes
from llada.config import Config
from llada.errors import Damaged, UserError
from llada.training import guard, optimizer, run_item
from llada.training.checkpoint import Checkpoints
from llada.training.step import TrainState, abstract_state, first_state


def restore_or_init(
    checkpoints: Checkpoints, config: Config, mesh: jax.sharding.Mesh, log: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]]:
    """State and cursor of the newest good checkpoint; of step 0 where there is none. All processes call it.

    Damaged steps are set aside once a good one is found, which `log` is told. UserError where all are damaged.
    """
    steps = processes.from_first(checkpoints.steps())
    damaged: dict[int, Damaged] = {}
    for step in reversed(steps):
        log(f"continuing from step {step} of {checkpoints.directory.parent}")
        try:
            restored = restore_state(checkpoints, config, mesh, step)
        except Damaged as error:  # on all processes
            damaged[step] = error
            continue
        for bad, why in damaged.items():  # now that there is a good one
            log(f"{why}: now {checkpoints.set_aside(bad)}")
        return restored
    if damaged:
        raise damaged[steps[-1]]
    return first_state(changes.at(config, 0), mesh), {}


def roll_back(
    checkpoints: Checkpoints, config: Config, mesh: jax.sharding.Mesh, skips: guard.Skips, step: int
) -> tuple[TrainState, int] | None:
    """An earlier state with the number `step`, and the step that it was saved at; counted in `skips`.

    It is as if no batch since had been read: parameters, moments and norms are the checkpoint's, while step number and
    learning rate are those of `step`. None where `train.roll_back` is, and where no checkpoint is far enough from the
    first of the skipped steps, or new since the run last went back. All processes call it.
    """
    reach = skips.reach(step)
    if reach is None:
        return None
    checkpoints.wait()
    for saved in reversed(processes.from_first(checkpoints.steps())):
        if saved not in reach:
            continue
        try:
            state, cursor = restore_state(checkpoints, config, mesh, saved)
        except Damaged:  # on all processes; set aside when it is the newest
            continue
        skips.went_back(saved, step, cursor)
        small = jnp.int32(step), guard.restored(changes.at(config, step), cursor)
        number, norms_W = jax.device_put(small, state.step.sharding)
        return TrainState(number, state.params, optimizer.at_step(state.optimizer_state, step), norms_W), saved
    return None


def restore_state(
    checkpoints: Checkpoints, config: Config, mesh: jax.sharding.Mesh, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """The state saved at `step`, sharded over `mesh` whatever mesh wrote it, and its cursor.

    An imported model has no moments: they begin at zero. UserError where the step cannot be used, or is of another run
    than `config`.
    """
    with processes.agreement():
        item = checkpoints.item(step)
        run_item.require_same(item, config, checkpoints.directory)
    config = changes.at(config, step)
    abstract = abstract_state(config, mesh)
    if item.begun:
        restored = checkpoints.restore(item, params=abstract.params, optimizer_state=abstract.optimizer_state)
        moments = restored["optimizer_state"]
    else:
        restored = checkpoints.restore(item, params=abstract.params)
        shardings = jax.tree.map(lambda x: x.sharding, abstract.optimizer_state)
        moments = jax.jit(optimizer.make(config).init, out_shardings=shardings)(restored["params"])
    small = jnp.int32(step), guard.restored(config, item.cursor)
    number, norms_W = jax.device_put(small, abstract.step.sharding)
    return TrainState(number, restored["params"], moments, norms_W), item.cursor


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """What `summary.json` holds, on every process; None where there is none. UserError, on all, for a damaged one."""
    summary = None
    with processes.agreement():
        path = workdir / "summary.json"
        if processes.is_first() and path.exists():
            try:
                summary = json_files.read(path)
            except UserError as error:
                raise UserError(f"{error}; remove it, and the same command writes it again") from error
    return processes.from_first(summary)
