"""llada evaluate --workdir=DIR [--step=N] [--draws=N] [--batches=N] [--estimator=l_of_L|bernoulli]

Held-out nats per token with standard error, bits per byte and perplexity, as JSON (kept in DIR/evaluation.json): the
likelihood bound of a LLaDA (Eq. (6), fixed masks), the exact NLL of an ARM, both on the same rows. A model too large
for one device is opened in parts, as it was trained: --config.mesh.fsdp=N, --microbatches=N, on several hosts too.
"""

import dataclasses
import sys
from pathlib import Path

from llada import json_files, processes
from llada.commands import joining, opening
from llada.commands.command_flags import CommandFlags
from llada.errors import DiskError, UserError

FLAGS = CommandFlags(opening.FLAGS, joining.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train")
STEP = FLAGS.define_integer("step", None, "checkpoint to evaluate; default the latest")
DRAWS = FLAGS.define_integer(
    "draws", None, "Monte Carlo draws per row; default: the run's", lower_bound=1, upper_bound=2**20
)
BATCHES = FLAGS.define_integer("batches", None, "batches of held-out rows; default: the run's", lower_bound=1)
MICROBATCHES = FLAGS.define_integer(
    "microbatches", None, "parts of a batch, one after the other; same figures, less memory; default: the run's",
    lower_bound=1,
)  # fmt: skip
ESTIMATOR = FLAGS.define_string("estimator", None, "l_of_L (Eq. (6), default) or bernoulli (Eq. (4): heavy-tailed)")
TASK = FLAGS.define_enum("task", "validation", ["validation"], "what to evaluate on: the run's held-out rows")


def run(overrides: dict[str, str]) -> int:
    """Evaluate, print, and keep what was printed where the workdir can be written."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give a workdir of llada train")
    mesh = opening.mesh(overrides)
    joining.join()
    import jax

    from llada.evaluation import validation
    from llada.training import run as run_lib

    with processes.agreement():
        validation.estimator_for(run_lib.read_config(WORKDIR.value), ESTIMATOR.value)
    asked = [flag.value for flag in (STEP, DRAWS, BATCHES, MICROBATCHES, ESTIMATOR, opening.DTYPE)]
    opening.require_same([mesh, *asked])
    opened = opening.open_run(WORKDIR.value, STEP.value, mesh)
    config = _changed(opened.config)
    with processes.agreement():
        corpus = run_lib.corpus_of_run(opened.workdir, config, opened.tokenizer, opened.step)
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
        found = {"step": opened.step, "task": TASK.value} | result._asdict() | {"dtype": opening.DTYPE.value}
        _print_and_keep(found, opened.workdir, config)
    return 0


def _changed(config):
    """The run's config with what the flags say."""
    evaluate = {"draws": DRAWS.value, "batches": BATCHES.value}
    groups = {"evaluate": evaluate, "train": {"microbatches": MICROBATCHES.value}}
    for name, values in groups.items():
        given = {key: value for key, value in values.items() if value is not None}
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **given)})
    return config


def _print_and_keep(found: dict, workdir: Path, config) -> None:
    from llada.files import write_atomically

    text = json_files.dumps(found, indent=2)
    print(text, flush=True)
    wanted = config.evaluate.batches * config.train.batch_size
    if BATCHES.value is not None and found["rows"] < wanted:
        print(
            f"--batches={BATCHES.value} are {wanted:,} rows; the held-out side has {found['rows']:,}, all of them used",
            file=sys.stderr,
        )
    try:
        write_atomically(workdir / "evaluation.json", f"{text}\n".encode())
    except (OSError, DiskError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"{workdir / 'evaluation.json'} could not be kept: {reason}", file=sys.stderr)
