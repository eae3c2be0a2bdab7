"""llada compare --llada=DIR --arm=DIR --out=DIR [--prompt=TEXT] [--infill=TEXT]

A LLaDA and its ARM twin side by side: a table of sizes, FLOPs and held-out figures, loss against FLOPs in
OUT/curves.png, samples of both, all in OUT/report.md. Refuses runs that read other rows, or in another order, and
figures of other held-out rows. Where both runs have an evaluation of the same rows by llada evaluate, that counts.
--config.mesh.fsdp=N and --dtype open models that one device does not hold.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from llada import paths
from llada.commands import opening
from llada.commands.command_flags import CommandFlags, required
from llada.config import MeshConfig

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from llada.inference.generation import Request
    from llada.scaling.comparison import RunRecord, Sampled

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
    llada_dir, arm_dir, out = _paths()
    from llada.files import write_atomically
    from llada.inference import generation
    from llada.objectives.families import AUTOREGRESSIVE, DIFFUSION
    from llada.scaling import comparison, figure

    figure.require_matplotlib()
    runs = [comparison.read_run(DIFFUSION, llada_dir), comparison.read_run(AUTOREGRESSIVE, arm_dir)]
    runs, remarks = comparison.choose_figures(runs)
    comparison.check_twins(runs)
    requests = _requests(*runs)
    for run, _, request in requests:
        generation.check(run.config, request)

    samples = _samples(requests, mesh)
    write_atomically(out / "curves.png", comparison.draw_curves(runs))
    text = comparison.report(runs, samples, out, remarks)
    write_atomically(out / "report.md", text.encode("utf-8", "backslashreplace"))
    _print(comparison.table(runs), remarks, samples, out)
    return 0


def _paths() -> tuple[Path, Path, Path]:
    """The two runs, and where the report goes. UserError for what the command line and the disk show to be wrong."""
    advice = "see llada compare --help"
    llada_dir, arm_dir = (paths.user_path(required(flag, advice), f"--{flag.name}") for flag in (LLADA, ARM))
    out = paths.writable_directory(required(OUT, advice), "--out")
    for name in ("curves.png", "report.md"):
        paths.writable_target(out / name, "--out")
    return llada_dir, arm_dir, out


def _requests(llada: "RunRecord", arm: "RunRecord") -> list[tuple["RunRecord", str, "Request"]]:
    """Which run writes what: the run, a title and the request."""
    from llada.inference.generation import Request

    continued = Request(prompt=PROMPT.value, gen_length=GEN_LENGTH.value, temperature=TEMPERATURE.value)
    return [
        (llada, f"{llada.name}, low-confidence remasking", continued._replace(remasking="low_confidence")),
        (llada, f"{llada.name}, random remasking", continued._replace(remasking="random")),
        (arm, arm.name, continued),
        (llada, f"{llada.name}, infilling", Request(infill=INFILL.value, temperature=0.0)),
    ]


def _samples(requests: list[tuple["RunRecord", str, "Request"]], mesh: MeshConfig) -> list["Sampled"]:
    """What the models write, of the steps that their figures are of."""
    import jax

    from llada.inference.generation import generate
    from llada.scaling.comparison import Sampled

    opened = {run.name: opening.open_run(run.workdir, run.summary["step"], mesh) for run, *_ in requests}
    samples = []
    for run, title, request in requests:
        model = opened[run.name]
        with jax.set_mesh(model.mesh):
            text = generate(model.config, model.params, model.tokenizer, [request])[0].text
        prompt = request.prompt if request.infill is None else request.infill
        samples.append(Sampled(f"{title}, temperature {request.temperature:g}", (prompt or "").rstrip("\n"), text))
    return samples


def _print(table: list[list[str]], remarks: list[str], samples: list["Sampled"], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    header, *rows = table
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
