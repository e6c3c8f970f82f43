import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from samplers.posterior import BetaPosterior


def with_counts(alpha, beta, **decays):
    posterior = BetaPosterior(len(alpha), **decays)
    posterior.load_state_dict({"alpha_D": np.array(alpha), "beta_D": np.array(beta)})
    return posterior


def test_by_hand_on_the_rows_of_the_published_figure():
    # 0.2 * 0.1 + 1, 0.2 * 8.4 + 7;  0.2 * 2.7 + 4, 0.2 * 5.3 + 4;  0.999 * 9, 0.999 * 0.2
    posterior = with_counts([0.1, 2.7, 9.0], [8.4, 5.3, 0.2])
    posterior.observe([0, 1], [1, 4], [8, 8])
    np.testing.assert_allclose(posterior.alpha_D, [1.02, 4.54, 8.991], rtol=1e-14)
    np.testing.assert_allclose(posterior.beta_D, [8.68, 5.06, 0.1998], rtol=1e-14)


def test_the_prior_sits_outside_the_decay():
    a, b = BetaPosterior(2).parameters()
    assert (a.tolist(), b.tolist()) == ([1, 1], [1, 1])
    posterior = with_counts([3.0], [5.0])
    assert [parameter.tolist() for parameter in posterior.parameters([0])] == [[4], [6]]


def test_without_decay_the_counts_are_those_of_conjugacy_in_any_order():
    rounds = [([0, 2], [1, 3], [4, 3]), ([1, 0], [0, 2], [5, 2]), ([2], [0], [1])]
    for order in [(0, 1, 2), (2, 0, 1)]:
        posterior = BetaPosterior(3, decay_chosen=1, decay_rest=1)
        for at in order:
            posterior.observe(*rounds[at])
        assert posterior.alpha_D.tolist() == [3, 0, 3]
        assert posterior.beta_D.tolist() == [3, 5, 1]


def test_full_decay_remembers_the_last_group_only():
    posterior = with_counts([7.0, 2.0], [1.0, 2.0], decay_chosen=0, decay_rest=1)
    posterior.observe([0], [2], [6])
    assert posterior.alpha_D.tolist() == [2, 2]
    assert posterior.beta_D.tolist() == [4, 2]


def test_an_ignored_prompt_returns_to_knowing_nothing_monotonically():
    posterior = with_counts([8.0], [1.0], decay_rest=0.9)
    evidence = [posterior.alpha_D[0] + posterior.beta_D[0]]
    for _ in range(400):
        posterior.observe([], [], [])
        evidence.append(posterior.alpha_D[0] + posterior.beta_D[0])
    assert (np.diff(evidence) < 0).all()
    np.testing.assert_allclose(posterior.mean(), 0.5, atol=1e-12)


def test_later_rounds_add_without_any_decay():
    posterior = with_counts([1.0, 4.0], [2.0, 4.0])
    posterior.add([1], [1.5], [2])
    assert posterior.alpha_D.tolist() == [1, 5.5]
    assert posterior.beta_D.tolist() == [2, 4.5]


@pytest.mark.slow
@given(
    decays=st.tuples(st.floats(0, 0.95), st.floats(0, 1)),
    rounds=st.lists(
        st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=2),
        max_size=12,
    ),
)
def test_counts_stay_in_their_range_and_rise_by_exactly_the_trials(decays, rounds):
    chosen, rest = decays
    posterior = BetaPosterior(3, decay_chosen=chosen, decay_rest=rest)
    for groups in rounds:
        trials = np.array([max(group) for group in groups])
        successes = np.array([min(group) for group in groups])
        before = posterior.alpha_D + posterior.beta_D
        posterior.observe([0, 2], successes, trials)
        after = posterior.alpha_D + posterior.beta_D
        np.testing.assert_allclose(after[[0, 2]], chosen * before[[0, 2]] + trials, atol=1e-12)
        np.testing.assert_allclose(after[1], rest * before[1], atol=1e-12)
        assert posterior.alpha_D.min() >= 0 and posterior.beta_D.min() >= 0
        # Groups of at most 8 sum to at most 8 / (1 - decay).
        assert after.max() <= 8 / (1 - chosen) + 1e-9


@pytest.mark.parametrize("trials", [1, 8])
def test_chosen_prompts_follow_the_update_of_mopps(trials):
    # a <- lambda a + (1 - lambda) a0 + s with a0 = 1, for a = alpha + 1; b likewise.
    generator = np.random.default_rng(0)
    posterior = BetaPosterior(1, decay_chosen=0.5)
    a = b = 1.0
    for _ in range(50):
        successes = generator.integers(0, trials + 1)
        posterior.observe([0], [successes], [trials])
        a = 0.5 * a + 0.5 + successes
        b = 0.5 * b + 0.5 + trials - successes
        np.testing.assert_allclose(posterior.parameters(), [[a], [b]], rtol=1e-12)


COUNTS = ([0.0, 4.0, 0.02, 3.5, 8.0], [0.0, 4.0, 7.68, 30.0, 0.1])


def test_moments_are_the_integrals_they_stand_for():
    posterior = with_counts(*COUNTS)
    mean, std = posterior.mean(), posterior.std_of_reward()
    for at, (a, b) in enumerate(zip(*posterior.parameters(), strict=True)):
        density = stats.beta(a, b).pdf

        def expectation(value, density=density):
            return integrate.quad(lambda p: value(p) * density(p), 0, 1, epsabs=1e-11)[0]

        assert mean[at] == pytest.approx(expectation(lambda p: p), abs=1e-8)
        assert std[at] ** 2 == pytest.approx(expectation(lambda p: p * (1 - p)), abs=1e-8)


@pytest.mark.slow
def test_draws_follow_the_posterior():
    posterior = with_counts(*COUNTS)
    generator = np.random.default_rng(0)
    draws = np.stack([posterior.draw(generator=generator) for _ in range(20_000)])
    a, b = posterior.parameters()
    error = np.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / 20_000)
    assert (np.abs(draws.mean(axis=0) - posterior.mean()) < 4 * error).all()
    # p (1 - p) varies by at most 1/8 around its mean, so its standard error is below this.
    variance = (draws * (1 - draws)).mean(axis=0)
    np.testing.assert_allclose(variance, posterior.std_of_reward() ** 2, atol=4 / 8 / 20_000**0.5)


def test_an_index_picks_rows_in_its_own_order():
    posterior = with_counts(*COUNTS)
    index = [3, 0]
    np.testing.assert_array_equal(posterior.mean(index), posterior.mean()[index])
    np.testing.assert_array_equal(posterior.std_of_reward(index), posterior.std_of_reward()[index])
    assert posterior.draw(index, generator=np.random.default_rng(0)).shape == (2,)


def test_whoever_holds_the_arrays_sees_what_is_learnt_and_loaded():
    posterior = BetaPosterior(2)
    held = posterior.alpha_D, posterior.beta_D
    posterior.observe([0], [1], [3])
    posterior.add([1], [2], [2])
    assert [counts.tolist() for counts in held] == [[1, 2], [2, 0]]
    posterior.load_state_dict(BetaPosterior(2).state_dict())
    assert [counts.tolist() for counts in held] == [[0, 0], [0, 0]]


def test_saved_and_loaded_is_the_same_bit_for_bit():
    posterior, restored = BetaPosterior(3), BetaPosterior(3)
    posterior.observe([2, 0], [1 / 3, 2], [5, 7])
    posterior.observe([1], [0.1], [3])
    state = posterior.state_dict()
    restored.load_state_dict(state)
    for name in ("alpha_D", "beta_D"):
        assert state[name].dtype == np.float64
        np.testing.assert_array_equal(getattr(posterior, name), getattr(restored, name))
    posterior.observe([1], [3], [3])
    np.testing.assert_array_equal(state["alpha_D"], restored.alpha_D)


@pytest.mark.parametrize(
    ("index", "successes", "trials", "message"),
    [
        ([0, 0], [1, 1], [1, 1], r"index_P must be distinct, got \[0, 0\]"),
        ([3], [1], [1], r"index_P must be in \[0, 3\), got \[3\]"),
        ([-1], [1], [1], r"index_P must be in \[0, 3\), got \[-1\]"),
        ([1], [3], [2], r"successes must be in \[0, trials\], got 3.0 of 2.0 for prompt 1"),
        ([1], [-1], [2], r"successes must be in \[0, trials\], got -1.0 of 2.0"),
        ([1], [float("nan")], [2], "got nan of 2.0"),
        ([1], [1], [float("inf")], "got 1.0 of inf"),
        ([1], [1, 2], [2, 2], r"equally long, got shapes \(1,\), \(2,\) and \(2,\)"),
    ],
)
@pytest.mark.parametrize("method", ["observe", "add"])
def test_counts_that_cannot_be_are_refused_and_change_nothing(
    method, index, successes, trials, message
):
    posterior = with_counts([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=message):
        getattr(posterior, method)(index, successes, trials)
    assert posterior.alpha_D.tolist() == [1, 2, 3]


def test_settings_and_states_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        BetaPosterior(0)
    with pytest.raises(ValueError, match=r"decay_chosen must be in \[0, 1\], got 1.1"):
        BetaPosterior(1, decay_chosen=1.1)
    with pytest.raises(ValueError, match=r"decay_rest must be in \[0, 1\], got nan"):
        BetaPosterior(1, decay_rest=float("nan"))
    with pytest.raises(ValueError, match=r"alpha_D has shape \(2,\), expected \(3,\)"):
        BetaPosterior(3).load_state_dict(BetaPosterior(2).state_dict())
    with pytest.raises(ValueError, match="beta_D must be finite and non-negative"):
        BetaPosterior(1).load_state_dict({"alpha_D": np.ones(1), "beta_D": -np.ones(1)})


def test_the_parts_of_a_training_step_are_the_whole_of_it():
    whole, parts = (BetaPosterior(4, decay_chosen=0.5, decay_rest=0.75) for _ in range(2))
    for posterior in (whole, parts):
        posterior.add([0, 1, 2, 3], [8, 8, 8, 8], [12, 12, 12, 12])
    whole.observe([0, 2], [1, 2], [1, 2])
    parts.decay([0])
    parts.add([0], [1], [1])
    # Until the step ends the others keep their counts.
    assert parts.alpha_D.tolist() == [5, 8, 8, 8]
    parts.decay([2])
    parts.add([2], [2], [2])
    parts.decay([])
    parts.decay_others([0, 2])
    assert parts.alpha_D.tolist() == whole.alpha_D.tolist() == [5, 6, 6, 6]
    assert parts.beta_D.tolist() == whole.beta_D.tolist() == [2, 3, 2, 3]


def test_rows_that_cannot_decay_are_refused():
    posterior = BetaPosterior(4)
    posterior.add([0], [8], [8])
    for decay in (posterior.decay, posterior.decay_others):
        with pytest.raises(ValueError, match=r"index_P must be in \[0, 4\), got \[4\]"):
            decay([4])
        with pytest.raises(ValueError, match=r"index_P must be distinct, got \[0, 0\]"):
            decay([0, 0])
    assert posterior.alpha_D.tolist() == [8, 0, 0, 0]
