"""Opening a trained model for a command: the mesh that its parameters are sharded over, and their dtype.

A model that was trained in shards need not fit one device: `--config.mesh.fsdp=16` opens it in 16 shards.
"""

import os
from typing import TYPE_CHECKING, Any

from llada import config as config_lib
from llada import processes
from llada.commands import experiment
from llada.commands.command_flags import CommandFlags
from llada.config import Config, MeshConfig, TrainConfig
from llada.errors import UserError

if TYPE_CHECKING:  # at run time it would import JAX, before the flags are parsed
    from llada.training.run import Run

FLAGS = CommandFlags()
DTYPE = FLAGS.define_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the parameters in memory: as trained, or half the size"
)


def mesh(overrides: dict[str, str]) -> MeshConfig:
    """The mesh of `--config.mesh.*`; by default all devices on the data axis. UserError for keys of other groups."""
    for key in overrides:
        if not key.startswith("mesh."):
            raise UserError(
                f"--config.{key} belongs to llada train; a workdir keeps its own config, and only --config.mesh.* "
                "says how it is opened"
            )
    if experiment.CONFIG.present:
        raise UserError(f"--config={experiment.CONFIG.value} belongs to llada train; a workdir keeps its own config")
    any_config = config_lib.to_dict(Config(train=TrainConfig(steps=1)))
    return experiment.override(any_config, overrides).mesh


def open_run(workdir: str | os.PathLike, step: int | None, mesh_config: MeshConfig) -> "Run":
    """`run.load` with --dtype; of several processes all must call it."""
    from llada.training import run as run_lib

    return run_lib.load(workdir, step, mesh_config, DTYPE.value)


def require_same(settings: Any) -> None:
    """UserError, on all processes, unless all have the same settings (compared by repr)."""
    first = processes.from_first(repr(settings))
    with processes.agreement():
        if repr(settings) != first:
            raise UserError("its flags are not those of process 0; run the same command everywhere")
