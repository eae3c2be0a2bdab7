"""Projected sampling, scoring and evaluation of LLaDA 8B on 16 chips of v5e, 16 GiB each: docs/plan/inference.md.

python benchmarks/plan_inference.py [--only=TEXT] [--most=N] [--again]

Each row is a program that `llada sample`, `likelihood`, `evaluate` or `lm_eval` runs, compiled for the slice at a
setting of the paper's evaluations (rows of 4,096 tokens; answers of 1,024 in blocks of 32). A row is written as soon as
it is compiled, with its commit and date, and not compiled again: interrupt it freely. Nothing here is a measurement.
Needs libtpu (pip install 'llada-jax[tpu]'); about 2 minutes a compilation on 2 cores.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from llada import mesh as mesh_lib
from llada.commands import experiment
from llada.errors import UserError
from llada.files import write_atomically
from llada.planning import fitting, programs, report, topology
from llada.scaling.numbers import markdown_table
from llada.training.calls import commit

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "plan" / "inference.md"
SLICE, MODEL = "v5e:4x4", "llada_8b"

_ANSWER = {"prompt_length": 1024, "gen_length": 1024, "block_length": 32, "batch": 16}
# What is run: the program, and its options as flags of llada plan.
PROGRAMS = {
    "rows of 4,096 tokens, by any bound or chain rule": ("likelihood", {}),
    "`llada evaluate`, its own bound": ("evaluate", {}),
    "texts of 1,024 tokens behind 1,024, blocks of 32, dual cache": ("sample", _ANSWER | {"cache": "dual"}),
    "the same without a cache": ("sample", _ANSWER),
    "such texts by `--estimator=sampler`": ("likelihood", _ANSWER | {"estimator": "sampler"}),
    "`is_greedy` of answers of 64 tokens behind 960": (
        "likelihood",
        {"prompt_length": 960, "gen_length": 64, "batch": 16, "estimator": programs.IS_GREEDY},
    ),
}
PLACES = [  # fsdp, tensor, dtype of the parameters
    (16, 1, "bfloat16"),
    (16, 1, "float32"),
    (1, 16, "bfloat16"),
    (1, 16, "float32"),
    (4, 4, "bfloat16"),
]
HEADER = "program,mesh fsdp x tensor,parameters,sequences,peak HBM GiB of,seconds,tokens/s,bound by,commit,date".split(
    ","
)


def main() -> None:
    """Fill the page, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose program, mesh and dtype have this text")
    parser.add_argument("--most", type=int, default=None, help="compile at most so many, then stop")
    parser.add_argument("--again", action="store_true", help="also those that the page has")
    options = parser.parse_args()
    rows = read_rows(PAGE.read_text()) if PAGE.exists() else {}
    hardware = topology.describe(SLICE)
    left = options.most
    for what, (name, flags) in PROGRAMS.items():
        for fsdp, tensor, dtype in PLACES:
            key = (what, f"{fsdp} x {tensor}", dtype)
            if options.only not in " ".join(key) or (key in rows and not options.again) or left == 0:
                continue
            rows[key] = [*key, *cells(name, flags, fsdp, tensor, dtype, hardware)]
            print(" | ".join(rows[key]), flush=True)
            write_atomically(PAGE, page(rows).encode())
            left = None if left is None else left - 1


def cells(name: str, flags: dict, fsdp: int, tensor: int, dtype: str, hardware: topology.Slice) -> list[str]:
    """What a compilation says; why it does not fit, where it does not."""
    changes = {"mesh.fsdp": str(fsdp), "mesh.tensor": str(tensor)}
    config = experiment.read(str(ROOT / "experiments" / f"{MODEL}.py"), changes)
    mesh = mesh_lib.make(config.mesh, hardware.devices)
    program = programs.make(config, mesh, name, programs.Workload(**flags, dtype=dtype))
    compiled = programs.lower_and_compile(program, mesh)
    made = [commit() or "-", str(datetime.date.today())]
    if compiled.refusal:
        wanted = fitting.wanted_bytes(compiled.refusal) / 2**30
        return [str(program.rows), f"{wanted:.1f}: does not fit", "-", "-", "-", *made]
    figures = report.figures(config, hardware, mesh, program, compiled)
    memory, projected = figures["hbm_bytes"], figures["projection"]
    return [
        str(program.rows),
        f"{memory['peak'] / 2**30:.1f} of {memory['capacity'] / 2**30:.1f}",
        f"{projected['seconds']:.2f}",
        f"{projected['tokens_per_second']:,.0f}",
        str(projected["roofline_binding"]),
        *made,
    ]


def page(rows: dict[tuple, list[str]]) -> str:
    """The Markdown page."""
    claim, method = report.METHOD.split(". ", 1)
    order = {what: i for i, what in enumerate(PROGRAMS)}
    ranked = sorted(rows, key=lambda key: (order.get(key[0], len(order)), *key[1:]))
    text = (
        f"Written by `python benchmarks/plan_inference.py`: LLaDA 8B on {SLICE}, 16 chips. **{claim}.** {method} "
        "Seconds are those of one program, for all of its sequences; tokens are those that it scores or writes."
    )
    return f"# Projected inference\n\n{text}\n\n{markdown_table([HEADER, *(rows[key] for key in ranked)])}\n"


def read_rows(text: str) -> dict[tuple, list[str]]:
    """The rows of a page by what they are of."""
    found = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if line.startswith("|") and len(parts) == len(HEADER) and parts[0] in PROGRAMS:
            found[tuple(parts[:3])] = parts
    return found


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        print(f"plan_inference: {mistake}", file=sys.stderr)
        sys.exit(2)
