"""llada compare --llada=DIR --arm=DIR --out=DIR [--prompt=TEXT] [--infill=TEXT]

A LLaDA and its ARM twin side by side: a table of sizes, FLOPs and held-out figures, loss against FLOPs in
OUT/curves.png, samples of both, all in OUT/report.md. Refuses runs that did not read the same rows in the same order.
"""

from pathlib import Path

from absl import flags

from llada.errors import UserError

LLADA = flags.DEFINE_string("llada", None, "workdir of the finished LLaDA run")
ARM = flags.DEFINE_string("arm", None, "workdir of the finished ARM run")
OUT = flags.DEFINE_string("out", None, "directory for report.md and curves.png")
PROMPT = flags.DEFINE_string("prompt", "def __init__(self, ", "text that both models continue")
INFILL = flags.DEFINE_string(
    "infill", "    if self.[MASK:2] is None:\n        return [MASK:2]\n", "text whose [MASK:N] the LLaDA fills"
)
GEN_LENGTH = flags.DEFINE_integer(
    "gen_length", None, "tokens after the prompt; default what the context leaves, at most 64"
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "of the samples; 0 is greedy")


def run() -> int:
    """Write the report and print its table."""
    for name in ("llada", "arm", "out"):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing; see llada compare --help")
    from rich.console import Console
    from rich.table import Table

    from llada.inference.generation import Request, generate
    from llada.scaling import comparison
    from llada.training import workdir as workdir_lib

    out = Path(OUT.value)
    runs = [comparison.read_run("LLaDA", Path(LLADA.value)), comparison.read_run("ARM", Path(ARM.value))]
    comparison.check_twins(runs)
    out.mkdir(parents=True, exist_ok=True)
    comparison.draw_curves(runs, out / "curves.png")

    opened = {run.name: workdir_lib.load(run.workdir) for run in runs}
    going_on = Request(prompt=PROMPT.value, gen_length=GEN_LENGTH.value, temperature=TEMPERATURE.value)
    samples = []
    for name, title, request in (
        ("LLaDA", "LLaDA, low-confidence remasking", going_on._replace(remasking="low_confidence")),
        ("LLaDA", "LLaDA, random remasking", going_on._replace(remasking="random")),
        ("ARM", "ARM", going_on),
        ("LLaDA", "LLaDA, infilling", Request(infill=INFILL.value, temperature=0.0)),
    ):
        model = opened[name]
        text = generate(model.config, model.params, model.tokenizer, [request])[0].text
        given = (request.prompt or request.infill).rstrip("\n")
        samples.append(comparison.Sampled(f"{title}, temperature {request.temperature:g}", given, text))
    (out / "report.md").write_text(comparison.report(runs, samples, out))

    header, *rows = comparison.table(runs)
    printed = Table(*header)
    for row in rows:
        printed.add_row(*row)
    console = Console()
    console.print(printed)
    for sample in samples:
        console.print(f"[bold]{sample.title}[/bold]")
        console.print(sample.text, markup=False, highlight=False)
    console.print(f"report: {out / 'report.md'}   curves: {out / 'curves.png'}", highlight=False, soft_wrap=True)
    return 0
