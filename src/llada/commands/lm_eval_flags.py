"""Flags of llada lm_eval, and what they ask for: tasks, checkpoints, settings, template."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llada.commands import joining, opening, sampling
from llada.commands.command_flags import CommandFlags
from llada.errors import UserError
from llada.evaluation.presets import PRESETS, Row
from llada.paths import user_path

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.data.chat_template import ChatTemplate
    from llada.evaluation.harness import Settings
    from llada.training.run import Run

FLAGS = CommandFlags(opening.FLAGS, joining.FLAGS, sampling.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train; with --at=all also a directory of several")
TASKS = FLAGS.define_string("tasks", None, "names of lm-eval's tasks or groups, separated by commas")
PRESET = FLAGS.define_enum("preset", None, list(PRESETS), "a published evaluation: its tasks (or --tasks of them)")
INCLUDE_PATH = FLAGS.define_string("include_path", None, "directory of more tasks: YAML files")
AT = FLAGS.define_string("at", None, "step to evaluate, default the latest; all: every checkpoint, and a picture")
LIMIT = FLAGS.define_float("limit", None, "documents per task, or below 1 the share of them: to try things out")
NUM_FEWSHOT = FLAGS.define_integer("num_fewshot", None, "examples before each question; default the task's", 0, 1000)
DRY_RUN = FLAGS.define_bool("dry_run", False, "print what would run, and what it costs")
OUT = FLAGS.define_string("out", None, "directory of the results; default DIR/lm_eval")
FINISHED = FLAGS.define_string(
    "finished", None, "file of finished requests; default one for each model under --out; none: off"
)
LOG_SAMPLES = FLAGS.define_bool("log_samples", False, "also write every document with the model's answer")
CHAT = FLAGS.define_bool("chat", False, "contexts are dialogues, in the model's chat template")
TEMPLATE = FLAGS.define_string("template", None, "plain, llada or a Jinja file instead of the model's own; with --chat")
SYSTEM = FLAGS.define_string("system", None, "a text before all contexts; with --chat the system message")
ESTIMATOR = FLAGS.define_string(
    "estimator", "l_of_L", "of log-likelihoods: l_of_L (Eq. (6)), bernoulli (Eq. (4)), chain_rule, sampler, ..."
)
DRAWS = FLAGS.define_integer("draws", 128, "masks per answer; answers with fewer masks than that are enumerated")
GEN_LENGTH = FLAGS.define_integer("gen_length", None, "tokens to write; default the task's max_gen_toks")
WINDOW = FLAGS.define_integer("window", None, "tokens per window of a long text; default half the context")
BOOTSTRAP = FLAGS.define_integer(
    "bootstrap_iters", 1000, "of standard errors that have no formula (perplexities, BLEU); 0: none", lower_bound=0
)
UNSAFE = FLAGS.define_bool("confirm_run_unsafe_code", False, "allow tasks that run the code which the model writes")

# What all processes must have alike, beside rows, checkpoints and settings.
OF_ALL = (AT, LIMIT, DRY_RUN, CHAT, TEMPLATE, SYSTEM, BOOTSTRAP, UNSAFE)

# What `Options`, how texts are written, takes from the flags.
WRITING = (*sampling.OPTIONS, sampling.SEED)
_OF_DIFFUSION = tuple(flag for flag in sampling.OPTIONS if flag.name != "temperature")


class Model(NamedTuple):
    """A checkpoint to be evaluated."""

    workdir: Path
    step: int | None

    @property
    def name(self) -> str:
        """What lm-eval calls it, and its directory of results."""
        return f"{self.workdir.resolve().name}-{'latest' if self.step is None else self.step}"


def rows() -> list[Row]:
    """What is asked for, with the flags in it that change all rows. UserError where that is nothing."""
    names = [name for name in (TASKS.value or "").split(",") if name.strip()]
    preset = PRESETS[PRESET.value].rows if PRESET.value else ()
    if not names and not preset:
        raise UserError(f"--tasks is missing; give names of lm-eval's tasks, or --preset: one of {', '.join(PRESETS)}")
    of_preset = {row.task: row for row in preset}
    rows = [of_preset.get(name.strip(), Row(name.strip())) for name in names] if names else list(preset)
    twice = [row.task for number, row in enumerate(rows) if row.task in [other.task for other in rows[:number]]]
    if twice:
        raise UserError(f"--tasks names {twice[0]} twice")
    if NUM_FEWSHOT.value is not None:
        rows = [row._replace(shots=NUM_FEWSHOT.value) for row in rows]
    if LIMIT.value is not None and not (0 < LIMIT.value < 1 or (LIMIT.value >= 1 and LIMIT.value.is_integer())):
        raise UserError(f"--limit={LIMIT.value} must be a number of documents, or a share of them between 0 and 1")
    return rows


def include_path() -> Path | None:
    """The directory of more tasks, None where none is given. UserError for what is no directory."""
    if INCLUDE_PATH.value is None:
        return None
    path = user_path(INCLUDE_PATH.value, "--include_path")
    if not path.is_dir():
        raise UserError(f"--include_path={path} is no directory; give one that holds YAML files of tasks")
    return path


def require_lm_eval() -> None:
    """UserError where the extra is not installed."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'llada-jax[eval]'")


def models(workdir: Path) -> list[Model]:
    """The checkpoints that --at and --workdir mean. UserError where there is none."""
    from llada.training import run as run_lib
    from llada.training.run_item import saved_steps

    if AT.value != "all":
        step = None if AT.value is None else _step(AT.value)
        run_lib.read_config(workdir)
        steps = saved_steps(workdir / "checkpoints")
        if steps and step not in (None, *steps):
            raise UserError(
                f"--at={step} is not saved in {workdir / 'checkpoints'}; saved: {', '.join(map(str, steps))}"
            )
        if step is None and steps:
            step = steps[-1]
        return [Model(workdir, step)]
    if (workdir / "config.json").exists() and not (workdir / "sweep.json").exists():
        workdirs = [workdir]
    else:
        places = sorted([*workdir.glob("*/config.json"), *workdir.glob("runs/*/config.json")])
        workdirs = [path.parent for path in places]
    models = []
    for each in workdirs:
        steps = saved_steps(each / "checkpoints")
        # A sweep compares runs of different sizes where they end.
        models += [Model(each, step) for step in (steps[-1:] if (workdir / "sweep.json").exists() else steps)]
    if not models:
        raise UserError(
            f"--workdir={workdir} has no checkpoint, nor has a workdir in it; give one of llada train or sweep"
        )
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"--workdir={workdir} has two runs of one name; evaluate them one by one")
    return models


def _step(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise UserError(f"--at={text} must be a step, or all")
    return int(text)


def settings(models: Sequence[Model], rows: Sequence[Row]) -> "dict[Path, dict[str, Settings]]":
    """How each run answers the requests of each row's task. UserError for what a run cannot do, or no run heeds."""
    from llada.inference import generation, likelihood
    from llada.training import run as run_lib

    configs = {workdir: run_lib.read_config(workdir) for workdir in dict.fromkeys(model.workdir for model in models)}
    for flag in (DRAWS, ESTIMATOR, *_OF_DIFFUSION):
        if flag.present and all(config.model.causal for config in configs.values()):
            raise UserError(f"--{flag.name}={flag.value} is for diffusion models; an ARM scores exactly, in order")
    found = {}
    for workdir, config in configs.items():
        found[workdir] = {row.task: _settings_of(row, config.model.causal) for row in rows}
        for settings in found[workdir].values():
            likelihood.check_settings(config.model, settings.scoring)
            likelihood.window_of(config.model, settings.window)
            fields = settings.writing._asdict() | {"gen_length": None}
            generation.check(config, generation.Request(prompt="", **fields))
    return found


def _settings_of(row: Row, causal: bool) -> "Settings":
    """A row's settings: flags that were given, else the row's, else the defaults. Of an ARM only what it can follow."""
    from llada.evaluation.harness import Settings
    from llada.inference.chat import Options
    from llada.inference.likelihood import LikelihoodConfig

    length = GEN_LENGTH.value if GEN_LENGTH.present else row.gen_length
    flags: dict[str, Any] = {flag.name: flag.value for flag in WRITING if flag.present}
    if causal:
        flags = {name: value for name, value in flags.items() if name not in [flag.name for flag in _OF_DIFFUSION]}
        return Settings(LikelihoodConfig(), Options()._replace(**flags), length, WINDOW.value)
    chosen = {name: getattr(row, name) for name in ("block_length", "cfg_scale", "eos")} | flags
    scale = chosen.pop("cfg_scale") or 0.0
    scoring = LikelihoodConfig(
        estimator=ESTIMATOR.value,
        draws=DRAWS.value if DRAWS.present or row.draws is None else row.draws,
        cfg_scale=scale,
    )
    return Settings(scoring, Options()._replace(**chosen, cfg_scale=scale or None), length, WINDOW.value)


def template(opened: "Run") -> "ChatTemplate | None":
    """What renders dialogues. UserError where they are asked for and the model has no template."""
    from llada.data.chat_template import ChatTemplate
    from llada.inference.chat import template_source

    chat = is_chat()
    if TEMPLATE.value is not None and not chat:
        raise UserError(f"--template={TEMPLATE.value} is for --chat, or a preset of an instruct model")
    if not chat:
        return None
    if TEMPLATE.value is not None:
        return ChatTemplate(opened.tokenizer, *template_source(TEMPLATE.value, "--template"))
    if opened.tokenizer.template is None:
        asks = "--chat" if CHAT.value or not PRESET.value else f"--preset={PRESET.value}"
        raise UserError(
            f"{asks} asks for a chat template, and the model's tokenizer has none; give the one it was tuned with: "
            "--template=plain, --template=llada or --template=FILE"
        )
    return ChatTemplate(opened.tokenizer)


def is_chat() -> bool:
    """Whether contexts are dialogues: --chat, or a preset of instruct models."""
    return CHAT.value or (PRESET.value is not None and PRESETS[PRESET.value].chat)
