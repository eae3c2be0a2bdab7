"""Fits of scaling laws against closed forms, brute force, and the optima that SMDM and Quokka published.

Truths: the constants of Chinchilla (arXiv 2203.15556, eq. 10) and Quokka (arXiv 2510.03280). Budgets in FLOPs, losses
in nats per token.
"""

import math

import numpy as np
import pytest

from llada.errors import UserError
from llada.scaling import laws, parametric
from llada.scaling.laws import Point, PowerLaw, offset_power_law, power_law
from llada.scaling.parametric import HuberObjective, Parametric, fit_parametric
from llada.scaling.study import compute_gap

CHINCHILLA = Parametric(1.69, 406.4, 0.34, 410.7, 0.28)
QUOKKA = Parametric(2.413, 798.6, 0.379, 4604.9, 0.378)
BUDGETS = np.geomspace(6e18, 1e20, 5)
PER_TOKEN = PowerLaw(40.0, 0.92)  # FLOPs per token that are not 6 N


def grid(law, budgets=BUDGETS, sizes=7, reach=3.0, stderr=0.004, rng=None, per_token=parametric.SIX_ND, shift=1.0):
    """Runs of `sizes` sizes, from 1/`reach` to `reach` times `shift` N*, at each budget; without noise if no rng."""
    points = []
    for budget in budgets:
        for n in law.optimal(budget, per_token)[0] * shift * np.geomspace(1 / reach, reach, sizes):
            d = budget / per_token(n)
            noise = rng.normal() * stderr if rng else 0.0
            points.append(Point(float(budget), float(n), float(d), float(law.loss(n, d) + noise), stderr))
    return points


def minimum_of(points):
    """Of the runs of one budget, with the scatter that their residuals show."""
    (parabola,) = laws.parabolas([points])
    return parabola.minimum()


def minima(points):
    return [minimum_of([p for p in points if p.budget == budget]) for budget in sorted({p.budget for p in points})]


# --- laws of one variable


def test_power_laws_come_back_from_points_on_them_and_draws_stay_apart():
    x = np.geomspace(1e18, 1e21, 6)
    y = np.stack([3 * x**-0.06, 0.02 * x**0.5, np.full(6, np.nan)])
    found = power_law(x, y, np.linspace(0.01, 0.1, 6))
    np.testing.assert_allclose(found.exponent, [-0.06, 0.5, np.nan], rtol=1e-9)
    np.testing.assert_allclose(found.coefficient, [3, 0.02, np.nan], rtol=1e-7)


def test_points_with_large_errors_hardly_count_in_laws():
    x = np.geomspace(1e18, 1e21, 6)
    off = np.array([1, 1, 1.5, 1, 1, 1])
    sigma = np.array([1, 1, 1e4, 1, 1, 1]) * 1e-3
    assert power_law(x, off * x**0.5, sigma).exponent == pytest.approx(0.5, abs=1e-7)
    y = 1.7 + 1e3 * x**-0.15
    found = offset_power_law(x, off * y, sigma * y)
    assert (found.offset, found.exponent) == pytest.approx((1.7, -0.15), rel=1e-3)


@pytest.mark.parametrize("budgets", [5, 6, 9])
@pytest.mark.parametrize("truth", [CHINCHILLA, QUOKKA, Parametric(0.01, 400.0, 0.3, 400.0, 0.3)])
def test_the_offset_is_recovered_from_five_budgets_on(truth, budgets):
    x, law = np.geomspace(6e18, 1e20, budgets), truth.frontier()[2]
    found = offset_power_law(x, law(x))
    assert found.offset == pytest.approx(law.offset, abs=2e-4)
    assert found.exponent == pytest.approx(law.exponent, rel=1e-3)


def test_three_budgets_cannot_tell_an_offset_and_an_offset_is_never_negative():
    x = np.geomspace(6e18, 1e20, 3)
    assert offset_power_law(x, 2 + 900 * x**-0.15) == power_law(x, 2 + 900 * x**-0.15)
    x = np.geomspace(6e18, 1e20, 6)
    assert offset_power_law(x, 5000 * x**-0.15 - 1).offset == 0


def test_the_inverse_of_a_law():
    law = PowerLaw(900.0, -0.15, 2.0)
    assert law.inverse(law(3e19)) == pytest.approx(3e19)
    assert law.inverse(2.0) == law.inverse(1.9) == math.inf


def test_bad_input_to_laws_is_told():
    with pytest.raises(UserError, match="2 different x"):
        power_law([1e19, 1e19], [1e8, 2e8])
    for y in ([1.0, 0.0], [1.0, math.inf]):
        with pytest.raises(UserError, match="above 0 and finite"):
            power_law([1e18, 1e19], y)
    for field, value in (("stderr", 0.0), ("loss", math.nan), ("loss", -1.0), ("tokens", math.inf)):
        with pytest.raises(UserError, match=rf"{field} must be above 0 and finite"):
            laws.columns([Point(1e19, 1e8, 1e10, 3.0, 0.01)._replace(**{field: value})])


# --- approach 2


def test_a_parabola_through_a_parabola_is_exact():
    n = np.geomspace(1e8, 1e9, 5)
    points = [Point(6e18, m, 1e18 / m, 3 + 0.05 * math.log(m / 4e8) ** 2, 0.01) for m in n]
    found = minimum_of(points)
    assert found[:4] == pytest.approx((6e18, 4e8, 2.5e9, 3))
    assert found.inside


def test_the_stated_errors_of_a_minimum_are_those_of_repeated_studies():
    rng, points = np.random.default_rng(0), grid(CHINCHILLA, BUDGETS[:1], stderr=0.004)
    curve = laws.Parabola(points)
    log_n, log_d, loss = curve.vertex(curve.fitted_P + 0.004 * rng.normal(size=(4000, len(points)))).T
    found = curve.minimum()
    assert log_n.std() == pytest.approx(found.log_parameters_stderr, rel=0.1)
    assert loss.std() == pytest.approx(found.loss_stderr, rel=0.1)
    np.testing.assert_allclose(log_n + log_d, math.log(BUDGETS[0] / 6))


def test_scatter_that_no_run_states_is_in_the_errors_of_minima():
    """Twenty studies whose runs state a hundredth of their noise, against one whose runs state all of it."""
    rng, points = np.random.default_rng(0), grid(CHINCHILLA, stderr=0.004)
    known = [m.log_parameters_stderr for m in minima(points)]
    ratios = []
    for _ in range(20):
        noisy = [p._replace(loss=p.loss + 0.004 * rng.normal(), stderr=4e-5) for p in points]
        profiles = [[p for p in noisy if p.budget == budget] for budget in sorted({p.budget for p in noisy})]
        found = [p.minimum().log_parameters_stderr for p in laws.parabolas(profiles)]
        ratios.append(np.mean(np.square(found) / np.square(known)))
    assert np.mean(ratios) == pytest.approx(1, abs=0.25)


def test_seeds_are_points_of_their_own():
    """Every run twice: the same minimum, with errors smaller by the square root of two."""
    points = grid(CHINCHILLA, BUDGETS[:1], stderr=0.01)
    once, twice = minimum_of(points), minimum_of(points * 2)
    assert twice[:4] == pytest.approx(once[:4])
    assert twice.log_parameters_stderr == pytest.approx(once.log_parameters_stderr / math.sqrt(2))


def test_a_run_with_a_large_error_does_not_move_the_fits():
    points = grid(CHINCHILLA)
    bad = points[3]._replace(loss=points[3].loss + 0.5, stderr=50.0)
    at = [p for p in points if p.budget == bad.budget]
    assert minimum_of([*at, bad])[:4] == pytest.approx(minimum_of(at)[:4], rel=1e-5)
    assert fit_parametric([*points, bad]) == pytest.approx(fit_parametric(points), rel=1e-3)


@pytest.mark.parametrize("law", [CHINCHILLA, QUOKKA])
def test_bias_of_parabolas(law):
    """A profile is no parabola: N* and L* come out wrong, by a factor that is the same at every budget.

    So exponents are right as long as the sizes lie alike about the optimum of each budget. If they drift across it, by
    4 times over the budgets, the exponent of N* is off by up to 0.006.
    """
    for reach, of_n, of_loss in ((3, 0.01, 3e-4), (10, 0.045, 6e-3)):
        points = grid(law, reach=reach)
        found = minima(points)
        truth = law.optimal(BUDGETS)
        assert np.abs(np.log([m.parameters for m in found] / truth[0])).max() < of_n
        assert np.abs([m.loss for m in found] - truth[2]).max() < of_loss
        assert power_law(BUDGETS, [m.parameters for m in found]).exponent == pytest.approx(
            law.frontier()[0].exponent, abs=1e-6
        )
        drifting = [
            p
            for budget, shift in zip(BUDGETS, np.geomspace(0.5, 2, 5), strict=True)
            for p in grid(law, [budget], reach=reach, shift=shift)
        ]
        off = power_law(BUDGETS, [m.parameters for m in minima(drifting)]).exponent - law.frontier()[0].exponent
        assert 0.002 < abs(off) < 0.007
    # The bias shows: at factors of up to 10 about N* the curves miss by more than they do at 3.
    assert abs(found[0].loss - truth[2][0]) > 1e-3


def test_tokens_of_a_minimum_where_budgets_are_exact_flops():
    """Runs of equal c N^p D: the line of log D on log N is exact, N D / C is not constant."""
    for m in minima(grid(CHINCHILLA, per_token=PER_TOKEN)):
        assert m.tokens * PER_TOKEN(m.parameters) == pytest.approx(m.budget)
        n, d, _ = CHINCHILLA.optimal(m.budget, PER_TOKEN)
        assert (m.parameters, m.tokens) == pytest.approx((n, d), rel=0.015)


def test_what_shows_no_minimum_is_told():
    points = grid(CHINCHILLA, BUDGETS[:1])
    with pytest.raises(UserError, match="needs 3 sizes or more, there are 2"):
        minimum_of(points[:2] * 3)
    with pytest.raises(UserError, match="opens downwards"):
        minimum_of([p._replace(loss=6 - p.loss) for p in points])
    with pytest.raises(UserError, match="flat within its error"):
        minimum_of([p._replace(loss=3 + i / 10) for i, p in enumerate(points)])
    shallow = [p._replace(loss=3 + 1e-3 * math.log(p.parameters / 4e8) ** 2, stderr=0.01) for p in points]
    with pytest.raises(UserError, match="flat within its error"):
        minimum_of(shallow)
    edge = [Point(6e18, n, 1e18 / n, 3 + 0.05 * math.log(n / 4e9) ** 2, 0.01) for n in np.geomspace(1e8, 1e9, 5)]
    assert not minimum_of(edge).inside
    assert minimum_of(edge).parameters == pytest.approx(4e9)


def test_errors_of_a_minimum_far_from_the_middle_are_those_of_its_losses():
    """Propagated one loss at a time, by finite differences."""
    points = [Point(6e18, n, 1e18 / n, 3 + 0.05 * math.log(n / 4e9) ** 2, 0.01) for n in np.geomspace(1e8, 1e9, 5)]
    parabola, found = laws.Parabola(points), minimum_of(points)
    moved = 1e-6 * np.eye(5)
    slope = (parabola.vertex(parabola.loss_P + moved) - parabola.vertex(parabola.loss_P - moved)) / 2e-6
    errors = np.sqrt(np.sum((0.01 * slope) ** 2, axis=0))
    assert (found.log_parameters_stderr, found.loss_stderr) == pytest.approx((errors[0], errors[2]), rel=1e-3)


def test_scatter_is_what_stated_errors_leave():
    residuals, errors = np.full(8, 0.03), np.full(8, 0.01)
    found = laws.scatter(residuals, errors, np.array([8.0, 4.0, 80.0]))
    np.testing.assert_allclose(found, [math.sqrt(8e-4), math.sqrt(17e-4), 0], atol=1e-12)


# --- approach 3


@pytest.mark.parametrize("law", [CHINCHILLA, QUOKKA])
@pytest.mark.parametrize("per_token", [parametric.SIX_ND, PER_TOKEN])
def test_the_frontier_is_the_minimum_by_brute_force(law, per_token):
    for budget in (1e18, 1e21, 1e24):
        n = np.exp(np.linspace(math.log(1e5), math.log(1e14), 400_001))
        loss = law.loss(n, budget / per_token(n))
        best = np.argmin(loss)
        found = law.optimal(budget, per_token)
        assert found[0] == pytest.approx(n[best], rel=1e-3)
        assert found[1] == pytest.approx(budget / per_token(n[best]), rel=1e-3)
        assert found[2] == pytest.approx(loss[best], rel=1e-9)


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    huber = HuberObjective(grid(CHINCHILLA, stderr=0.01, rng=rng))
    truth = huber.theta(CHINCHILLA)
    for spread in (0.001, 0.1):  # residuals within a unit, and beyond
        theta, step = truth + spread * rng.normal(size=(8, 5)), 1e-6
        _, gradient, _ = huber(theta, huber.log_loss_P)
        for k in range(5):
            ends = [huber(theta + s * step * np.eye(5)[k], huber.log_loss_P)[0] for s in (1, -1)]
            np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), gradient[:, k], rtol=1e-4, atol=1e-3)
    squared = huber(huber.theta(CHINCHILLA)[None], np.log(CHINCHILLA.loss(*laws.columns(grid(CHINCHILLA))[1:3])))[0]
    assert squared == pytest.approx(0, abs=1e-12)
    # One run off by 5 units in log L counts 4.5; one off by half a unit counts 1/8.
    exact = np.log(CHINCHILLA.loss(*laws.columns(grid(CHINCHILLA))[1:3]))
    for units, counted in ((5, 4.5), (0.5, 0.125)):
        off = exact + units * huber.unit_P * (np.arange(len(exact)) == 3)
        assert huber(truth[None], off)[0] == pytest.approx(counted)


@pytest.mark.parametrize("law", [CHINCHILLA, QUOKKA])
def test_the_parametric_law_comes_back_from_runs_on_it(law):
    found = fit_parametric(grid(law, sizes=5))
    assert found == pytest.approx(law, rel=2e-3)


def test_an_outlier_counts_linearly_and_follow_finds_what_lbfgs_finds():
    rng = np.random.default_rng(1)
    points = grid(CHINCHILLA, stderr=0.002, rng=rng)
    best = fit_parametric(points)
    huber = HuberObjective(points)
    followed = huber.law(huber.follow(huber.theta(CHINCHILLA), huber.log_loss_P[None]))
    assert [float(f[0]) for f in followed] == pytest.approx(list(best), rel=1e-3)
    points[10] = points[10]._replace(loss=points[10].loss + 1.0)  # 500 standard errors
    assert fit_parametric(points).frontier()[0].exponent == pytest.approx(best.frontier()[0].exponent, abs=0.03)


def test_runs_that_cannot_tell_a_parametric_law_are_told():
    points = grid(CHINCHILLA, sizes=4)
    with pytest.raises(UserError, match=r"4 different \(N, D\), .* 1 budgets: the five constants"):
        fit_parametric(points[:4] * 3)
    two_sizes = [Point(6 * n * d, n, d, float(CHINCHILLA.loss(n, d)), 0.01) for n in (1e8, 1e9) for d in (1, 2, 4, 8)]
    with pytest.raises(UserError, match="2 different N"):
        fit_parametric(two_sizes)
    for losses in (np.linspace(2, 4, len(points)), np.full(len(points), 3.0)):
        with pytest.raises(UserError, match="do not fall with both N and D"):
            fit_parametric([p._replace(loss=float(loss)) for p, loss in zip(points, losses, strict=True)])


# --- published points

SMDM_BUDGETS = np.array([6e18, 1e19, 3e19, 6e19, 1e20])
SMDM = {  # N* in parameters, loss in nats per token: read off figures, to some 3% and 0.003
    "arm": ([0.15e9, 0.23e9, 0.45e9, 0.63e9, 1.01e9], [2.85, 2.75, 2.55, 2.45, 2.38], 0.64, -0.064),
    "mdm": ([0.084e9, 0.11e9, 0.23e9, 0.36e9, 0.48e9], [3.38, 3.26, 3.04, 2.92, 2.83], 0.63, -0.063),
}


@pytest.mark.parametrize("family", SMDM)
def test_smdm_exponents_come_back(family):
    """arXiv 2410.18514, section 4: L ∝ C^-0.064 and C^-0.063, N* ∝ C^0.64 and C^0.63; D* exponent about 0.37."""
    n, loss, of_n, of_loss = SMDM[family]
    assert power_law(SMDM_BUDGETS, loss).exponent == pytest.approx(of_loss, abs=1e-3)
    assert power_law(SMDM_BUDGETS, n).exponent == pytest.approx(of_n, abs=0.02)
    assert power_law(SMDM_BUDGETS, SMDM_BUDGETS / 6 / np.array(n)).exponent == pytest.approx(0.37, abs=0.02)


def test_smdm_gap_comes_back():
    """14.5 times at 3e18 FLOPs and 16.7 times at 1e21: within what reading errors of 0.003 nats leave open."""
    rng = np.random.default_rng(0)
    arm, mdm = (
        power_law(SMDM_BUDGETS, np.array(SMDM[f][1]) + 0.003 * rng.normal(size=(4000, 5))) for f in ("arm", "mdm")
    )
    for budget, published, widest in ((3e18, 14.5, 1.3), (1e21, 16.7, 4.0)):
        low, middle, high = np.quantile(compute_gap(mdm, arm, arm(budget)), [0.025, 0.5, 0.975])
        assert low < published < high, (low, high)
        assert high - low < widest
        assert middle == pytest.approx(published, rel=0.05)


QUOKKA_TABLE_2 = np.array([(9.46e19, 400e6, 39.3e9), (5.62e20, 1e9, 93.5e9), (4.96e22, 10e9, 825e9)]).T


def test_quokka_exponents_come_back():
    """arXiv 2510.03280: N* = 0.0216 C^0.514, D* = 7.7 C^0.486; its Table 2, in three digits, and 67 B on 5 T."""
    c, n, d = QUOKKA_TABLE_2
    np.testing.assert_allclose(6 * n * d, c, rtol=4e-3)
    of_n, of_d = power_law(c, n), power_law(c, d)
    assert (of_n.exponent, of_d.exponent) == pytest.approx((0.514, 0.486), abs=5e-4)
    assert (of_n.coefficient, of_d.coefficient) == pytest.approx((0.0216, 7.7), rel=0.02)
    assert (of_n(6 * 67e9 * 5e12), of_d(6 * 67e9 * 5e12)) == pytest.approx((67e9, 5e12), rel=0.01)


def test_quokka_constants_do_not_agree_with_its_own_exponents():
    """Its L(N, D) implies N* ∝ C^0.499 and a smaller model: 4% at 9e19 FLOPs, 13% at 5e22. Shown, not reconciled."""
    of_n = QUOKKA.frontier()[0]
    assert of_n.exponent == pytest.approx(0.378 / (0.379 + 0.378))
    c, n, _ = QUOKKA_TABLE_2
    np.testing.assert_allclose(of_n(c) / n, [0.956, 0.931, 0.872], atol=1e-3)
