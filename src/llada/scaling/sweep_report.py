"""What a sweep leaves behind: results.csv, fits.json, pictures and report.md.

The report says what the runs show, with intervals, and what they do not show. Every caveat is there if and only if it
applies; what is missing is named.
Units: FLOPs, parameters without embeddings, tokens, nats per token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llada import json_files
from llada.files import queue_for_lock, write_atomically
from llada.objectives.families import FAMILIES
from llada.scaling import findings, fits_report, measures, pictures, ranking_report, repetition
from llada.scaling.numbers import count, flops, listed, markdown_list, markdown_table, or_dash, three
from llada.scaling.results import FAILED, FINISHED, Result, check_comparable, points, write_csv
from llada.scaling.series import Series, ordered, pairs
from llada.scaling.study import Study, fit

CAPTIONS = {
    "isoflop": "loss against size at each budget",
    "frontier": "loss at the best size against training FLOPs",
    "allocation": "best size and tokens against training FLOPs",
    "repeat": "loss against epochs over the same tokens",
    "ranking": "share of the FLOPs that each variant needs",
    "losses": "loss against training FLOPs of each variant beside its family",
}


def write(
    directory: Path,
    results: Sequence[Result],
    command: str,
    predict: float | None = None,
    annealing_gain: float = 0.0,
    remarks: Sequence[str] = (),
) -> list[Path]:
    """Write everything that `results` allow into `directory`; returns the files. UserError where they do not compare.

    command         how this was called, for the report
    predict         a budget in FLOPs whose best models the report predicts
    annealing_gain  share of the loss taken off readings without annealing before the fits
    remarks         on what is not among the results
    """
    check_comparable(results)
    with queue_for_lock(directory / "report.lock", f"writes the report of {directory}"):
        write_csv(results, directory / "results.csv")
        # Laws of the budget say nothing of data read again and again, nor of few sizes: no isoFLOP profiles.
        unfit = any(r.data_limited or r.ranked for r in results)
        study = fit({} if unfit else points(results, annealing_gain))
        compared = [(a.key, b.key) for a, b in pairs(study.series)]
        fits = {"annealing_gain": annealing_gain, "matching": results[0].matching} | study.to_json(compared)
        if any(r.data_limited for r in results):
            fits["crossovers"] = [crossover.to_json() for crossover in repetition.crossovers(results)]
        if any(r.ranked for r in results):
            fits["ranking"] = ranking_report.to_json(results)
        write_atomically(directory / "fits.json", (json_files.dumps(fits, indent=2) + "\n").encode())
        images = draw(results, study, predict, annealing_gain)
        for name, image in images.items():
            write_atomically(directory / name, image)
        measured = measures.section(directory, results)
        text = report(results, study, command, tuple(images), predict, annealing_gain, remarks, measured)
        write_atomically(directory / "report.md", text.encode("utf-8", "backslashreplace"))
    return [directory / name for name in ("results.csv", "fits.json", *images, "report.md")]


def draw(results: Sequence[Result], study: Study, predict: float | None, annealing_gain: float) -> dict[str, bytes]:
    """The pictures that suit the readings, by the names of their files; none before there is a figure."""
    if not any(r.measured for r in results):
        return {}
    if any(r.data_limited for r in results):
        return {"repeat.png": repetition.picture(results)}
    if any(r.ranked for r in results):
        return ranking_report.pictures(results)
    return {
        "isoflop.png": pictures.isoflop(results, study, annealing_gain=annealing_gain),
        "frontier.png": pictures.frontier(results, study, predict, annealing_gain=annealing_gain),
        "allocation.png": pictures.allocation(results, study),
    }


def report(
    results: Sequence[Result],
    study: Study,
    command: str,
    images: Sequence[str] = (),
    predict: float | None = None,
    annealing_gain: float = 0.0,
    remarks: Sequence[str] = (),
    measured: str = "",
) -> str:
    """The whole report in Markdown; `images` are the names of pictures beside it, the rest as in `write`.

    `measured`: the section on gaps by further measures (`measures.section`).
    """
    repeated, ranked = any(r.data_limited for r in results), any(r.ranked for r in results)
    if repeated:
        sections = {"Repeated data": repetition.section(results)}
    elif ranked:
        sections = ranking_report.sections(results)
    else:
        sections = fits_report.sections(results, study)
    sections |= {"Variants": _variants(results)}
    if predict and not ranked:
        sections[f"Prediction at {flops(predict)} FLOPs"] = fits_report.prediction(study, predict)
    sections |= {
        "Gaps by each measure": measured,
        "Caveats": markdown_list(findings.caveats(results, study, annealing_gain)),
        "What the fits could not tell": "" if repeated or ranked else fits_report.reasons(study),
        "Runs that have no figure": _lost(results),
        "Runs at another learning rate": _named({r.run: r.retried for r in results if r.retried}),
        "Left out": markdown_list(text.removeprefix("left out: ") for text in remarks),
        "All readings": _readings(results),
        "Command": f"    {command}",
    }
    families = listed([family.title for family in FAMILIES.values()])
    title = f"# Scaling of {families}{' on repeated data' if repeated else ''}"
    title = "# Variants of the training objective" if ranked else title
    drawn = [f"![{CAPTIONS[name.removesuffix('.png')]}]({name})" for name in images]
    texts = [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join([title, _summary(results, study), *drawn, *texts]) + "\n"


def _named(texts: dict[str, Any]) -> str:
    return markdown_list(f"{name}: {text}" for name, text in texts.items())


def _variants(results: Sequence[Result]) -> str:
    """A line each: what it changes, and whether its training loss compares with anything; empty without variants."""
    first = {r.series: r for r in reversed(results)}
    lines = []
    for series in ordered(r.series.key for r in results):
        if (r := first.get(series)) is None:
            continue
        unbiased = "" if r.bound_trained in (True, None) else f"; its training loss is not {_measured(series)}"
        if series.variant:
            lines.append(f"{series.title}: {r.variant_keys or 'unknown'}{unbiased}.")
        elif unbiased:
            lines.append(f"{series.title}, the plain objective{unbiased}.")
    if not any(series.variant for series in first):
        return ""
    text = "Held-out figures are the bound (of an ARM, the NLL) for every series, whatever it was trained on."
    return f"{markdown_list(lines)}\n\n{text}"


def _measured(series: Series) -> str:
    return "the NLL" if series.exact else "a bound"


def _summary(results: Sequence[Result], study: Study) -> str:
    measured = sum(r.measured for r in results)
    if not measured:
        return f"No reading has a figure yet, of {len(results)} planned. There is nothing to fit."
    if any(r.ranked for r in results):
        texts = ranking_report.summary(results)
    else:
        repeated = any(r.data_limited for r in results)
        texts = repetition.summary(results) if repeated else fits_report.summary(study)
    if measured < len(results):
        texts.append(f"{measured} of {len(results)} readings have a figure.")
    return " ".join(texts)


def _lost(results: Sequence[Result]) -> str:
    """Why runs have no figure, once a run: failed, diverged, running or waiting."""
    lost: dict[str, str] = {}
    for r in results:
        if r.measured:
            continue
        if r.nats_per_token is not None:
            why = f"diverged: its loss is {r.nats_per_token}"
        elif r.status == FINISHED:
            why = "not read at this step: it was finished before the grid asked for it"
        else:
            why = r.status
        lost.setdefault(r.run, why + (f" ({r.reason})" if r.reason else ""))
    return _named(lost)


def _readings(results: Sequence[Result]) -> str:
    if not results:
        return "None."
    head = "run,FLOPs asked for,N,all parameters,tokens,tokens per N,epochs,peak rate,FLOPs 6ND,FLOPs exact,"
    cells = [(head + "nats per token,± draws,± rows,annealed,seconds").split(",")]
    order = ordered(r.series.key for r in results)
    for r in sorted(results, key=lambda r: (order.index(r.series), r.budget, r.non_embedding_parameters, r.seed)):
        numbers = [flops(r.budget), count(r.non_embedding_parameters), count(r.parameters), count(r.tokens)]
        numbers += [three(r.tokens / r.non_embedding_parameters), "-" if r.epochs is None else three(r.epochs)]
        numbers += [f"{r.peak_learning_rate:.2e}", flops(r.flops_6nd), flops(r.flops_exact)]
        if r.measured:
            numbers.append(f"{r.loss:.4f}")
        else:
            numbers.append("diverged" if r.nats_per_token is not None and r.status != FAILED else r.status)
        numbers += [or_dash(r.monte_carlo_stderr, ".4f"), or_dash(r.stderr, ".4f"), "yes" if r.annealed else "no"]
        cells.append([r.run, *numbers, or_dash(r.seconds, ",.0f")])
    return markdown_table(cells)
