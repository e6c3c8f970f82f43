import numpy as np
import pytest
from scipy import integrate, stats

from samplers.selection import scores

GRID = np.linspace(0, 1, 3001)


def test_vade_by_hand():
    # .2 * .64, .5 * .25, .6 * .16; the worked numbers of the published figure; the peak.
    rates = np.array([0.2, 0.5, 0.6, 0.13, 0.32, 0.9, 1 / 3])
    expected = [0.128, 0.125, 0.096, 0.0984, 0.1480, 0.0090, 4 / 27]
    np.testing.assert_allclose(scores.vade(rates), expected, atol=5e-5)


@pytest.mark.parametrize(
    ("score", "centre"),
    [
        (scores.vade, 1 / 3),
        (scores.variance, 1 / 2),
        (scores.distance_to(0.5), 1 / 2),
        (scores.distance_to(0.2), 0.2),
    ],
)
def test_a_score_rises_to_its_centre_and_falls_after_it(score, centre):
    score_K = score(GRID)
    assert GRID[score_K.argmax()] == pytest.approx(centre, abs=1 / 3000)
    assert (np.diff(score_K[: np.searchsorted(GRID, centre)]) > 0).all()
    assert (np.diff(score_K[np.searchsorted(GRID, centre, side="right") :]) < 0).all()


@pytest.mark.parametrize("score", [scores.vade, scores.variance])
def test_sure_prompts_score_nothing(score):
    assert score(np.array([0.0, 1.0])).tolist() == [0, 0]


def test_the_variance_and_the_distance_from_a_half_are_one_score():
    difference = scores.variance(GRID) - scores.distance_to(0.5)(GRID)
    np.testing.assert_allclose(difference, 0.25, rtol=1e-15)


PARAMETERS = np.array([[1, 1], [1, 9], [5, 5], [9, 1], [1.02, 8.68], [300.0, 2.5]])


@pytest.mark.parametrize(
    ("expected_score", "score"),
    [(scores.expected_vade, scores.vade), (scores.expected_variance, scores.variance)],
)
def test_an_expected_score_is_the_integral_and_the_mean_over_draws(expected_score, score):
    found = expected_score(*PARAMETERS.T)
    generator = np.random.default_rng(0)
    for at, (a, b) in enumerate(PARAMETERS):
        density = stats.beta(a, b).pdf
        integral = integrate.quad(
            lambda p, density=density: score(p) * density(p), 0, 1, epsabs=1e-12
        )[0]
        assert found[at] == pytest.approx(integral, abs=1e-8)
        drawn = score(generator.beta(a, b, size=20_000))
        assert abs(drawn.mean() - found[at]) < 4 * drawn.std() / 20_000**0.5


def test_expected_vade_by_hand():
    # 1/12 without evidence; after 0, 4 and 8 of 8: 1*9*10 / (10*11*12), 5*5*6 / (10*11*12), 18/1320.
    found = scores.expected_vade(np.array([1.0, 1, 5, 9]), np.array([1.0, 9, 5, 1]))
    np.testing.assert_allclose(found, [1 / 12, 0.068182, 0.113636, 0.013636], atol=1e-6)


def test_a_draw_for_a_hopeless_prompt_often_beats_one_for_a_good_one():
    # 0 of 8 against 4 of 8: .213, 8 of 8: .015, unseen: .334; standard error below .0018.
    generator = np.random.default_rng(0)
    good = scores.vade(generator.beta(5, 5, size=80_000))
    for (a, b), expected in [((1, 9), 0.213), ((9, 1), 0.015), ((1, 1), 0.334)]:
        share = (scores.vade(generator.beta(a, b, size=80_000)) > good).mean()
        assert abs(share - expected) < 4 * 0.0018


def test_a_target_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"target must be in \[0, 1\], got 1.5"):
        scores.distance_to(1.5)
    with pytest.raises(ValueError, match="got nan"):
        scores.distance_to(float("nan"))
