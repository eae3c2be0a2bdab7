"""The report of a sweep: its numbers, parsed back, are the study's; caveats are there exactly when they apply."""

import dataclasses
import math
import re

import pytest
from synthetic import BUDGETS, EXACT, LAWS, change, isoflop_readings, lost, only, repeated_readings

from llada.objectives.families import DIFFUSION, FAMILIES
from llada.scaling import figure, findings, fits_report, repetition, study, sweep_report
from llada.scaling.results import FAILED, RUNNING, points
from llada.scaling.series import Series
from llada.scaling.sweep_report import report


@pytest.fixture(scope="module")
def whole():
    readings = isoflop_readings()
    return readings, study.fit(points(readings), draws=40)


def written(readings, fitted=None, **changes) -> str:
    fitted = fitted or study.fit(points(readings), draws=5)
    return report(readings, fitted, "llada sweep --workdir=runs/x", **changes)


def section(text: str, title: str) -> str:
    return text.split(f"## {title}")[1].split("\n## ")[0]


def rows(text: str) -> list[dict[str, str]]:
    """Of the first table, by the names of its columns."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def number(text: str) -> float:
    """1.23 M ± 4% as 1.23e6; the first number of the text."""
    value, unit = re.match(r"(-?[\d.,]+(?:e-?\d+)?)x? ?([TBMk]?)\b", text).groups()
    return float(value.replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]


def test_the_summary_comes_first_and_has_the_gap(whole):
    text = written(*whole, images=["isoflop.png"])
    (gap,), first = findings.headline_gaps(whole[1]), text.split("\n\n")[1]
    found = re.search(r"\*\*([\d.]+)x\*\* \(95% interval ([\d.]+)x to ([\d.]+)x\)", first)
    assert [float(g) for g in found.groups()] == pytest.approx([gap.value, gap.low, gap.high], rel=0.06)
    assert "![loss against size at each budget](isoflop.png)" in text
    assert section(text, "Command").strip() == "llada sweep --workdir=runs/x"


def test_a_gap_far_beyond_the_runs_is_no_finding(whole, monkeypatch):
    (gap,) = findings.headline_gaps(whole[1])
    monkeypatch.setattr(findings, "headline_gaps", lambda study: [gap._replace(value=5e23, beyond=2e23)])
    said = " ".join(fits_report.summary(whole[1]))
    assert "too far to tell a compute gap" in said and "LLaDA needs" not in said


def test_minima_are_those_of_the_law(whole):
    table = rows(section(written(*whole), "Best size of each budget"))
    assert len(table) == 2 * len(BUDGETS)
    for row in table:
        law = LAWS["diffusion" if row["series"] == "LLaDA" else "autoregressive"]
        n, d, loss = (float(x) for x in law.optimal(float(row["FLOPs"])))
        assert number(row["N*"]) == pytest.approx(n, rel=0.1) and number(row["D*"]) == pytest.approx(d, rel=0.1)
        assert number(row["D*/N*"]) == pytest.approx(number(row["D*"]) / number(row["N*"]), rel=0.02)
        assert number(row["L*, nats per token"]) == pytest.approx(loss, abs=0.02)
        assert number(row["bits per byte"]) == pytest.approx(0.4 * number(row["L*, nats per token"]), abs=1e-3)


def test_bits_per_byte_only_where_all_readings_have_them(whole):
    readings = [*whole[0]]
    readings[0] = dataclasses.replace(readings[0], bits_per_byte=None)
    assert "Not all readings have bits per byte" in written(readings, whole[1])


def test_exponents_stand_beside_published_ones(whole):
    by_label = {row["exponent of C"]: row for row in rows(section(written(*whole), "Exponents"))}
    assert number(by_label["N*"]["LLaDA"]) == pytest.approx(0.5, abs=0.02)
    assert by_label["N*"]["SMDM MDM (2410.18514)"] == "0.63" and by_label["D*"]["Quokka (2510.03280)"] == "0.486"
    assert by_label["L*, no irreducible loss"]["GIDD masked (2512.10858)"] == "-0.0496"
    assert number(by_label["L*, by L(N, D)"]["ARM"]) == pytest.approx(-0.16, abs=0.02)


def test_gaps_and_prediction_and_readings_are_the_studys(whole):
    readings, fitted = whole
    text = written(readings, fitted, predict=1e22)
    table = rows(section(text, "Compute gap"))
    for row, found in zip(table, fitted.gap("diffusion", "autoregressive")["ratios"], strict=True):
        loss, ratio = row["by the minima: L*, LLaDA (bound) over ARM (exact NLL)"].split(": ")
        assert float(loss) == pytest.approx(found["loss"], abs=1e-3)
        assert number(ratio) == pytest.approx(found["value"], rel=0.06)
        assert ("(!)" in ratio) == (found["beyond"] > 1)
    assert "close" in section(text, "Compute gap")
    foretold = section(text, "Prediction at 1e22 FLOPs")
    assert "10x the largest budget with runs, 1e21: an extrapolation" in foretold
    for row in rows(foretold):
        n, d, loss = LAWS["diffusion" if row["series"] == "LLaDA" else "autoregressive"].optimal(1e22)
        assert number(row["N*"]) == pytest.approx(n, rel=0.3) and number(row["D*"]) == pytest.approx(d, rel=0.3)
        assert number(row["L*, nats per token"]) == pytest.approx(loss, abs=0.1)
    shown = {row["run"]: row for row in rows(section(text, "All readings"))}
    for r in readings:
        row = shown[r.run]
        assert number(row["nats per token"]) == pytest.approx(r.nats_per_token, abs=1e-4)
        assert number(row["N"]) == pytest.approx(r.non_embedding_parameters, rel=5e-3)
        assert number(row["FLOPs exact"]) == pytest.approx(r.flops_exact, rel=5e-3)
        assert number(row["tokens per N"]) == pytest.approx(r.tokens / r.non_embedding_parameters, rel=5e-3)
    constants = {row[""]: row for row in rows(section(text, "L(N, D) through all runs"))}
    assert number(constants["E"]["ARM"]) == pytest.approx(1.5, abs=0.15)
    assert "Prediction" not in written(readings, fitted)


CAVEATS = {
    "bound": "is an upper bound",
    "gap": "the true compute gap is at most",
    "accounting": "Budgets are matched in",
    "annealing": "before the learning rate had come down",
    "epochs": "more than one epoch",
    "budgets": "cannot tell an irreducible loss",
    "small": "The models are small",
    "rule": "not tuned for each run",
    "seeds": "same seed",
    "draws": "The Monte Carlo error",
    "rows": "The error over held-out rows is at most 0.0123",
}


def caveats(text: str) -> set[str]:
    return {name for name, words in CAVEATS.items() if words in section(text, "Caveats")}


def test_caveats_are_there_exactly_when_they_apply(whole):
    readings, fitted = whole
    always = {"bound", "gap", "accounting", "rule", "seeds", "draws", "rows"}
    assert caveats(written(readings, fitted)) == always
    cases = {
        "annealing": [dataclasses.replace(r, mode="checkpoints") for r in readings],
        "epochs": [dataclasses.replace(readings[0], epochs=3.0), *readings[1:]],
        "small": [
            dataclasses.replace(r, non_embedding_parameters=r.non_embedding_parameters // 10**6) for r in readings
        ],
    }
    for name, changed in cases.items():
        assert caveats(written(changed, fitted)) == always | {name}, name
    other_seed = [dataclasses.replace(readings[0], seed=1), *readings[1:]]
    assert caveats(written(other_seed, fitted)) == always - {"seeds"}
    arm = [r for r in readings if r.objective == "autoregressive"]
    assert caveats(written(arm, only(fitted, "autoregressive"))) == {"accounting", "rule", "seeds", "rows"}
    two = change(fitted, minima=lambda _, fit: fit.minima[:2])
    assert caveats(written(readings, two)) == always | {"budgets"}


def test_caveats_carry_their_numbers(whole):
    readings, fitted = whole
    text = written([dataclasses.replace(r, matching="exact") for r in readings], fitted)
    assert "matched in exact FLOPs" in text
    assert f"{EXACT['diffusion']:.2f} for LLaDA and {EXACT['autoregressive']:.2f} for ARM" in text
    early = [dataclasses.replace(r, mode="checkpoints") for r in readings]
    assert "3.00% of their loss was taken off" in written(early, fitted, annealing_gain=0.03)
    assert "nothing was taken off" in written(early, fitted)


def test_lost_runs_are_named_with_reasons(whole):
    readings = [*whole[0]]
    readings[0] = lost(readings[0], FAILED, "out of memory at step 3")
    readings[1] = lost(readings[1], RUNNING)
    readings[2] = lost(readings[2], FAILED, loss=math.nan)
    first = study.fit(points([r for r in readings if r.budget == BUDGETS[0]]), draws=5)
    text = written(readings, change(whole[1], reasons=lambda family, _: first.series[family].reasons))
    named = section(text, "Runs that have no figure")
    assert f"- {readings[0].run}: failed (out of memory at step 3)" in named
    assert f"- {readings[1].run}: running" in named and f"- {readings[2].run}: diverged" in named
    assert f"{len(readings) - 3} of {len(readings)} readings have a figure." in text
    assert "budget 1e+18" in section(text, "What the fits could not tell")
    assert "Runs that have no figure" not in written(*whole)


def test_nothing_and_little_are_said_plainly(whole):
    assert "No reading has a figure yet" in written([])
    waiting = [lost(r, RUNNING) for r in isoflop_readings()]
    assert "No reading has a figure yet, of 40 planned" in written(waiting, predict=1e22)
    two = isoflop_readings(budgets=BUDGETS[:1], sizes=2)
    text = written(two, predict=1e22)
    assert "There is no compute gap" in text and "no minimum" in section(text, "Best size of each budget")
    arm = [r for r in whole[0] if r.objective == "autoregressive"]
    assert "no LLaDA run has a figure" in section(written(arm, only(whole[1], "autoregressive")), "Compute gap")


def test_repeated_data_has_its_own_report():
    readings = repeated_readings({"diffusion": [4.0, 3.5, 3.0, 2.6], "autoregressive": [3.2, 2.8, 3.1, 3.6]})
    readings += repeated_readings(
        {"diffusion": [4.0, 3.8], "autoregressive": [3.2, 2.8]}, unique_tokens=10**7, epochs=[1, 16]
    )
    text = written(readings, study.fit({}), images=["repeat.png"])
    first, second = rows(section(text, "Repeated data"))
    assert first["below the ARM after equally many epochs"] == "at 4.00 epochs"
    assert first["below the ARM's best"] == "at 8.00 epochs"
    assert first["LLaDA's best, bound"] == "2.6000 at 8.00 epochs (still falling)"
    assert second["below the ARM's best"] == "no crossover up to 16.0 epochs"
    assert "in 1 of 2 pairs" in text.split("\n\n")[1]
    assert "Compute gap" not in text and "the true crossover is no later" in text
    assert "epochs" not in caveats(text) and "budgets" not in caveats(text)
    assert "Repeated data" in written(readings, study.fit({}))
    # Checkpoints of more than one epoch are no such study.
    checkpoints = [dataclasses.replace(r, mode="checkpoints") for r in readings]
    assert "Compute gap" in written(checkpoints, study.fit({}), images=["isoflop.png"])


def test_a_third_family_needs_no_more_than_its_entry(monkeypatch):
    """Tables, sentences and pictures go through the families there are; each is compared with the exact one."""
    block = dataclasses.replace(DIFFUSION, name="block", title="Block", prefix="block")
    monkeypatch.setitem(FAMILIES, "block", block)
    monkeypatch.setitem(figure.COLOURS, "block", "green")

    def with_block(readings, gain):
        own = [r for r in readings if r.objective == "diffusion"]
        change = dataclasses.replace
        return readings + [
            change(r, objective="block", run=f"block_{r.run}", nats_per_token=r.loss - gain) for r in own
        ]

    readings = with_block(isoflop_readings(budgets=BUDGETS[:2]), 0.2)
    fitted = study.fit(points(readings), draws=5)
    images = sweep_report.draw(readings, fitted, None, 0.0)
    assert [image[:4] for image in images.values()] == [b"\x89PNG"] * 3
    text = written(readings, fitted)
    of_llada, of_block = findings.headline_gaps(fitted)
    assert (of_llada.series, of_block.series) == (Series(DIFFUSION), Series(block)) and of_block.value < of_llada.value
    assert "Block needs" in text and "by the minima: L*, Block (bound) over ARM (exact NLL)" in section(
        text, "Compute gap"
    )
    assert {row["series"] for row in rows(section(text, "Best size of each budget"))} == {"LLaDA", "ARM", "Block"}
    assert "Block's figure is an upper bound" in section(text, "Caveats")
    repeated = with_block(
        repeated_readings({"diffusion": [4.0, 3.5, 3.0, 2.6], "autoregressive": [3.2, 2.8, 3.1, 3.6]}), 0.2
    )
    assert repetition.picture(repeated)[:4] == b"\x89PNG"
    assert "Block ends below the ARM's best loss (Block by its bound, ARM by its exact NLL)" in written(
        repeated, study.fit({})
    )
