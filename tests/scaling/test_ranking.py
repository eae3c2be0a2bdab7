"""Variants ranked: intervals that hold the truth as often as they say, against formulas and simulated studies."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats
from synthetic import BUDGETS as SYNTHETIC
from synthetic import isoflop_readings, ranked_readings, reading, variant

from llada.scaling import figure, ranking_report, series, study, sweep_report
from llada.scaling.ranking import Cell, log_share, rank
from llada.scaling.results import FAILED, points

BUDGETS = (2e11, 4e11)


def simulated(rng, share=0.8, sizes=2, seeds=3, noise=0.01, correlation=0.7, slope=0.15) -> list[Cell]:
    """Two straight lines, `share` apart in FLOPs, and pairs of losses about them."""
    covariance = noise**2 * np.array([[1, correlation], [correlation, 1]])
    cells = []
    for size in range(sizes):
        for budget in BUDGETS:
            means = [5 - slope * math.log(budget / s / BUDGETS[-1]) for s in (1.0, share)]
            losses = rng.multivariate_normal(means, covariance, seeds)
            cells.append(Cell(str(size), budget, *map(tuple, losses.T.tolist())))
    return cells


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 400 studies of three seeds: 95 %, within three standard errors of a share of 400."""
    share, hits = 0.8, np.zeros(4)
    for i in range(400):
        of = rank({"v": simulated(np.random.default_rng(i), share)}, draws=799)["v"]
        difference = 0.15 * math.log(share)
        truths = (of.share, share), (of.by_size[0].share, share), (of.difference, difference)
        hits += [e.low <= truth <= e.high for e, truth in (*truths, (of.differences[1], difference))]
    assert np.all(np.abs(hits / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)), hits / 400


def test_no_variant_is_sure_by_chance_more_often_than_it_may():
    """Ten variants that are the plain objective: any of them is sure in at most about 5 % of studies."""
    wrong = 0
    for i in range(200):
        rng = np.random.default_rng(1000 + i)
        of = rank({str(k): simulated(rng, share=1.0) for k in range(10)}, draws=999)
        wrong += any(each.share.sure for each in of.values())
    assert wrong / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_difference_has_students_interval_of_the_pooled_variance():
    cells = simulated(np.random.default_rng(5))
    of = rank({"v": cells}, draws=100_000)["v"]
    d = np.array([cell.differences for cell in cells])
    dof = d.size - len(d)
    deviation = math.sqrt(((d - d.mean(axis=1, keepdims=True)) ** 2).sum() / dof)
    half = stats.t.ppf(0.975, dof) * deviation / math.sqrt(3)
    assert of.dof == dof == 8
    for found, mean in zip(of.differences, d.mean(axis=1), strict=True):
        assert found.value == pytest.approx(mean)
        assert (found.high - mean, mean - found.low) == pytest.approx((half, half), rel=0.02)
    assert of.difference.high - of.difference.value == pytest.approx(half / 2, rel=0.02)  # of four cells


def test_the_share_is_where_the_variants_line_meets_the_plain_end():
    log_budget = np.log([1e11, 2e11, 4e11, 8e11])
    for share in (0.5, 1.0, 3.0):
        means = np.stack([5 - 0.2 * log_budget, 5 - 0.2 * (log_budget - math.log(share))], axis=-1)
        value, target = log_share(log_budget, means)
        assert math.exp(value) == pytest.approx(share) and target == pytest.approx(means[-1, 0])
    curved = 5 - 0.2 * log_budget + 0.01 * log_budget**2  # the same for both: no line is asked to be right
    assert log_share(log_budget, np.stack([curved, curved], axis=-1))[0] == pytest.approx(0.0, abs=1e-9)
    rising = np.stack([5 - 0.2 * log_budget, 9 + 0.1 * log_budget], axis=-1)
    assert log_share(log_budget, rising)[0] == math.inf
    assert log_share(log_budget, rising - [0, 20])[0] == -math.inf


def test_one_variants_figures_do_not_depend_on_the_others_and_few_seeds_give_no_interval():
    a, b = (simulated(np.random.default_rng(i), share=s) for i, s in ((1, 0.7), (2, 1.2)))
    both = rank({"b": b, "a": a, "none": []})
    assert list(both) == ["a", "b"]
    assert both["a"].share[:3] == rank({"a": a})["a"].share[:3]
    one = rank({"a": [c._replace(plain=c.plain[:1], variant=c.variant[:1]) for c in a]})["a"]
    assert one.dof == 0 and one.share.low is None and not one.share.sure and one.share.value > 0
    budget = rank({"a": [c for c in a if c.budget == BUDGETS[0]]})["a"]
    assert budget.share is None and budget.by_size == () and budget.difference.value < 0
    flat = rank({"a": [Cell("s", c, (5.0, 5.1), (6.0, 6.1)) for c in BUDGETS]})["a"]
    assert flat.share.value == math.inf and flat.share.to_json()["value"] is None


def section(text: str, title: str) -> str:
    return text.split(f"## {title}")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranked")
    readings = ranked_readings({"bell": 0.7, "flat": 0.98, "clipped": 1.4})
    sweep_report.write(directory, readings, "llada sweep --workdir=x")
    return directory, readings


def test_the_report_ranks_and_says_how_sure_it_is(written):
    directory, readings = written
    text, fits = (directory / "report.md").read_text(), json.loads((directory / "fits.json").read_text())["ranking"]
    assert fits["best"] == "bell" and fits["better_than_chance"] and fits["compared"] == 3
    assert [v["variant"] for v in fits["variants"]] == ["bell", "flat", "clipped"]
    (share, *_), of = fits["variants"][0]["sizes"], fits["variants"][0]
    assert of["share"]["low"] < 0.7 < of["share"]["high"] and of["degrees_of_freedom"] == 8
    assert share["largest"] == 4e11 and share["extrapolated"] is None
    assert {s["extrapolated"] for s in fits["variants"][2]["sizes"]} == {"above"}
    first = text.split("\n\n")[1]
    assert "LLaDA, bell needs" in first and "the best of 3 variants compared" in first and "98.3%" in first
    table = section(text, "FLOPs to reach the plain final loss")
    assert "| 3  | LLaDA, clipped" in table.replace("| 3 |", "| 3  |") and "(!)" in table and "not the bound" in table
    assert "LLaDA, flat: weight=flat; its training loss is not a bound." in section(text, "Variants")
    assert "8 degrees of freedom a variant" in " ".join(text.split()) and "ranking.png" in text and "losses.png" in text
    plain = [r for r in readings if not r.variant and r.size == "N1e+05" and r.budget == 4e11]
    assert f"{sum(r.loss for r in plain) / 3:.4f}" in table
    for name in ("ranking.png", "losses.png"):
        assert (directory / name).read_bytes()[:4] == b"\x89PNG"
    assert "Compute gap" not in text and "fits weigh" not in text


def test_what_is_no_better_than_chance_or_cannot_be_told_is_said(monkeypatch):
    monkeypatch.setattr(figure, "png", lambda fig: b"")

    def head(readings):
        assert ranking_report.pictures(readings).keys() <= {"ranking.png", "losses.png"}
        return sweep_report.report(readings, study.fit({}), "llada sweep").split("\n\n")[1]

    noisy = ranked_readings({"a": 0.97, "b": 1.0}, noise=0.05)
    assert head(noisy).startswith("No variant is better than its plain family by more than chance allows")
    # The first by its figure scatters too much to be sure, the second is sure.
    wild = [
        dataclasses.replace(r, nats_per_token=r.loss + 0.4 * (r.seed - 1)) if r.variant == "a" else r
        for r in ranked_readings({"a": 0.4, "b": 0.7})
    ]
    words = head(wild)
    assert (
        words.startswith("By more than chance allows **LLaDA, b needs 0.")
        and "The first of the ranking, LLaDA, a" in words
    )
    fits = ranking_report.to_json(wild)
    assert (fits["best"], fits["better_than_chance"], fits["saving"]) == ("a", False, ["b"])
    assert "with one seed nothing tells" in head(ranked_readings({"a": 0.5}, seeds=1))
    one_budget = [r for r in ranked_readings({"a": 0.5}) if r.budget == 2e11]
    assert "nats per token from plain LLaDA" in head(one_budget)
    lost = [dataclasses.replace(r, nats_per_token=None, status=FAILED) if r.variant else r for r in noisy]
    assert "nothing to rank" in head(lost) and ranking_report.to_json(lost)["best"] is None
    unpaired = [dataclasses.replace(r, seed=r.seed + 3) if r.variant else r for r in noisy]
    assert "nothing to rank" in head(unpaired)


def test_isoflop_gives_a_variant_the_whole_treatment():
    """A variant 0.06 nats below its family everywhere: minima, laws and both gaps, its own below 1."""
    readings = isoflop_readings(budgets=SYNTHETIC[:2])
    readings += [variant(r, "bell", 0.06, unbiased=True) for r in readings if r.objective == "diffusion"]
    readings += [variant(r, "masked", -0.01) for r in readings if r.objective == "autoregressive"]
    names = {"diffusion", "diffusion:bell", "autoregressive", "autoregressive:masked"}
    assert {s.key for s in series.ordered(points(readings))} == names
    fitted = study.fit(points(readings), draws=5)
    text = sweep_report.report(readings, fitted, "llada sweep")
    compared = [(a.key, b.key) for a, b in series.pairs(fitted.series)]
    assert ("diffusion:bell", "diffusion") in compared and ("diffusion:bell", "autoregressive") in compared
    assert compared.count(("autoregressive:masked", "autoregressive")) == 1 and len(compared) == 4
    (ratios,) = (g["ratios"] for g in fitted.to_json([("diffusion:bell", "diffusion")])["gaps"] if g["law"] == "loss")
    plain = fitted.series["diffusion"].laws.loss.best
    for row in ratios:  # the variant's law is the plain one's, 0.06 lower: it is down where that one is 0.06 higher
        assert row["value"] == pytest.approx(plain.inverse(row["loss"] + 0.06) / row["budget"], rel=0.05)
    assert "LLaDA, bell over LLaDA" in section(text, "Compute gap") and "A ratio below 1 is a saving" in text
    assert "ARM, masked: weight=flat; its training loss is not the NLL." in section(text, "Variants")
    images = sweep_report.draw(readings, fitted, None, 0.0)
    assert [image[:4] for image in images.values()] == [b"\x89PNG"] * 3


def test_every_series_of_a_picture_looks_different():
    keys = [f"diffusion:v{i}" for i in range(10)]
    styles = figure.styles(keys)
    assert len(set(styles.values())) == len(styles) == 12
    assert styles == figure.styles([*keys, "diffusion", "autoregressive"])
    assert reading("diffusion", 1e18, 1e8, 3.0).series.title == "LLaDA"
