"""The pictures of a sweep: drawn for whole, partial and empty studies, titled by what the numbers say."""

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from synthetic import BUDGETS, LAWS, change, isoflop_readings, lost, only, repeated_readings

from llada.scaling import figure as figure_lib
from llada.scaling import findings, numbers, pictures, repetition, study
from llada.scaling.laws import CHINCHILLA_TABLE_3, PUBLISHED, SMDM_BUDGETS, SMDM_GAP, power_law
from llada.scaling.repetition import crossovers, curves
from llada.scaling.results import FAILED, WAITING, points


@pytest.fixture(scope="module")
def whole():
    readings = isoflop_readings()
    return readings, study.fit(points(readings), draws=40)


@pytest.fixture
def said(monkeypatch):
    """`said()`: all texts of the figure drawn last; a text that is over another fails the test."""
    kept = []
    png = figure_lib.png

    def keep(figure):
        figure.canvas.draw()
        texts = drawn_texts(figure)
        kept[:] = [text.get_text() for text in texts]
        # Not of the class Annotation, whose extents have the arrow in them.
        boxes = [Text.get_window_extent(text).padded(-1.5) for text in texts]
        for i, j in itertools.combinations(range(len(texts)), 2):
            assert not boxes[i].overlaps(boxes[j]), f"{kept[i]!r} is over {kept[j]!r}"
            assert figure.bbox.contains(*boxes[i].min) and figure.bbox.contains(*boxes[i].max), kept[i]
        return png(figure)

    monkeypatch.setattr(figure_lib, "png", keep)
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


def is_a_picture(content: bytes) -> bool:
    """Of some size, and with more on it than its background."""
    image = plt.imread(io.BytesIO(content))
    return image.shape[0] > 400 and image.shape[1] > 700 and np.mean(image[..., :3].min(axis=2) < 0.9) > 0.005


def draw_all(readings, fitted, **settings):
    images = [pictures.isoflop(readings, fitted), pictures.frontier(readings, fitted, **settings)]
    return all(map(is_a_picture, [*images, pictures.allocation(readings, fitted)]))


@pytest.mark.parametrize("predict", [3e19, 1e22, 1e24])
def test_a_prediction_lies_on_the_law_at_its_own_budget(whole, monkeypatch, predict):
    """Wherever the laws' lines end: before it, at it, or, for the sake of the gap's arrow, beyond."""
    readings, fitted = whole
    marks = []
    monkeypatch.setattr(
        figure_lib,
        "png",
        lambda figure: marks.extend(
            tuple(float(v) for v in line.get_xydata()[0])
            for line in figure.axes[0].lines
            if line.get_marker() == "D" and len(line.get_xydata())
        ),
    )
    pictures.frontier(readings, fitted, predict=predict)
    wanted = [(predict, float(fitted.series[family].laws.loss.best(predict))) for family in LAWS]
    np.testing.assert_allclose(sorted(marks), sorted(wanted))


def test_the_frontier_says_the_gap_and_the_prediction(whole, said):
    readings, fitted = whole
    assert is_a_picture(pictures.frontier(readings, fitted, predict=1e22))
    (gap,) = findings.headline_gaps(fitted)
    assert f"LLaDA needs {numbers.times(gap.value)} the FLOPs of the ARM at the same loss" in said()
    assert "upper bound" in said() and "training FLOPs C (6ND)" in said() and "10x the largest budget" in said()
    # Both laws have the exponent ab/(a+b) and the same E, so the ratio is the same at every loss.
    k = {family: law.frontier()[2].coefficient for family, law in LAWS.items()}
    true = (k["diffusion"] / k["autoregressive"]) ** (1 / 0.16)
    assert gap.value == pytest.approx(true, rel=0.2) and gap.low < true * 1.15 and gap.high > true / 1.15
    assert gap.beyond <= 1 and gap.budget == max(b for b in BUDGETS if b * gap.value <= max(BUDGETS))


def test_isoflop_says_the_ratio_of_sizes(whole, said):
    readings, fitted = whole
    assert is_a_picture(pictures.isoflop(readings, fitted))
    (ratio,) = findings.size_ratios(fitted)
    true = LAWS["diffusion"].optimal(1e19)[0] / LAWS["autoregressive"].optimal(1e19)[0]
    assert ratio.low < true < ratio.high and ratio.budgets == len(BUDGETS)
    assert f"LLaDA's is {numbers.times(ratio.value)} the ARM's" in said()
    assert all(numbers.flops(budget) in said() for budget in BUDGETS)


def test_allocation_shows_published_laws_beside_ours(whole, said):
    readings, fitted = whole
    assert is_a_picture(pictures.allocation(readings, fitted))
    assert all(paper.name in said() for paper in PUBLISHED if paper.parameters)
    law = fitted.series["diffusion"].laws.parameters
    assert fitted.constants(law)["exponent"]["value"] == pytest.approx(0.5, abs=0.02)


def test_partial_studies_are_drawn(whole, said):
    readings, fitted = whole
    arm = [r for r in readings if r.objective == "autoregressive"]
    assert draw_all(arm, only(fitted, "autoregressive"), predict=1e22)
    assert draw_all([], study.fit({}), predict=1e22)
    few = [r for r in readings if r.budget == BUDGETS[0]][:2]  # two sizes: no parabola
    assert draw_all(few, study.fit(points(few), draws=5))
    none = [lost(r, WAITING) for r in readings]
    assert draw_all(none, study.fit(points(none), draws=5))

    def outside(_, fit):
        return [m._replace(inside=False, parameters=m.parameters / 20) for m in fit.minima]

    assert draw_all(readings, change(fitted, minima=outside, laws=lambda *_: study.Laws()))
    assert "No law of the best size yet" in said()


def test_failed_runs_are_noted(whole, said):
    readings = [*whole[0]]
    readings[0], readings[4] = lost(readings[0], FAILED, "out of memory"), lost(readings[4], FAILED, loss=math.nan)
    pictures.isoflop(readings, whole[1])
    assert "2 runs failed" in said()


def test_checkpoints_are_drawn_beneath_the_frontier(whole, said):
    readings, fitted = [dataclasses.replace(r, mode="checkpoints", run=r.size) for r in whole[0]], whole[1]
    assert is_a_picture(pictures.frontier(readings, fitted, annealing_gain=0.0245)) and "2.45% taken off" in said()


FALLING, OVERFITTED = [4.0, 3.5, 3.0, 2.6], [3.2, 2.8, 3.1, 3.6]


def test_repetition_names_the_crossover(said):
    readings = repeated_readings({"diffusion": FALLING, "autoregressive": OVERFITTED})
    assert is_a_picture(repetition.picture(readings))
    assert "crossover at 4 epochs, below the ARM's best at 8" in said()
    higher = repeated_readings({"diffusion": [5.0, 4.5, 4.2, 4.0], "autoregressive": OVERFITTED})
    assert is_a_picture(repetition.picture(higher)) and "no crossover up to 8 epochs" in said()
    assert "above the picture" not in said()
    by_heart = repeated_readings({"diffusion": FALLING, "autoregressive": [3.2, 2.8, 4.0, 12.0]})
    repetition.picture(by_heart)
    assert "ARM curves go on above the picture" in said()
    repetition.picture([r for r in by_heart if r.objective == "autoregressive"])
    repetition.picture([])
    assert "no readings" in said()


def test_crossovers_of_hand_made_curves():
    (x,) = crossovers(repeated_readings({"diffusion": FALLING, "autoregressive": OVERFITTED}))
    assert (x.same_epochs, x.below_best, x.until) == (4, 8, 8)
    assert x.curve.best == (8, 2.6) and x.reference_curve.best == (2, 2.8) and x.curve.still_falling
    # Below the ARM that overfits, never below its best.
    (x,) = crossovers(repeated_readings({"diffusion": [4.0, 3.5, 3.2, 3.3], "autoregressive": OVERFITTED}))
    assert (x.same_epochs, x.below_best, x.curve.still_falling) == (8, None, False)
    # Readings at other epochs: at 3 the ARM is between its 2.8 at 2 and 3.1 at 4.
    arm = repeated_readings({"autoregressive": OVERFITTED})
    (x,) = crossovers([*arm, *repeated_readings({"diffusion": [3.5, 2.9, 2.7]}, epochs=[1, 3, 16])])
    assert (x.same_epochs, x.below_best, x.until) == (3, 16, 8)
    # Other sizes and corpora are pairs of their own; one family alone is none.
    other = repeated_readings({"diffusion": FALLING}, unique_tokens=10**7)
    assert crossovers([*arm, *other]) == [] and len(curves([*arm, *other])) == 2
    assert arm[0].data_limited and not isoflop_readings()[0].data_limited


def test_curves_are_means_over_seeds():
    one = repeated_readings({"diffusion": [4.0, 3.0]})
    two = [dataclasses.replace(r, seed=1, run="b", nats_per_token=r.nats_per_token + 0.2) for r in one]
    (curve,) = curves([*one, *two])
    assert curve.loss == pytest.approx((4.1, 3.1)) and curve.stderr[0] == pytest.approx(0.0031 / math.sqrt(2))


def test_published_laws_agree_with_their_papers():
    by_name = {paper.name: paper for paper in PUBLISHED}
    for paper in PUBLISHED:
        assert paper.exponents["parameters"] + paper.exponents["tokens"] == pytest.approx(1, abs=0.01)
        if paper.parameters:
            # C = 6 N D, and the line has the printed exponent within what digitising leaves.
            assert 6 * paper.parameters(1e20) * paper.tokens(1e20) == pytest.approx(1e20, rel=0.03)
            assert paper.parameters.exponent == pytest.approx(paper.exponents["parameters"], abs=0.01)
    # Quokka's Table 2: 1 B parameters at 5.62e20 FLOPs and 93.5 B tokens.
    assert by_name["Quokka"].parameters(5.62e20) == pytest.approx(1e9, rel=0.02)
    assert by_name["Quokka"].tokens(5.62e20) == pytest.approx(93.5e9, rel=0.02)
    for budget, n, d in CHINCHILLA_TABLE_3:
        assert by_name["Chinchilla"].parameters(budget) == pytest.approx(n, rel=0.06)
        assert 6 * n * d == pytest.approx(budget, rel=0.06)
    # Its losses, read off the figures within about 0.003 nats per token.
    arm = power_law(SMDM_BUDGETS, [2.85, 2.75, 2.55, 2.45, 2.38])
    mdm = power_law(SMDM_BUDGETS, [3.38, 3.26, 3.04, 2.92, 2.83])
    gaps = study.compute_gap(mdm, arm, arm([3e18, 1e21]))
    assert gaps[0] < SMDM_GAP < gaps[1]


@pytest.mark.parametrize(
    "value, written",
    [(999.6e3, "1.00 M"), (1234567, "1.23 M"), (16.44, "16.4"), (0.001234, "0.00123"), (12345, "12.3 k"), (0, "0")],
)
def test_numbers_have_three_digits(value, written):
    assert numbers.count(value) == written


def test_ratios_and_flops_are_short():
    assert [numbers.times(v) for v in (0.456, 9.44, 16.4, 1234, math.inf)] == "0.46x 9.4x 16x 1,234x unbounded".split()
    assert [numbers.flops(v) for v in (3e18, 1.5e12, 1e20)] == ["3e18", "1.5e12", "1e20"]
    assert [numbers.short(v) for v in (1e6, 1.5e9, 999.7, 64)] == ["1 M", "1.5 B", "1 k", "64"]


def test_axes_stay_with_the_data_where_laws_go_anywhere(whole, monkeypatch):
    """Draws of a law through noise are absurd; and what has no law is named without a point that no run had."""
    monkeypatch.setattr(figure_lib, "png", lambda figure: figure.axes)
    monkeypatch.setattr(figure_lib, "labels_right", lambda *_: None)  # it draws the whole
    rng = np.random.default_rng(1)
    noisy = [
        dataclasses.replace(r, nats_per_token=r.nats_per_token + 0.9 + 0.3 * rng.normal())
        for r in isoflop_readings(sizes=4, reach=1.5, shift=40)
    ]
    fitted = study.fit(points(noisy), draws=10)
    assert any(fitted.series[family].laws.best("parameters") for family in LAWS)
    (n, d), (loss,) = pictures.allocation(noisy, fitted), pictures.frontier(noisy, fitted)
    for ax, low, high in ((n, 1e7, 1e13), (d, 1e6, 1e13), (loss, 0.0, 9.0)):
        assert low < ax.get_ylim()[0] < ax.get_ylim()[1] < high, ax.get_ylim()
    assert loss.get_xlim()[1] < 1e4 * max(BUDGETS)
    few = [r for r in whole[0] if r.objective == "diffusion" or r.budget == BUDGETS[0]]
    none = whole[1].series["autoregressive"]._replace(laws=study.Laws(), minima=[])
    (loss,) = pictures.frontier(few, whole[1]._replace(series=whole[1].series | {"autoregressive": none}))
    (named,) = (line for line in loss.lines if "no law" in str(line.get_label()))
    assert named.get_marker() == "None" and not len(named.get_xdata())
