"""What leaving unmasked positions out of the vocabulary saves on a TPU slice: python benchmarks/plan_dense.py

Compiles the training step of a model for a slice three times: as it is, with all logits at once, and with logits of all
positions in chunks that the backward pass recomputes (benchmarks/dense_losses.py). Same mesh, remat and batch.
With --static instead twice, as it is and with loops of a static length, for 55 % of all rows.
Printed for each: FLOPs of products with the vocabulary matrix, all matrix FLOPs, the compiler's own cycles as seconds
(nothing for attention kernels, which it estimates no cycles for), the projected seconds and peak HBM, with ratios to
ours; which share of the bytes of gathers and reduce-scatters is asynchronous; and with --batches the largest number of
sequences at once on a device that fits, ours and with all logits: about ten compilations more, of minutes each.

--config.key=value changes a key, for another shape; of 50 M parameters without embeddings, say:
--config.model.{layers=16,width=512,heads=8,kv_heads=8,ffn=1408}, in a shell that expands braces.
Nothing is measured. Needs libtpu (pip install 'llada-jax[tpu]').
"""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import dense_losses
import record

from llada import mesh as mesh_lib
from llada.commands import experiment
from llada.errors import UserError
from llada.planning import kernels, programs, report, topology
from llada.planning.hlo import Module

ROOT = Path(__file__).resolve().parents[1]


def main():
    """Compile and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "experiments" / "llada_1b.py"))
    parser.add_argument("--topology", default="v5p:4x4x8")
    parser.add_argument("--fsdp", type=int, default=32)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--sequences", type=int, default=4, help="at once on a device")
    parser.add_argument("--static", action="store_true", help="compare with loops of a static length")
    parser.add_argument("--batches", action="store_true", help="find the largest batch on a device too")
    record.add_flags(parser)
    rest, overrides = experiment.take_overrides(sys.argv[1:])
    options = parser.parse_args(rest, argparse.Namespace(overrides=overrides))
    dense_losses.register()
    names = {"ours": "diffusion", "all logits": dense_losses.DENSE, "in chunks": dense_losses.CHUNKED}
    if options.static:
        names = {"ours": "diffusion", "static": dense_losses.STATIC}
    steps, rows = {}, {}
    for label, objective in names.items():
        steps[label] = attempt(options, objective, options.sequences)
        rows[label] = row(steps[label], steps["ours"])
        print(f"{label:12} {', '.join(f'{name} {cell}' for name, cell in rows[label].items())}", flush=True)
    if options.batches:
        for label in list(names)[:2]:
            most = largest(options, names[label], steps[label])
            print(f"{label:12} at most {most} sequences at once on a device", flush=True)
            rows[label][MOST] = str(most)
    table = [
        {"step": label} | {column: cells.get(column, "") for column in rows["ours"]} for label, cells in rows.items()
    ]
    record.record(options, "plan_dense", table, machine=f"{options.topology}, projected")


def attempt(options, objective: str, sequences: int) -> dict | None:
    """Figures of one step of `sequences` on every device; None where they do not fit."""
    hardware = topology.describe(options.topology)
    changes = {
        "mesh.fsdp": str(options.fsdp),
        "model.remat": options.remat,
        "train.batch_size": str(sequences * len(hardware.devices)),
        "train.microbatches": "1",
        "objective.random_length_fraction": "0.0",
    }
    config = experiment.read(options.config, options.overrides | changes)
    mesh = mesh_lib.make(config.mesh, hardware.devices)
    # What a diffusion step would need is what all three are credited with.
    program = programs.make(config, mesh, "train", programs.Workload())
    other = dataclasses.replace(config, objective=dataclasses.replace(config.objective, name=objective))
    jitted = programs.make(other, mesh, "train", programs.Workload()).jitted
    compiled = programs.lower_and_compile(program._replace(jitted=jitted), mesh)
    if compiled.refusal:
        return None
    figures = report.figures(config, hardware, mesh, program, compiled)
    if figures["hbm_bytes"]["peak_share"] > 1:
        return None
    chip = hardware.chip
    module = Module(compiled.text, program.trips, False, chip.flops_per_cycle)
    figures["vocabulary_flops"] = chip.devices * vocabulary_flops(module, config.model.vocab_size)
    figures["own_seconds"] = (module.cycles(module.entry) - kernel_cycles(module)) / chip.clock
    return figures


def vocabulary_flops(module: Module, size: int) -> float:
    """Executed FLOPs of the products in which the vocabulary is an axis, on one device."""
    total = 0.0
    for name, body in module.computations.items():
        for instruction in body if module.executions[name] else ():
            flops = module.flops(name, instruction)
            if flops and instruction.opcode in ("dot", "convolution"):
                arrays = [*instruction.arrays, *(module.operand(name, instruction, k).arrays[0] for k in range(2))]
                total += module.executions[name] * flops * any(size in array.dims for array in arrays)
    return total


def kernel_cycles(module: Module) -> float:
    """What `Module.cycles` adds to the compiler's estimates for kernels, which it has none for."""
    return sum(
        module.executions[name] * module.instruction_cycles(name, instruction)
        for name, body in module.computations.items()
        if module.executions[name]
        for instruction in body
        if kernels.is_kernel(instruction.opcode, instruction.attributes) and not instruction.cycles
    )


def largest(options, objective: str, known: dict | None) -> int:
    """Sequences at once on a device; 0 if one does not fit. `known`: figures of `options.sequences` of them.

    By bisection between what fits and what does not, begun where memory in proportion to the batch would end.
    """
    fits, too_many = (0, options.sequences) if known is None else (options.sequences, None)
    one = attempt(options, objective, 1) if options.sequences > 1 else known
    trial, stride = None, 1
    if known and one and options.sequences > 1:
        peaks = [figures["hbm_bytes"]["peak"] for figures in (one, known)]
        each = (peaks[1] - peaks[0]) / (options.sequences - 1)
        trial = 1 + int((known["hbm_bytes"]["capacity"] - peaks[0]) / each)
    while too_many is None or too_many - fits > 1:
        if trial is None or not fits < trial < (too_many or math.inf):
            trial = max(2 * fits, 1) if too_many is None else (fits + too_many) // 2
        figures = attempt(options, objective, trial)
        print(f"    {trial} sequences {'do not fit' if figures is None else 'fit'}", file=sys.stderr, flush=True)
        if figures is None:
            too_many, trial = trial, trial - stride
        else:
            fits, trial = trial, trial + stride
        stride *= 2  # away from a guess that was wrong by more
    return fits


MOST = "sequences that fit on a device"
FIGURES = {
    "vocabulary TFLOP": lambda f: f["vocabulary_flops"] / 1e12,
    "all products TFLOP": lambda f: f["matrix_flops"]["executed"] / 1e12,
    "compiler's cycles, s": lambda f: f["own_seconds"],
    "projected, s": lambda f: f["projection"]["seconds"],
    "HBM, GiB": lambda f: f["hbm_bytes"]["peak"] / 2**30,
}


def row(figures: dict | None, ours: dict) -> dict[str, str]:
    """One variant: figures, in brackets ours over them."""
    if figures is None:
        return dict.fromkeys(FIGURES, "does not fit")
    cells = {name: f"{of(figures):.4g} ({of(ours) / of(figures):.3f})" for name, of in FIGURES.items()}
    cells["asynchronous gathers and scatters"] = f"{figures['traffic']['parts_asynchronous_share']:.1%}"
    cells["unhidden links, s"] = f"{figures['projection']['exposed_link_seconds']:.3g}"
    return cells


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        print(f"plan_dense: {mistake}", file=sys.stderr)
        sys.exit(2)
