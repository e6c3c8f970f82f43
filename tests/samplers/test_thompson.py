"""Selectors that read the posterior: exact choice, key order, and what they do in a closed loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.keys import step_generator
from samplers.posterior import BetaPosterior
from samplers.selection import scores
from samplers.selection.bands import OnlineBandSelector, StaticBandSelector
from samplers.selection.diverse import DiverseSelector, greedy_diverse
from samplers.selection.selectors import (
    PosteriorMeanSelector,
    ThompsonSelector,
    UniformSelector,
    mopps,
)

NUM = 40
EMBEDDING = np.random.default_rng(7).normal(size=(NUM, 3))


def believing(num_prompts=NUM, seed=0):
    posterior = BetaPosterior(num_prompts)
    generator = np.random.default_rng(seed)
    trials = generator.integers(0, 9, num_prompts)
    posterior.add(range(num_prompts), generator.binomial(trials, 0.5), trials)
    return posterior


MAKERS = {
    "vade": ThompsonSelector,
    "variance": lambda p, **keys: ThompsonSelector(p, score="variance", **keys),
    "candidates": lambda p, **keys: ThompsonSelector(p, candidates=3, **keys),
    "mopps": lambda p, **keys: mopps(p, candidates=4, **keys),
    "mopps_band": lambda p, **keys: OnlineBandSelector(
        p, rate="draw", candidates=4, short="nearest", **keys
    ),
    "mean": PosteriorMeanSelector,
    "mean_variance": lambda p, **keys: PosteriorMeanSelector(p, score="variance", **keys),
    "online_band": lambda p, **keys: OnlineBandSelector(p, short="uniform", **keys),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("num_prompts", [1, 7, NUM - 2])
def test_distinct_free_and_reproducible_rows_are_chosen(make, num_prompts):
    posterior = believing()
    before = posterior.state_dict()
    chosen = make(posterior).select(num_prompts, generator=np.random.default_rng(1), exclude=[3, 5])
    assert chosen.dtype == np.int64 and chosen.shape == (num_prompts,)
    assert len(np.unique(chosen)) == num_prompts and not {3, 5} & set(chosen.tolist())
    again = make(posterior).select(
        num_prompts, generator=np.random.default_rng(1), exclude=np.array([5, 3, 3])
    )
    assert chosen.tolist() == again.tolist()
    for name, counts in posterior.state_dict().items():
        np.testing.assert_array_equal(counts, before[name])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_number_of_prompts_must_be_there(make):
    with pytest.raises(ValueError, match="the size of the data set, got 41"):
        make(believing()).select(41, generator=np.random.default_rng(0))
    with pytest.raises(ValueError, match="num_prompts=40 exceeds the 39 prompts"):
        make(believing()).select(40, generator=np.random.default_rng(0), exclude=[0])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@given(order=st.permutations(range(12)))
@settings(max_examples=15)
def test_with_keys_a_shuffle_of_the_rows_changes_nothing(make, order):
    def chosen(rows):
        keys = [f"key {row}" for row in rows]
        posterior = BetaPosterior(12)
        counts = np.array([[row % 4, row % 3] for row in rows])
        posterior.add(range(12), counts[:, 0], counts.sum(axis=1))
        selector = make(posterior, keys=keys)
        return [
            [keys[row] for row in selector.select(5, generator=np.random.default_rng(seed))]
            for seed in range(3)
        ]

    assert chosen(order) == chosen(range(12))


def test_thompson_takes_the_argsort_of_its_scores():
    posterior = believing()
    chosen = ThompsonSelector(posterior).select(9, generator=np.random.default_rng(3))
    drawn = posterior.draw(generator=np.random.default_rng(3))
    assert chosen.tolist() == np.argsort(-scores.vade(drawn))[:9].tolist()


def test_the_variance_chooses_as_mopps_does():
    # From the same draws; both orders agree as well.
    posterior = believing()
    for seed in range(20):
        pair = [
            selector.select(9, generator=np.random.default_rng(seed)).tolist()
            for selector in (
                ThompsonSelector(posterior, score="variance"),
                mopps(posterior, candidates=None),
            )
        ]
        assert pair[0] == pair[1]


def test_candidates_are_all_that_is_looked_at():
    # One candidate per place: no choice is left, so this is uniform.
    counts = np.zeros(NUM)
    selector = ThompsonSelector(believing(), candidates=1)
    for seed in range(1000):
        counts[selector.select(4, generator=np.random.default_rng(seed))] += 1
    # 100 each, standard deviation 9.5.
    assert np.abs(counts - 100).max() < 4 * 9.5
    # More candidates than there are: the whole pool.
    many = ThompsonSelector(believing(), candidates=11)
    whole = ThompsonSelector(believing())
    for seed in range(5):
        pair = [s.select(4, generator=np.random.default_rng(seed)).tolist() for s in (many, whole)]
        assert pair[0] == pair[1]


def test_the_posterior_mean_takes_the_largest_expectations():
    posterior = believing()
    chosen = PosteriorMeanSelector(posterior).select(6, generator=np.random.default_rng(0))
    score = scores.expected_vade(*posterior.parameters())
    assert score[chosen].tolist() == sorted(score.tolist(), reverse=True)[:6]


def test_a_score_of_ones_own():
    posterior = believing()
    chosen = ThompsonSelector(posterior, score=lambda p: p).select(
        3, generator=np.random.default_rng(0)
    )
    drawn = posterior.draw(generator=np.random.default_rng(0))
    assert chosen.tolist() == np.argsort(-drawn)[:3].tolist()
    longest = PosteriorMeanSelector(posterior, score=lambda a, b: a + b)
    total = sum(posterior.parameters())
    assert total[longest.select(1, generator=np.random.default_rng(0))] == total.max()


def test_selectors_read_the_posterior_itself():
    posterior = believing()
    selectors = [ThompsonSelector(posterior), PosteriorMeanSelector(posterior)]
    posterior.alpha_D[:] = 1e6
    posterior.alpha_D[17], posterior.beta_D[17] = 1e5, 2e5
    for selector in selectors:
        assert selector.select(1, generator=np.random.default_rng(0)).tolist() == [17]


def test_the_static_band_is_uniform_within_its_bounds():
    pass_rate_D = np.array([0.0, 0.3, 0.5, 0.7, 0.71, 1.0])
    selector = StaticBandSelector(pass_rate_D, short="raise")
    counts = np.zeros(6)
    for seed in range(900):
        counts[selector.select(2, generator=np.random.default_rng(seed))] += 1
    assert counts[[0, 4, 5]].tolist() == [0, 0, 0]
    # 600 each, standard deviation 14.
    assert np.abs(counts[1:4] - 600).max() < 4 * 14.2
    assert selector.metrics() == {"share_in_band": 0.5, "prompts_filled": 0}


def test_a_short_band_does_what_was_declared():
    pass_rate_D = [0.0, 0.5, 0.75, 0.9, 0.2]
    message = r"1 of 5 candidates have a pass rate in \[0.3, 0.7\], 3 are needed"
    with pytest.raises(ValueError, match=message):
        StaticBandSelector(pass_rate_D, short="raise").select(3, generator=np.random.default_rng(0))
    nearest = StaticBandSelector(pass_rate_D, short="nearest")
    # Outside by .05 and .1.
    assert nearest.select(3, generator=np.random.default_rng(0)).tolist() == [1, 2, 4]
    assert nearest.metrics() == {"share_in_band": 0.2, "prompts_filled": 2}
    anyone = StaticBandSelector(pass_rate_D, short="uniform")
    found = [anyone.select(3, generator=np.random.default_rng(seed)) for seed in range(400)]
    assert all(rows[0] == 1 for rows in found)
    counts = np.bincount(np.concatenate(found), minlength=5)
    assert np.abs(counts[[0, 2, 3, 4]] - 200).max() < 4 * 10


def test_the_online_band_follows_the_posterior():
    posterior = BetaPosterior(4)
    selector = OnlineBandSelector(posterior, short="raise")
    selector.select(4, generator=np.random.default_rng(0))  # all at 1/2
    posterior.observe([0, 1], [8, 0], [8, 8])
    found = selector.select(2, generator=np.random.default_rng(0))
    assert sorted(found.tolist()) == [2, 3]
    with pytest.raises(ValueError, match="2 of 4 candidates"):
        selector.select(3, generator=np.random.default_rng(0))


def test_bands_remember_their_last_call_for_the_metrics():
    for make in (
        lambda: StaticBandSelector([0.1, 0.5, 0.5], short="uniform"),
        lambda: OnlineBandSelector(BetaPosterior(3), short="uniform", rate="draw"),
    ):
        selector, restored = make(), make()
        selector.select(3, generator=np.random.default_rng(0))
        restored.load_state_dict(selector.state_dict())
        assert restored.metrics() == selector.metrics()


@pytest.mark.parametrize("gamma", [0.0, 0.05, 3.0])
def test_the_diverse_choice_is_the_greedy_of_the_definition(gamma):
    posterior = believing()
    selector = DiverseSelector(posterior, EMBEDDING, gamma=gamma, candidates=None)
    found = selector.select(8, generator=np.random.default_rng(0)).tolist()
    score = scores.vade(posterior.draw(generator=np.random.default_rng(0)))
    chosen = [int(score.argmax())]
    while len(chosen) < 8:
        gains = [
            -np.inf
            if i in chosen
            else score[i] / 2
            + gamma * min(np.linalg.norm(EMBEDDING[i] - EMBEDDING[j]) for j in chosen)
            for i in range(NUM)
        ]
        chosen.append(int(np.argmax(gains)))
    assert found == chosen
    if gamma == 0:
        plain = ThompsonSelector(posterior).select(8, generator=np.random.default_rng(0))
        assert found == plain.tolist()


def test_diversity_breaks_up_what_is_alike():
    # Twenty prompts in one place and twenty far apart, all of one posterior: with weight on
    # distance one of the twenty is taken, and without it about half come from there.
    embedding = np.zeros((40, 2))
    embedding[20:, 0] = np.arange(1, 21) * 10
    alike = {}
    for gamma in (0.0, 1.0):
        selector = DiverseSelector(BetaPosterior(40), embedding, gamma=gamma)
        chosen = [selector.select(10, generator=np.random.default_rng(s)) for s in range(20)]
        alike[gamma] = np.mean([(rows < 20).sum() for rows in chosen])
    assert alike[1.0] <= 1 and alike[0.0] > 3


def test_with_keys_the_diverse_choice_is_one_of_keys():
    def chosen(rows):
        keys = [f"key {row}" for row in rows]
        selector = DiverseSelector(
            BetaPosterior(12), EMBEDDING[list(rows)], gamma=0.1, candidates=2, keys=keys
        )
        return [keys[row] for row in selector.select(4, generator=np.random.default_rng(0))]

    assert chosen(range(12)) == chosen(np.random.default_rng(1).permutation(12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ThompsonSelector(BetaPosterior(2), score="vaed"),
            "score must be a function or one of vade, variance, got 'vaed'",
        ),
        (lambda: PosteriorMeanSelector(BetaPosterior(2), score="x"), "one of vade, variance"),
        (lambda: ThompsonSelector(BetaPosterior(2), candidates=0), "at least 1 per chosen prompt"),
        (lambda: ThompsonSelector(BetaPosterior(2), keys=["a", "a"]), "2 distinct ones, got 2"),
        (lambda: mopps(BetaPosterior(2), target=-0.1), r"target must be in \[0, 1\], got -0.1"),
        (lambda: StaticBandSelector([0.5, 1.1], short="raise"), r"in \[0, 1\], .* with 1.1"),
        (lambda: StaticBandSelector([0.5, np.nan], short="raise"), "with nan"),
        (lambda: StaticBandSelector([0.5], short="skip"), "short must be .* got 'skip'"),
        (
            lambda: OnlineBandSelector(BetaPosterior(2), short="raise", low=0.8, high=0.2),
            "0 <= low <= high <= 1, got 0.8, 0.2",
        ),
        (
            lambda: OnlineBandSelector(BetaPosterior(2), short="raise", low=float("nan")),
            "got nan, 0.7",
        ),
        (
            lambda: OnlineBandSelector(BetaPosterior(2), short="raise", rate="mode"),
            "rate must be 'mean' or 'draw', got 'mode'",
        ),
        (
            lambda: DiverseSelector(BetaPosterior(2), np.zeros((3, 1)), gamma=1),
            r"must be \(2, C\), one row per prompt, got shape \(3, 1\)",
        ),
        (
            lambda: DiverseSelector(BetaPosterior(2), [[0], [np.inf]], gamma=1),
            "must be finite, row 1 is not",
        ),
        (
            lambda: DiverseSelector(BetaPosterior(1), [[0]], gamma=-1),
            "gamma must be finite and non-negative, got -1",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("score", [lambda p: p[:-1], lambda p: p * np.nan])
def test_a_score_that_is_none_is_refused(score):
    for selector in (
        ThompsonSelector(believing(), score=score),
        DiverseSelector(believing(), EMBEDDING, gamma=1, score=score),
    ):
        with pytest.raises(ValueError, match="score"):
            selector.select(3, generator=np.random.default_rng(0))


def test_the_state_of_another_selector_is_refused():
    state = UniformSelector(NUM, seed=0).state_dict()
    for make in ("vade", "mopps", "mean"):
        with pytest.raises(ValueError, match="the state holds epoch, owed, waiting"):
            MAKERS[make](believing()).load_state_dict(state)


def closed_loop(pass_rate_D, make, *, steps=150, warm_up=50, drift=0.0, decay_chosen=0.2, seed=0):
    """A pool of given pass rates, 64 prompts by 8 rollouts a step, after a warm-up.

    Returns mean pass rate and share of mixed groups of what was chosen, and the squared error of
    the posterior mean on it; pass rates walk with the given step and are reflected at 0 and 1.
    """
    generator = np.random.default_rng(seed)
    rate_D = pass_rate_D.copy()
    posterior = BetaPosterior(len(rate_D), decay_chosen=decay_chosen)
    selector = make(posterior)
    rates, mixed, errors = [], [], []
    for step in range(warm_up + steps):
        chosen = selector.select(64, generator=step_generator(seed, "select", step))
        successes = generator.binomial(8, rate_D[chosen])
        if step >= warm_up:
            rates.append(rate_D[chosen])
            mixed.append((successes > 0) & (successes < 8))
            errors.append((posterior.mean(chosen) - rate_D[chosen]) ** 2)
        posterior.observe(chosen, successes, np.full(64, 8))
        if drift:
            rate_D = np.abs(rate_D + drift * generator.normal(size=len(rate_D)))
            rate_D = 1 - np.abs(1 - rate_D)
    return np.concatenate(rates), np.mean(mixed), np.mean(errors)


def test_on_a_uniform_pool_vade_chooses_around_a_third_and_mixes_more():
    pass_rate_D = np.random.default_rng(0).random(1024)
    rates, mixed, _ = closed_loop(pass_rate_D, ThompsonSelector)
    _, uniform, _ = closed_loop(pass_rate_D, lambda p: UniformSelector(1024, seed=0))
    # Simulated elsewhere: .321 to .338, and .88 against .78.
    assert abs(rates.mean() - 1 / 3) < 0.05
    assert mixed > uniform + 0.05
    assert mixed == pytest.approx(0.88, abs=0.03) and uniform == pytest.approx(0.78, abs=0.02)


def test_on_a_half_dead_pool_many_choices_are_hopeless():
    pass_rate_D = np.random.default_rng(0).random(1024)
    pass_rate_D[::2] = 0
    rates, mixed, _ = closed_loop(pass_rate_D, ThompsonSelector)
    _, uniform, _ = closed_loop(pass_rate_D, lambda p: UniformSelector(1024, seed=0))
    # Simulated elsewhere: 28 % hopeless, .63 against .39 mixed, mean pass rate .23.
    assert (rates == 0).mean() == pytest.approx(0.28, abs=0.05)
    assert mixed == pytest.approx(0.63, abs=0.05) and uniform == pytest.approx(0.39, abs=0.03)
    assert rates.mean() == pytest.approx(0.23, abs=0.03)


def test_remembering_everything_loses_calibration_when_pass_rates_drift():
    # A walk of .10 a step: errors .051, .057, .076 at decays .2, .8, 1, simulated elsewhere.
    pass_rate_D = np.random.default_rng(0).random(1024)
    error = {
        decay: closed_loop(pass_rate_D, ThompsonSelector, drift=0.1, decay_chosen=decay)[2]
        for decay in (0.8, 1.0)
    }
    assert error[1.0] > error[0.8] + 0.01


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_distances_that_overflow_are_refused(gamma):
    embedding = np.array([[1e200, 0.0], [-1e200, 0.0], [0.0, 0.0]])
    with pytest.raises(
        ValueError, match="distances between embeddings must be finite, got inf bet"
    ):
        greedy_diverse(np.array([3.0, 2.0, 1.0]), embedding, 2, gamma=gamma)
    # Where they do not, gamma = 0 is the plain order of scores.
    order = greedy_diverse(np.array([3.0, 2.0, 1.0]), embedding / 1e100, 3, gamma=0.0)
    assert order.tolist() == [0, 1, 2]
