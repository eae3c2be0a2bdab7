"""The figures of a plan: one nested dict, for JSON, and the same as text.

Figures are per chip and per run of the program (a step of training) unless their name says otherwise. Seconds are
projections, never measurements.
"""

import re
from collections import defaultdict
from typing import Any

import jax

from llada import accounting
from llada.config import Config
from llada.planning import projection, traffic
from llada.planning.fitting import advice, gibibytes
from llada.planning.hlo import Module
from llada.planning.programs import Compiled, Program
from llada.planning.topology import Slice

METHOD = (
    "A projection, not a measurement. Compiled ahead of time for the slice; seconds are the larger of (a) the "
    "compiler's cycle estimates times trip counts over the clock plus the link time its schedule leaves unhidden, and "
    f"(b) a roofline: products at {projection.MATH_SHARE:.0%} of peak, HBM at {projection.HBM_SHARE:.0%}, ICI, DCN."
)


def figures(
    config: Config, hardware: Slice, mesh: jax.sharding.Mesh, program: Program, compiled: Compiled
) -> dict[str, Any]:
    """All figures of a program that was compiled for the slices."""
    chip = hardware.chip
    module = Module(compiled.text, program.trips, config.model.causal, chip.flops_per_cycle)
    moved = traffic.Traffic(module, traffic.Links(mesh, hardware))
    projected = projection.project(module, moved, hardware)
    hbm = _memory(hardware, compiled)
    useful = None if program.useful is None else program.useful / hardware.chips
    fits = hbm["peak_share"] <= 1
    return {
        **_heading(config, hardware, mesh, program),
        **_assumed(module, moved),
        "compile_seconds": compiled.seconds,
        "hbm_bytes": hbm,
        "advice": None if fits else advice(config, mesh.shape, program, chip, hbm["peak"] / chip.devices),
        "matrix_flops": {
            "executed": projected.matrix_flops,
            "useful": useful,
            "dense_credit": None if program.dense is None else program.dense / hardware.chips,
            "executed_over_useful": None if useful is None else projected.matrix_flops / useful,
        },
        "loops": _loops(module),
        "collectives": _collectives(moved, chip.devices),
        "traffic": _traffic(config, program, mesh, moved, hardware),
        "projection": _projection(config, hardware, program, projected),
    }


def _heading(config: Config, hardware: Slice, mesh: jax.sharding.Mesh, program: Program) -> dict[str, Any]:
    """What was compiled for what."""
    return {
        "program": program.name,
        "topology": hardware.name,
        "slices": hardware.slices,
        "chips": hardware.chips,
        "devices": len(hardware.devices),
        "mesh": dict(mesh.shape),
        "parameters": accounting.parameters(config.model).total,
        "remat": config.model.remat,
        "batch_size": config.train.batch_size if program.name == "train" else None,
        "microbatches": config.train.microbatches if program.name == "train" else None,
        "tokens": program.tokens,
    }


def _memory(hardware: Slice, compiled: Compiled) -> dict[str, float]:
    """HBM bytes per chip by kind, and the capacity."""
    per_chip = {kind: value * hardware.chip.devices for kind, value in compiled.memory.items()}
    # What the compiler allocates; outputs in the memory of arguments count once. Its own peak may leave out gaps.
    allocated = sum(per_chip[kind] for kind in ("arguments", "outputs", "temporaries", "program")) - per_chip["aliased"]
    per_chip["peak"] = max(per_chip["peak"], allocated)
    return per_chip | {"capacity": hardware.chip.capacity, "peak_share": per_chip["peak"] / hardware.chip.capacity}


def _assumed(module: Module, moved: traffic.Traffic) -> dict[str, Any]:
    """`assumed`, only where something could not be read from the program: each assumption, how often, one example."""
    unknown = [*module.unknown.items(), *moved.unknown.items()]
    entries = [{"assumption": what, "count": len(names), "such_as": min(names)} for what, names in unknown]
    return {"assumed": entries} if entries else {}


def _loops(module: Module) -> list[dict[str, Any]]:
    """All loops but the counted ones of binary searches."""
    return [
        {
            "path": loop.path,
            "turns": loop.trip_count,
            "entries": loop.entries,
            "counted": loop.counted,
            "why": loop.why,
        }
        for loop in module.loops
        if not loop.counted or "searchsorted" not in loop.path
    ]


def _collectives(moved: traffic.Traffic, devices: int) -> list[dict[str, Any]]:
    """One entry for all collectives of a kind, axes and array; bytes per chip."""
    groups: dict[tuple, list[traffic.Collective]] = defaultdict(list)
    for c in moved.collectives:
        groups[c.kind, c.axes, c.array.dtype, c.array.dims, c.asynchronous].append(c)
    entries = [
        {
            "kind": kind,
            "axes": list(axes),
            "largest_array": f"{dtype}[{','.join(map(str, dims))}]",
            "times": sum(c.times for c in members),
            "bytes": devices * sum(c.times * c.bytes for c in members),
            "seconds": sum(c.times * c.seconds for c in members),
            "hidden_seconds": sum(c.times * c.hidden for c in members),
            "asynchronous": asynchronous,
        }
        for (kind, axes, dtype, dims, asynchronous), members in groups.items()
    ]
    return sorted(entries, key=lambda entry: -entry["bytes"])


def _traffic(
    config: Config, program: Program, mesh: jax.sharding.Mesh, moved: traffic.Traffic, hardware: Slice
) -> dict[str, Any]:
    """Bytes per axis and kind, the least that FSDP can do with, and how much is hidden."""
    devices = hardware.chip.devices
    per_axis: dict[str, float] = defaultdict(float)
    for c in moved.collectives:
        per_axis["+".join(c.axes) or "none"] += devices * c.times * c.bytes
    total = sum(per_axis.values())
    hidden = devices * sum(c.times * c.bytes * c.hidden / c.seconds for c in moved.collectives if c.seconds)
    overlapped = devices * sum(c.times * c.bytes for c in moved.collectives if c.asynchronous)
    of_shards = [c for c in moved.collectives if c.kind in ("all-gather", "reduce-scatter")]
    shard_bytes = sum(c.times * c.bytes for c in of_shards)
    shard_overlapped = sum(c.times * c.bytes for c in of_shards if c.asynchronous)
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
        "parts_asynchronous_share": shard_overlapped / shard_bytes if shard_bytes else None,
    }


def _projection(config: Config, hardware: Slice, program: Program, projected: projection.Projection) -> dict[str, Any]:
    """Seconds and what follows from them: speed, MFU, and the time that the tokens of a training run take."""

    def mfu(flops: float | None, seconds: float) -> float | None:
        return None if flops is None else flops / hardware.chips / seconds / hardware.chip.peak_flops

    seconds, days = projected.seconds, config.steps * projected.seconds / 86_400
    budget = {
        "budget_tokens": float(config.steps * config.tokens_per_step),
        "budget_days": days,
        "budget_chip_hours": days * 24 * hardware.chips,
    }
    return {
        "method": METHOD,
        "seconds": seconds,
        "compiler_seconds": projected.compiler_seconds,
        "roofline_seconds": projected.roofline_seconds,
        "roofline_binding": projected.binding,
        "math_seconds": projected.math_seconds,
        "hbm_seconds": projected.hbm_seconds,
        "hbm_bytes_moved": projected.hbm_bytes,
        "ici_seconds": projected.ici_seconds,
        "dcn_seconds": projected.dcn_seconds,
        "exposed_link_seconds": projected.exposed_seconds,
        "tokens_per_second": program.tokens / seconds,
        "tokens_per_second_per_chip": program.tokens / seconds / hardware.chips,
        "useful_mfu": mfu(program.useful, seconds),
        "dense_credit_mfu": mfu(program.dense, seconds),
        "roofline_useful_mfu": mfu(program.useful, projected.roofline_seconds),
        **(budget if program.name == "train" else {}),
    }


LEGEND = (
    "useful: products that the method needs, each once; executed: also those computed again for the backward pass, and",
    "rows that fill blocks. MFU: useful products over the chips' peak; head on every row: the same, crediting the",
    "vocabulary head with rows that need none. hidden: moved while other work is done. peak: the most held at once.",
)
_PER = {"train": "a step", "evaluate": "a batch", "sample": "written", "likelihood": "scored"}
_MOST_COLLECTIVES = 12  # shown as text; JSON has all

Rows = list[tuple[str, str]]  # name and value


def text(plan: dict[str, Any]) -> str:
    """The dict as aligned lines, the same in a terminal and in a file."""
    sections = {
        "HBM per chip": _memory_rows(plan),
        "matrix FLOPs per chip": _flops_rows(plan),
        "collectives per chip": _collective_rows(plan),
        "projection, not a measurement": _projection_rows(plan["projection"]),
    }
    lines = _heading_lines(plan)
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:<26}{value}" for name, value in rows)]
    return "\n".join([*lines, "", *LEGEND])


def _heading_lines(plan: dict[str, Any]) -> list[str]:
    slices = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
    batch = f", {plan['batch_size']} sequences a step" if plan["batch_size"] else ""
    batch += f" in {plan['microbatches']} microbatches" if (plan["microbatches"] or 1) > 1 else ""
    tokens = f"{plan['tokens']:,} tokens {_PER[plan['program']]}"
    assumed = [
        f"NOT READ FROM THE PROGRAM: {entry['count']} {entry['assumption']} (such as {entry['such_as']})"
        for entry in plan.get("assumed", ())
    ]
    return [
        f"{plan['program']} on {slices}{plan['topology']}: {plan['chips']} chips, {plan['devices']} devices",
        "mesh " + " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()),
        f"{plan['parameters']:,} parameters, remat {plan['remat']}{batch}, {tokens}",
        *assumed,
    ]


def _memory_rows(plan: dict[str, Any]) -> Rows:
    hbm = plan["hbm_bytes"]
    peak = f"{gibibytes(hbm['peak'])} of {gibibytes(hbm['capacity'])}: {hbm['peak_share']:.1%}"
    if hbm["peak_share"] > 1:
        peak += f", MORE THAN THERE IS: {plan['advice']}"
    kinds = ("arguments", "outputs", "aliased", "temporaries", "program")
    return [*((kind, gibibytes(hbm[kind])) for kind in kinds), ("peak", peak)]


def _flops_rows(plan: dict[str, Any]) -> Rows:
    flops = plan["matrix_flops"]
    executed = f"{flops['executed']:.4g}" if flops["executed"] else "none: single rows do not go to the matrix units"
    rows = [("executed", executed)]
    if flops["useful"] is not None:
        ratio = f"executed / useful {flops['executed_over_useful']:.3f}"
        rows += [
            ("useful", f"{flops['useful']:.4g}; {ratio}"),
            ("head on every row", f"{flops['dense_credit']:.4g}"),
        ]
    return rows + [
        (f"loop over {_loop_name(loop['path'])}", f"{loop['turns']:.1f} iterations expected, {loop['why']}")
        for loop in plan["loops"]
        if loop["why"]
    ]


def _collective_rows(plan: dict[str, Any]) -> Rows:
    moved, entries = plan["traffic"], plan["collectives"]
    rows = [_collective_row(entry) for entry in entries[:_MOST_COLLECTIVES]]
    if smaller := entries[_MOST_COLLECTIVES:]:
        rows.append(("smaller ones", _gigabytes(sum(entry["bytes"] for entry in smaller))))
    rows.append(("all", _gigabytes(moved["bytes"])))
    if moved["fsdp_minimum_bytes"] is not None:
        least = f"{_gigabytes(moved['fsdp_minimum_bytes'])}; fsdp axis {moved['fsdp_over_minimum']:.2f} x"
        rows.append(("least FSDP needs", least))
    if moved["hidden_share"] is not None:
        overlap = f"{moved['asynchronous_share']:.1%} of bytes asynchronous, {moved['hidden_share']:.1%} hidden"
        rows.append(("overlap", overlap))
    if moved["parts_asynchronous_share"] is not None:
        rows.append(("gathers, scatters", f"{moved['parts_asynchronous_share']:.1%} of their bytes asynchronous"))
    return rows


def _collective_row(entry: dict[str, Any]) -> tuple[str, str]:
    share = entry["hidden_seconds"] / entry["seconds"] if entry["seconds"] else 0.0
    how = f"{share:.0%} hidden" if entry["asynchronous"] else "synchronous"
    name = f"{entry['kind']} {'+'.join(entry['axes']) or 'one device'}"
    return name, f"{_gigabytes(entry['bytes']):>10}  {entry['times']:g} x {entry['largest_array']}, {how}"


def _projection_rows(p: dict[str, Any]) -> Rows:
    bounds = (
        f"products {p['math_seconds']:.3g}, HBM {p['hbm_seconds']:.3g}, ICI {p['ici_seconds']:.3g}, "
        f"DCN {p['dcn_seconds']:.3g}"
    )
    rows = [
        ("seconds", f"{p['seconds']:.4g}"),
        ("compiler's cycles", f"{p['compiler_seconds']:.4g}, of it links unhidden {p['exposed_link_seconds']:.3g}"),
        ("roofline", f"{p['roofline_seconds']:.4g} ({p['roofline_binding']}): {bounds}"),
        ("tokens/s", f"{p['tokens_per_second']:,.0f}; per chip {p['tokens_per_second_per_chip']:,.0f}"),
    ]
    if p["useful_mfu"] is not None:
        rows += [
            ("MFU", f"{p['useful_mfu']:.1%} useful; at the roofline {p['roofline_useful_mfu']:.1%}"),
            ("  head on every row", f"{p['dense_credit_mfu']:.1%}"),
        ]
    if "budget_days" in p:
        time = f"{_duration(p['budget_days'])}, {p['budget_chip_hours']:,.3g} chip-hours"
        rows.append((f"{p['budget_tokens']:.3g} tokens", time))
    return rows


def _loop_name(path: str) -> str:
    """`whole blocks` from "jit(train_step)/jvp(whole_blocks)/while"."""
    names = re.findall(r"(\w+)\)*/while", path)
    return names[-1].replace("_", " ") if names else "data"


def _duration(days: float) -> str:
    for size, unit in ((1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= 2 * size:
            return f"{days / size:,.1f} {unit}"
    return f"{days * 86_400:,.1f} seconds"


def _gigabytes(size: float) -> str:
    """Traffic: GB, or MB where it is little."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
