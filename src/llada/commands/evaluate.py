"""llada evaluate --workdir=DIR [--step=N] [--draws=N] [--batches=N] [--estimator=l_of_L|bernoulli]

Held-out nats per token with standard error, bits per byte and perplexity, as JSON (kept in DIR/evaluation.json): the
likelihood bound of a LLaDA (Eq. (6), fixed masks), the exact NLL of an ARM, both on the same rows.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from llada.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "a workdir of llada train")
STEP = flags.DEFINE_integer("step", None, "checkpoint to evaluate; default the latest")
DRAWS = flags.DEFINE_integer("draws", None, "Monte Carlo draws per row; default: the run's", lower_bound=1)
BATCHES = flags.DEFINE_integer("batches", None, "batches of held-out rows; default: the run's", lower_bound=1)
ESTIMATOR = flags.DEFINE_string("estimator", None, "l_of_L (Eq. (6), default) or bernoulli (Eq. (4): heavy-tailed)")
TASK = flags.DEFINE_enum("task", "validation", ["validation"], "what to evaluate on: the run's held-out rows")


def run() -> int:
    """Evaluate and print."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give a workdir of llada train")
    import jax

    from llada.evaluation.validation import Validator
    from llada.files import write_atomically
    from llada.training import workdir as workdir_lib

    opened = workdir_lib.load(WORKDIR.value, STEP.value)
    asked = {"draws": DRAWS.value, "batches": BATCHES.value}
    changes = {name: value for name, value in asked.items() if value is not None}
    config = dataclasses.replace(opened.config, evaluate=dataclasses.replace(opened.config.evaluate, **changes))
    corpus = workdir_lib.corpus_for(Path(WORKDIR.value), config, opened.tokenizer)
    with jax.set_mesh(opened.mesh):
        validator = Validator(
            config,
            opened.tokenizer.special,
            corpus.text_bytes(opened.tokenizer.token_bytes_V),
            corpus.holdout_NL,
            opened.mesh,
            ESTIMATOR.value,
        )
        result = validator(opened.params)
    kind = "NLL" if result.estimator == "exact" else "bound"
    text = json.dumps({"step": opened.step, "kind": kind, "task": TASK.value} | result._asdict(), indent=2)
    write_atomically(Path(WORKDIR.value) / "evaluation.json", f"{text}\n".encode())
    print(text)
    return 0
