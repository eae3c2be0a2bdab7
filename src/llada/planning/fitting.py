"""What does not fit a device: what is largest in it, and what to change, by arithmetic.

`axes` are sizes of the mesh by axis name: `mesh.shape`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

from llada import accounting
from llada.config import Config
from llada.planning.programs import Program
from llada.planning.topology import Chip, Slice

_ROOM = 0.95  # of a device's memory: what advice may fill by arithmetic, which misses some
_NO_SIMPLE_CHANGE = "--search looks for a mesh, remat and batch that fit; else take a larger slice"


def refusal(config: Config, hardware: Slice, axes: Mapping[str, int], program: Program, message: str) -> str:
    """One line for a program that the compiler refused with `message`: its need, what is largest, what to change."""
    on_chip = re.search(r"memory space vmem. (Used [\d.]+\w of [\d.]+\w)", message)
    if on_chip:
        return (
            f"a kernel does not fit the on-chip memory of {hardware.name} ({on_chip[1]}): its tiles are too large; "
            "try other --config.train.microbatches, or smaller tiles in model/attention_kernels.py"
        )
    needs = re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", message)
    reason = f"needs {needs[1]} and has {needs[2]} a device" if needs else message.splitlines()[0]
    largest = ", ".join(f"{name} {gibibytes(size)}" for name, size in largest_buffers(config, axes, program)[:3])
    change = advice(config, axes, program, hardware.chip, wanted_bytes(message))
    return f"does not fit {hardware.name}: {reason}; largest: {largest}; {change}"


def wanted_bytes(message: str) -> float:
    """Bytes a device would need, from the compiler's refusal; infinite where it does not say."""
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    return float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1) if match else math.inf


def largest_buffers(config: Config, axes: Mapping[str, int], program: Program) -> list[tuple[str, float]]:
    """What a device must hold at least, by arithmetic: names and bytes, the largest first."""
    m = config.model
    shards = axes["fsdp"] * axes["tensor"]
    total = accounting.parameters(m).total
    width = 2 if m.dtype in ("bfloat16", "float16") else 4
    vocabulary = float(width * m.vocab_size * m.width)
    if program.name != "train":
        of_device = math.ceil(program.rows / (axes["data"] * axes["fsdp"])) * program.length
        buffers = [
            ("parameters", program.parameter_bytes * total / shards),
            ("vocabulary matrix", vocabulary),
            ("activations of a layer", width * of_device * (2.0 * m.width + 2 * m.ffn / axes["tensor"])),
        ]
        return sorted(buffers, key=lambda buffer: -buffer[1])
    L = config.data.sequence_length
    rows = config.train.batch_size // config.train.microbatches * L / (axes["data"] * axes["fsdp"])
    of_attention = m.head_size * (2 * m.heads + 2 * m.key_value_heads) / axes["tensor"]
    per_layer = {  # numbers of a row that the backward pass takes from memory, by remat
        "offload": 0,
        "full": m.width,
        "attention": m.width + of_attention,
        "dots": m.width * 3 + 2 * m.ffn / axes["tensor"] + of_attention,
    }
    per_layer["none"] = 2 * per_layer["dots"] + 2 * m.width + m.ffn / axes["tensor"]
    buffers = [
        ("parameters and moments (float32)", 12.0 * total / shards),
        ("gradients (float32)", 4.0 * total / shards),
        (f"activations saved for the backward pass (remat={m.remat})", width * rows * m.layers * per_layer[m.remat]),
        ("gradient of the vocabulary matrix (float32)", 4.0 * m.vocab_size * m.width),
        ("vocabulary matrix", vocabulary),
    ]
    return sorted(buffers, key=lambda buffer: -buffer[1])


def advice(config: Config, axes: Mapping[str, int], program: Program, chip: Chip, wanted: float) -> str:
    """What to change where a device would need `wanted` bytes and has fewer: by arithmetic, nothing that cannot do."""
    capacity, devices = chip.capacity / chip.devices, math.prod(axes.values())
    name, state = _state(config, program)
    if state / devices > capacity:
        return (
            f"{name} alone are {gibibytes(state / devices)} a device over all {devices}: take a larger slice (of "
            f"{math.ceil(state / capacity)} devices or more), or a smaller model"
            + ("" if program.name == "train" or program.in_half else ", or --dtype=bfloat16")
        )
    over = state / (axes["fsdp"] * axes["tensor"]) > capacity
    if program.name == "train":
        change = _training_change(config, axes, program, capacity, wanted)
    else:
        change = _inference_change(axes, program, over)
    return f"{name} alone are over: {change}" if over and change != _NO_SIMPLE_CHANGE else change


def _state(config: Config, program: Program) -> tuple[str, float]:
    """What must be held whatever the batch, over all devices: its name and bytes."""
    total = accounting.parameters(config.model).total
    if program.name == "train":
        return "parameters and moments", 12.0 * total
    return "parameters", program.parameter_bytes * total


def _inference_change(axes: Mapping[str, int], program: Program, over: bool) -> str:
    of_evaluate = "a larger --config.train.microbatches (llada evaluate: --microbatches)"
    smaller_batch = of_evaluate if program.name == "evaluate" else "a smaller --batch"
    helps = {
        "a larger --config.mesh.fsdp": axes["fsdp"] < math.prod(axes.values()),
        smaller_batch: not over and program.rows > axes["data"] * axes["fsdp"],
        "--dtype=bfloat16": not program.in_half,
        "a larger slice": True,
    }
    return f"try {' or '.join(change for change in helps if helps[change])}"


def _training_change(config: Config, axes: Mapping[str, int], program: Program, capacity: float, wanted: float) -> str:
    """Of the changes that suffice the one that costs least: microbatches, then remat, then fsdp."""
    # What arithmetic misses is taken to be activations.
    buffers = dict(largest_buffers(config, axes, program))
    activations = next(size for name, size in buffers.items() if name.startswith("activations"))
    missed = wanted - sum(buffers.values()) if wanted < math.inf else 0.0
    scale = max(1.0, 1.0 + missed / activations) if activations else 1.0
    ways = axes["data"] * axes["fsdp"]
    fsdp_sizes = [f for f in _divisors(ways) if f >= axes["fsdp"]]
    remats = [config.model.remat] + ["full"] * (config.model.remat not in ("full", "offload"))
    counts = [g for g in _divisors(config.train.batch_size // ways) if g >= config.train.microbatches]
    for fsdp, remat, microbatches in itertools.product(fsdp_sizes, remats, counts):
        changed = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, microbatches=microbatches),
        )
        sizes = largest_buffers(changed, {**axes, "fsdp": fsdp, "data": ways // fsdp}, program)
        total = sum(size * (scale if name.startswith("activations") else 1.0) for name, size in sizes)
        flags = [
            f"--config.{key}={value}"
            for key, value, now in (
                ("mesh.fsdp", fsdp, axes["fsdp"]),
                ("model.remat", remat, config.model.remat),
                ("train.microbatches", microbatches, config.train.microbatches),
            )
            if value != now
        ]
        if flags and total <= _ROOM * capacity:
            return f"try {' '.join(flags)}, --search for other ways, or a larger slice"
    return _NO_SIMPLE_CHANGE


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def gibibytes(size: float) -> str:
    """Memory: GiB, or MiB where it is little."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"
