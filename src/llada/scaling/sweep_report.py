"""What a sweep leaves behind: results.csv, fits.json, pictures and report.md.

The report says what the runs show, with intervals, and what they do not show. Every caveat is there if and only if it
applies; what is missing is named.
Units: FLOPs, parameters without embeddings, tokens, nats per token.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llada import json_files
from llada.files import queue_for_lock, write_atomically
from llada.objectives.families import FAMILIES, Family
from llada.scaling import findings, pictures, repetition
from llada.scaling.laws import PUBLISHED, SMDM_GAP, Minimum
from llada.scaling.numbers import count, flops, interval, markdown_table, or_dash, three, times
from llada.scaling.parametric import Parametric
from llada.scaling.results import FAILED, FINISHED, PAIRS, Result, check_comparable, points, write_csv
from llada.scaling.study import Study, fit

_TOO_FAR = 1000  # times the largest budget: what a law says beyond that is no finding

CAPTIONS = {
    "isoflop": "loss against size at each budget",
    "frontier": "loss at the best size against training FLOPs",
    "allocation": "best size and tokens against training FLOPs",
    "repeat": "loss against epochs over the same tokens",
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
        repeated = any(r.data_limited for r in results)
        # Laws of the budget say nothing of data read again and again: those readings are no isoFLOP profile.
        study = fit({} if repeated else points(results, annealing_gain))
        fits = {"annealing_gain": annealing_gain, "matching": results[0].matching} | study.to_json()
        if repeated:
            fits["crossovers"] = [crossover.to_json() for crossover in repetition.crossovers(results)]
        write_atomically(directory / "fits.json", (json_files.dumps(fits, indent=2) + "\n").encode())
        images = draw(results, study, predict, annealing_gain)
        for name, image in images.items():
            write_atomically(directory / name, image)
        text = report(results, study, command, tuple(images), predict, annealing_gain, remarks)
        write_atomically(directory / "report.md", text.encode("utf-8", "backslashreplace"))
    return [directory / name for name in ("results.csv", "fits.json", *images, "report.md")]


def draw(results: Sequence[Result], study: Study, predict: float | None, annealing_gain: float) -> dict[str, bytes]:
    """The pictures that suit the readings, by the names of their files; none before there is a figure."""
    if not any(r.measured for r in results):
        return {}
    if any(r.data_limited for r in results):
        return {"repeat.png": repetition.picture(results)}
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
) -> str:
    """The whole report in Markdown; `images` are the names of pictures beside it, the rest as in `write`."""
    repeated = any(r.data_limited for r in results)
    if repeated:
        sections = {"Repeated data": repetition.section(results)}
    else:
        sections = {
            "Best size of each budget": _minima(results, study),
            "Exponents": _exponents(study),
            "Compute gap": _gaps(study),
            "L(N, D) through all runs": _parametric(study),
        }
    if predict:
        sections[f"Prediction at {flops(predict)} FLOPs"] = _prediction(study, predict)
    sections |= {
        "Caveats": _list(findings.caveats(results, study, annealing_gain)),
        "What the fits could not tell": "" if repeated else _reasons(study),
        "Runs that have no figure": _lost(results),
        "Runs at another learning rate": _named({r.run: r.retried for r in results if r.retried}),
        "Left out": _list(text.removeprefix("left out: ") for text in remarks),
        "All readings": _readings(results),
        "Command": f"    {command}",
    }
    title = f"# Scaling of {_titles(FAMILIES.values())}{' on repeated data' if repeated else ''}"
    drawn = [f"![{CAPTIONS[name.removesuffix('.png')]}]({name})" for name in images]
    texts = [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join([title, _summary(results, study, repeated), *drawn, *texts]) + "\n"


def _titles(families: Iterable[Family], word: str = "and") -> str:
    return f" {word} ".join(family.title for family in families)


def _list(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _named(texts: dict[str, Any]) -> str:
    return _list(f"{name}: {text}" for name, text in texts.items())


def _summary(results: Sequence[Result], study: Study, repeated: bool) -> str:
    measured = sum(r.measured for r in results)
    if not measured:
        return f"No reading has a figure yet, of {len(results)} planned. There is nothing to fit."
    texts = repetition.summary(results) if repeated else _fitted_sentences(study)
    if measured < len(results):
        texts.append(f"{measured} of {len(results)} readings have a figure.")
    return " ".join(texts)


def _fitted_sentences(study: Study) -> list[str]:
    texts = [_gap_sentences(gap, f"{study.level:.0%}") for gap in findings.headline_gaps(study)]
    if not texts:
        texts.append("There is no compute gap to give: it takes laws of the loss of both families.")
    texts += [
        f"At the same FLOPs the best {ratio.family.title} has {times(ratio.value)} ({times(ratio.low)} to "
        f"{times(ratio.high)}) the parameters of the best {ratio.reference.title}."
        for ratio in findings.size_ratios(study)
    ]
    for family in FAMILIES.values():
        if law := study.of(family.name).laws.best("parameters"):
            exponent = study.constants(law)["exponent"]
            texts.append(f"The best size of {family.title} grows as C^{interval(exponent)}.")
    return texts


def _gap_sentences(gap: findings.Gap, level: str) -> str:
    family, arm = gap.family.title, gap.reference.title
    down = f"{family}'s law {{}} to the {arm}'s loss at {flops(gap.budget)} FLOPs"
    if not math.isfinite(gap.value):
        return f"{down.format('does not come down')} at any budget."
    if gap.beyond > _TOO_FAR:
        return (
            f"{down.format('comes down')} only beyond {_TOO_FAR:,} times its largest budget, too far to tell a compute "
            "gap."
        )
    text = (
        f"At the same loss, {family} needs **{times(gap.value)}** ({level} interval {times(gap.low)} to "
        f"{times(gap.high)}) the training FLOPs of the {arm}, at the {gap.loss:.3f} nats per token of the best {arm} "
        f"of {flops(gap.budget)} FLOPs."
    )
    if gap.beyond > 1:
        text += f" {family}'s budget there is extrapolated, {times(gap.beyond)} its largest one."
    return text


def _minima(results: Sequence[Result], study: Study) -> str:
    measured = [r for r in results if r.measured]
    if not measured:
        return "There are none: no run has a figure yet."
    per_nat = [r.bits_per_byte / r.loss for r in measured if r.bits_per_byte is not None]
    bits = sum(per_nat) / len(per_nat) if len(per_nat) == len(measured) else None
    cells = [["FLOPs", "family", "N*", "D*", "D*/N*", "L*, nats per token", *(["bits per byte"] if bits else []), ""]]
    for family in FAMILIES.values():
        fitted = study.of(family.name)
        minima = {m.budget: m for m in fitted.minima}
        for budget in sorted({*fitted.budgets, *(r.budget for r in results if r.family is family)}):
            none = [*["-"] * (len(cells[0]) - 3), "no minimum"]
            found = _minimum(minima[budget], bits) if budget in minima else none
            cells.append([flops(budget), family.title, *found])
    text = "± are standard errors; those of N* and D* are of the same error, in opposite directions."
    if not bits:
        text += " Not all readings have bits per byte, so none are given."
    return f"{markdown_table(cells)}\n\n{text}"


def _minimum(m: Minimum, bits: float | None) -> list[str]:
    share = math.expm1(m.log_parameters_stderr)
    cells = [f"{count(m.parameters)} ± {share:.1%}", f"{count(m.tokens)} ± {share:.1%}"]
    cells.append(f"{three(m.tokens / m.parameters)} ± {math.expm1(2 * m.log_parameters_stderr):.1%}")
    cells.append(f"{m.loss:.4f} ± {m.loss_stderr:.4f}")
    if bits:
        cells.append(f"{bits * m.loss:.4f} ± {bits * m.loss_stderr:.4f}")
    return [*cells, "" if m.inside else "outside the sizes tried"]


_EXPONENTS = {  # of `Laws`
    "parameters": "N*",
    "tokens": "D*",
    "loss_power": "L*, no irreducible loss",
    "loss": "L*, above the irreducible loss",
    "parametric_parameters": "N*, by L(N, D)",
    "parametric_tokens": "D*, by L(N, D)",
    "parametric_loss": "L*, by L(N, D)",
}


def _exponents(study: Study) -> str:
    known = [study.of(family).laws.known() for family in FAMILIES]
    if not any(known):
        return "There are none: no family has a law yet."
    titles = (family.title for family in FAMILIES.values())
    cells = [["exponent of C", *titles, *(f"{paper.name} ({paper.arxiv})" for paper in PUBLISHED)]]
    for name, label in _EXPONENTS.items():
        ours = [interval(study.constants(laws[name])["exponent"]) if name in laws else "-" for laws in known]
        theirs = [or_dash(paper.exponents.get(name), ".3g") for paper in PUBLISHED]
        if {*ours, *theirs} != {"-"}:
            cells.append([label, *ours, *theirs])
    ranges = [f"{p.name} {flops(p.budgets[0])} to {flops(p.budgets[-1])}" for p in PUBLISHED if p.budgets]
    text = f"In brackets: {study.level:.0%} intervals. Published laws were fitted at other FLOPs: {', '.join(ranges)}."
    return f"{markdown_table(cells)}\n\n{text} A published exponent need not hold at the budgets of this sweep."


GAP_LAWS = {
    "loss": "by the minima",
    "loss_power": "by the minima, no irreducible loss",
    "parametric_loss": "by L(N, D)",
}


def _gaps(study: Study) -> str:
    pairs = [pair for pair in PAIRS if all(family.name in study.families for family in pair)]
    if not pairs:
        missing = [family for family in FAMILIES.values() if family.name not in study.families]
        return f"There is none: no {_titles(missing, 'and no')} run has a figure."
    return "\n\n".join(_gap_table(study, family, reference) for family, reference in pairs)


def _gap_table(study: Study, family: Family, reference: Family) -> str:
    gaps = {law: study.gap(family.name, reference.name, law) for law in GAP_LAWS}
    known = {law: gap for law, gap in gaps.items() if gap.get("ratios")}
    lacking = {
        law: _titles(f for f in (family, reference) if law not in study.of(f.name).laws.known()) for law in GAP_LAWS
    }
    if not known:
        return f"There is none: no law of the loss of {lacking['loss']}."
    ratio = f"L*, {family.title} over {reference.title}"
    cells = [[f"{reference.title}'s FLOPs", *(f"{GAP_LAWS[law]}: {ratio}" for law in known)]]
    cells += [
        [flops(rows[0]["budget"]), *map(_gap, rows)]
        for rows in zip(*(gap["ratios"] for gap in known.values()), strict=True)
    ]
    text = (
        f"L* is the {reference.title}'s loss at its budget; the ratio is how many times the FLOPs {family.title} needs "
        f"for it, with its {study.level:.0%} interval. `(!)`: at more FLOPs than {family.title} has runs at, so "
        f"extrapolated. SMDM reads about {SMDM_GAP:.0f}x off its two lines, from 6e18 to 1e20 FLOPs."
    )
    closes = [_closing(GAP_LAWS[law], gap["closes"], study) for law, gap in known.items()]
    missing = [f"No gap {label}: no such law of {lacking[law]}." for law, label in GAP_LAWS.items() if law not in known]
    return "\n\n".join([markdown_table(cells), text, " ".join([*closes, *missing])])


def _gap(row: dict[str, Any]) -> str:
    extrapolated = " (!)" if row["beyond"] is None or row["beyond"] > 1 else ""
    return f"{row['loss']:.3f}: {interval(row, times)}{extrapolated}"


def _closing(label: str, closes: dict[str, Any], study: Study) -> str:
    label = label[0].upper() + label[1:]
    if closes["value"] is None:
        low = f"; the {study.level:.0%} interval begins at {flops(closes['low'])} FLOPs" if closes["low"] else ""
        return f"{label}, the gap does not close at any budget looked at{low}."
    beyond = closes["beyond"]
    extrapolated = f", {times(beyond)} the largest budget and so extrapolated" if beyond > 1 else ""
    return f"{label}, the gap closes at {interval(closes, flops)} FLOPs{extrapolated}."


def _parametric(study: Study) -> str:
    laws = {family.title: study.of(name).laws.parametric for name, family in FAMILIES.items()}
    constants = {title: study.constants(law) for title, law in laws.items() if law}
    if not constants:
        some = any(fitted.reasons for fitted in study.families.values())
        return "There is none: see what the fits could not tell." if some else "There is none."
    cells = [["", *constants]]
    cells += [[name, *(interval(of[name], three) for of in constants.values())] for name in Parametric._fields]
    return f"L = E + A/N^a + B/D^b, nats per token, with {study.level:.0%} intervals.\n\n{markdown_table(cells)}"


def _prediction(study: Study, predict: float) -> str:
    if study.largest_budget is None:
        return "There are no laws to predict from."
    cells = [["family", "by", "N*", "D*", "L*, nats per token"]]
    shows = {"parameters": count, "tokens": count, "loss": "{:.3f}".format}
    for name, family in FAMILIES.items():
        known, first = study.of(name).laws.known(), len(cells)
        for prefix, approach in (("", "minima"), ("parametric_", "L(N, D)")):
            laws = {quantity: known.get(prefix + quantity) for quantity in shows}
            if any(laws.values()):
                row = [
                    interval(study.estimate(float(law.best(predict)), law.draws(predict)), shows[q]) if law else "-"
                    for q, law in laws.items()
                ]
                cells.append([family.title, approach, *row])
        if len(cells) == first:
            cells.append([family.title, "no law", "-", "-", "-"])
    largest = study.largest_budget
    place = "within the budgets that have runs" if predict <= largest else "an extrapolation"
    text = (
        f"{flops(predict)} FLOPs are {times(predict / largest)} the largest budget with runs, {flops(largest)}: "
        f"{place}. {study.level:.0%} intervals are of the noise of the runs; that the laws hold so far is assumed."
    )
    return f"{markdown_table(cells)}\n\n{text}"


def _reasons(study: Study) -> str:
    return _list(
        f"{FAMILIES[name].title}, {what}: {reason}"
        for name, fitted in study.families.items()
        for what, reason in fitted.reasons.items()
    )


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
    order = list(FAMILIES)
    for r in sorted(results, key=lambda r: (order.index(r.objective), r.budget, r.non_embedding_parameters, r.seed)):
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
