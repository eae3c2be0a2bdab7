"""Downstream scores against FLOPs (LLaDA Figure 3): lm-eval's results of many checkpoints, a table and a picture."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llada.config import Config
from llada.objectives import families
from llada.scaling import figure, numbers
from llada.scaling.held_out import is_number
from llada.scaling.series import NAME, Series, ordered
from llada.training import metrics as metrics_lib

# Of a task with several metrics the first of these is drawn, else the first that it has.
_PREFERRED = "acc exact_match pass@1 pass_at_1 prompt_level_strict_acc bits_per_byte word_perplexity".split()
_PERCENT = re.compile(r"acc|exact_match|pass@|pass_at|f1|_acc")


class Checkpoint(NamedTuple):
    """A step of a run, what it has cost, and which series it belongs to."""

    run: str
    series: Series
    step: int
    tokens: int
    flops: float


class Reading(NamedTuple):
    """One metric of one task at one checkpoint; `stderr` is lm-eval's, over documents, None where it has none."""

    checkpoint: Checkpoint
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None


def checkpoint(workdir: Path, config: Config, step: int) -> Checkpoint:
    """Of a run's step; FLOPs are 6 N D. Runs of a variant objective are a series by the first part of their name."""
    family, totals = families.of(config), metrics_lib.run_totals(config, step)
    first = workdir.resolve().name.partition("_")[0].removeprefix(f"{family.prefix}-")
    variant = first if config.objective.variant and NAME.fullmatch(first) else None
    return Checkpoint(
        str(workdir), Series(family, variant), step, int(totals["train/tokens"]), float(totals["train/flops_6nd"])
    )


def readings(checkpoint: Checkpoint, results: Mapping[str, Any]) -> list[Reading]:
    """All metrics of lm-eval's results (its `results`: {task: {"acc,none": 0.5, "acc_stderr,none": ...}})."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr") and is_number(value):
                error = values.get(f"{metric}_stderr,{filter_name}")
                stderr = float(error) if is_number(error) and math.isfinite(error) else None
                found.append(Reading(checkpoint, task, metric, filter_name, float(value), stderr))
    return found


def to_json(found: Iterable[Reading]) -> list[dict[str, Any]]:
    """A line of `downstream.json` each."""
    return [
        {"run": r.checkpoint.run, "family": r.checkpoint.series.key, "step": r.checkpoint.step}
        | {"tokens": r.checkpoint.tokens, "flops_6nd": r.checkpoint.flops}
        | {"task": r.task, "metric": r.metric, "filter": r.filter, "value": r.value, "stderr": r.stderr}
        for r in found
    ]


def drawn(found: Sequence[Reading]) -> list[Reading]:
    """The readings of one metric for each task: what the picture and the table show."""
    chosen: dict[str, tuple[str, str]] = {}
    for task in dict.fromkeys(reading.task for reading in found):
        kinds = list(dict.fromkeys((r.metric, r.filter) for r in found if r.task == task))
        rank = {name: i for i, name in enumerate(_PREFERRED)}
        chosen[task] = min(kinds, key=lambda kind: rank.get(kind[0], len(rank)))
    return [reading for reading in found if (reading.metric, reading.filter) == chosen[reading.task]]


def table(found: Sequence[Reading]) -> list[list[str]]:
    """Checkpoints in rows, tasks in columns, header first; errors are lm-eval's standard errors."""
    shown = drawn(found)
    tasks = list(dict.fromkeys(reading.task for reading in shown))
    metric = {reading.task: reading.metric for reading in shown}
    cells = [["run", "step", "FLOPs, 6ND", *(f"{task}, {metric[task]}" for task in tasks)]]
    for each in dict.fromkeys(reading.checkpoint for reading in shown):
        of_tasks = {reading.task: reading for reading in shown if reading.checkpoint == each}
        cells.append(
            [Path(each.run).name, f"{each.step:,}", numbers.flops(each.flops)] + [_cell(of_tasks.get(t)) for t in tasks]
        )
    return cells


def _cell(reading: Reading | None) -> str:
    if reading is None:
        return "-"
    scale, form = _scale(reading.metric)
    error = "" if reading.stderr is None else f" ± {form.format(scale * reading.stderr)}"
    return form.format(scale * reading.value) + error


def _scale(metric: str) -> tuple[float, str]:
    """Shares are shown in percent."""
    return (100.0, "{:.1f}") if _PERCENT.search(metric) else (1.0, "{:.3g}")


def draw(found: Sequence[Reading], title: str) -> bytes:
    """`downstream.png`: a panel a task, a line a run, bars of two standard errors."""
    shown = drawn(found)
    tasks = list(dict.fromkeys(reading.task for reading in shown))
    caption = (
        "Bars are two of lm-evaluation-harness's standard errors, over documents. Answers are ranked, and texts "
        f"scored, by different measures ({figure.MEASURES}): scores compare, perplexities do not."
    )
    fig, panels = figure.panels(len(tasks), title, caption, small=True)
    looks = figure.styles(reading.checkpoint.series.key for reading in shown)
    for ax, task in zip(panels, tasks, strict=True):
        of_task = [reading for reading in shown if reading.task == task]
        for series in ordered(reading.checkpoint.series.key for reading in of_task):
            _lines(ax, series, looks[series], [r for r in of_task if r.checkpoint.series == series])
        metric = of_task[0].metric
        ax.set(title=task, xlabel="FLOPs, 6ND", ylabel=f"{metric}, %" if _scale(metric)[0] != 1 else metric)
        if all(reading.checkpoint.flops > 0 for reading in of_task):
            ax.set_xscale("log")
            ax.set_xlim(figure.limits([reading.checkpoint.flops for reading in of_task], 0.06, log=True))
            figure.log_ticks(ax.xaxis, numbers.flops)
        ax.legend(frameon=False, fontsize=8)
    return figure.png(fig)


def _lines(ax, series: Series, look: figure.Style, found: list[Reading]) -> None:
    """A line for each run of the series that was read at several steps; points where there is one of each run."""
    runs: dict[str, list[Reading]] = {}
    for reading in found:
        runs.setdefault(reading.checkpoint.run, []).append(reading)
    if all(len(of_run) == 1 for of_run in runs.values()):  # of a sweep: final checkpoints, which no line joins
        runs = {"": found} if found else {}
    for number, of_run in enumerate(runs.values()):
        of_run = sorted(of_run, key=lambda reading: reading.checkpoint.flops)
        scale = _scale(of_run[0].metric)[0]
        ax.errorbar(
            [reading.checkpoint.flops for reading in of_run],
            [scale * reading.value for reading in of_run],
            [2 * scale * (reading.stderr or 0.0) for reading in of_run],
            color=look.colour,
            marker=look.marker,
            linestyle="none" if "" in runs else "-",
            markersize=4,
            capsize=3,
            label=series.title if number == 0 else None,
        )
