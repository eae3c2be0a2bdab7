"""A run trained again from what its workdir holds, and compared: same config, rows, tokenizer, and calls alike."""

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llada import config as config_lib
from llada import json_files, knobs, processes
from llada.config import Config, DebugConfig
from llada.data import control_tokens, tokenizer_files
from llada.errors import UserError
from llada.files import write_atomically
from llada.training import calls as calls_lib
from llada.training import digests as digests_lib
from llada.training import loop, metrics, run_item
from llada.training import workdir as workdir_lib
from llada.training.corpus import has_rows, rows_directory, saved_tokenizer
from llada.training.resuming import read_summary
from llada.training.run_item import RunItem

_FIGURES = ("parameters_sha256", "moments_sha256", "rows_digest", "corpus_digest")
_CLOCKS = ("speed/", "time/")


class Segment(NamedTuple):
    """Steps that calls with the same config trained, without a gap: after `start`, up to and with `end`."""

    start: int
    end: int
    config: Config


class Plan(NamedTuple):
    """What is to be trained again. `figures` and `lines` (of metrics.jsonl) are what it should end with.

    `doubts`: why bits may differ, a line each; `imported`: it begins from the model in checkpoint 0.
    """

    workdir: Path
    step: int
    figures: dict[str, str]
    lines: list[dict[str, Any]]
    segments: list[Segment]
    imported: bool
    tokenizer: tuple[str, bytes]
    doubts: list[str]


def plan(workdir: Path) -> Plan:
    """How to reproduce a workdir up to its summary, or else its newest checkpoint. UserError where that cannot be."""
    records, bad = calls_lib.read(workdir)
    base = config_lib.load(workdir / "config.json")
    item, summary = workdir_lib.newest(workdir), read_summary(workdir)
    if item is not None:
        run_item.require_same(item, base, workdir / "checkpoints")
    step, figures = _end(workdir, item, summary)
    calls = _effective(records, step)
    if not calls or calls[0]["from_step"] != 0:
        first = f"begins at step {calls[0]['from_step']}" if calls else "has no call"
        raise UserError(f"{workdir / calls_lib.FILE} {first}: what an older llada trained before cannot be repeated")
    imported = calls[0]["imported"]
    if imported and 0 not in run_item.saved_steps(workdir / "checkpoints"):
        raise UserError(
            f"--workdir={workdir} was begun from another model, checkpoint 0, which has been removed since; "
            "--config.checkpoint.keep_every=N, with any N, keeps it"
        )
    doubts = [f"{calls_lib.FILE} is damaged in line {', '.join(map(str, bad))}: a call is missing"] if bad else []
    doubts += _doubts(calls)
    if step < base.steps:
        doubts.insert(0, f"the run is not finished: its newest checkpoint is reproduced, step {step} of {base.steps}")
    data = rows_directory(workdir, base)
    if not has_rows(data, base):
        doubts.append(f"{data} holds no rows: they are made again from {base.data.source}")
    segments = _segments(base, calls, step, data.resolve(), doubts)
    lines = [line for line in metrics.read(workdir / "metrics.jsonl") if line["step"] <= step]
    return Plan(workdir, step, figures, lines, segments, imported, _tokenizer(workdir, item), doubts)


def _end(workdir: Path, item: RunItem | None, summary: dict[str, Any] | None) -> tuple[int, dict[str, str]]:
    """The step that the workdir ends with, and its figures: the summary's, or those of the newest checkpoint."""
    saved = item.step if item is not None and item.begun else 0
    if summary is not None and summary.get("step", 0) >= saved and summary.get("parameters_sha256"):
        return summary["step"], {name: summary[name] for name in _FIGURES if summary.get(name)}
    if item is None or not saved:
        raise UserError(f"--workdir={workdir} has no checkpoint of a trained step: there is nothing to compare with")
    if item.digests is None:
        raise UserError(f"step {saved} of {workdir} was saved without digests, by an older llada: nothing to compare")
    return saved, _figures(item)


def _figures(item: RunItem) -> dict[str, str]:
    assert item.digests is not None
    from_cursor = {name: item.cursor[name] for name in _FIGURES if name in item.cursor}
    return digests_lib.fingerprints(item.digests) | from_cursor


def _effective(records: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The calls whose steps are in the run as it ended: what a later call went over again is left out.

    A call that trained nothing may still have evaluated, after the run had been made shorter: it stays.
    """
    kept: list[dict[str, Any]] = []
    for call in records:
        start = call["from_step"]
        while kept and (kept[-1]["from_step"] > start or (kept[-1]["from_step"] == start and not _idle(kept[-1]))):
            kept.pop()
        if start < step or (start == step and _idle(call)):
            kept.append(call)
    return kept


def _idle(call: dict[str, Any]) -> bool:
    return call["steps"] == call["from_step"]


def _doubts(calls: list[dict[str, Any]]) -> list[str]:
    """How the calls' surroundings differ from these, and the calls from each other."""
    here = calls_lib.surroundings()
    found: dict[str, list[int]] = {}
    for call in calls:
        for line in _differences(call, here):
            found.setdefault(line, []).append(call["from_step"])
    lines = []
    for line, starts in found.items():
        some = f", in the call(s) from step {', '.join(map(str, starts))}" if len(starts) < len(calls) else ""
        lines.append(f"{line}{some}")
    for before, after in itertools.pairwise(calls):
        old, new = before["keys"], after["keys"]
        names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
        changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in names]
        if changed:
            lines.append(f"from step {after['from_step']} on a call had {'; '.join(changed)}: repeated alike")
    return lines


def _differences(call: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    if call["code_sha256"] != here["code_sha256"]:
        tree = " with changes that no commit holds" if call["commit"].endswith("+") else ""
        yield f"trained by llada at commit {call['commit']}{tree}, here {here['commit']}: its code was another"
    for group in ("versions", "machine", "environment"):
        old, new = call[group], here[group]
        for name in sorted(old | new):
            if old.get(name) != new.get(name) and name != "llada":
                yield f"trained with {name}={old.get(name)}, here {new.get(name)}"


def _segments(base: Config, calls: list[dict[str, Any]], step: int, data: Path, doubts: list[str]) -> list[Segment]:
    """The calls as configs to train again, neighbours that are alike joined."""
    counts = {call["machine"].get("devices") for call in calls}
    newest_mesh = {key: value for key, value in calls[-1]["keys"].items() if key.startswith("mesh.")}
    if len(counts) > 1:
        doubts.append("calls had different numbers of devices: all is repeated on the newest one's mesh")
    segments: list[Segment] = []
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        keys = call["keys"] | (newest_mesh if len(counts) > 1 else {})
        config = _config(base, keys, data if has_rows(data, base) else None)
        end = following["from_step"] if following else step
        if segments and segments[-1].config == config:
            segments[-1] = segments[-1]._replace(end=end)
        else:
            segments.append(Segment(call["from_step"], end, config))
    meshes = [segment.config.mesh for segment in segments]
    needed = {math.prod((mesh.data or 1, mesh.fsdp, mesh.tensor)) for mesh in meshes}
    if needed != {jax.device_count()}:
        on_cpu = f"; XLA_FLAGS=--xla_force_host_platform_device_count={max(needed)} simulates them on a CPU"
        raise UserError(
            f"the run was on {max(needed)} device(s), and here are {jax.device_count()}: give as many"
            + (on_cpu if jax.default_backend() == "cpu" else "")
        )
    return segments


def _config(base: Config, keys: dict[str, Any], data: Path | None) -> Config:
    """The workdir's config with the keys of a call, reading the workdir's rows, without looking inside."""
    tree = config_lib.to_dict(base)
    known = {key.name for key in knobs.keys(Config)}
    for name, value in keys.items():
        if name in known:
            *groups, last = name.split(".")
            group = tree
            for part in groups:
                group = group[part]
            group[last] = value
    tree["data"]["directory"] = None if data is None else str(data)
    tree["data"]["tokenizer"] = None  # the workdir's copy counts
    template = base.dialogues.template
    if template is not None and template not in control_tokens.BUILT_IN and not Path(template).expanduser().exists():
        tree["dialogues"]["template"] = None  # the tokenizer has it
    tree["debug"] = dataclasses.asdict(DebugConfig())
    tree["checkpoint"]["keep_every"] = 0
    return config_lib.from_config_dict(tree)


def _tokenizer(workdir: Path, item: RunItem | None) -> tuple[str, bytes]:
    """Name and content of the tokenizer's file."""
    path = tokenizer_files.in_workdir(workdir)
    if path is not None:
        return path.name, json_files.read_bytes(path)
    if item is None:
        raise UserError(f"--workdir={workdir} has neither a tokenizer nor a checkpoint that holds one")
    tokenizer = saved_tokenizer(workdir, item)
    return tokenizer.file_name, tokenizer.content


def train_again(plan: Plan, out: Path) -> list[str]:
    """Train the plan in the empty directory `out`; returns what is not as it was, nothing where all bits are.

    Of several processes all call it. Interrupted, and what else `loop.train` raises.
    """
    with processes.agreement():
        if processes.is_first():
            name, content = plan.tokenizer
            write_atomically(out / name, content)
            if plan.imported:
                shutil.copytree(plan.workdir / "checkpoints" / "0", out / "checkpoints" / "0")
    processes.require_shared(out, "--out")
    for segment in plan.segments:
        loop.train(segment.config, out, allow_rate_jump=True, until=segment.end)
    item = run_item.read(out / "checkpoints", plan.step)
    figures = _figures(item)
    wrong = [
        f"{name} is {figures.get(name)}, there {value}"
        for name, value in plan.figures.items()
        if figures.get(name) != value
    ]
    return wrong + _other_lines(metrics.read(out / "metrics.jsonl"), plan.lines)


def verdict(plan: Plan, wrong: list[str]) -> str:
    """The reproduction in one line."""
    if wrong:
        return f"not reproduced: step {plan.step} of {plan.workdir}: {'; '.join(wrong)}"
    return (
        f"reproduced: step {plan.step} of {plan.workdir}, parameters_sha256 {plan.figures['parameters_sha256']}, "
        f"moments, rows and {len(plan.lines)} lines of metrics"
    )


def _other_lines(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """In which line two records of metrics first differ, but for clocks."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
        a, b = ({k: v for k, v in line.items() if not k.startswith(_CLOCKS)} for line in (a, b))
        if a != b:
            name = next(name for name in sorted(a | b) if a.get(name) != b.get(name))
            return [
                f"metrics.jsonl differs from line {number} on (step {b['step']}): {name} is {a.get(name)}, "
                f"there {b.get(name)}"
            ]
    if len(ours) != len(theirs):
        return [f"metrics.jsonl has {len(ours)} lines, there {len(theirs)}"]
    return []


def empty_directory(out: Path) -> None:
    """UserError unless `out` is empty or not there yet."""
    if out.exists() and any(os.scandir(out)):
        raise UserError(f"--out={out} is not empty; give a new directory")
