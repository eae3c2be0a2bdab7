"""Opening a trained model for a command: the mesh that its parameters are spread over, their dtype, the processes.

A model that was trained in parts need not fit one device: `--config.mesh.fsdp=16` opens it in as many.
"""

import os
from pathlib import Path

from llada import config as config_lib
from llada import processes
from llada.commands import experiment
from llada.commands.command_flags import CommandFlags
from llada.config import Config, MeshConfig, TrainConfig
from llada.errors import UserError

FLAGS = CommandFlags()
DTYPE = FLAGS.define_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the parameters in memory: as trained, or half the size"
)


def mesh(overrides: dict[str, str]) -> MeshConfig:
    """The mesh of `--config.mesh.*`, all devices on its data axis without any. UserError for keys of other groups."""
    for key in overrides:
        if not key.startswith("mesh."):
            raise UserError(
                f"--config.{key} belongs to llada train; a workdir keeps its own config, and only --config.mesh.* "
                "says how it is opened"
            )
    if experiment.CONFIG.present:
        raise UserError(f"--config={experiment.CONFIG.value} belongs to llada train; a workdir keeps its own config")
    anything = config_lib.to_dict(Config(train=TrainConfig(steps=1)))
    return experiment.override(anything, overrides).mesh


def open_run(workdir: str | os.PathLike | Path, step: int | None, mesh_config: MeshConfig):
    """`run.load` by these flags; of several processes all must call it."""
    from llada.training import run as run_lib

    return run_lib.load(workdir, step, mesh_config, DTYPE.value)


def require_same(asked) -> None:
    """UserError, on all processes, unless each was asked for the same (anything with a repr)."""
    first = processes.from_first(repr(asked))
    with processes.agreement():
        if repr(asked) != first:
            raise UserError("its flags are not those of process 0; run the same command everywhere")
