"""llada compare --llada=DIR --arm=DIR --out=DIR [--prompt=TEXT] [--infill=TEXT]

A LLaDA and its ARM twin side by side: a table of sizes, FLOPs and held-out figures, loss against FLOPs in
OUT/curves.png, samples of both, all in OUT/report.md. Refuses runs that read other rows, or in another order, and
figures of other held-out rows. Where both runs have an evaluation of the same rows by llada evaluate, that counts.
--config.mesh.fsdp=N and --dtype open models that one device does not hold.
"""

from pathlib import Path

from llada import paths
from llada.commands import opening
from llada.commands.command_flags import CommandFlags
from llada.errors import UserError

FLAGS = CommandFlags(opening.FLAGS)
LLADA = FLAGS.define_string("llada", None, "workdir of the finished LLaDA run")
ARM = FLAGS.define_string("arm", None, "workdir of the finished ARM run")
OUT = FLAGS.define_string("out", None, "directory for report.md and curves.png")
PROMPT = FLAGS.define_string("prompt", "def __init__(self, ", "text that both models continue")
INFILL = FLAGS.define_string(
    "infill", "    if self.[MASK:2] is None:\n        return [MASK:2]\n", "text whose [MASK:N] the LLaDA fills"
)
GEN_LENGTH = FLAGS.define_integer(
    "gen_length", None, "tokens after the prompt; default what the context leaves, at most 64"
)
TEMPERATURE = FLAGS.define_float("temperature", 0.7, "of the samples; 0 is greedy")


def run(overrides: dict[str, str]) -> int:
    """Write the report and print its table."""
    mesh = opening.mesh(overrides)
    out, places = _paths()
    from rich.console import Console
    from rich.table import Table

    from llada.files import write_atomically
    from llada.inference import generation
    from llada.inference.generation import Request
    from llada.scaling import comparison, figure

    figure.require_matplotlib()
    runs = [
        comparison.read_run("LLaDA", places[0], "diffusion", "--llada"),
        comparison.read_run("ARM", places[1], "autoregressive", "--arm"),
    ]
    runs, remarks = comparison.settle(runs)
    comparison.check_twins(runs)
    requests = _requests(Request)
    for name, _, request in requests:
        generation.check(next(run.config for run in runs if run.name == name), request)

    samples = _samples(runs, requests, mesh)
    write_atomically(out / "curves.png", comparison.draw_curves(runs))
    text = comparison.report(runs, samples, out, remarks)
    write_atomically(out / "report.md", text.encode("utf-8", "backslashreplace"))

    header, *rows = comparison.table(runs)
    printed = Table(*header)
    for row in rows:
        printed.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(printed)
    for remark in remarks:
        console.print(remark, soft_wrap=True)
    for sample in samples:
        console.print(sample.title, style="bold")
        console.print(sample.text)
    console.print(f"report: {out / 'report.md'}   curves: {out / 'curves.png'}", soft_wrap=True)
    return 0


def _paths() -> tuple[Path, list[Path]]:
    """Where the report goes, and the two runs. UserError for what can be told from the command line and the disk."""
    for name in ("llada", "arm", "out"):
        if FLAGS[name].value is None:
            raise UserError(f"--{name} is missing; see llada compare --help")
    places = [paths.user_path(FLAGS[name].value, f"--{name}") for name in ("llada", "arm")]
    out = paths.writable_directory(OUT.value, "--out")
    for name in ("curves.png", "report.md"):
        paths.writable_target(out / name, "--out")
    return out, places


def _requests(request) -> list[tuple]:
    """Which run writes what: its name, a title and the request."""
    going_on = request(prompt=PROMPT.value, gen_length=GEN_LENGTH.value, temperature=TEMPERATURE.value)
    return [
        ("LLaDA", "LLaDA, low-confidence remasking", going_on._replace(remasking="low_confidence")),
        ("LLaDA", "LLaDA, random remasking", going_on._replace(remasking="random")),
        ("ARM", "ARM", going_on),
        ("LLaDA", "LLaDA, infilling", request(infill=INFILL.value, temperature=0.0)),
    ]


def _samples(runs, requests, mesh) -> list:
    """What the two models write, of the steps that their figures are of."""
    import jax

    from llada.inference.generation import generate
    from llada.scaling.comparison import Sampled

    opened = {run.name: opening.open_run(run.workdir, run.summary["step"], mesh) for run in runs}
    samples = []
    for name, title, request in requests:
        model = opened[name]
        with jax.set_mesh(model.mesh):
            text = generate(model.config, model.params, model.tokenizer, [request])[0].text
        given = (request.prompt if request.infill is None else request.infill).rstrip("\n")
        samples.append(Sampled(f"{title}, temperature {request.temperature:g}", given, text))
    return samples
