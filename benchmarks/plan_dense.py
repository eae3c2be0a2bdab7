"""What leaving unmasked positions out of the vocabulary saves on a TPU slice: python benchmarks/plan_dense.py

Compiles the training step of a model for a slice three times: as it is, with all logits at once, and with logits of all
positions in chunks that the backward pass computes again (benchmarks/dense_losses.py). Same mesh, remat and batch.
Printed for each: FLOPs of products with the vocabulary matrix, all matrix FLOPs, the compiler's seconds and peak HBM,
with ratios to ours; and with --batches the largest number of sequences at once on a device that fits, by bisection.
Nothing is measured. Needs libtpu (pip install 'llada-jax[tpu]').
"""

import argparse
import dataclasses
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import dense_losses

from llada import mesh as mesh_lib
from llada.commands import experiment
from llada.planning import programs, report, topology
from llada.planning.hlo import Module

ROOT = Path(__file__).resolve().parents[1]


def main():
    """Compile and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "experiments" / "llada_1b.py"))
    parser.add_argument("--topology", default="v5p:4x4x8")
    parser.add_argument("--fsdp", type=int, default=16)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--sequences", type=int, default=4, help="at once on a device")
    parser.add_argument("--layers", type=int, default=None, help="fewer, for a quick look")
    parser.add_argument("--batches", action="store_true", help="find the largest batch on a device too")
    given = parser.parse_args()
    names = {"ours": "diffusion", "all logits": dense_losses.WHOLE, "in chunks": dense_losses.CHUNKED}
    found = {}
    for label, objective in names.items():
        found[label] = attempt(given, objective, given.sequences)
        print(line(label, found[label], found["ours"]), flush=True)
    if given.batches:
        most = {label: largest(given, objective) for label, objective in names.items()}
        for label, sequences in most.items():
            print(f"{label:12} at most {sequences} sequences at once on a device")


def attempt(given, objective: str, sequences: int) -> dict | None:
    """Figures of one step of `sequences` on every device; None where they do not fit."""
    place = topology.describe(given.topology)
    changes = {
        "mesh.fsdp": str(given.fsdp),
        "model.remat": given.remat,
        "train.batch_size": str(sequences * len(place.devices)),
        "train.microbatches": "1",
        "objective.random_length_fraction": "0.0",
    }
    if given.layers:
        changes["model.layers"] = str(given.layers)
    config = experiment.read(given.config, changes)
    mesh = mesh_lib.make(config.mesh, place.devices)
    # What a diffusion step would need is what all three are credited with.
    program = programs.make(config, mesh, "train", programs.Request())
    other = dataclasses.replace(config, objective=dataclasses.replace(config.objective, name=objective))
    jitted = programs.make(other, mesh, "train", programs.Request()).jitted
    compiled = programs.lower_and_compile(program._replace(jitted=jitted), mesh)
    if compiled.refusal:
        return None
    figures = report.figures(config, place, mesh, program, compiled)
    module = Module(compiled.text, program.trips, False, place.chip.peak_flops / place.chip.devices / place.chip.clock)
    figures["vocabulary_flops"] = place.chip.devices * vocabulary_flops(module, config.model.vocab_size)
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


def largest(given, objective: str) -> int:
    """Sequences at once on a device, by bisection between what fits and what does not; 0 if one does not."""
    fits, too_many = 0, None
    trial = given.sequences
    while too_many is None or too_many - fits > 1:
        if attempt(given, objective, trial) is None:
            too_many = trial
        else:
            fits = trial
        trial = 2 * fits if too_many is None else (fits + too_many) // 2
    return fits


def line(label: str, figures: dict | None, ours: dict) -> str:
    """One variant."""
    if figures is None:
        return f"{label:12} does not fit"
    rows = [
        ("vocabulary", lambda f: f["vocabulary_flops"] / 1e12, "TFLOP"),
        ("all products", lambda f: f["matrix_flops"]["executed"] / 1e12, "TFLOP"),
        ("compiler", lambda f: f["projection"]["compiler_seconds"], "s"),
        ("HBM", lambda f: f["hbm_bytes"]["peak"] / 2**30, "GiB"),
    ]
    parts = (f"{name} {of(figures):.4g} {unit} (ours {of(ours) / of(figures):.3f})" for name, of, unit in rows)
    return f"{label:12} " + ", ".join(parts)


if __name__ == "__main__":
    main()
