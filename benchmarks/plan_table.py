"""Projected training steps of LLaDA 1B and 8B (and the ARMs) on five TPU generations: docs/plan/table.md and .json.

python benchmarks/plan_table.py [--models=llada_1b,llada_8b] [--topologies=v5p:4x4x8,2xv5p:4x4x8] [--again]

table.md is in git, one row an entry; table.json, which holds the whole plan of each, is written beside it and is not:
without it the entries are compiled again, and each replaces its row of table.md when it is done.

A topology is a slice, or that many of them (2xv5p:4x4x8), joined by the data-centre network.

Each entry is the real step compiled for the slice, parameters split over FSDP devices (on a torus of three axes not
over all: there gradients would come back whole) and repeated over the rest, with the fewest microbatches that fit; a
compilation that does not fit says how many to try next. Entries already in table.json are skipped: interrupt it freely.
Nothing here is a measurement. Needs libtpu (pip install 'llada-jax[tpu]'); about 2 minutes a compilation on 2 cores.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from llada import mesh as mesh_lib
from llada.commands import experiment
from llada.errors import UserError
from llada.planning import fitting, programs, report, topology

ROOT = Path(__file__).resolve().parents[1]
MODELS = "llada_8b,llada_1b,arm_7b,arm_1b"
FSDP = {"v4:4x4x4": 32, "v5e:16x16": 128, "v5p:4x4x8": 32, "v6e:16x16": 128, "tpu7x:4x4x4": 32}
TOPOLOGIES = ",".join([*FSDP, "2xv5p:4x4x8", "2xv6e:16x16"])


def main():
    """Fill the table, entry by entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--topologies", default=TOPOLOGIES)
    parser.add_argument("--remat", default=None, help="default: the least that memory has room for")
    parser.add_argument("--most", type=int, default=None, help="compile at most so many entries, then stop")
    parser.add_argument(
        "--again", action="store_true", help="compile entries of table.json too, from their microbatches on"
    )
    options = parser.parse_args()
    out = ROOT / "docs" / "plan"
    out.mkdir(parents=True, exist_ok=True)
    path, page = out / "table.json", out / "table.md"
    entries = json.loads(path.read_text()) if path.exists() else {}
    rows = read_rows(page.read_text()) if page.exists() else {}
    done = 0
    for model in options.models.split(","):
        for name in options.topologies.split(","):
            remat = options.remat or least_remat(model, name)
            key = f"{model} {name} {remat}"
            if (key in entries and not options.again) or (options.most is not None and done >= options.most):
                continue
            # Less recomputation needs more memory: no fewer microbatches than with more.
            known = entries.get(key) or entries.get(f"{model} {name} full", {})
            entries[key] = entry(model, name, remat, known.get("microbatches", 1))
            done += 1
            path.write_text(json.dumps(entries, indent=1) + "\n")
            rows |= {key: row(key, plan) for key, plan in entries.items()}
            page.write_text(table(rows))


def least_remat(model: str, name: str) -> str:
    """The remat that recomputes least of those that there is room for."""
    small = "1b" in model
    if "v5p" in name or "tpu7x" in name or ("v6e" in name and small):
        return "dots"
    # On one v6e slice it would be a sequence at a time, and all weights for each.
    return "attention" if small or name in ("v4:4x4x4", "2xv6e:16x16") else "full"


def entry(model: str, name: str, remat: str, microbatches: int) -> dict:
    """The plan with the fewest that fit, from `microbatches` on; the refusal where not one sequence a device does."""
    slices, slice_name = re.fullmatch(r"(?:(\d+)x)?(\w+:[\dx]+)", name).groups()
    hardware = topology.describe(slice_name, int(slices or 1))
    devices, fsdp = len(hardware.devices), FSDP[slice_name]
    while True:
        overrides = {"mesh.fsdp": str(fsdp), "model.remat": remat, "train.microbatches": str(microbatches)}
        config = experiment.read(str(ROOT / "experiments" / f"{model}.py"), {})
        batch = max(devices, config.train.batch_size // devices * devices)  # ARM 7B's 4,224 is no multiple of 256
        config = experiment.read(
            str(ROOT / "experiments" / f"{model}.py"), overrides | {"train.batch_size": str(batch)}
        )
        mesh = mesh_lib.make(config.mesh, hardware.devices)
        program = programs.make(config, mesh, "train", programs.Workload())
        compiled = programs.lower_and_compile(program, mesh)
        figures = None if compiled.refusal else report.figures(config, hardware, mesh, program, compiled)
        if figures and figures["hbm_bytes"]["peak_share"] <= 1:
            print(key_line(model, name, figures), flush=True)
            return figures
        # Even without a refusal the compiler may allocate more than the capacity.
        share = (
            figures["hbm_bytes"]["peak_share"]
            if figures
            else (fitting.wanted_bytes(compiled.refusal) * hardware.chip.devices / hardware.chip.capacity)
        )
        print(f"{model} {name}, {microbatches} microbatches: {share:.0%} of HBM", flush=True)
        per_device = batch // devices
        wanted = share * microbatches
        larger = [g for g in range(microbatches + 1, per_device + 1) if per_device % g == 0]
        if not larger:
            return {"refusal": f"one sequence at once on a device wants {share:.0%} of HBM"}
        # Memory falls more slowly than the batch, so one step further than in proportion is not too far.
        microbatches = next((g for g in larger if g >= wanted), larger[-1])


def rank(key: str) -> tuple[int, int]:
    """Models and slices in the order in which they are listed above."""
    model, name, _ = key.split()
    return MODELS.find(model), TOPOLOGIES.find(name)


def key_line(model: str, name: str, figures: dict) -> str:
    """Progress."""
    p = figures["projection"]
    return f"{model} {name}: {p['seconds']:.2f} s a step, useful MFU {p['useful_mfu']:.1%}"


def table(rows: dict[str, str]) -> str:
    """The Markdown page of these rows, by key."""
    claim, method = report.METHOD.split(". ", 1)
    lines = [
        "# Projected training steps",
        "",
        "Written by `python benchmarks/plan_table.py`, which also writes `docs/plan/table.json` (not in git): the "
        f"whole plan of each row. **{claim}.** {method} Attention kernels, for which the compiler estimates nothing, "
        "are taken at half of peak with 128 channels a head and in proportion with fewer, causal ones for the tiles "
        "that they do. Useful MFU credits the vocabulary head on the rows that meet it, dense-credit MFU on all; "
        "neither credits recomputation. The floor is the roofline alone: what perfect overlap would reach. The batch "
        "of a step is the experiment's, or the next smaller multiple of the devices (2xv6e: 1,024 sequences for "
        "1,280).",
        "",
        "| model | slice | chips | data x fsdp | remat | sequences at once per device | peak HBM GiB of "
        "| executed / useful | FSDP bytes / least | gathers and scatters asynchronous | s per step | tokens/s/chip "
        "| useful MFU | dense-credit MFU | floor, s | days for its tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(rows[key] for key in sorted(rows, key=rank))]) + "\n"


def read_rows(page: str) -> dict[str, str]:
    """The rows of a page by key (model, slice and remat)."""
    rows = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            model, name, _, _, remat = (cell.strip(" `") for cell in line.split("|")[1:6])
            rows[f"{model} {name} {remat}"] = line
    return rows


def row(key: str, plan: dict) -> str:
    """One line of the table."""
    model, name, remat = key.split()
    if "refusal" in plan:
        return f"| `{model}` | {name} | | | {remat} | {plan['refusal']} |" + " |" * 10
    p, t, m, f = (plan[group] for group in ("projection", "traffic", "hbm_bytes", "matrix_flops"))
    at_once = plan["batch_size"] // plan["devices"] // plan["microbatches"]
    return (
        f"| `{model}` | {name} | {plan['chips']} "
        f"| {plan['mesh']['data']} x {plan['mesh']['fsdp']} | {remat} | {at_once} "
        f"| {m['peak'] / 2**30:.1f} of {m['capacity'] / 2**30:.1f} | {f['executed_over_useful']:.3f} "
        f"| {t['fsdp_over_minimum']:.2f} | {t['parts_asynchronous_share']:.0%} | {p['seconds']:.2f} "
        f"| {p['tokens_per_second_per_chip']:,.0f} | {p['useful_mfu']:.1%} | {p['dense_credit_mfu']:.1%} "
        f"| {p['roofline_seconds']:.2f} | {p['budget_days']:,.0f} |"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        print(f"plan_table: {mistake}", file=sys.stderr)
        sys.exit(2)
