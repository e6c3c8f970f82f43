import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.allocation import uniform
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.proposal import Decision, admit
from samplers.refill import Refill, RefillError
from samplers.selection import ThompsonSelector, UniformSelector

REWARDS = {"mixed": [1, 0], "all_pass": [1, 1], "all_fail": [0, 0], "lone": [1], "failed": []}


def run(refill, rounds, *, start=0, order=None):
    """Dispatch and finish rounds of outcomes; a prompt's key is its number."""
    for outcome_R in rounds:
        numbers = [refill.dispatch(f"key {start + at}", 0) for at in range(len(outcome_R))]
        start += len(outcome_R)
        finished = list(zip(numbers, outcome_R, strict=True))
        for at in order(len(outcome_R)) if order else range(len(outcome_R)):
            number, outcome = finished[at]
            reward_n = REWARDS[outcome]
            refill.finish(
                number, reward_n, tokens=10 * len(reward_n), failed=int(outcome == "failed")
            )
    return start


def accepted(filled):
    return [group.number for group in filled.accepted]


def test_by_hand():
    refill = Refill(3, max_drawn=9, at_cap="raise", max_age=1)
    refill.begin(0)
    assert refill.missing == 3
    run(refill, [["mixed", "all_fail", "failed"]])
    assert refill.missing == 2
    run(refill, [["all_pass", "mixed", "mixed", "mixed"]], start=3)
    assert refill.missing == 0
    filled = refill.end()
    # Groups 0, 4 and 5 in the order of dispatch; 6 is one too many and waits for step 1.
    assert accepted(filled) == [0, 4, 5] and filled.num_padded == 0 and not filled.discarded
    assert [group.number for group in refill.held] == [6]
    metrics = refill.metrics()
    expected = {
        "groups_drawn": 7,
        "groups_accepted": 3,
        "groups_filtered": 2,
        "groups_filtered_all_pass": 1,
        "groups_filtered_all_fail": 1,
        "groups_failed": 1,
        "groups_buffered": 1,
        "rollouts_drawn": 13,
        "rollouts_failed": 1,
        "rollouts_accepted": 6,
        "tokens_drawn": 120,
        "tokens_accepted": 60,
        # 4 mixed and one all right: (4 + 2) of 12; in the accepted 3 of 6.
        "reward_mean_unfiltered": 0.5,
        "reward_mean_accepted": 0.5,
        "length_mean_accepted": 10,
    }
    assert {name: metrics[f"refill/{name}"] for name in expected} == expected
    refill.begin(1)
    assert refill.missing == 2
    run(refill, [["mixed", "mixed"]], start=7)
    assert accepted(refill.end()) == [6, 7, 8]
    assert refill.metrics()["refill/groups_taken"] == 1
    assert refill.metrics()["refill_total/groups_drawn"] == 9


def test_the_filtered_reward_is_not_the_unfiltered_one():
    refill = Refill(1, max_drawn=4, at_cap="raise")
    refill.begin(0)
    run(refill, [["all_fail", "all_fail", "all_fail", "mixed"]])
    refill.end()
    metrics = refill.metrics()
    assert metrics["refill/reward_mean_unfiltered"] == 1 / 8
    assert metrics["refill/reward_mean_accepted"] == 1 / 2
    assert metrics["refill/length_mean_filtered"] == 10


def test_fractional_rewards_are_judged_by_their_spread():
    # Equal ones in float32 as well, where their std is not 0; a mean inside (0, 1) says nothing.
    assert not admit(np.full(8, 0.7, dtype=np.float32)).kept
    assert admit([0.7, 0.7, 0.7000001]).kept
    assert admit([0.0, 0.0, 1.0]).kept


@pytest.mark.slow
@given(
    outcomes=st.lists(st.sampled_from(sorted(REWARDS)), min_size=4, max_size=12),
    max_age=st.integers(0, 2),
    data=st.data(),
)
def test_the_order_of_finishing_decides_nothing(outcomes, max_age, data):
    order = data.draw(st.permutations(range(len(outcomes))))
    found = []
    for finish_in in (None, lambda size: order):
        refill = Refill(3, max_drawn=12, at_cap="pad", max_age=max_age)
        refill.begin(0)
        run(refill, [outcomes], order=finish_in)
        found.append((refill.end(data_ended=True), refill.state_dict(), refill.metrics()))
    assert found[0] == found[1]


def test_what_finishes_early_waits_for_what_was_dispatched_before():
    refill = Refill(1, max_drawn=2, at_cap="raise")
    refill.begin(0)
    first, second = refill.dispatch("a", 0), refill.dispatch("b", 0)
    refill.finish(second, [1, 0], tokens=2)
    with pytest.raises(ValueError, match=r"groups \[0\] of step 0 are in flight"):
        refill.end()
    refill.finish(first, [0, 1], tokens=2)
    filled = refill.end()
    assert accepted(filled) == [first]
    assert [group.key for group in filled.discarded] == ["b"]


@pytest.mark.parametrize("at_cap", ["raise", "partial", "pad"])
@pytest.mark.parametrize("data_ended", [False, True])
def test_the_three_behaviours_at_the_cap(at_cap, data_ended):
    refill = Refill(3, max_drawn=9 if data_ended else 4, at_cap=at_cap)
    refill.begin(0)
    run(refill, [["mixed", "all_fail", "all_pass", "mixed"]])
    assert refill.missing == int(data_ended)
    if at_cap == "raise":
        message = "2 of 3 groups carry gradient after 4 were drawn .* 1 pass .* 1 fail"
        with pytest.raises(RefillError, match=message):
            refill.end(data_ended=data_ended)
        assert refill.step == 0
        return
    filled = refill.end(data_ended=data_ended)
    assert accepted(filled) == [0, 3]
    assert filled.num_padded == (1 if at_cap == "pad" else 0)
    assert refill.metrics()["refill/groups_padded"] == filled.num_padded


def test_a_step_that_could_go_on_does_not_end():
    refill = Refill(2, max_drawn=4, at_cap="partial")
    refill.begin(0)
    run(refill, [["mixed", "all_fail"]])
    with pytest.raises(ValueError, match="step 0 lacks 1 groups that may still be drawn"):
        refill.end()


def test_surplus_ages_out_and_is_counted():
    refill = Refill(1, max_drawn=4, at_cap="partial", max_age=2)
    refill.begin(0)
    run(refill, [["mixed"] * 4])
    assert accepted(refill.end()) == [0]
    refill.begin(2)
    assert refill.missing == 0
    filled = refill.end()
    assert accepted(filled) == [1] and not filled.discarded
    refill.begin(3)  # groups 2 and 3 are of three steps ago
    assert refill.missing == 1
    run(refill, [["mixed"]], start=4)
    filled = refill.end()
    assert accepted(filled) == [4] and [group.number for group in filled.discarded] == [2, 3]
    assert refill.metrics()["refill/groups_discarded"] == 2
    assert refill.metrics()["refill/tokens_discarded"] == 40
    assert refill.drain() == ()


def test_what_waits_at_the_end_of_a_run_is_given_up_and_counted():
    refill = Refill(1, max_drawn=3, at_cap="partial", max_age=5)
    refill.begin(0)
    run(refill, [["mixed"] * 3])
    refill.end()
    assert [group.number for group in refill.drain()] == [1, 2]
    assert refill.metrics()["refill_total/groups_discarded"] == 2
    assert refill.held == ()


STEPS = st.lists(
    st.lists(
        st.tuples(st.sampled_from(sorted(REWARDS)), st.integers(0, 3), st.integers(0, 50)),
        max_size=8,
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@given(steps=STEPS, wanted=st.integers(1, 4), max_age=st.integers(0, 3), data=st.data())
def test_nothing_is_lost_under_failures_caps_and_ends_of_data(steps, wanted, max_age, data):
    at_cap = data.draw(st.sampled_from(["partial", "pad"]))
    refill = Refill(wanted, max_drawn=8, at_cap=at_cap, max_age=max_age)
    restored = None
    drawn = {"groups": 0, "rollouts": 0, "tokens": 0}
    fates = []
    for step, groups in enumerate(steps):
        refill.begin(step)
        numbers = [refill.dispatch(f"{step}, {at}", 0) for at in range(len(groups))]
        for number, (outcome, failed, tokens) in zip(numbers, groups, strict=True):
            reward_n = REWARDS[outcome]
            of_scored = tokens if reward_n else 0
            refill.finish(number, reward_n, tokens=of_scored, failed=failed, failed_tokens=failed)
            drawn["groups"] += 1
            drawn["rollouts"] += len(reward_n) + failed
            drawn["tokens"] += of_scored + failed
            if restored is None:  # an interruption in the middle of a step
                restored = Refill(wanted, max_drawn=8, at_cap=at_cap, max_age=max_age)
                restored.load_state_dict(json.loads(json.dumps(refill.state_dict())))
                refill = restored
        filled = refill.end(data_ended=True)
        assert len(filled.accepted) <= wanted
        assert all(step - group.step <= max_age for group in (*filled.accepted, *refill.held))
        fates += [*filled.accepted, *filled.discarded]
    fates += refill.drain()
    totals = {
        name.removeprefix("refill_total/"): count
        for name, count in refill.metrics().items()
        if name.startswith("refill_total/")
    }
    for unit, count in drawn.items():
        gone = sum(totals[f"{unit}_{f}"] for f in ("accepted", "filtered", "failed", "discarded"))
        assert totals[f"{unit}_drawn"] == gone == count
        assert totals[f"{unit}_taken"] == totals[f"{unit}_buffered"]
    # Every mixed group is accepted or given up, once.
    mixed = sum(outcome == "mixed" for groups in steps for outcome, *_ in groups)
    assert len({group.number for group in fates}) == len(fates) == mixed


@given(
    steps=st.lists(
        st.lists(st.sampled_from(sorted(REWARDS)), min_size=1, max_size=6), min_size=1, max_size=5
    ),
    kill=st.integers(0, 30),
)
def test_a_run_killed_anywhere_and_resumed_accepts_the_same(steps, kill):
    def play(kill_at):
        refill = Refill(2, max_drawn=6, at_cap="pad", max_age=2)
        made, events = [], 0

        def event():
            nonlocal refill, events
            events += 1
            if events == kill_at:
                state = json.loads(json.dumps(refill.state_dict()))
                refill = Refill(2, max_drawn=6, at_cap="pad", max_age=2)
                refill.load_state_dict(state)

        for step, outcome_R in enumerate(steps):
            refill.begin(step)
            event()
            numbers = [refill.dispatch(f"{step}, {at}", 0) for at in range(len(outcome_R))]
            event()
            for number, outcome in zip(numbers, outcome_R, strict=True):
                refill.finish(number, REWARDS[outcome], tokens=len(REWARDS[outcome]))
                event()
            made.append(refill.end(data_ended=True))
            event()
        return made, refill.state_dict()

    assert play(kill) == play(0)


def test_a_check_that_does_not_balance_is_told():
    refill = Refill(1, max_drawn=1, at_cap="raise")
    refill.begin(0)
    run(refill, [["mixed"]])
    refill._counts["tokens_drawn"] += 1
    with pytest.raises(AssertionError, match="step 0 had 21 tokens and accounts for"):
        refill.end()


def score(rewards, p):
    """d log-likelihood / d logit of each Bernoulli action; the reward is the action."""
    return np.array(rewards) - p


def leave_one_out(rewards):
    rewards = np.array(rewards, dtype=float)
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


PASS_RATES = (0.15, 0.6)
SIZE = 3


def outcomes():
    """Every (prompt, rewards) of one group with its probability, prompts being drawn evenly."""
    for prompt, p in enumerate(PASS_RATES):
        for rewards in itertools.product([0, 1], repeat=SIZE):
            chance = np.prod([p if r else 1 - p for r in rewards])
            yield prompt, rewards, chance / len(PASS_RATES)


def gradient(prompt, rewards):
    """Gradient of one group, a vector over the logits of both prompts."""
    vector = np.zeros(2)
    vector[prompt] = (leave_one_out(rewards) * score(rewards, PASS_RATES[prompt])).mean()
    return vector


def direction(vector):
    return vector / np.linalg.norm(vector)


def filtered_gradient(*, first_finished):
    """Expected accepted gradient of one outcome_R of two groups, of which one is wanted."""
    total, weight = np.zeros(2), 0.0
    for groups in itertools.product(list(outcomes()), repeat=2):
        chance = groups[0][2] * groups[1][2]
        refill = Refill(1, max_drawn=2, at_cap="partial")
        refill.begin(0)
        if first_finished:  # successes take longer, and what is ready first is registered first
            groups = sorted(groups, key=lambda group: sum(group[1]))
        for at, (prompt, _, _) in enumerate(groups):
            refill.dispatch(str(prompt), at)
        for at in (1, 0):
            refill.finish(at, groups[at][1], tokens=SIZE)
        for group in refill.end(data_ended=True).accepted:
            total += chance * gradient(*groups[group.number][:2])
            weight += chance
    return total / weight


def test_filtering_keeps_the_direction_and_lengthens_the_step():
    unfiltered = sum(chance * gradient(prompt, rewards) for prompt, rewards, chance in outcomes())
    # Leave-one-out is unbiased: p (1 - p) of each prompt, drawn half of the time.
    expected = [p * (1 - p) / 2 for p in PASS_RATES]
    np.testing.assert_allclose(unfiltered, expected, rtol=1e-12)
    share = sum(chance for _, rewards, chance in outcomes() if 0 < sum(rewards) < SIZE)
    np.testing.assert_allclose(
        filtered_gradient(first_finished=False), unfiltered / share, rtol=1e-12
    )


def test_accepting_what_finishes_first_turns_the_direction():
    unfiltered = sum(chance * gradient(prompt, rewards) for prompt, rewards, chance in outcomes())
    turned = filtered_gradient(first_finished=True)
    assert np.abs(direction(turned) - direction(unfiltered)).max() > 0.01


def test_a_mean_over_the_tokens_of_the_batch_turns_the_direction():
    # A batch of two groups; wrong answers to prompt 0 are long, the others short.
    def expected(groups):
        total, weight = np.zeros(2), 0.0
        for pair in itertools.product(groups, repeat=2):
            chance = pair[0][2] * pair[1][2]
            tokens = sum(
                1 if prompt or reward else 30 for prompt, rewards, _ in pair for reward in rewards
            )
            total += chance * sum(gradient(*group[:2]) for group in pair) / tokens
            weight += chance
        return total / weight

    everyone = list(outcomes())
    mixed = [group for group in everyone if 0 < sum(group[1]) < SIZE]
    ratio = [vector[0] / vector[1] for vector in (expected(mixed), expected(everyone))]
    assert abs(ratio[0] / ratio[1] - 1) > 0.05


@pytest.mark.parametrize("max_age", [0, 2])
def test_it_refills_from_a_planner(max_age):
    keys = [f"key {i}" for i in range(40)]
    posterior = BetaPosterior(40)
    planner = Planner(
        posterior,
        ThompsonSelector(posterior, keys=keys),
        uniform,
        keys=keys,
        prompts_per_step=4,
        rollouts_per_step=16,
    )
    refill = Refill(4, max_drawn=24, at_cap="partial", max_age=max_age, decide=planner.admit)
    row_of = {key: row for row, key in enumerate(keys)}
    generator = np.random.default_rng(0)
    pass_rate_D = generator.random(40) * (generator.random(40) < 0.6)
    for step in range(12):
        refill.begin(step)
        seen = set()
        while refill.missing:
            held = [row_of[group.key] for group in refill.held]
            proposal = planner.propose(num_prompts=refill.missing, exclude=held)
            assert not seen & set(proposal.index_P.tolist())
            seen |= set(proposal.index_P.tolist())
            reward_N = (
                generator.random(len(proposal.seed_N))
                < pass_rate_D[proposal.index_P[proposal.prompt_N]]
            )
            planner.observe(proposal, reward_N, proposal.prompt_N)
            names = [
                (keys[row], draw)
                for row, draw in zip(proposal.index_P, proposal.draw_P, strict=True)
            ]
            numbers = [refill.dispatch(key, draw) for key, draw in names]
            for place, number in enumerate(numbers):
                refill.finish(number, reward_N[proposal.prompt_N == place], tokens=8)
        filled = refill.end()
        assert len(filled.accepted) == 4
        assert len({(group.key, group.draw) for group in filled.accepted}) == 4
    totals = refill.metrics()
    # Every group, also one left out, was observed: rollouts in the posterior's visits.
    assert totals["refill_total/groups_drawn"] == planner._draw_D.sum()
    assert totals["refill_total/groups_filtered"] > 0


def test_a_uniform_selector_visits_all_through_a_refill():
    selector = UniformSelector(6, seed=0)
    first = selector.select(3, generator=np.random.default_rng(0))
    second = selector.select(3, generator=np.random.default_rng(0), exclude=first)
    assert sorted([*first, *second]) == list(range(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups_per_step": 0}, "1 <= groups_per_step <= max_drawn, got 0 and 4"),
        ({"max_drawn": 1}, "1 <= groups_per_step <= max_drawn, got 2 and 1"),
        ({"at_cap": "stop"}, "at_cap must be 'raise', 'partial' or 'pad', got 'stop'"),
        ({"max_age": -1}, "max_age must be at least 0 optimizer steps, got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Refill(**{"groups_per_step": 2, "max_drawn": 4, "at_cap": "raise"} | settings)


def test_calls_out_of_order_are_refused():
    refill = Refill(1, max_drawn=1, at_cap="partial")
    for call in (refill.end, lambda: refill.dispatch("a", 0), lambda: refill.missing):
        with pytest.raises(ValueError, match="no step is open: begin comes first"):
            call()
    refill.begin(3)
    with pytest.raises(ValueError, match="step 3 must end before step 4 begins"):
        refill.begin(4)
    with pytest.raises(ValueError, match="step 3 must end before the buffer is drained"):
        refill.drain()
    number = refill.dispatch("a", 0)
    with pytest.raises(ValueError, match="step 3 has drawn all of max_drawn=1 groups"):
        refill.dispatch("b", 0)
    with pytest.raises(ValueError, match="group 7 is not in flight at step 3"):
        refill.finish(7, [1], tokens=1)
    with pytest.raises(ValueError, match="counts must be non-negative, got tokens=-1"):
        refill.finish(number, [1], tokens=-1)
    with pytest.raises(ValueError, match=r"rewards of group 0 must be 1-d and finite, got \[nan\]"):
        refill.finish(number, [float("nan")], tokens=1)
    with pytest.raises(ValueError, match="group 0 has 5 tokens in no scored rollout"):
        refill.finish(number, [], tokens=5)
    refill.finish(number, [1, 0], tokens=1)
    with pytest.raises(ValueError, match="group 0 is not in flight"):
        refill.finish(number, [1, 0], tokens=1)
    refill.end()
    with pytest.raises(ValueError, match="step 3 cannot begin after step 3"):
        refill.begin(3)


def test_a_group_is_registered_once():
    refill = Refill(2, max_drawn=4, at_cap="partial")
    refill.begin(0)
    refill.dispatch("a", 0)
    refill.dispatch("a", 1)
    with pytest.raises(ValueError, match="draw 0 of prompt a is registered already"):
        refill.dispatch("a", 0)


def test_a_state_that_the_settings_forbid_is_refused():
    refill = Refill(1, max_drawn=3, at_cap="partial", max_age=1)
    refill.begin(0)
    run(refill, [["mixed"] * 3])
    refill.end()
    with pytest.raises(ValueError, match="2 in the buffer, which max_drawn=3 and max_age=0"):
        Refill(1, max_drawn=3, at_cap="partial").load_state_dict(refill.state_dict())


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (SimpleNamespace(kept=False, reason=""), "neither empty nor 'failed', .*; got ''"),
        (
            SimpleNamespace(kept=True, reason="failed"),
            "neither empty nor 'failed', .*; got 'failed'",
        ),
        (SimpleNamespace(kept=None, reason="dull"), "decide must give a Decision with a boolean"),
        (SimpleNamespace(kept=True, reason=None), "decide must give a Decision with a boolean"),
        (None, "decide must give a Decision with a boolean `kept` .* got None"),
        (True, "decide must give a Decision with a boolean `kept` .* got True"),
    ],
)
def test_what_a_test_of_ones_own_says_is_checked(decision, message):
    answers = [decision, Decision(True, "mixed")]
    refill = Refill(1, max_drawn=1, at_cap="partial", decide=lambda reward_n: answers.pop(0))
    refill.begin(0)
    number = refill.dispatch("a", 0)
    with pytest.raises(ValueError, match=message):
        refill.finish(number, [1, 0], tokens=2)
    # The group is still in flight, and a sound answer finishes it.
    assert refill.metrics()["refill/rollouts_drawn"] == 0
    refill.finish(number, [1, 0], tokens=2)
    assert accepted(refill.end()) == [0]


@pytest.mark.parametrize("reward_n", [[1, float("nan")], [float("inf")], [[1, 0]], 1.0])
def test_rewards_are_checked_whatever_the_test_is(reward_n):
    refill = Refill(
        1, max_drawn=1, at_cap="partial", decide=lambda reward_n: Decision(True, "mixed")
    )
    refill.begin(0)
    number = refill.dispatch("a", 0)
    with pytest.raises(ValueError, match="rewards of group 0 must be 1-d and finite, got"):
        refill.finish(number, reward_n, tokens=2)


def test_a_reason_of_ones_own_is_counted():
    decide = lambda reward_n: SimpleNamespace(kept=np.bool_(False), reason="dull")  # noqa: E731
    refill = Refill(1, max_drawn=1, at_cap="partial", decide=decide)
    refill.begin(0)
    refill.finish(refill.dispatch("a", 0), [1, 0], tokens=2)
    refill.end()
    assert refill.metrics()["refill/rollouts_filtered_dull"] == 2
