"""llada train --config=FILE[:ARGUMENT] --workdir=DIR [--config.key=value ...]

Pre-trains the experiment in DIR: config.json, tokenizer.model, data/, checkpoints/, metrics.jsonl, summary.json and
TensorBoard events. Called again on the same DIR it continues from the newest checkpoint, bit for bit.
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
    config = experiment.read(experiment.CONFIG.value, overrides)
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
