"""llada sample --workdir=DIR (--prompt=TEXT | --prompt_ids=12,7 | --infill='x = [MASK:4](y)') [--gen_length=48 ...]

Text from a trained model. A LLaDA starts from masks and fills a quota of them per step; an ARM continues the prompt
token by token. --infill fills the marks [MASK] (one token) and [MASK:N] (N tokens) anywhere in a text. --watch draws
the masks becoming words; --html=FILE writes a page that replays it. --config.mesh.* and --dtype say how the model
lies on the devices, and several processes may share it.
"""

import sys
from typing import TYPE_CHECKING, Any

from llada import json_files, processes
from llada.commands import joining, opening, sampling
from llada.commands.command_flags import CommandFlags
from llada.errors import UserError
from llada.paths import writable_target

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.inference.generation import Generated, Request, Watcher
    from llada.training.run import Run

FLAGS = CommandFlags(opening.FLAGS, joining.FLAGS, sampling.FLAGS)
WORKDIR = FLAGS.define_string("workdir", None, "a workdir of llada train")
STEP = FLAGS.define_integer("step", None, "checkpoint to sample from; default the latest")
JSON = FLAGS.define_bool("json", False, "print a line of JSON per text: ids, text, forward_passes, seconds ...")
WATCH = FLAGS.define_bool("watch", False, "draw the text in the terminal while its masks become words")
HTML = FLAGS.define_string("html", None, "write a page that replays how the text came to be")
# What to continue or to fill; each flag may be given several times, and then the texts are written as one batch.
PROMPTS = (
    FLAGS.define_multi_string("prompt", None, "text to continue; may be empty"),
    FLAGS.define_multi_string("prompt_ids", None, "the same as token ids: 12,7,99"),
    FLAGS.define_multi_string("infill", None, "text with [MASK] or [MASK:N] where tokens are to be filled in"),
)
SAMPLES = FLAGS.define_integer("samples", 1, "texts for each of them, with the seeds that follow --seed", lower_bound=1)
# Fields of `generation.Request`, each under its name.
OPTIONS = (
    FLAGS.define_integer("gen_length", None, "tokens after the prompt; default what the context leaves, at most 64"),
    *sampling.OPTIONS,
)


_WATCHABLE_SECONDS = 4.0  # a small model writes faster than anybody can see
_MOST_TEXTS = 100_000  # of one call: all are in memory until the last is written


def run(overrides: dict[str, str]) -> int:
    """Sample and print."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give a workdir of llada train")
    mesh = opening.mesh(overrides)
    joining.join()
    import jax

    from llada.inference import generation, replay
    from llada.training import run as run_lib

    with processes.agreement():
        requests = _requests()
        page = None if HTML.value is None else writable_target(HTML.value, "--html")
        config = run_lib.read_config(WORKDIR.value)
        for request in requests:
            generation.check(config, request)
        if WATCH.value and processes.count() > 1:
            raise UserError(f"--watch shows what one process does; there are {processes.count()}")
    opening.require_same([mesh, STEP.value, opening.DTYPE.value, requests])
    opened = opening.open_run(WORKDIR.value, STEP.value, mesh)
    with jax.set_mesh(opened.mesh), processes.ending_together(UserError):
        texts = (_generate_watched if WATCH.value else _generate)(opened, requests)
    if processes.is_first():
        _print(texts)
        if page is not None:
            tokenizer, first = opened.tokenizer, texts[0]
            replay.write_html(page, tokenizer, first.ids, first.step, tokenizer.mask_id, _facts(first))
    return 0


def _requests() -> "list[Request]":
    """A request per text: each prompt with each seed. UserError unless prompts are given by one flag."""
    from llada.inference.generation import Request

    given = [flag for flag in PROMPTS if flag.value]
    if len(given) != 1:
        names = " and ".join(f"--{flag.name}" for flag in given) or "none"
        raise UserError(f"give one of --prompt, --prompt_ids, --infill (as often as you like), not {names}")
    name, prompts = given[0].name, given[0].value or []
    _check_count(len(prompts) * SAMPLES.value)
    options: dict[str, Any] = {flag.name: flag.value for flag in OPTIONS}
    seeds = range(sampling.SEED.value, sampling.SEED.value + SAMPLES.value)
    return [Request(**options | {name: prompt, "seed": seed}) for prompt in prompts for seed in seeds]


def _check_count(texts: int) -> None:
    if texts > _MOST_TEXTS:
        raise UserError(f"{texts} texts are asked for; --samples times the prompts can be {_MOST_TEXTS} at most")
    if texts > 1 and (WATCH.value or HTML.value is not None):
        flag = "--watch" if WATCH.value else f"--html={HTML.value}"
        raise UserError(f"{flag} shows one text; {texts} are asked for")


def _generate(opened: "Run", requests: "list[Request]", observe: "Watcher | None" = None) -> "list[Generated]":
    from llada.inference.generation import generate

    return generate(opened.config, opened.params, opened.tokenizer, requests, observe)


def _generate_watched(opened: "Run", requests: "list[Request]") -> "list[Generated]":
    """The one text that is asked for, drawn while its masks become words."""
    from llada.inference import generation, replay

    steps = generation.total_steps(opened.config, opened.tokenizer, requests[0])
    console = _console()
    with replay.Watch(opened.tokenizer, opened.tokenizer.mask_id, steps, console) as watch:
        draw = replay.paced(watch, steps, _WATCHABLE_SECONDS) if console.is_terminal else watch
        return _generate(opened, requests, lambda index, *state: draw(*state))


def _print(texts: "list[Generated]") -> None:
    """Texts to standard output, unless they were drawn; what they cost to standard error."""
    for number, generated in enumerate(texts, 1):
        if JSON.value:
            print(json_files.dumps(generated._asdict()))
        elif not WATCH.value:
            print(f"--- {number}\n{generated.text}" if len(texts) > 1 else generated.text)
    print(_figures(texts), file=sys.stderr)
    sys.stdout.flush()


def _figures(texts: "list[Generated]") -> str:
    """What it took: canvas, passes, speed. Texts of one batch share their passes and seconds."""
    batches = {(text.seconds, text.forward_passes) for text in texts}
    written, seconds = sum(_written(text) for text in texts), sum(seconds for seconds, _ in batches)
    canvases = ", ".join(str(length) for length in sorted({len(text.ids) for text in texts}))
    return (
        f"{written} tokens written on canvases of {canvases} tokens, "
        f"{sum(passes for _, passes in batches)} forward passes, {written / seconds:.0f} tokens/s"
    )


def _written(text: "Generated") -> int:
    """How many tokens the model wrote: after an ARM's end token there are none."""
    return sum(step >= 0 for step in text.step)


def _console():
    """Where to draw: standard error when standard output is for JSON."""
    from rich.console import Console

    return Console(stderr=JSON.value)


def _facts(generated: "Generated") -> dict[str, str]:
    """What the page says about the text."""
    options = {flag.name: str(flag.value) for flag in OPTIONS if flag.value is not None}
    return {
        "model": str(WORKDIR.value),
        **options,
        "seed": str(sampling.SEED.value),
        "tokens written": str(_written(generated)),
        "forward passes": str(generated.forward_passes),
        "seconds": f"{generated.seconds:.2f}",
        "tokens per second": f"{generated.tokens_per_second:.0f}",
    }
