"""One notion of success: as the planner reads rewards, alone and from step to step."""

import itertools
import warnings

import numpy as np
import pytest

from samplers.allocation import gvm, neyman
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.selection import ThompsonSelector
from samplers.stopping import positive
from samplers.success import Seen, Success, full_marks

WARNED = "a reward of .* is outside"


def planner(**settings):
    posterior = BetaPosterior(6)
    defaults = dict(
        keys=[f"key {i}" for i in range(6)], prompts_per_step=2, rollouts_per_step=8, scale=gvm
    )
    return Planner(posterior, ThompsonSelector(posterior), neyman, **defaults | settings)


def steps(success, *rewards):
    """Successes of each step's rewards, one round a step."""
    found = []
    for reward_N in rewards:
        success.begin_step()
        found.append(success.observe(np.array(reward_N, dtype=np.float64)).tolist())
    return found


def test_full_marks_are_the_sum_of_the_positive_weights():
    assert full_marks([1.0]) == 1
    assert full_marks([0.7, 0.3]) == 1
    assert full_marks([1.0, -0.5, 0.0, 2.0]) == 3
    assert full_marks([-1.0]) == 0


def test_rewards_in_range_are_fractions_of_full_marks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps(Success(), [0, 0.25, 1]) == [[0, 0.25, 1]]
        assert steps(Success(full_marks=2.0), [0, 1, 2, 1.5]) == [[0, 0.5, 1, 0.75]]


def test_rounding_makes_a_sum_of_tenths_no_failure():
    ten_tenths = float(np.sum([0.1] * 10))  # 0.9999999999999999
    sixth = np.float32(0.6) * 10 / 6  # 1.0000000397
    assert steps(Success(), [ten_tenths, sixth, -1e-12]) == [[1, 1, 0]]


def test_a_line_is_a_line_whatever_the_range():
    success = Success(above=-0.5)
    assert steps(success, [-3, -0.5, 0, 7], [1e300]) == [[0, 0, 1, 1], [1]]
    assert success.line == -0.5


def test_outside_the_range_rewards_are_compared_with_the_mean_of_earlier_steps():
    success = Success()
    with pytest.warns(UserWarning, match=r"a reward of 4 is outside \[0, 1\].*write success_above"):
        found = steps(success, [0.5, 1.0, 0.0], [4.0, 0.6, 0.3], [2.0, 0.0])
    # Means of earlier steps: none (fractions), (.5 + 1 + 0) / 3 = .5, (1.5 + 4.9) / 6 = 1.0667.
    assert found == [[0.5, 1, 0], [1, 1, 0], [1, 0]]
    assert success.line == pytest.approx(6.4 / 6)


def test_in_the_first_step_the_mean_is_its_own():
    with pytest.warns(UserWarning, match=WARNED):
        assert steps(Success(), [-1, 0, 4]) == [[0, 0, 1]]  # above 1


def test_a_line_holds_for_all_rounds_of_a_step_and_a_late_reward_changes_no_earlier_round():
    success = Success()
    success.begin_step()
    assert success.observe(np.array([0.0, 1.0])).tolist() == [0, 1]
    with pytest.warns(UserWarning, match=WARNED):  # mean of 0, 1, 3, 0 and 1
        assert success.observe(np.array([3.0, 0.0, 1.0])).tolist() == [1, 0, 0]
    assert success.observe(np.array([1.5, 100.0, 0.5])).tolist() == [1, 1, 0]
    assert success.line == 1


def test_the_change_is_warned_of_once_and_holds():
    success = Success()
    with pytest.warns(UserWarning, match=WARNED) as caught:
        steps(success, [5.0], [-7.0], [0.5, 0.25])
    assert len(caught) == 1
    success.begin_step()
    assert success.observe(np.array([0.0])).tolist() == [1]  # above (5 - 7 + .75) / 4 = -.3125


@pytest.mark.parametrize("value", [-5.0, 0.9, 1 / 3, 1e300, -1e308, 7.7])  # .9 / 3 * 3 < .9
def test_equal_rewards_are_no_success_whatever_their_number(value):
    for sizes in ([3], [7, 3, 5], [1, 1, 1, 6]):
        success = Success(full_marks=0.0)
        with pytest.warns(UserWarning, match=WARNED):
            found = steps(success, *[[value] * size for size in sizes])
        assert not any(itertools.chain(*found))


def test_huge_rewards_have_a_mean():
    seen = Seen.of(np.array([1.7e308, 1.7e308, -1.7e308, 1.7e308]))
    assert seen.mean == pytest.approx(0.85e308)
    assert seen.and_also(seen).mean == pytest.approx(0.85e308)


def test_the_mean_is_that_of_all_rewards_in_any_order_and_however_they_are_split():
    reward_N = np.random.default_rng(0).normal(size=101)
    assert Seen.of(reward_N).mean == pytest.approx(reward_N.mean(), rel=1e-12)
    assert Seen.of(reward_N) == Seen.of(reward_N[::-1])
    parts = Seen.of(reward_N[:13]).and_also(Seen.of(reward_N[13:]))
    assert parts.mean == pytest.approx(reward_N.mean(), rel=1e-12)
    assert (parts.count, parts.low, parts.high) == (101, reward_N.min(), reward_N.max())
    assert Seen().and_also(parts) == parts.and_also(Seen()) == parts


def test_rows_have_full_marks_of_their_own_where_rewards_do_not_apply_to_all():
    success = Success(full_marks=2.0)
    success.begin_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = success.observe(np.array([1.0, 1.0, 0.5, 0.0]), [1.0, 2.0, 1.0, 0.0])
    assert found.tolist() == [1, 0.5, 0.5, 0]


def test_reading_teaches_nothing():
    success = Success()
    before = success.state_dict()
    with pytest.warns(UserWarning, match=WARNED):
        assert success.of(np.array([-1.0, -3.0])).tolist() == [
            1,
            0,
        ]  # their own mean: none was seen
    assert success.of(np.array([0.5])).tolist() == [0.5]
    assert success.state_dict() == before
    steps(success, [0.0, 0.5])
    assert success.of(np.array([-1.0, 0.3])).tolist() == [0, 1]  # above .25, all that was seen
    assert success.of(np.zeros(0)).tolist() == []


def test_a_state_goes_on_bit_for_bit():
    rewards = np.random.default_rng(1).normal(size=(5, 7)).tolist()
    whole = Success()
    with pytest.warns(UserWarning, match=WARNED):
        expected = steps(whole, *rewards)
    for cut in range(5):
        first, second = Success(), Success()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = steps(first, *rewards[:cut])
            second.load_state_dict(first.state_dict())
            found += steps(second, *rewards[cut:])
        assert found == expected
        assert second.state_dict() == whole.state_dict()


def test_wrong_settings_and_states_are_refused():
    with pytest.raises(ValueError, match="success_above must be a number or None, got nan"):
        Success(above=float("nan"))
    with pytest.raises(ValueError, match="full_marks must be finite and at least 0, got -1"):
        Success(full_marks=-1.0)
    with pytest.raises(ValueError, match="the state of what counts as success lacks"):
        Success().load_state_dict({"line": None})


# -- in the planner


@pytest.mark.parametrize(
    "draw",
    [
        lambda g, n: g.uniform(-1, 1, n),
        lambda g, n: g.choice([-1.0, 0.0, 1.0], n),
        lambda g, n: g.uniform(0, 100, n),
        lambda g, n: g.integers(1, 300, n).astype(float),  # lengths
        lambda g, n: -g.uniform(1, 2, n),
        lambda g, n: np.full(n, -3.0),
        lambda g, n: g.choice([1e300, -1e300], n),
    ],
    ids=["around 0", "three", "percent", "lengths", "negative", "equal", "huge"],
)
@pytest.mark.filterwarnings("ignore:a reward of")
def test_rewards_of_any_range_teach_the_posterior_pass_rates(draw):
    generator, made = np.random.default_rng(0), planner()
    for _ in range(6):
        proposal = made.propose()
        success_N = made.observe(proposal, draw(generator, 8), proposal.prompt_N)
        assert set(success_N.tolist()) <= {0.0, 1.0}
    assert ((made.posterior.mean() > 0) & (made.posterior.mean() < 1)).all()
    assert (
        sum(made.metrics()[f"planner/share_{name}"] for name in ("mixed", "all_fail", "lone")) > 0
    )


def test_what_observe_returns_is_what_the_posterior_is_taught():
    made = planner(full_marks=4.0)
    proposal = made.propose()
    success_N = made.observe(proposal, [4.0, 2.0, 1.0, 0.0] * 2, proposal.prompt_N)
    assert success_N.tolist() == [1, 0.5, 0.25, 0] * 2
    assert made.posterior.alpha_D.sum() == 3.5
    assert made.success([2.0]).tolist() == [0.5]
    assert made.admit([4.0, 4.0]).reason == "all_pass"
    assert made.admit([3.0, 3.0]).reason == "all_fail"


def test_a_refused_round_leaves_the_line_as_it_was():
    made = planner(stopping=positive(), round_size=4, scale=gvm)
    proposal = made.propose()
    before = made.state_dict()["success"]
    with pytest.raises(ValueError, match="is 0.5 of full marks"):
        made.observe(proposal, [0.5] * 8, proposal.prompt_N)
    assert made.state_dict()["success"] == before
    with pytest.warns(UserWarning, match=WARNED):  # rewards that are read by a line pass or fail
        made.observe(proposal, [0.5, 2.0] * 4, proposal.prompt_N)


@pytest.mark.filterwarnings("ignore:a reward of")
def test_a_planner_resumed_anywhere_reads_rewards_alike():
    def run(made, first, last):
        found = []
        for step in range(first, last):
            generator = np.random.default_rng(step)
            while True:
                proposal = made.propose()
                reward_N = generator.normal(size=len(proposal.seed_N))
                found.append(made.observe(proposal, reward_N, proposal.prompt_N).tolist())
                if not made.is_open:
                    break
        return found

    make = lambda: planner(pilot=2)  # noqa: E731
    whole = run(make(), 0, 4)
    first, second = make(), make()
    found = run(first, 0, 2)
    second.load_state_dict(first.state_dict())
    assert found + run(second, 2, 4) == whole
