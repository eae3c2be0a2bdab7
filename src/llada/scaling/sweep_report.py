"""`report.md` of a sweep: what the runs say, with intervals, and what they do not say.

Text and tables only; the numbers are those of `study`, `findings` and `repetition`. Every caveat is there if and only
if it applies. Nothing is left out in silence: what is missing is named.
Units: FLOPs, parameters without embeddings, tokens, nats per token.
"""

import math
from collections.abc import Sequence
from typing import Any

from llada.scaling import findings
from llada.scaling.caveats import caveats, lost_runs
from llada.scaling.comparison import markdown_table
from llada.scaling.findings import NAMES, count, flops, interval, three, times
from llada.scaling.isoflop import Minimum
from llada.scaling.published import PUBLISHED, SMDM_GAP
from llada.scaling.repetition import crossovers, is_data_limited, unpaired
from llada.scaling.results import FAILED, Result
from llada.scaling.study import Study

_TOO_FAR = 1000  # times the largest budget: what a law says there is no finding

CAPTIONS = {
    "isoflop": "loss against size at each budget",
    "frontier": "loss at the best size against training FLOPs",
    "allocation": "best size and tokens against training FLOPs",
    "repeat": "loss against epochs over the same tokens",
}


def report(
    results: Sequence[Result],
    study: Study,
    *,
    command: str,
    matching: str,
    predict: float | None,
    pictures: dict[str, str],
    annealing_gain: float,
    remarks: Sequence[str] = (),
) -> str:
    """The whole report in Markdown.

    command         the shell command that made or updates the sweep
    matching        the FLOPs that budgets are in: 6nd | exact
    predict         FLOPs of a budget to foretell, or None
    pictures        drawn ones, {isoflop | frontier | allocation | repeat: path from the report}
    annealing_gain  share of the loss already taken off readings before annealing, in `study`
    remarks         on what is not among the readings
    """
    repeated = is_data_limited(results)
    drawn = "\n\n".join(f"![{CAPTIONS.get(name, name)}]({path})" for name, path in pictures.items())
    sections = [
        ("", _summary(results, study, repeated)),
        ("", drawn),
        ("Repeated data", _repetition(results) if repeated else ""),
        ("Best size of each budget", "" if repeated else _minima(results, study)),
        ("Exponents", "" if repeated else _exponents(study)),
        ("Compute gap", "" if repeated else _gaps(study)),
        ("L(N, D) through all runs", "" if repeated else _parametric(study)),
        (f"Prediction at {flops(predict)} FLOPs" if predict else "", _prediction(study, predict) if predict else ""),
        ("Caveats", "\n".join(f"- {text}" for text in caveats(results, study, matching, annealing_gain, repeated))),
        ("What the fits could not tell", "" if repeated else _reasons(study)),
        ("Runs that have no figure", _lost(results)),
        ("Runs at another learning rate", _retried(results)),
        ("Left out", "\n".join(f"- {text.removeprefix('left out: ')}" for text in remarks)),
        ("All readings", _runs(results)),
        ("Command", f"    {command}"),
    ]
    texts = [f"## {title}\n\n{text}" if title else text for title, text in sections if text]
    return "\n\n".join(["# Scaling of LLaDA and ARM" + (" on repeated data" if repeated else ""), *texts]) + "\n"


def _summary(results: Sequence[Result], study: Study, repeated: bool) -> str:
    measured = sum(r.measured for r in results)
    if not measured:
        return f"No reading has a figure yet, of {len(results)} planned. There is nothing to fit."
    said = _repeated_sentences(results) if repeated else _fitted_sentences(study)
    if measured < len(results):
        said.append(f"{measured} of {len(results)} readings have a figure.")
    return " ".join(said)


def _repeated_sentences(results: Sequence[Result]) -> list[str]:
    crossed = crossovers(results)
    if not crossed:
        return ["No size and corpus was read for both families, so there is no crossover to look for."]
    won = [x for x in crossed if x.below_best is not None]
    last = three(max(x.until for x in crossed))
    said = f"LLaDA ends below the ARM's best loss in {len(won)} of {len(crossed)} pairs of equal size and unique tokens"
    if not won:
        return [f"{said}: no crossover up to {last} epochs."]
    first = min(won, key=lambda x: x.below_best)
    return [
        f"{said}, up to {last} epochs.",
        f"The earliest crossover is at {three(first.below_best)} epochs ({count(first.parameters)} parameters, "
        f"{count(first.unique_tokens)} unique tokens).",
    ]


def _fitted_sentences(study: Study) -> list[str]:
    said, level = [], f"{study.level:.0%}"
    gap, ratio = findings.headline_gap(study), findings.size_ratio(study)
    if gap is None:
        said.append("There is no compute gap to give: it takes laws of the loss of both families.")
    elif not math.isfinite(gap.value):
        said.append(f"LLaDA's law does not come down to the ARM's loss at {flops(gap.budget)} FLOPs at any budget.")
    elif gap.beyond > _TOO_FAR:
        said.append(
            f"LLaDA's law comes down to the ARM's loss at {flops(gap.budget)} FLOPs only beyond {_TOO_FAR:,} times its "
            "largest budget, too far to tell a compute gap."
        )
    else:
        said.append(
            f"At the same loss, LLaDA needs **{times(gap.value)}** ({level} interval {times(gap.low)} to "
            f"{times(gap.high)}) the training FLOPs of an ARM, at the {gap.loss:.3f} nats per token of the best ARM of "
            f"{flops(gap.budget)} FLOPs."
        )
        if gap.beyond > 1:
            said.append(f"LLaDA's budget there is extrapolated, {times(gap.beyond)} its largest one.")
    if ratio:
        said.append(
            f"At the same FLOPs the best LLaDA has {times(ratio.value)} ({times(ratio.low)} to {times(ratio.high)}) "
            "the parameters of the best ARM."
        )
    for family, name in NAMES.items():
        if law := findings.law_of(study, family, "parameters"):
            exponent = study.constants(family, law)["exponent"]
            said.append(f"The best size of {name} grows as C^{interval(exponent)}.")
    return said


def _minima(results: Sequence[Result], study: Study) -> str:
    measured = [r for r in results if r.measured]
    if not measured:
        return "There are none: no run has a figure yet."
    per_nat = [r.bits_per_byte / r.nats_per_token for r in measured if r.bits_per_byte is not None]
    bits = sum(per_nat) / len(per_nat) if per_nat and len(per_nat) == len(measured) else None
    cells = [["FLOPs", "family", "N*", "D*", "D*/N*", "L*, nats per token", *(["bits per byte"] if bits else []), ""]]
    for family, name in NAMES.items():
        minima = {m.budget: m for m in study.minima.get(family, [])}
        for budget in sorted({*study.budgets.get(family, []), *(r.budget for r in results if r.objective == family)}):
            if budget in minima:
                cells.append([flops(budget), name, *_minimum(minima[budget], bits)])
            else:
                cells.append([flops(budget), name, *["-"] * (len(cells[0]) - 3), "no minimum"])
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


def _exponents(study: Study) -> str:
    if not any(study.laws.values()):
        return "There are none: no family has a law yet."
    quantities = {
        "parameters": "N*",
        "tokens": "D*",
        "loss_power": "L*, no irreducible loss",
        "loss": "L*, above the irreducible loss",
        "parametric_parameters": "N*, by L(N, D)",
        "parametric_tokens": "D*, by L(N, D)",
        "parametric_loss": "L*, by L(N, D)",
    }
    published = {"parameters": "parameters_exponent", "tokens": "tokens_exponent", "loss_power": "loss_exponent"}
    cells = [["exponent of C", *NAMES.values(), *(f"{paper.name} ({paper.arxiv})" for paper in PUBLISHED)]]
    for law, label in quantities.items():
        own = [
            interval(study.constants(family, law)["exponent"]) if law in study.laws.get(family, {}) else "-"
            for family in NAMES
        ]
        theirs = [getattr(paper, published[law]) if law in published else None for paper in PUBLISHED]
        if law in published or set(own) != {"-"}:
            cells.append([label, *own, *("-" if e is None else f"{e:.3g}" for e in theirs)])
    ranges = [f"{p.name} {flops(p.low)} to {flops(p.high)}" for p in PUBLISHED if p.low is not None]
    text = f"In brackets: {study.level:.0%} intervals. Published laws were fitted at other FLOPs: {', '.join(ranges)}."
    return f"{markdown_table(cells)}\n\n{text} A published exponent need not hold at the budgets of this sweep."


GAP_LAWS = {
    "loss": "by the minima",
    "loss_power": "by the minima, no irreducible loss",
    "parametric_loss": "by L(N, D)",
}


def _gaps(study: Study) -> str:
    if missing := [name for family, name in NAMES.items() if family not in study.laws]:
        return f"There is none: no {' and no '.join(missing)} run has a figure."
    found = {law: study.gap(*NAMES, law) for law in GAP_LAWS}
    there = {law: gap for law, gap in found.items() if gap.get("ratios")}
    if not there:
        return f"There is none: {_lacking(study, 'loss').replace('such law', 'law of the loss')}."
    cells = [["ARM's FLOPs", *(f"{label}: L*, LLaDA over ARM" for law, label in GAP_LAWS.items() if law in there)]]
    for i, row in enumerate(next(iter(there.values()))["ratios"]):
        cells.append([flops(row["budget"]), *(_gap(gap["ratios"][i]) for gap in there.values())])
    closes = [_closing(GAP_LAWS[law], gap["closes"], study) for law, gap in there.items()]
    missing = [f"No gap {label}: {_lacking(study, law)}." for law, label in GAP_LAWS.items() if law not in there]
    text = "L* is the ARM's loss at its budget; the ratio is how many times the FLOPs LLaDA needs for it, with its "
    text += (
        f"{study.level:.0%} interval. `(!)`: at more FLOPs than LLaDA has runs at, so extrapolated. SMDM reads about "
    )
    text += f"{SMDM_GAP:.0f}x off its two lines, from 6e18 to 1e20 FLOPs."
    return "\n\n".join([markdown_table(cells), text, " ".join([*closes, *missing])])


def _lacking(study: Study, law: str) -> str:
    return "no such law of " + " and ".join(name for family, name in NAMES.items() if law not in study.laws[family])


def _gap(row: dict[str, Any]) -> str:
    extrapolated = " (!)" if row["beyond"] is None or row["beyond"] > 1 else ""
    return f"{row['loss']:.3f}: {interval(row, times)}{extrapolated}"


def _closing(label: str, closes: dict[str, Any], study: Study) -> str:
    label = label[0].upper() + label[1:]
    if closes["value"] is None:
        low = f"; the {study.level:.0%} interval begins at {flops(closes['low'])} FLOPs" if closes["low"] else ""
        return f"{label}, the gap does not close at any budget looked at{low}."
    beyond = closes["beyond"]
    told = f", {times(beyond)} the largest budget and so extrapolated" if beyond and beyond > 1 else ""
    return f"{label}, the gap closes at {interval(closes, flops)} FLOPs{told}."


def _parametric(study: Study) -> str:
    found = {f: study.constants(f, "parametric") for f in NAMES if "parametric" in study.laws.get(f, {})}
    if not found:
        return "There is none: see what the fits could not tell." if any(study.reasons.values()) else "There is none."
    cells = [["", *(NAMES[f] for f in found)]]
    for constant in next(iter(found.values())):
        cells.append([constant, *(interval(constants[constant], three) for constants in found.values())])
    return f"L = E + A/N^a + B/D^b, nats per token, with {study.level:.0%} intervals.\n\n{markdown_table(cells)}"


def _prediction(study: Study, predict: float) -> str:
    cells = [["family", "by", "N*", "D*", "L*, nats per token"]]
    for family, name in NAMES.items():
        found = findings.predictions(study, family, predict)
        for approach, quantities in found.items():
            shows = {"parameters": count, "tokens": count, "loss": "{:.3f}".format}
            row = (interval(quantities[q], show) if q in quantities else "-" for q, show in shows.items())
            cells.append([name, approach, *row])
        if not found:
            cells.append([name, "no law", "-", "-", "-"])
    largest = findings.largest_budget(study)
    if largest is None:
        return "There are no laws to foretell from."
    place = "within the budgets that have runs" if predict <= largest else "an extrapolation"
    text = f"{flops(predict)} FLOPs are {times(predict / largest)} the largest budget with runs, {flops(largest)}: "
    text += f"{place}. {study.level:.0%} intervals tell the noise of the runs; that the laws hold so far is assumed."
    return f"{markdown_table(cells)}\n\n{text}"


def _reasons(study: Study) -> str:
    lines = [
        f"- {NAMES.get(family, family)}, {what}: {reason}"
        for family, reasons in study.reasons.items()
        for what, reason in reasons.items()
    ]
    return "\n".join(lines)


def _repetition(results: Sequence[Result]) -> str:
    head = ["unique tokens", "parameters", "below the ARM after equally many epochs", "below the ARM's best"]
    cells = [[*head, "LLaDA's best", "ARM's best"]]
    for x in crossovers(results):
        none = f"no crossover up to {three(x.until)} epochs"
        at = [none if e is None else f"at {three(e)} epochs" for e in (x.same_epochs, x.below_best)]
        bests = [f"{loss:.4f} at {three(e)} epochs" for e, loss in (x.diffusion_best, x.autoregressive_best)]
        bests[0] += " (still falling)" if x.diffusion_still_falling else ""
        cells.append([count(x.unique_tokens), count(x.parameters), *at, *bests])
    alone = "".join(f" {text}" for text in unpaired(results))
    if len(cells) == 1:
        return f"No size and corpus was read for both families.{alone}"
    text = "Epochs are those of the first reading that is below; the crossing lies between it and the reading before. "
    return f"{markdown_table(cells)}\n\n{text}Losses are held-out nats per token, means over seeds.{alone}"


def _lost(results: Sequence[Result]) -> str:
    lines = [f"- {run}: {why}" for run, why in lost_runs(results).items()]
    return "\n".join(lines)


def _retried(results: Sequence[Result]) -> str:
    return "\n".join(f"- {run}: {why}" for run, why in {r.run: r.retried for r in results if r.retried}.items())


def _runs(results: Sequence[Result]) -> str:
    if not results:
        return "None."
    head = "run,FLOPs asked for,N,all parameters,tokens,tokens per N,epochs,peak rate,FLOPs 6ND,FLOPs exact,"
    cells = [(head + "nats per token,± draws,± rows,annealed,seconds").split(",")]
    for r in sorted(results, key=lambda r: (r.objective != "diffusion", r.budget, r.non_embedding_parameters, r.seed)):
        loss = f"{r.nats_per_token:.4f}" if r.measured else "diverged" if r.nats_per_token is not None else r.status
        numbers = [r.monte_carlo_stderr, r.stderr]
        epochs = "-" if r.epochs is None else three(r.epochs)
        cells.append(
            [
                r.run, flops(r.budget), count(r.non_embedding_parameters), count(r.parameters), count(r.tokens),
                three(r.tokens / r.non_embedding_parameters), epochs, f"{r.peak_learning_rate:.2e}",
                flops(r.flops_6nd), flops(r.flops_exact), "failed" if r.status == FAILED and not r.measured else loss,
                *("-" if x is None else f"{x:.4f}" for x in numbers), "yes" if r.annealed else "no",
                "-" if r.seconds is None else f"{r.seconds:,.0f}",
            ]
        )  # fmt: skip
    return markdown_table(cells)
