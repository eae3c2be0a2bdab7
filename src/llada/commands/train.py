"""llada train --config=FILE[:ARGUMENT] --workdir=DIR [--config.key=value ...]

Trains the experiment in DIR: config.json, tokenizer.model, data/, checkpoints/, metrics.jsonl, calls.jsonl,
summary.json and TensorBoard events. Called again on the same DIR it continues from the newest checkpoint, bit for bit.
Without --config the experiment is the one that DIR holds: a run to continue, or a model that llada import brought.
Another rate, schedule, clipping or guard (--help_config marks them *) holds from the next step on, which is recorded.

--init=DIR begins from another run's model, or from a Hugging Face directory: for fine-tuning with
--config=experiments/sft.py --config.data.source='dialogues:GLOB', or to go on training with another experiment.

On several hosts run the same command on each, with DIR on a file system that all of them share. Slurm (srun) and TPU
pods are recognised; elsewhere give --coordinator, --processes and --process_id.
"""

import functools
import os
import sys
from typing import TextIO

from llada import json_files, processes
from llada.commands import environment, experiment, joining, progress
from llada.commands.command_flags import CommandFlags, required
from llada.config import Config, load, to_dict
from llada.errors import Diverged, Interrupted, UserError
from llada.paths import user_path

FLAGS = CommandFlags(experiment.FLAGS, joining.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "directory of the run; created if missing, continued if it holds one")
INIT = FLAGS.define_string(
    "init", None, "begin from this model: a workdir or a Hugging Face directory, whose model replaces the experiment's"
)
ALLOW_NONFINITE = FLAGS.define_bool(
    "allow_nonfinite", False, "begin by --init from weights that hold NaN, infinity or values beyond 1e18"
)
PRINT_CONFIG = FLAGS.define_bool("print_config", False, "print the resolved configuration as JSON and stop")
ALLOW_RATE_JUMP = FLAGS.define_bool(
    "allow_rate_jump",
    False,
    "continue although the new length moves the schedule, so that the learning rate jumps, or a value comes back that "
    "the run has left behind",
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
    if ALLOW_NONFINITE.value and not INIT.value:
        raise UserError("--allow_nonfinite is about the weights of --init=DIR, which is missing")
    if INIT.value:
        from llada.interop import beginning

        with progress.bar("parameters read") as show:
            init, directory = user_path(INIT.value, "--init"), user_path(workdir, "--workdir")
            beginning.begin(config, init, directory, show, ALLOW_NONFINITE.value)
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
    if INIT.value:
        from llada.interop import beginning

        workdir = user_path(required(WORKDIR, "for example --workdir=runs/tuned"), "--workdir")
        adopt = functools.partial(beginning.adopt, init=user_path(INIT.value, "--init"), workdir=workdir)
        return experiment.read(experiment.CONFIG.value, overrides, adopt)
    if experiment.CONFIG.value or saved is None or not saved.exists():
        return experiment.read(experiment.CONFIG.value, overrides)
    return experiment.override(to_dict(load(saved)), overrides)
