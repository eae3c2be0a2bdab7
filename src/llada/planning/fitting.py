"""What does not fit a device: what is largest in it, and what to change, by arithmetic."""

import dataclasses
import itertools
import math
import re
from types import SimpleNamespace

from llada import accounting
from llada.config import Config
from llada.planning.programs import Compiled, Program
from llada.planning.topology import Chip, Slice


def refusal(config: Config, place: Slice, mesh, program: Program, compiled: Compiled) -> str:
    """One line for a program that does not fit: how much it wants, what is largest, what to change."""
    fast = re.search(r"memory space vmem. (Used [\d.]+\w of [\d.]+\w)", compiled.refusal)
    if fast:
        return (
            f"a kernel does not fit the on-chip memory of {place.name} ({fast[1]}): its tiles are too large there; "
            "try other --config.train.microbatches, or smaller tiles in model/attention.py"
        )
    wants = re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", compiled.refusal)
    wanted = wanted_bytes(compiled.refusal)
    said = f"needs {wants[1]} and has {wants[2]} a device" if wants else compiled.refusal.splitlines()[0]
    buffers = largest_buffers(config, mesh, program)
    named = ", ".join(f"{name} {gibibytes(size)}" for name, size in buffers[:3])
    return f"does not fit {place.name}: {said}; largest: {named}; {advice(config, mesh, program, place.chip, wanted)}"


def wanted_bytes(refusal: str) -> float:
    """Bytes a device would need, from the compiler's refusal; infinite where it does not say."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", refusal)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else math.inf


def largest_buffers(config: Config, mesh, program: Program) -> list[tuple[str, float]]:
    """What a device must hold at least, by arithmetic, the largest first; bytes."""
    m, axes = config.model, mesh.shape
    shard = axes["fsdp"] * axes["tensor"]
    total = accounting.parameters(m).total
    width = 2 if m.dtype in ("bfloat16", "float16") else 4
    if program.name != "train":
        each = 2.0 if program.in_half else 4.0
        return [("parameters", each * total / shard), ("vocabulary matrix", width * m.vocab_size * m.width)]
    L = config.data.sequence_length
    rows = config.train.batch_size // config.train.microbatches * L / (axes["data"] * axes["fsdp"])
    of_attention = m.head_size * (2 * m.heads + 2 * m.key_value_heads) / axes["tensor"]
    per_layer = {
        "offload": 0,
        "full": m.width,
        "attention": m.width + of_attention,
        "dots": m.width * 3 + 2 * m.ffn / axes["tensor"] + of_attention,
    }
    per_layer["none"] = 2 * per_layer["dots"] + 2 * m.width + m.ffn / axes["tensor"]
    found = [
        ("parameters and moments (float32)", 12.0 * total / shard),
        ("gradients (float32)", 4.0 * total / shard),
        (f"activations kept for the backward pass (remat={m.remat})", width * rows * m.layers * per_layer[m.remat]),
        ("gradient of the vocabulary matrix (float32)", 4.0 * m.vocab_size * m.width),
        ("vocabulary matrix", float(width * m.vocab_size * m.width)),
    ]
    return sorted(found, key=lambda entry: -entry[1])


def advice(config: Config, mesh, program: Program, chip: Chip, wanted: float) -> str:
    """What to change where a device would need `wanted` bytes and has fewer: by arithmetic, nothing that cannot do.

    Of what suffices the first in the order in which it costs least: microbatches, then remat, then fsdp.
    """
    capacity, shape = chip.capacity / chip.devices, dict(mesh.shape)
    devices = math.prod(shape.values())
    held, state = _state(config, program)
    if state / devices > capacity:
        return (
            f"{held} alone are {gibibytes(state / devices)} a device over all {devices}: take a larger slice (of "
            f"{math.ceil(state / capacity)} devices or more), or a smaller model"
            + ("" if program.name == "train" or program.in_half else ", or --dtype=bfloat16")
        )
    wider = [f for f in _divisors(shape["data"] * shape["fsdp"]) if f >= shape["fsdp"]]
    if program.name != "train":
        less = "a larger --config.train.microbatches" if program.name == "evaluate" else "a smaller --batch"
        over = state / (shape["fsdp"] * shape["tensor"]) > capacity
        helps = {
            "a larger --config.mesh.fsdp": shape["fsdp"] < devices,
            less: not over and program.arguments[1].shape[0] > shape["data"] * shape["fsdp"],
            "--dtype=bfloat16": not program.in_half,
            "a larger slice": True,
        }
        return f"{f'{held} alone are over: ' if over else ''}try {' or '.join(way for way in helps if helps[way])}"
    over = f"{held} alone are over: " if state / (shape["fsdp"] * shape["tensor"]) > capacity else ""
    # What arithmetic misses is taken to be activations.
    buffers = dict(largest_buffers(config, mesh, program))
    activations = next(size for name, size in buffers.items() if name.startswith("activations"))
    missed = wanted - sum(buffers.values()) if wanted < math.inf else 0.0
    scale = max(1.0, 1.0 + missed / activations) if activations else 1.0
    per_device = config.train.batch_size // (shape["data"] * shape["fsdp"])
    remats = [config.model.remat] + ["full"] * (config.model.remat not in ("full", "offload"))
    for fsdp, remat in itertools.product(wider, remats):
        for microbatches in (g for g in _divisors(per_device) if g >= config.train.microbatches):
            changed = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, remat=remat),
                train=dataclasses.replace(config.train, microbatches=microbatches),
            )
            there = SimpleNamespace(shape=shape | {"fsdp": fsdp, "data": shape["data"] * shape["fsdp"] // fsdp})
            sizes = largest_buffers(changed, there, program)
            total = sum(size * (scale if name.startswith("activations") else 1.0) for name, size in sizes)
            given = {"mesh.fsdp": fsdp, "model.remat": remat, "train.microbatches": microbatches}
            now = (shape["fsdp"], config.model.remat, config.train.microbatches)
            flags = [
                f"--config.{key}={value}" for (key, value), old in zip(given.items(), now, strict=True) if value != old
            ]
            if flags and total <= 0.95 * capacity:
                return f"{over}try {' '.join(flags)}, --search for other ways, or a larger slice"
    return "--search looks for a mesh, remat and batch that fit; else take a larger slice"


def _state(config: Config, program: Program) -> tuple[str, float]:
    """What must be held whatever the batch, over all devices: its name and bytes."""
    total = accounting.parameters(config.model).total
    if program.name == "train":
        return "parameters and moments", 12.0 * total
    return "parameters", (2.0 if program.in_half else 4.0) * total


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def gibibytes(size: float) -> str:
    """Memory: GiB, or MiB where it is little."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"
