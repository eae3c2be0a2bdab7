"""llada train --config=FILE[:ARGUMENT] --workdir=DIR [--config.key=value ...]

Pre-trains the experiment in DIR: config.json, tokenizer.model, data/, checkpoints/, metrics.jsonl, summary.json and
TensorBoard events. Called again on the same DIR it continues from the newest checkpoint, bit for bit. Without --config
the experiment is the one that DIR holds: a run to continue, or a model that llada import brought.

On several hosts run the same command on each, with DIR on a file system that all of them share. Slurm (srun) and TPU
pods are recognised; elsewhere --coordinator, --processes and --process_id say who is there.
"""

import os
import sys

from llada import json_files, processes
from llada.commands import environment, experiment, joining
from llada.commands.command_flags import CommandFlags
from llada.errors import UserError
from llada.paths import user_path

FLAGS = CommandFlags(experiment.FLAGS, joining.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "directory of the run; made if missing, continued if it holds one")
PRINT_CONFIG = FLAGS.define_bool("print_config", False, "print the resolved configuration as JSON and stop")
ALLOW_RATE_JUMP = FLAGS.define_bool(
    "allow_rate_jump", False, "go on where another length of the run moves its schedule, so that the rate jumps"
)


def run(overrides: dict[str, str]) -> int:
    """Train; 129, 130 or 143 after a signal (everything saved), 3 if the loss stopped being a number."""
    if not PRINT_CONFIG.value:
        joining.join()
        environment.retain_freed_memory()
    with processes.agreement():
        config = _config(overrides)
    if PRINT_CONFIG.value:
        from llada.config import to_dict

        print(json_files.dumps(to_dict(config), indent=2))
        return 0
    if not WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/first")
    from llada.training import loop

    try:
        summary = loop.train(config, WORKDIR.value, allow_rate_jump=ALLOW_RATE_JUMP.value)
    except (loop.Interrupted, loop.Diverged) as end:
        _say(f"llada train: {end}", sys.stderr)
        return end.status
    except KeyboardInterrupt:
        # The threads that were saving would go on, and end in tracebacks of their own.
        _say("llada train: stopped at once; run again to continue from the newest checkpoint", sys.stderr)
        sys.stderr.flush()
        os._exit(130)
    _say(json_files.dumps(summary, indent=2), sys.stdout)
    return 0


def _say(text: str, file) -> None:
    """What all processes know, once."""
    if processes.is_first():
        print(text, file=file)


def _config(overrides: dict[str, str]):
    """The experiment of --config, or else the workdir's own."""
    held = user_path(WORKDIR.value, "--workdir") / "config.json" if WORKDIR.value else None
    if experiment.CONFIG.value or not (held and held.exists()):
        return experiment.read(experiment.CONFIG.value, overrides)
    from llada import config as config_lib

    return experiment.override(config_lib.to_dict(config_lib.load(held)), overrides)
