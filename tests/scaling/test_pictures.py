"""The pictures of a sweep: drawn for whole, partial and empty studies, titled by what the numbers say."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from synthetic import BUDGETS, LAWS, isoflop_readings, lost, only, repeated_readings

from llada.scaling import figure as figure_lib
from llada.scaling import findings, pictures, study
from llada.scaling.laws import power_law
from llada.scaling.published import (
    CHINCHILLA_TABLE_3,
    PUBLISHED,
    SMDM_ARM_LOSS,
    SMDM_BUDGETS,
    SMDM_GAP,
    SMDM_MDM_LOSS,
)
from llada.scaling.repetition import crossovers, curves, is_data_limited
from llada.scaling.results import FAILED, WAITING, points


@pytest.fixture(scope="module")
def whole():
    readings = isoflop_readings()
    return readings, study.fit(points(readings), draws=40)


@pytest.fixture
def said(monkeypatch):
    """`said()`: all texts of the figure drawn last; a text that is over another fails the test."""
    kept = []
    save = figure_lib.save

    def keep(figure, path):
        figure.canvas.draw()
        texts = drawn_texts(figure)
        kept[:] = [text.get_text() for text in texts]
        # Not of the class Annotation, whose extents have the arrow in them.
        boxes = [Text.get_window_extent(text).padded(-1.5) for text in texts]
        for i, j in itertools.combinations(range(len(texts)), 2):
            assert not boxes[i].overlaps(boxes[j]), f"{kept[i]!r} is over {kept[j]!r}"
            assert figure.bbox.contains(*boxes[i].min) and figure.bbox.contains(*boxes[i].max), kept[i]
        save(figure, path)

    monkeypatch.setattr(figure_lib, "save", keep)
    return lambda: " ".join("\n".join(kept).split())


def drawn_texts(figure) -> list[Text]:
    """Labels of ticks beyond the ends of an axis exist, but are not drawn."""
    beyond = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t not in beyond and t.get_visible() and t.get_text().strip()]


def is_a_picture(path) -> bool:
    """Of some size, and with more on it than its background."""
    image = plt.imread(path)
    return image.shape[0] > 400 and image.shape[1] > 700 and np.mean(image[..., :3].min(axis=2) < 0.9) > 0.005


def draw_all(readings, fitted, folder, **settings):
    pictures.isoflop(readings, fitted, folder / "isoflop.png")
    pictures.frontier(readings, fitted, folder / "frontier.png", **settings)
    pictures.allocation(readings, fitted, folder / "allocation.png")
    return all(is_a_picture(folder / f"{name}.png") for name in ("isoflop", "frontier", "allocation"))


@pytest.mark.parametrize("predict", [3e19, 1e22, 1e24])
def test_a_prediction_lies_on_the_law_at_its_own_budget(whole, tmp_path, monkeypatch, predict):
    """Wherever the laws' lines end: before it, at it, or, for the sake of the gap's arrow, beyond."""
    readings, fitted = whole
    marks = []
    monkeypatch.setattr(figure_lib, "save", lambda figure, path: marks.extend(
        tuple(float(v) for v in line.get_xydata()[0]) for line in figure.axes[0].lines
        if line.get_marker() == "D" and len(line.get_xydata())
    ))  # fmt: skip
    pictures.frontier(readings, fitted, tmp_path / "frontier.png", predict=predict)
    wanted = [(predict, float(fitted.laws[family]["loss"][0](predict))) for family in LAWS]
    np.testing.assert_allclose(sorted(marks), sorted(wanted))


def test_the_frontier_says_the_gap_and_the_prediction(whole, tmp_path, said):
    readings, fitted = whole
    pictures.frontier(readings, fitted, tmp_path / "frontier.png", predict=1e22)
    assert is_a_picture(tmp_path / "frontier.png")
    gap = findings.headline_gap(fitted)
    assert f"LLaDA needs {findings.times(gap.value)} the FLOPs of an ARM at the same loss" in said()
    assert "upper bound" in said() and "training FLOPs C (6ND)" in said() and "10x the largest budget" in said()
    # Both laws have the exponent ab/(a+b) and the same E, so the ratio is the same at every loss.
    k = {family: law.frontier()[2].coefficient for family, law in LAWS.items()}
    true = (k["diffusion"] / k["autoregressive"]) ** (1 / 0.16)
    assert gap.value == pytest.approx(true, rel=0.2) and gap.low < true * 1.15 and gap.high > true / 1.15
    assert gap.beyond <= 1 and gap.budget == max(b for b in BUDGETS if b * gap.value <= max(BUDGETS))


def test_isoflop_says_the_ratio_of_sizes(whole, tmp_path, said):
    readings, fitted = whole
    pictures.isoflop(readings, fitted, tmp_path / "isoflop.png")
    assert is_a_picture(tmp_path / "isoflop.png")
    ratio = findings.size_ratio(fitted)
    true = LAWS["diffusion"].optimal(1e19)[0] / LAWS["autoregressive"].optimal(1e19)[0]
    assert ratio.low < true < ratio.high and ratio.budgets == len(BUDGETS)
    assert f"LLaDA's is {findings.times(ratio.value)} an ARM's" in said()
    assert all(findings.flops(budget) in said() for budget in BUDGETS)


def test_allocation_shows_published_laws_beside_ours(whole, tmp_path, said):
    readings, fitted = whole
    pictures.allocation(readings, fitted, tmp_path / "allocation.png")
    assert is_a_picture(tmp_path / "allocation.png")
    assert all(paper.name in said() for paper in PUBLISHED if paper.parameters)
    assert fitted.constants("diffusion", "parameters")["exponent"]["value"] == pytest.approx(0.5, abs=0.02)


def test_partial_studies_are_drawn(whole, tmp_path, said):
    readings, fitted = whole
    arm = [r for r in readings if r.objective == "autoregressive"]
    assert draw_all(arm, only(fitted, "autoregressive"), tmp_path, predict=1e22)
    assert draw_all([], study.fit({}), tmp_path, predict=1e22)
    few = [r for r in readings if r.budget == BUDGETS[0]][:2]  # two sizes: no parabola
    assert draw_all(few, study.fit(points(few), draws=5), tmp_path)
    none = [lost(r, WAITING) for r in readings]
    assert draw_all(none, study.fit(points(none), draws=5), tmp_path)
    outside = {
        f: [m._replace(inside=False, parameters=m.parameters / 20) for m in ms] for f, ms in fitted.minima.items()
    }
    assert draw_all(readings, fitted._replace(minima=outside, laws={family: {} for family in LAWS}), tmp_path)
    assert "No law of the best size yet" in said()


def test_failed_runs_are_noted(whole, tmp_path, said):
    readings = [*whole[0]]
    readings[0], readings[4] = lost(readings[0], FAILED, "out of memory"), lost(readings[4], FAILED, loss=math.nan)
    pictures.isoflop(readings, whole[1], tmp_path / "isoflop.png")
    assert "2 runs failed" in said()


def test_checkpoints_are_drawn_beneath_the_frontier(whole, tmp_path, said):
    readings, fitted = [dataclasses.replace(r, mode="checkpoints", run=r.size) for r in whole[0]], whole[1]
    pictures.frontier(readings, fitted, tmp_path / "frontier.png", annealing_gain=0.0245)
    assert is_a_picture(tmp_path / "frontier.png") and "2.45% taken off" in said()


FALLING, OVERFITTED = [4.0, 3.5, 3.0, 2.6], [3.2, 2.8, 3.1, 3.6]


def test_repetition_names_the_crossover(tmp_path, said):
    readings = repeated_readings({"diffusion": FALLING, "autoregressive": OVERFITTED})
    pictures.repeat(readings, tmp_path / "repeat.png")
    assert is_a_picture(tmp_path / "repeat.png")
    assert "crossover at 4 epochs, below the ARM's best at 8" in said()
    higher = repeated_readings({"diffusion": [5.0, 4.5, 4.2, 4.0], "autoregressive": OVERFITTED})
    pictures.repeat(higher, tmp_path / "none.png")
    assert is_a_picture(tmp_path / "none.png") and "no crossover up to 8 epochs" in said()
    assert "above the picture" not in said()
    by_heart = repeated_readings({"diffusion": FALLING, "autoregressive": [3.2, 2.8, 4.0, 12.0]})
    pictures.repeat(by_heart, tmp_path / "by_heart.png")
    assert "ARM curves go on above the picture" in said()
    pictures.repeat([r for r in by_heart if r.objective == "autoregressive"], tmp_path / "one.png")
    pictures.repeat([], tmp_path / "empty.png")
    assert "no readings" in said()


def test_crossovers_of_hand_made_curves():
    (x,) = crossovers(repeated_readings({"diffusion": FALLING, "autoregressive": OVERFITTED}))
    assert (x.same_epochs, x.below_best, x.until) == (4, 8, 8)
    assert x.diffusion_best == (8, 2.6) and x.autoregressive_best == (2, 2.8) and x.diffusion_still_falling
    # Below the ARM that overfits, never below its best.
    (x,) = crossovers(repeated_readings({"diffusion": [4.0, 3.5, 3.2, 3.3], "autoregressive": OVERFITTED}))
    assert (x.same_epochs, x.below_best, x.diffusion_still_falling) == (8, None, False)
    # Readings at other epochs: at 3 the ARM is between its 2.8 at 2 and 3.1 at 4.
    arm = repeated_readings({"autoregressive": OVERFITTED})
    (x,) = crossovers([*arm, *repeated_readings({"diffusion": [3.5, 2.9, 2.7]}, epochs=[1, 3, 16])])
    assert (x.same_epochs, x.below_best, x.until) == (3, 16, 8)
    # Other sizes and corpora are pairs of their own; one family alone is none.
    other = repeated_readings({"diffusion": FALLING}, unique_tokens=10**7)
    assert crossovers([*arm, *other]) == [] and len(curves([*arm, *other])) == 2
    assert is_data_limited(arm) and not is_data_limited(isoflop_readings()) and not is_data_limited([])


def test_curves_are_means_over_seeds():
    one = repeated_readings({"diffusion": [4.0, 3.0]})
    two = [dataclasses.replace(r, seed=1, run="b", nats_per_token=r.nats_per_token + 0.2) for r in one]
    (curve,) = curves([*one, *two])
    assert curve.loss == pytest.approx((4.1, 3.1)) and curve.stderr[0] == pytest.approx(0.0031 / math.sqrt(2))


def test_published_laws_agree_with_their_papers():
    by_name = {paper.name: paper for paper in PUBLISHED}
    for paper in PUBLISHED:
        assert paper.parameters_exponent + paper.tokens_exponent == pytest.approx(1, abs=0.01)
        if paper.parameters:
            # C = 6 N D, and the line has the printed exponent within what digitising leaves.
            assert 6 * paper.parameters(1e20) * paper.tokens(1e20) == pytest.approx(1e20, rel=0.03)
            assert paper.parameters.exponent == pytest.approx(paper.parameters_exponent, abs=0.01)
    # Quokka's Table 2: 1 B parameters at 5.62e20 FLOPs and 93.5 B tokens.
    assert by_name["Quokka"].parameters(5.62e20) == pytest.approx(1e9, rel=0.02)
    assert by_name["Quokka"].tokens(5.62e20) == pytest.approx(93.5e9, rel=0.02)
    for budget, n, d in CHINCHILLA_TABLE_3:
        assert by_name["Chinchilla"].parameters(budget) == pytest.approx(n, rel=0.06)
        assert 6 * n * d == pytest.approx(budget, rel=0.06)
    arm, mdm = (power_law(SMDM_BUDGETS, loss) for loss in (SMDM_ARM_LOSS, SMDM_MDM_LOSS))
    gaps = study.compute_gap(mdm, arm, arm([3e18, 1e21]))
    assert gaps[0] < SMDM_GAP < gaps[1]


@pytest.mark.parametrize(
    "value, written",
    [(999.6e3, "1.00 M"), (1234567, "1.23 M"), (16.44, "16.4"), (0.001234, "0.00123"), (12345, "12.3 k"), (0, "0")],
)
def test_numbers_have_three_digits(value, written):
    assert findings.count(value) == written


def test_ratios_and_flops_are_short():
    assert [findings.times(v) for v in (0.456, 9.44, 16.4, 1234, math.inf)] == "0.46x 9.4x 16x 1,234x unbounded".split()
    assert [findings.flops(v) for v in (3e18, 1.5e12, 1e20)] == ["3e18", "1.5e12", "1e20"]
    assert [findings.short(v) for v in (1e6, 1.5e9, 999.7, 64)] == ["1 M", "1.5 B", "1 k", "64"]


def test_axes_stay_with_the_data_where_laws_go_anywhere(whole, tmp_path, monkeypatch):
    """Draws of a law through noise are absurd; and what has no law is named without a point that no run had."""
    axes = {}
    monkeypatch.setattr(figure_lib, "save", lambda figure, path: axes.update({path.stem: figure.axes}))
    monkeypatch.setattr(figure_lib, "labels_right", lambda *_: None)  # it draws the whole
    rng = np.random.default_rng(1)
    noisy = [
        dataclasses.replace(r, nats_per_token=r.nats_per_token + 0.9 + 0.3 * rng.normal())
        for r in isoflop_readings(sizes=4, reach=1.5, shift=40)
    ]
    fitted = study.fit(points(noisy), draws=10)
    assert any(findings.law_of(fitted, family, "parameters") for family in LAWS)
    pictures.allocation(noisy, fitted, tmp_path / "allocation.png")
    pictures.frontier(noisy, fitted, tmp_path / "frontier.png")
    n, d = axes["allocation"]
    for ax, low, high in ((n, 1e7, 1e13), (d, 1e6, 1e13), (axes["frontier"][0], 0.0, 9.0)):
        assert low < ax.get_ylim()[0] < ax.get_ylim()[1] < high, ax.get_ylim()
    assert axes["frontier"][0].get_xlim()[1] < 1e4 * max(BUDGETS)
    few = [r for r in whole[0] if r.objective == "diffusion" or r.budget == BUDGETS[0]]
    no_law = whole[1]._replace(
        laws=whole[1].laws | {"autoregressive": {}}, minima=whole[1].minima | {"autoregressive": []}
    )
    pictures.frontier(few, no_law, tmp_path / "frontier.png")
    (named,) = (line for line in axes["frontier"][0].lines if "no law" in str(line.get_label()))
    assert named.get_marker() == "None" and not len(named.get_xdata())
