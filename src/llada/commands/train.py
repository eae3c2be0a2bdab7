"""llada train --config=FILE[:ARGUMENT] --workdir=DIR [--config.key=value ...]

Pre-trains the experiment in DIR: config.json, tokenizer.model, data/, checkpoints/, metrics.jsonl, summary.json and
TensorBoard events. Called again on the same DIR it continues from the newest checkpoint, bit for bit. Without --config
the experiment is the one that DIR holds: a run to continue, or a model that llada import brought.
"""

import json
import sys
from pathlib import Path

from absl import flags

from llada.commands import experiment
from llada.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; made if missing, continued if it holds one")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "print the resolved configuration as JSON and stop")
flags.adopt_module_key_flags(experiment)


def run(overrides: dict[str, str]) -> int:
    """Train; 130 or 143 after a signal (everything saved), 1 if the loss stopped being a number."""
    config = _config(overrides)
    if PRINT_CONFIG.value:
        from llada.config import to_dict

        print(json.dumps(to_dict(config), indent=2))
        return 0
    if not WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/first")
    from llada.training import loop

    try:
        summary = loop.train(config, Path(WORKDIR.value))
    except loop.Interrupted as stop:
        print(f"llada train: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    except loop.Diverged as error:
        print(f"llada train: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    return 0


def _config(overrides: dict[str, str]):
    """The experiment of --config, or else the workdir's own."""
    held = Path(WORKDIR.value or "") / "config.json"
    if experiment.CONFIG.value or not (WORKDIR.value and held.exists()):
        return experiment.read(experiment.CONFIG.value, overrides)
    from llada import config as config_lib

    return experiment.override(config_lib.to_dict(config_lib.load(held)), overrides)
