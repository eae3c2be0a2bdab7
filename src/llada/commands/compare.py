"""llada compare --llada=DIR --arm=DIR --out=DIR [--estimator=NAME,NAME] [--prompt=TEXT] [--infill=TEXT]

A LLaDA and its ARM twin side by side: a table of sizes, FLOPs and held-out figures, loss against FLOPs in
OUT/curves.png, samples of both, all in OUT/report.md. Refuses runs that read other rows, or in another order, and
figures of other held-out rows. Where both runs have an evaluation of the same rows by llada evaluate, that counts.
--also=DIR[,DIR] sets further finished runs beside the two, such as a LLaDA with another training objective.
The gap is told by each measure that llada evaluate has taken of both on the same rows, and which of them is a bound and
which exact; --estimator=sampler,chain_rule asks for these. --config.mesh.fsdp=N and --dtype open models that one device
does not hold.

Of runs that were fine-tuned on dialogues the report is on the answers that llada evaluate --task=dialogues --generate=N
had both write: how many are exact, for each task and turn, in OUT/report.md and OUT/answers.png.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from llada import paths
from llada.commands import opening
from llada.commands.command_flags import CommandFlags, required
from llada.config import MeshConfig
from llada.errors import UserError

if TYPE_CHECKING:  # at run time these would import JAX, before the flags are parsed
    from rich.console import Console

    from llada.inference.generation import Request
    from llada.scaling.comparison import RunRecord, Sampled

FLAGS = CommandFlags(opening.FLAGS)
LLADA = FLAGS.define_string("llada", None, "workdir of the finished LLaDA run")
ARM = FLAGS.define_string("arm", None, "workdir of the finished ARM run")
ALSO = FLAGS.define_string("also", None, "workdirs of further finished runs on the same rows, separated by commas")
OUT = FLAGS.define_string("out", None, "directory for report.md and curves.png")
ESTIMATOR = FLAGS.define_string(
    "estimator", None, "measures to tell the gap by, separated by commas, of llada evaluate; default all there are"
)
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
    llada_dir, arm_dir, also, out = _paths()
    from llada.files import write_atomically
    from llada.inference import generation
    from llada.objectives.families import AUTOREGRESSIVE, DIFFUSION
    from llada.scaling import comparison, figure, gaps

    figure.require_matplotlib()
    further = [comparison.read_further(directory) for directory in also]
    runs = [comparison.read_run(DIFFUSION, llada_dir), *further, comparison.read_run(AUTOREGRESSIVE, arm_dir)]
    if twice := next((run.name for run in further if [each.name for each in runs].count(run.name) > 1), None):
        raise UserError(f"--{ALSO.name}={ALSO.value} names two runs {twice!r}; directories' names tell them apart")
    runs, remarks = comparison.choose_figures(runs)
    comparison.check_twins(runs)
    if further and any(run.config.fine_tunes for run in runs):
        raise UserError(f"--{ALSO.name}={ALSO.value} is for pre-training; of fine-tuned runs two are compared")
    if ESTIMATOR.value and any(run.config.fine_tunes for run in runs):
        raise UserError(f"--estimator={ESTIMATOR.value} is for pre-training; see evaluation.json of fine-tuned runs")
    if all(run.config.fine_tunes for run in runs):
        return _compare_answers(runs, remarks, out)
    measured = gaps.table(gaps.lines(runs, [name for name in (ESTIMATOR.value or "").split(",") if name]))
    requests = _requests(runs[0], further, runs[-1])
    for run, _, request in requests:
        generation.check(run.config, request)

    samples = _samples(requests, mesh)
    write_atomically(out / "curves.png", comparison.draw_curves(runs))
    text = comparison.report(runs, samples, out, remarks, measured)
    write_atomically(out / "report.md", text.encode("utf-8", "backslashreplace"))
    _print([comparison.table(runs), *([measured] if measured else [])], remarks, samples, out)
    return 0


def _paths() -> tuple[Path, Path, list[Path], Path]:
    """The two runs, further ones, and where the report goes.

    UserError for what the command line and the disk show to be wrong.
    """
    advice = "see llada compare --help"
    llada_dir, arm_dir = (paths.user_path(required(flag, advice), f"--{flag.name}") for flag in (LLADA, ARM))
    out = paths.writable_directory(required(OUT, advice), "--out")
    for name in ("curves.png", "answers.png", "report.md"):
        paths.writable_target(out / name, "--out")
    also = [paths.user_path(word, f"--{ALSO.name}") for word in (ALSO.value or "").split(",") if word]
    return llada_dir, arm_dir, also, out


def _compare_answers(runs: list["RunRecord"], remarks: list[str], out: Path) -> int:
    """The report on answers that both have written."""
    from llada.files import write_atomically
    from llada.scaling import comparison, fine_tuning

    sampled = fine_tuning.read(runs)
    words = [f"--{flag.name}={flag.value}" for flag in (LLADA, ARM, OUT)]
    text = fine_tuning.report(runs, sampled, remarks, shlex.join(["llada", "compare", *words]))
    if sampled:
        write_atomically(out / "answers.png", fine_tuning.draw(sampled))
    write_atomically(out / "curves.png", comparison.draw_curves(runs))
    write_atomically(out / "report.md", text.encode("utf-8", "backslashreplace"))
    _print_tables([*([fine_tuning.table(sampled)] if sampled else []), comparison.table(runs)], remarks)
    pictures = ", ".join(str(out / name) for name in ("answers.png", "curves.png") if sampled or name == "curves.png")
    print(f"report: {out / 'report.md'}   pictures: {pictures}")
    return 0


def _requests(
    llada: "RunRecord", further: list["RunRecord"], arm: "RunRecord"
) -> list[tuple["RunRecord", str, "Request"]]:
    """Which run writes what: the run, a title and the request."""
    from llada.inference.generation import Request

    continued = Request(prompt=PROMPT.value, gen_length=GEN_LENGTH.value, temperature=TEMPERATURE.value)
    by_confidence = continued._replace(remasking="low_confidence")
    return [
        (llada, f"{llada.name}, low-confidence remasking", by_confidence),
        (llada, f"{llada.name}, random remasking", continued._replace(remasking="random")),
        *((run, f"{run.name}, low-confidence remasking", by_confidence) for run in further if run.family.masks),
        *((run, run.name, continued) for run in further if not run.family.masks),
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


def _print(tables: list[list[list[str]]], remarks: list[str], samples: list["Sampled"], out: Path) -> None:
    console = _print_tables(tables, remarks)
    for sample in samples:
        console.print(sample.title, style="bold")
        console.print(sample.text)
    console.print(f"report: {out / 'report.md'}   curves: {out / 'curves.png'}", soft_wrap=True)


def _print_tables(tables: list[list[list[str]]], remarks: list[str]) -> "Console":
    """Print tables, header first, and remarks; the console that did it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    for header, *rows in tables:
        printed = Table(*header)
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
    for remark in remarks:
        console.print(remark, soft_wrap=True)
    return console
