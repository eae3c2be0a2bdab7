"""What the fits of a sweep say, in words and tables: minima, exponents, compute gaps, predictions.

Units: FLOPs, parameters without embeddings, tokens, nats per token.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from llada.scaling import findings
from llada.scaling.laws import PUBLISHED, SMDM_GAP, Minimum
from llada.scaling.numbers import count, flops, interval, markdown_list, markdown_table, or_dash, three, times
from llada.scaling.parametric import Parametric
from llada.scaling.results import Result
from llada.scaling.series import Series, compared_by, of_key, ordered, pairs
from llada.scaling.study import Study

_TOO_FAR = 1000  # times the largest budget: what a law says beyond that is no finding


def _plain() -> list[Series]:
    return [series for series in ordered(()) if not series.variant]


def _titles(series: Iterable[Series], word: str = "and") -> str:
    return f" {word} ".join(each.title for each in series)


def summary(study: Study) -> list[str]:
    """Sentences for the head of the report: gaps, best sizes, how they grow."""
    texts = [_gap_sentences(gap, f"{study.level:.0%}") for gap in findings.headline_gaps(study)]
    if not texts:
        texts.append("There is no compute gap to give: it takes laws of the loss of both families.")
    texts += [
        f"At the same FLOPs the best {ratio.series.title} has {times(ratio.value)} ({times(ratio.low)} to "
        f"{times(ratio.high)}) the parameters of the best {ratio.reference.title}."
        for ratio in findings.size_ratios(study)
    ]
    for series in ordered(study.series):
        if law := study.of(series.key).laws.best("parameters"):
            exponent = study.constants(law)["exponent"]
            texts.append(f"The best size of {series.title} grows as C^{interval(exponent)}.")
    return texts


def _gap_sentences(gap: findings.Gap, level: str) -> str:
    series, reference, by = gap.series.title, _the(gap.reference), compared_by(gap.series, gap.reference)
    down = f"{series}'s law {{}} to {reference}'s loss at {flops(gap.budget)} FLOPs{by and f' ({by})'}"
    if not math.isfinite(gap.value):
        return f"{down.format('does not come down')} at any budget."
    if gap.beyond > _TOO_FAR:
        return (
            f"{down.format('comes down')} only beyond {_TOO_FAR:,} times its largest budget, too far to tell a compute "
            "gap."
        )
    text = (
        f"At the same loss{by and f' ({by}: at most so)'}, {series} needs **{times(gap.value)}** ({level} interval "
        f"{times(gap.low)} to {times(gap.high)}) the training FLOPs of {reference}, at the {gap.loss:.3f} nats per "
        f"token of the best {gap.reference.title} of {flops(gap.budget)} FLOPs."
    )
    if gap.beyond > 1:
        text += f" {series}'s budget there is extrapolated, {times(gap.beyond)} its largest one."
    return text


def _the(series: Series) -> str:
    """In a sentence: "the ARM", "plain LLaDA"."""
    return f"the {series.title}" if series.exact else f"plain {series.title}"


def sections(results: Sequence[Result], study: Study) -> dict[str, str]:
    """The tables of the report, by their headings."""
    return {
        "Best size of each budget": _minima(results, study),
        "Exponents": _exponents(study),
        "Compute gap": _gaps(study),
        "L(N, D) through all runs": _parametric(study),
    }


def _minima(results: Sequence[Result], study: Study) -> str:
    measured = [r for r in results if r.measured]
    if not measured:
        return "There are none: no run has a figure yet."
    per_nat = [r.bits_per_byte / r.loss for r in measured if r.bits_per_byte is not None]
    bits = sum(per_nat) / len(per_nat) if len(per_nat) == len(measured) else None
    cells = [["FLOPs", "series", "N*", "D*", "D*/N*", "L*, nats per token", *(["bits per byte"] if bits else []), ""]]
    for series in ordered([*(r.series.key for r in results), *study.series]):
        fitted = study.of(series.key)
        minima = {m.budget: m for m in fitted.minima}
        for budget in sorted({*fitted.budgets, *(r.budget for r in results if r.series == series)}):
            none = [*["-"] * (len(cells[0]) - 3), "no minimum"]
            found = _minimum(minima[budget], bits) if budget in minima else none
            cells.append([flops(budget), series.title, *found])
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
    known = [study.of(series.key).laws.known() for series in ordered(study.series)]
    if not any(known):
        return "There are none: no family has a law yet."
    titles = (series.title for series in ordered(study.series))
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
    compared = [pair for pair in pairs(study.series) if all(series.key in study.series for series in pair)]
    if not compared:
        missing = [series for series in _plain() if series.key not in study.series]
        return f"There is none: no {_titles(missing, 'and no')} run has a figure."
    return "\n\n".join(_gap_table(study, series, reference) for series, reference in compared)


def _gap_table(study: Study, series: Series, reference: Series) -> str:
    gaps = {law: study.gap(series.key, reference.key, law) for law in GAP_LAWS}
    known = {law: gap for law, gap in gaps.items() if gap.get("ratios")}
    lacking = {
        law: _titles(s for s in (series, reference) if law not in study.of(s.key).laws.known()) for law in GAP_LAWS
    }
    if not known:
        return f"There is none: no law of the loss of {lacking['loss']}."
    of_series, of_reference = ("exact NLL" if each.exact else "bound" for each in (series, reference))
    ratio = f"L*, {series.title} over {reference.title}"
    if compared_by(series, reference):
        ratio = f"L*, {series.title} ({of_series}) over {reference.title} ({of_reference})"
    cells = [[f"{reference.title}'s FLOPs", *(f"{GAP_LAWS[law]}: {ratio}" for law in known)]]
    cells += [
        [flops(rows[0]["budget"]), *map(_gap, rows)]
        for rows in zip(*(gap["ratios"] for gap in known.values()), strict=True)
    ]
    text = (
        f"L* is {_the(reference)}'s loss at its budget; the ratio is how many times the FLOPs {series.title} needs "
        f"for it, with its {study.level:.0%} interval. `(!)`: at more FLOPs than {series.title} has runs at, so "
        "extrapolated."
    )
    if reference.exact and not series.variant:
        text += f" SMDM reads about {SMDM_GAP:.0f}x off its two lines, from 6e18 to 1e20 FLOPs."
    elif series.variant and reference == series.plain:
        text += " A ratio below 1 is a saving."
    # Where a variant's gap over its own family closes says nothing: it may well begin below 1.
    with_reference = known if reference.exact else {}
    closes = [_closing(GAP_LAWS[law], gap["closes"], study) for law, gap in with_reference.items()]
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
    laws = {series.title: study.of(series.key).laws.parametric for series in ordered(study.series)}
    constants = {title: study.constants(law) for title, law in laws.items() if law}
    if not constants:
        some = any(fitted.reasons for fitted in study.series.values())
        return "There is none: see what the fits could not tell." if some else "There is none."
    cells = [["", *constants]]
    cells += [[name, *(interval(of[name], three) for of in constants.values())] for name in Parametric._fields]
    return f"L = E + A/N^a + B/D^b, nats per token, with {study.level:.0%} intervals.\n\n{markdown_table(cells)}"


def prediction(study: Study, predict: float) -> str:
    """The best size, tokens and loss of every series at `predict` FLOPs."""
    if study.largest_budget is None:
        return "There are no laws to predict from."
    cells = [["series", "by", "N*", "D*", "L*, nats per token"]]
    shows = {"parameters": count, "tokens": count, "loss": "{:.3f}".format}
    for series in ordered(study.series):
        known, first = study.of(series.key).laws.known(), len(cells)
        for prefix, approach in (("", "minima"), ("parametric_", "L(N, D)")):
            laws = {quantity: known.get(prefix + quantity) for quantity in shows}
            if any(laws.values()):
                row = [
                    interval(study.estimate(float(law.best(predict)), law.draws(predict)), shows[q]) if law else "-"
                    for q, law in laws.items()
                ]
                cells.append([series.title, approach, *row])
        if len(cells) == first:
            cells.append([series.title, "no law", "-", "-", "-"])
    largest = study.largest_budget
    place = "within the budgets that have runs" if predict <= largest else "an extrapolation"
    text = (
        f"{flops(predict)} FLOPs are {times(predict / largest)} the largest budget with runs, {flops(largest)}: "
        f"{place}. {study.level:.0%} intervals are of the noise of the runs; that the laws hold so far is assumed."
    )
    return f"{markdown_table(cells)}\n\n{text}"


def reasons(study: Study) -> str:
    """What the fits could not tell, and why."""
    return markdown_list(
        f"{of_key(key).title}, {what}: {reason}"
        for key, fitted in study.series.items()
        for what, reason in fitted.reasons.items()
    )
