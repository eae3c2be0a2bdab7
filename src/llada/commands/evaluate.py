"""llada evaluate --workdir=DIR [--step=N] [--draws=N] [--rows=N] [--estimator=NAME] [--task=dialogues [--generate=N]]

Held-out nats per token with standard error, bits per byte and perplexity, as JSON (also in DIR/evaluation.json, which
keeps what other estimators, and other rows, gave at this step): the likelihood bound of a LLaDA (Eq. (6), fixed masks),
the exact NLL of an ARM, both on the same rows. A model too large for one device is opened in shards, as it was trained:
--config.mesh.fsdp=N, --microbatches=N, on several hosts too.

`kind` says what the figure is. --estimator=chain_rule, chain_rule_reversed, confidence_ordered and sampler are exact,
each under a distribution of its own; sampler is that of llada sample --remasking=top_probability with the same --steps,
--block_length, --confidence_threshold, --cfg_scale and --temperature (default 1). They take a pass for each step of a
row: --rows=N reads so many rows, spread over the held-out side, the same ones of every model.

Of a run that was fine-tuned on dialogues they are those of held-out answers. --task=dialogues adds a LLaDA's loss at
fixed times t, and with --generate=N has the model write N of the answers: exact match for each label and turn, with
95 % intervals. DIR/answers.json has the scores of every way of writing them that was evaluated at this step.

--task=reversal --facts=FILE asks pairs {"first": ..., "second": ...} forward, for the second, and backward, for the
first: shares of right answers as they are written and by likelihood among --candidates, with 95 % intervals (also in
DIR/reversal.json). --forward='{first} is {second}.' and --backward='{second} is {first}.' are texts to be continued;
with --ask=blank gaps in the first are filled; with --ask=chat users ask, by default as LLaDA appendix B.7 has it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada import json_files, processes
from llada.commands import asking, joining, opening, progress, sampling
from llada.commands.command_flags import CommandFlags, required
from llada.config import Config
from llada.errors import DiskError, UserError
from llada.files import write_atomically
from llada.paths import user_path

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.inference.likelihood import LikelihoodConfig
    from llada.training.run import Run

FLAGS = CommandFlags(opening.FLAGS, joining.FLAGS, sampling.FLAGS, asking.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train")
STEP = FLAGS.define_integer("step", None, "checkpoint to evaluate; default the latest")
DRAWS = FLAGS.define_integer(
    "draws", None, "Monte Carlo draws per row; default: the run's", lower_bound=1, upper_bound=2**20
)
BATCHES = FLAGS.define_integer("batches", None, "batches of held-out rows; default: the run's", lower_bound=1)
ROWS = FLAGS.define_integer("rows", None, "held-out rows; default --batches", lower_bound=1)
MICROBATCHES = FLAGS.define_integer(
    "microbatches",
    None,
    "parts of a batch, one after the other; same figures, less memory; default: the run's",
    lower_bound=1,
)
ESTIMATOR = FLAGS.define_string(
    "estimator",
    None,
    "l_of_L (Eq. (6), default), bernoulli (Eq. (4): heavy-tailed), chain_rule, chain_rule_reversed, "
    "confidence_ordered, sampler or upper",
)
TASK = FLAGS.define_enum(
    "task",
    "validation",
    ["validation", "dialogues", "reversal"],
    "validation: the run's held-out rows; dialogues: for fine-tuned runs also the loss by time, and answers compared; "
    "reversal: the pairs of --facts, asked both ways",
)
GENERATE = FLAGS.define_integer(
    "generate", 0, "held-out answers to be written and compared (--task=dialogues)", lower_bound=0, upper_bound=2**20
)
# How to write them: fields of `generation.Request`, each under its name.
OPTIONS = (
    FLAGS.define_integer("gen_length", None, "tokens after the prompt; default room for the longest held-out answer"),
    *sampling.OPTIONS,
    sampling.SEED,
)


def run(overrides: dict[str, str]) -> int:
    """Evaluate, print the result, and save it in the workdir unless that is read-only."""
    workdir = user_path(required(WORKDIR, "give a workdir of llada train"), "--workdir")
    mesh = opening.mesh(overrides)
    joining.join()
    from llada.evaluation import reversal
    from llada.scaling import held_out
    from llada.training import run as run_lib

    with processes.agreement():
        _check(run_lib.read_config(workdir))
    of_rows = (STEP, DRAWS, BATCHES, ROWS, MICROBATCHES, ESTIMATOR, TASK, GENERATE)
    opening.require_same([mesh, *(flag.value for flag in (*of_rows, *OPTIONS, *asking.OPTIONS, opening.DTYPE))])
    opened = opening.open_run(workdir, STEP.value, mesh)
    config = _with_flags(opened.config)
    if TASK.value == "reversal":
        facts, path = asking.evaluate(opened, _likelihood_settings(), _options()), workdir / reversal.FILE
    else:
        facts, path = _of_held_out(workdir, opened, config), workdir / held_out.FILE
    if processes.is_first():
        facts = {"step": opened.step, "task": TASK.value, **facts, "dtype": opening.DTYPE.value}
        _print(facts)
        if TASK.value != "reversal":
            _remark_on_rows(facts["rows"], config)
            facts = held_out.with_earlier(facts, workdir)
        _save(facts, path)
    return 0


def _of_held_out(workdir: Path, opened: "Run", config: Config) -> dict[str, Any]:
    """Figures of the run's held-out rows, of dialogues with those of their answers."""
    import jax

    from llada.evaluation import likelihoods, validation
    from llada.training import run as run_lib

    with processes.agreement():
        corpus = run_lib.corpus_of_run(workdir, config, opened.tokenizer, opened.corpus_digest)
    with jax.set_mesh(opened.mesh), processes.ending_together(UserError):
        scorer = likelihoods.scorer_for(config, opened.tokenizer, opened.mesh, ESTIMATOR.value, _of_sampler())
        validator = validation.Validator(
            config,
            opened.tokenizer.special,
            corpus.text_bytes(opened.tokenizer.token_bytes_V),
            corpus.held_out(config, opened.tokenizer),
            opened.mesh,
            ESTIMATOR.value,
            ROWS.value,
            scorer,
        )
        with progress.bar("rows scored") as show:
            show = progress.with_cost(show, f"{validator.count:,} held-out rows", _passes(opened, config, validator))
            facts = validator(opened.params, show)._asdict()
        if ESTIMATOR.value == "sampler":
            facts["sampler"] = _of_sampler()
        return facts | (_of_dialogues(opened, config, corpus, validator) if TASK.value == "dialogues" else {})


def _check(config: Config) -> None:
    """UserError for flags that do not go with this run, or with each other."""
    from llada.evaluation import likelihoods, validation
    from llada.inference import generation, likelihood

    if TASK.value == "reversal":
        _check_reversal(config)
        return
    if asking.given():
        raise UserError(f"--{asking.given()[0]} is for --task=reversal; this is --task={TASK.value}")
    if likelihoods.by_pairs(config, ESTIMATOR.value):
        settings = likelihoods.settings_for(config, ESTIMATOR.value, None, _of_sampler())
        likelihood.check_settings(config.model, settings)
        if ESTIMATOR.value not in likelihood.DRAWN and DRAWS.present:
            raise UserError(f"--draws={DRAWS.value}: --estimator={ESTIMATOR.value} draws nothing")
    else:
        validation.estimator_for(config, ESTIMATOR.value)
    if ROWS.value and BATCHES.value:
        raise UserError(f"--rows={ROWS.value} and --batches={BATCHES.value} exclude each other")
    if TASK.value == "dialogues" and not config.fine_tunes:
        raise UserError(f"--task=dialogues is for fine-tuned runs; this one's data.source={config.data.source}")
    given = [flag.name for flag in OPTIONS if flag.present]
    if ESTIMATOR.value == "sampler":
        _check_sampler(given)
        given = []
    if GENERATE.value and TASK.value != "dialogues":
        raise UserError(f"--generate={GENERATE.value} is for --task=dialogues")
    if given and not GENERATE.value:
        raise UserError(f"--{given[0]} says how answers are written; --generate=N, how many, is missing")
    generation.check(config, generation.Request(prompt="", **_options()))


def _check_sampler(given: list[str]) -> None:
    """UserError for flags, among those that say how to write, which the sampler that is scored does not have."""
    allowed = [flag.name for flag in OF_SAMPLER]
    if GENERATE.value:
        raise UserError(f"--generate={GENERATE.value} and --estimator=sampler read the same flags; run one at a time")
    if other := [name for name in given if name not in allowed]:
        raise UserError(
            f"--{other[0]} is not for --estimator=sampler, whose order is that of --remasking=top_probability; it "
            f"takes --{', --'.join(allowed)}"
        )


OF_SAMPLER = (
    sampling.STEPS,
    sampling.BLOCK_LENGTH,
    sampling.CONFIDENCE_THRESHOLD,
    sampling.TEMPERATURE,
    sampling.CFG_SCALE,
)


def _of_sampler() -> dict[str, Any]:
    """The sampler whose likelihood is asked for; its draws have the model's own distribution unless told otherwise."""
    from llada.evaluation import likelihoods

    return likelihoods.SAMPLER | {flag.name: flag.value for flag in OF_SAMPLER if flag.present}


def _passes(opened: "Run", config: Config, validator) -> int:
    """How often a row goes through the model, at most."""
    from llada.evaluation import likelihoods

    if not likelihoods.by_pairs(config, ESTIMATOR.value):
        return validator.count * validator.draws
    pairs, _ = likelihoods.pairs_of(config, opened.tokenizer.special, validator.rows)
    return likelihoods.cost(likelihoods.settings_for(config, ESTIMATOR.value, None, _of_sampler()), pairs)


def _check_reversal(config: Config) -> None:
    """UserError for flags that do not go with --task=reversal, for pairs that cannot be asked, and ways of writing."""
    from llada.inference import generation

    for flag in (BATCHES, ROWS, MICROBATCHES, GENERATE):
        if flag.present:
            raise UserError(f"--{flag.name}={flag.value} is not for --task=reversal, which asks all of --facts")
    given = [flag.name for flag in OPTIONS if flag.present]
    if given and asking.SCORING.value == "likelihood":
        raise UserError(f"--{given[0]} says how answers are written; with --scoring=likelihood none are")
    if "gen_length" in given and asking.ASKED.value == "blank":
        raise UserError(f"--gen_length={OPTIONS[0].value} is not for --ask=blank: gaps are as long as the right answer")
    asking.read(config, _likelihood_settings())
    generation.check(config, generation.Request(prompt="", **_options()))


def _likelihood_settings() -> "LikelihoodConfig":
    """How --task=reversal scores candidates."""
    from llada.inference.likelihood import LikelihoodConfig

    default = LikelihoodConfig()
    return LikelihoodConfig(estimator=ESTIMATOR.value or default.estimator, draws=DRAWS.value or default.draws)


def _options() -> dict[str, Any]:
    """The fields of `generation.Request` that say how to write answers."""
    return {flag.name: flag.value for flag in OPTIONS}


def _of_dialogues(opened, config: Config, corpus, validator) -> dict[str, Any]:
    """The loss by time of a mask predictor, and the scores of written answers. UserError as `answers.write`."""
    from llada.evaluation import answers, by_time
    from llada.objectives import families

    facts: dict[str, Any] = {}
    if families.of(config).masks:
        losses = by_time.losses_by_time(config, opened.tokenizer.special, validator, opened.params)
        facts["by_time"] = [loss._asdict() for loss in losses]
    if GENERATE.value:
        held_out = corpus.held_out(config, opened.tokenizer)
        written = answers.write(
            config, opened.params, opened.tokenizer, held_out, corpus.metadata.labels, GENERATE.value, _options()
        )
        facts["answers"] = answers.summary(written)
        with processes.agreement():
            if processes.is_first():
                answers.record(opened.workdir / answers.FILE, opened.step, corpus.metadata.digest, facts["answers"])
    return facts


def _with_flags(config: Config) -> Config:
    """The run's config with the values of the flags that were given."""
    evaluate = dataclasses.replace(
        config.evaluate,
        draws=DRAWS.value or config.evaluate.draws,
        batches=BATCHES.value or config.evaluate.batches,
    )
    train = dataclasses.replace(config.train, microbatches=MICROBATCHES.value or config.train.microbatches)
    return dataclasses.replace(config, evaluate=evaluate, train=train)


def _remark_on_rows(rows: int, config: Config) -> None:
    requested = config.evaluate.batches * config.train.batch_size
    if BATCHES.value is not None and rows < requested:
        print(
            f"--batches={BATCHES.value} are {requested:,} rows; the held-out side has {rows:,}, all of them used",
            file=sys.stderr,
        )
    if ROWS.value is not None and rows < ROWS.value:
        print(f"--rows={ROWS.value:,}: the held-out side has {rows:,}, all of them used", file=sys.stderr)


def _print(facts: dict[str, Any]) -> None:
    print(json_files.dumps(facts, indent=2), flush=True)


def _save(facts: dict[str, Any], path: Path) -> None:
    try:
        write_atomically(path, f"{json_files.dumps(facts, indent=2)}\n".encode())
    except (OSError, DiskError) as error:
        print(f"{path} could not be saved: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
