"""What a plan says: one nested dict, for JSON, and the same as text.

Figures are per chip and per run of the program (a step of training) unless their name says otherwise. Seconds are
projections, never measurements.
"""

import re
from collections import defaultdict
from typing import Any

from llada import accounting
from llada.config import Config
from llada.planning import projection, traffic
from llada.planning.fitting import advice, gibibytes
from llada.planning.hlo import Module
from llada.planning.programs import Compiled, Program
from llada.planning.topology import Slice

METHOD = (
    "A projection, not a measurement. Compiled ahead of time for the slice; seconds are the larger of (a) the "
    "compiler's cycle estimates times loop turns over the clock plus the link time its schedule leaves unhidden, and "
    f"(b) a roofline: products at {projection.MATH_SHARE:.0%} of peak, HBM at {projection.HBM_SHARE:.0%}, ICI, DCN."
)


def figures(config: Config, place: Slice, mesh, program: Program, compiled: Compiled) -> dict[str, Any]:
    """Everything there is to say about a program that fits."""
    chip = place.chip
    per_cycle = chip.peak_flops / chip.devices / chip.clock
    module = Module(compiled.text, program.trips, config.model.causal, per_cycle)
    moved = traffic.Traffic(module, traffic.Links(mesh, place))
    found = projection.project(module, moved, place)
    peak = place.chip.peak_flops
    hbm = memory(place, compiled)
    too_much = (
        advice(config, mesh, program, place.chip, hbm["peak"] / place.chip.devices) if hbm["peak_share"] > 1 else None
    )
    useful, dense = (None if total is None else total / place.chips for total in (program.useful, program.dense))
    return {
        **heading(config, place, mesh, program),
        "compile_seconds": compiled.seconds,
        "hbm_bytes": hbm,
        "advice": too_much,
        "matrix_flops": {
            "executed": found.matrix_flops,
            "useful": useful,
            "dense_credit": dense,
            "executed_over_useful": None if useful is None else found.matrix_flops / useful,
        },
        "loops": _loops(module),
        "collectives": _collectives(moved, place.chip.devices),
        "traffic": _traffic(config, program, mesh, moved, place),
        "projection": {
            "method": METHOD,
            "seconds": found.seconds,
            "compiler_seconds": found.compiler_seconds,
            "roofline_seconds": found.roofline_seconds,
            "roofline_binding": found.binding,
            "math_seconds": found.math_seconds,
            "hbm_seconds": found.hbm_seconds,
            "hbm_bytes_moved": found.hbm_bytes,
            "ici_seconds": found.ici_seconds,
            "dcn_seconds": found.dcn_seconds,
            "exposed_link_seconds": found.exposed_seconds,
            "tokens_per_second": program.tokens / found.seconds,
            "tokens_per_second_per_chip": program.tokens / found.seconds / place.chips,
            "useful_mfu": None if useful is None else useful / found.seconds / peak,
            "dense_credit_mfu": None if dense is None else dense / found.seconds / peak,
            "roofline_useful_mfu": None if useful is None else useful / found.roofline_seconds / peak,
            **(_budget(config, found.seconds, place) if program.name == "train" else {}),
        },
    }


def heading(config: Config, place: Slice, mesh, program: Program) -> dict[str, Any]:
    """What was compiled for what."""
    return {
        "program": program.name,
        "topology": place.name,
        "slices": place.slices,
        "chips": place.chips,
        "devices": len(place.devices),
        "mesh": dict(mesh.shape),
        "parameters": accounting.parameters(config.model).total,
        "remat": config.model.remat,
        "batch_size": config.train.batch_size if program.name == "train" else None,
        "microbatches": config.train.microbatches if program.name == "train" else None,
        "tokens": program.tokens,
    }


def memory(place: Slice, compiled: Compiled) -> dict[str, float]:
    """HBM bytes per chip by kind, beside what there is."""
    per_chip = {kind: value * place.chip.devices for kind, value in compiled.memory.items()}
    # What the compiler allots, outputs that take over arguments counted once; its own peak may leave out gaps.
    allotted = sum(per_chip[kind] for kind in ("arguments", "outputs", "temporaries", "program")) - per_chip["aliased"]
    per_chip["peak"] = max(per_chip["peak"], allotted)
    return per_chip | {"capacity": place.chip.capacity, "peak_share": per_chip["peak"] / place.chip.capacity}


def _loops(module: Module) -> list[dict[str, Any]]:
    """Loops with products in them, and every loop whose turns are expected rather than counted."""
    return [loop._asdict() for loop in module.loops if not loop.counted or "searchsorted" not in loop.path]


def _collectives(moved: traffic.Traffic, devices: int) -> list[dict[str, Any]]:
    """One entry for all collectives of a kind, axes and array; bytes per chip."""
    groups: dict[tuple, list[traffic.Collective]] = defaultdict(list)
    for c in moved.collectives:
        groups[c.kind, c.axes, c.array.dtype, c.array.dims, c.asynchronous].append(c)
    found = []
    for (kind, axes, dtype, dims, asynchronous), members in groups.items():
        size = devices * sum(c.times * c.bytes for c in members)
        seconds = sum(c.times * c.seconds for c in members)
        hidden = sum(c.times * c.hidden for c in members)
        found.append(
            {
                "kind": kind,
                "axes": list(axes),
                "largest_array": f"{dtype}[{','.join(map(str, dims))}]",
                "times": sum(c.times for c in members),
                "bytes": size,
                "seconds": seconds,
                "hidden_seconds": hidden,
                "asynchronous": asynchronous,
            }
        )
    return sorted(found, key=lambda entry: -entry["bytes"])


def _traffic(config: Config, program: Program, mesh, moved: traffic.Traffic, place: Slice) -> dict[str, Any]:
    """Bytes per axis and kind, the least that FSDP can do with, and how much is hidden."""
    devices = place.chip.devices
    per_axis: dict[str, float] = defaultdict(float)
    for c in moved.collectives:
        per_axis["+".join(c.axes) or "none"] += devices * c.times * c.bytes
    total = sum(per_axis.values())
    hidden = devices * sum(c.times * c.bytes * c.hidden / c.seconds for c in moved.collectives if c.seconds)
    overlapped = devices * sum(c.times * c.bytes for c in moved.collectives if c.asynchronous)
    parts = [c for c in moved.collectives if c.kind in ("all-gather", "reduce-scatter")]
    parts_bytes = sum(c.times * c.bytes for c in parts)
    parts_overlapped = sum(c.times * c.bytes for c in parts if c.asynchronous)
    minimum = None
    if program.name == "train" and mesh.shape["fsdp"] > 1:
        share = (mesh.shape["fsdp"] - 1) / mesh.shape["fsdp"] / mesh.shape["tensor"]
        passes = 3 * config.train.microbatches
        minimum = devices * passes * 2.0 * accounting.parameters(config.model).total * share
    fsdp = per_axis.get("fsdp", 0.0)
    return {
        "bytes": total,
        "bytes_by_axes": dict(per_axis),
        "fsdp_minimum_bytes": minimum,
        "fsdp_over_minimum": None if minimum is None else fsdp / minimum,
        "asynchronous_share": overlapped / total if total else None,
        "hidden_share": hidden / total if total else None,
        "parts_asynchronous_share": parts_overlapped / parts_bytes if parts_bytes else None,
    }


def _budget(config: Config, seconds: float, place: Slice) -> dict[str, float]:
    days = config.steps * seconds / 86_400
    return {
        "budget_tokens": float(config.steps * config.tokens_per_step),
        "budget_days": days,
        "budget_chip_hours": days * 24 * place.chips,
    }


def text(found: dict[str, Any]) -> str:
    """The dict as aligned lines."""
    p, t, f, m = (found[key] for key in ("projection", "traffic", "matrix_flops", "hbm_bytes"))
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    slices = f"{found['slices']} slices of " if found["slices"] > 1 else ""
    batch = f", {found['batch_size']} sequences a step" if found["batch_size"] else ""
    batch += f" in {found['microbatches']} microbatches" if (found["microbatches"] or 1) > 1 else ""
    tokens = f"{found['tokens']:,} tokens {_PER[found['program']]}"
    lines = [
        f"{found['program']} on {slices}{found['topology']}: {found['chips']} chips, {found['devices']} devices",
        f"mesh {mesh}",
        f"{found['parameters']:,} parameters, remat {found['remat']}{batch}, {tokens}",
        "",
        "HBM per chip",
        *(_row(kind, gibibytes(m[kind])) for kind in ("arguments", "outputs", "aliased", "temporaries", "program")),
        _row("peak", f"{gibibytes(m['peak'])} of {gibibytes(m['capacity'])}: {m['peak_share']:.1%}")
        + (f", MORE THAN THERE IS: {found['advice']}" if m["peak_share"] > 1 else ""),
        "",
        "matrix FLOPs per chip",
        _row(
            "executed", f"{f['executed']:.4g}" if f["executed"] else "none: single rows do not go to the matrix units"
        ),
    ]
    if f["useful"] is not None:
        lines += [
            _row("useful", f"{f['useful']:.4g}; executed / useful {f['executed_over_useful']:.3f}"),
            _row("head on every row", f"{f['dense_credit']:.4g}"),
        ]
    lines += [
        _row(f"loop over {_loop_name(loop['path'])}", f"{loop['turns']:.1f} iterations expected, {loop['why']}")
        for loop in found["loops"]
        if loop["why"]
    ]
    lines += ["", "collectives per chip"]
    for entry in found["collectives"][:12]:
        size = gigabytes(entry["bytes"])
        axes = "+".join(entry["axes"]) or "one device"
        share = entry["hidden_seconds"] / entry["seconds"] if entry["seconds"] else 0.0
        how = f"{share:.0%} hidden" if entry["asynchronous"] else "synchronous"
        lines.append(
            _row(f"{entry['kind']} {axes}", f"{size:>10}  {entry['times']:g} x {entry['largest_array']}, {how}")
        )
    if len(found["collectives"]) > 12:
        lines.append(_row("smaller ones", gigabytes(sum(entry["bytes"] for entry in found["collectives"][12:]))))
    lines.append(_row("all", gigabytes(t["bytes"])))
    if t["fsdp_minimum_bytes"] is not None:
        lines.append(
            _row("least FSDP needs", f"{gigabytes(t['fsdp_minimum_bytes'])}; fsdp axis {t['fsdp_over_minimum']:.2f} x")
        )
    if t["hidden_share"] is not None:
        lines.append(
            _row("overlap", f"{t['asynchronous_share']:.1%} of bytes asynchronous, {t['hidden_share']:.1%} hidden")
        )
    if t["parts_asynchronous_share"] is not None:
        lines.append(_row("gathers, scatters", f"{t['parts_asynchronous_share']:.1%} of their bytes asynchronous"))
    lines += [
        "",
        "projection, not a measurement",
        _row("seconds", f"{p['seconds']:.4g}"),
        _row("compiler's cycles", f"{p['compiler_seconds']:.4g}, of it links unhidden {p['exposed_link_seconds']:.3g}"),
        _row(
            "roofline",
            f"{p['roofline_seconds']:.4g} ({p['roofline_binding']}): products {p['math_seconds']:.3g}, "
            f"HBM {p['hbm_seconds']:.3g}, ICI {p['ici_seconds']:.3g}, DCN {p['dcn_seconds']:.3g}",
        ),
        _row("tokens/s", f"{p['tokens_per_second']:,.0f}; per chip {p['tokens_per_second_per_chip']:,.0f}"),
    ]
    if p["useful_mfu"] is not None:
        lines += [
            _row("MFU", f"{p['useful_mfu']:.1%} useful; at the roofline {p['roofline_useful_mfu']:.1%}"),
            _row("  head on every row", f"{p['dense_credit_mfu']:.1%}"),
        ]
    if "budget_days" in p:
        lines.append(
            _row(
                f"{p['budget_tokens']:.3g} tokens",
                f"{_duration(p['budget_days'])}, {p['budget_chip_hours']:,.3g} chip-hours",
            )
        )
    return "\n".join([*lines, "", *LEGEND])


LEGEND = (
    "useful: products that the method needs, each once; executed: also those done again for the backward pass, and",
    "rows that fill blocks. MFU: useful products over the chips' peak; head on every row: the same, crediting the",
    "vocabulary head with rows that need none. hidden: moved while other work is done. peak: the most held at once.",
)
_PER = {"train": "a step", "evaluate": "a batch", "sample": "written", "likelihood": "scored"}


def _loop_name(path: str) -> str:
    """`whole blocks` from "jit(train_step)/jvp(whole_blocks)/while"."""
    names = re.findall(r"(\w+)\)*/while", path)
    return names[-1].replace("_", " ") if names else "data"


def _duration(days: float) -> str:
    for size, unit in ((1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= 2 * size:
            return f"{days / size:,.1f} {unit}"
    return f"{days * 86_400:,.1f} seconds"


def gigabytes(size: float) -> str:
    """Traffic: GB, or MB where it is little."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _row(name: str, value: str) -> str:
    return f"  {name:<26}{value}"
