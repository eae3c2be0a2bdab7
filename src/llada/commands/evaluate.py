"""llada evaluate --workdir=DIR [--step=N] [--draws=N] [--batches=N] [--estimator=l_of_L|bernoulli]

Held-out nats per token with standard error, bits per byte and perplexity, as JSON (also in DIR/evaluation.json): the
likelihood bound of a LLaDA (Eq. (6), fixed masks), the exact NLL of an ARM, both on the same rows. A model too large
for one device is opened in shards, as it was trained: --config.mesh.fsdp=N, --microbatches=N, on several hosts too.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from llada import json_files, processes
from llada.commands import joining, opening
from llada.commands.command_flags import CommandFlags, required
from llada.config import Config
from llada.errors import DiskError, UserError
from llada.files import write_atomically
from llada.paths import user_path

FLAGS = CommandFlags(opening.FLAGS, joining.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train")
STEP = FLAGS.define_integer("step", None, "checkpoint to evaluate; default the latest")
DRAWS = FLAGS.define_integer(
    "draws", None, "Monte Carlo draws per row; default: the run's", lower_bound=1, upper_bound=2**20
)
BATCHES = FLAGS.define_integer("batches", None, "batches of held-out rows; default: the run's", lower_bound=1)
MICROBATCHES = FLAGS.define_integer(
    "microbatches",
    None,
    "parts of a batch, one after the other; same figures, less memory; default: the run's",
    lower_bound=1,
)
ESTIMATOR = FLAGS.define_string("estimator", None, "l_of_L (Eq. (6), default) or bernoulli (Eq. (4): heavy-tailed)")
TASK = FLAGS.define_enum("task", "validation", ["validation"], "what to evaluate on: the run's held-out rows")


def run(overrides: dict[str, str]) -> int:
    """Evaluate, print the result, and save it in the workdir unless that is read-only."""
    workdir = user_path(required(WORKDIR, "give a workdir of llada train"), "--workdir")
    mesh = opening.mesh(overrides)
    joining.join()
    import jax

    from llada.evaluation import validation
    from llada.training import run as run_lib

    with processes.agreement():
        validation.estimator_for(run_lib.read_config(workdir), ESTIMATOR.value)
    settings = [flag.value for flag in (STEP, DRAWS, BATCHES, MICROBATCHES, ESTIMATOR, opening.DTYPE)]
    opening.require_same([mesh, *settings])
    opened = opening.open_run(workdir, STEP.value, mesh)
    config = _with_flags(opened.config)
    with processes.agreement():
        corpus = run_lib.corpus_of_run(workdir, config, opened.tokenizer, opened.step)
    with jax.set_mesh(opened.mesh), processes.ending_together(UserError):
        validator = validation.Validator(
            config,
            opened.tokenizer.special,
            corpus.text_bytes(opened.tokenizer.token_bytes_V),
            corpus.holdout_NL,
            opened.mesh,
            ESTIMATOR.value,
        )
        result = validator(opened.params)
    if processes.is_first():
        facts = {"step": opened.step, "task": TASK.value} | result._asdict() | {"dtype": opening.DTYPE.value}
        _print_and_save(facts, workdir, config)
    return 0


def _with_flags(config: Config) -> Config:
    """The run's config with the values of the flags that were given."""
    evaluate = dataclasses.replace(
        config.evaluate,
        draws=DRAWS.value or config.evaluate.draws,
        batches=BATCHES.value or config.evaluate.batches,
    )
    train = dataclasses.replace(config.train, microbatches=MICROBATCHES.value or config.train.microbatches)
    return dataclasses.replace(config, evaluate=evaluate, train=train)


def _print_and_save(facts: dict[str, Any], workdir: Path, config: Config) -> None:
    text = json_files.dumps(facts, indent=2)
    print(text, flush=True)
    requested = config.evaluate.batches * config.train.batch_size
    rows = facts["rows"]
    if BATCHES.value is not None and rows < requested:
        print(
            f"--batches={BATCHES.value} are {requested:,} rows; the held-out side has {rows:,}, all of them used",
            file=sys.stderr,
        )
    path = workdir / "evaluation.json"
    try:
        write_atomically(path, f"{text}\n".encode())
    except (OSError, DiskError) as error:
        print(f"{path} could not be saved: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
