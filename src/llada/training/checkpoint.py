"""Checkpoints through Orbax: parameters, optimizer state, and a JSON item with cursor, config and tokenizer.

On disk as in memory: a nested dict, layers stacked on axis 0. Parameters are an item of their own, so that inference
reads nothing else. Saving is asynchronous; a step exists only once Orbax has committed it.
"""

import base64
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llada import config as config_lib
from llada import mesh as mesh_lib
from llada.config import Config
from llada.errors import UserError
from llada.model import transformer
from llada.training.step import TrainState, init_state, state_placements

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save


class Restored(NamedTuple):
    """A training state with the position of its run."""

    state: TrainState
    cursor: dict


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, keep: int | None = None):
        self.directory = (workdir / "checkpoints").resolve()
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None),
            item_names=("params", "optimizer_state", "run"),
        )

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, state: TrainState, config: Config, cursor: dict, tokenizer_model: bytes) -> None:
        """Start saving `state`; returns once the arrays have left the device. A step already there is left alone."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        run = {
            "cursor": cursor,
            "config": config_lib.to_dict(config),
            "tokenizer": base64.b64encode(tokenizer_model).decode(),
        }
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer_state=ocp.args.StandardSave(state.optimizer_state),
                run=ocp.args.JsonSave(run),
            ),
        )

    def restore(self, config: Config, mesh: jax.sharding.Mesh, step: int) -> Restored:
        """The training state of `step`, placed on `mesh` whatever mesh wrote it."""
        target = _placed(jax.eval_shape(lambda: init_state(config)), state_placements(config, mesh))
        items = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                optimizer_state=ocp.args.StandardRestore(target.optimizer_state),
                run=ocp.args.JsonRestore(),
            ),
        )
        place = mesh_lib.placement(mesh, "replicated")
        state = TrainState(jax.device_put(jnp.int32(step), place), items.params, items.optimizer_state)
        return Restored(state, items.run["cursor"])

    def restore_parameters(self, config: Config, mesh: jax.sharding.Mesh, step: int | None) -> transformer.Parameters:
        """Only the parameters, of `step` or of the latest; UserError where there is none."""
        step = self.resolve(step)
        abstract = transformer.abstract_parameters(config.model)
        target = _placed(abstract, mesh_lib.parameter_placements(mesh, abstract))
        return self.manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))).params

    def resolve(self, step: int | None) -> int:
        """`step`, or the latest for None; UserError naming the steps there are."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}; train first: llada train --config=... --workdir=...")
        if step is not None and step not in steps:
            raise UserError(f"--step={step} is not saved in {self.directory}; saved: {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def tokenizer_model(self, step: int | None = None) -> bytes:
        """The tokenizer saved with a step."""
        run = self.manager.restore(self.resolve(step), args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        return base64.b64decode(run["tokenizer"])

    def wait(self) -> None:
        """Until every save is committed; raises if one failed."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go."""
        self.wait()
        self.manager.close()


def _placed(abstract, placements):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placements)
