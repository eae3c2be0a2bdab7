"""llada train --config=FILE[:ARGUMENT] --workdir=DIR [--config.key=value ...]

Trains the experiment in DIR: config.json, tokenizer.model, data/, checkpoints/, metrics.jsonl, summary.json and
TensorBoard events. Called again on the same DIR it continues from the newest checkpoint, bit for bit. Without --config
the experiment is the one that DIR holds: a run to continue, or a model that llada import brought.

On several hosts run the same command on each, with DIR on a file system that all of them share. Slurm (srun) and TPU
pods are recognised; elsewhere give --coordinator, --processes and --process_id.
"""

import os
import sys
from typing import TextIO

from llada import json_files, processes
from llada.commands import environment, experiment, joining
from llada.commands.command_flags import CommandFlags, required
from llada.config import Config, load, to_dict
from llada.errors import Diverged, Interrupted
from llada.paths import user_path

FLAGS = CommandFlags(experiment.FLAGS, joining.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "directory of the run; created if missing, continued if it holds one")
PRINT_CONFIG = FLAGS.define_bool("print_config", False, "print the resolved configuration as JSON and stop")
ALLOW_RATE_JUMP = FLAGS.define_bool(
    "allow_rate_jump", False, "continue although the new length moves the schedule, so that the learning rate jumps"
)


def run(overrides: dict[str, str]) -> int:
    """Train; status 129, 130 or 143 after a signal (everything saved), 3 if training diverged."""
    if PRINT_CONFIG.value:
        print(json_files.dumps(to_dict(_config(overrides)), indent=2))
        return 0
    joining.join()
    environment.retain_freed_memory()
    with processes.agreement():
        config = _config(overrides)
    workdir = required(WORKDIR, "for example --workdir=runs/first")
    from llada.training import loop

    try:
        summary = loop.train(config, workdir, allow_rate_jump=ALLOW_RATE_JUMP.value)
    except (Interrupted, Diverged) as end:
        _print_once(f"llada train: {end}", sys.stderr)
        return end.status
    except KeyboardInterrupt:
        # A second Ctrl-C, while saving. The saving threads would go on, and print tracebacks of their own.
        _print_once("llada train: stopped at once; run again to continue from the newest checkpoint", sys.stderr)
        os._exit(130)
    _print_once(json_files.dumps(summary, indent=2), sys.stdout)
    return 0


def _print_once(text: str, stream: TextIO) -> None:
    if processes.is_first():
        print(text, file=stream, flush=True)


def _config(overrides: dict[str, str]) -> Config:
    """The experiment of --config, or else that of the workdir."""
    saved = user_path(WORKDIR.value, "--workdir") / "config.json" if WORKDIR.value else None
    if experiment.CONFIG.value or saved is None or not saved.exists():
        return experiment.read(experiment.CONFIG.value, overrides)
    return experiment.override(to_dict(load(saved)), overrides)
