import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.ledger import FATES, Ledger


def test_by_hand():
    ledger = Ledger()
    ledger.begin(0)
    ledger.drawn(4, 20, kind="pilot")
    ledger.drawn(6, 50)
    ledger.account("trained", 5, 40)
    ledger.account("filtered", 3, 21, reason="all_fail")
    ledger.account("filtered", 1, 4, reason="all_pass")
    ledger.account("failed", 1, 5)
    ledger.seconds("rollout", 1.5)
    ledger.seconds("rollout", 0.25)
    ledger.updates(2)
    ledger.end()
    expected = {
        "rollouts_drawn": 10,
        "rollouts_drawn_pilot": 4,
        "rollouts_trained": 5,
        "rollouts_filtered": 4,
        "rollouts_filtered_all_fail": 3,
        "rollouts_filtered_all_pass": 1,
        "rollouts_surplus": 0,
        "rollouts_failed": 1,
        "rollouts_buffered": 0,
        "rollouts_taken": 0,
        "tokens_drawn": 70,
        "tokens_drawn_pilot": 20,
        "tokens_trained": 40,
        "tokens_filtered": 25,
        "tokens_filtered_all_fail": 21,
        "tokens_filtered_all_pass": 4,
        "tokens_surplus": 0,
        "tokens_failed": 5,
        "tokens_buffered": 0,
        "tokens_taken": 0,
        "seconds_rollout": 1.75,
        "updates": 2,
    }
    assert ledger.totals == expected
    both = {"ledger/": expected, "ledger_total/": expected}
    assert ledger.metrics() == {
        prefix + name: count for prefix, counts in both.items() for name, count in counts.items()
    }


def test_a_step_starts_at_zero_and_the_run_goes_on():
    ledger = Ledger()
    for step in range(3):
        ledger.begin(step)
        ledger.drawn(step, 10 * step)
        ledger.account("surplus", step, 10 * step, reason="late" if step == 1 else "")
        ledger.end()
    metrics = ledger.metrics()
    assert metrics["ledger/rollouts_drawn"] == 2
    assert metrics["ledger_total/rollouts_drawn"] == 3
    # A name once seen is reported at every later step.
    assert metrics["ledger/rollouts_surplus_late"] == 0
    assert metrics["ledger_total/tokens_surplus_late"] == 10


@pytest.mark.parametrize(
    ("rollouts", "tokens", "message"),
    [
        (
            3,
            41,
            "step 7 drew 3 rollouts and took 0 from the buffer, but accounts for 2 = 2 trained",
        ),
        (1, 41, "step 7 drew 1 rollouts and took 0 from the buffer, but accounts for 2"),
        (
            2,
            40,
            "step 7 drew 40 tokens and took 0 from the buffer, but accounts for 41 = 41 trained",
        ),
    ],
)
def test_a_step_that_does_not_add_up_stops(rollouts, tokens, message):
    ledger = Ledger()
    ledger.begin(7)
    ledger.drawn(rollouts, tokens)
    ledger.account("trained", 2, 41)
    with pytest.raises(AssertionError, match=message):
        ledger.end()


@given(
    st.lists(st.tuples(st.sampled_from(FATES), st.integers(0, 9), st.integers(0, 99)), max_size=20)
)
def test_steps_add_up_whatever_the_fates(events):
    ledger = Ledger()
    ledger.begin(0)
    for fate, rollouts, tokens in events:
        ledger.drawn(rollouts, tokens)
        ledger.account(fate, rollouts, tokens, reason=f"why_{rollouts}")
    ledger.end()
    totals = ledger.totals
    for unit, at in [("rollouts", 1), ("tokens", 2)]:
        assert totals[f"{unit}_drawn"] == sum(event[at] for event in events)
        for fate in FATES:
            assert totals[f"{unit}_{fate}"] == sum(e[at] for e in events if e[0] == fate)


def test_what_is_buffered_is_taken_by_a_later_step_and_accounted_for_there():
    ledger = Ledger()
    ledger.begin(0)
    ledger.drawn(5, 50)
    ledger.account("trained", 2, 20)
    ledger.account("buffered", 3, 30)
    ledger.end()
    ledger.begin(1)
    with pytest.raises(ValueError, match="4 rollouts taken from a buffer that holds 3"):
        ledger.taken(4, 30)
    ledger.taken(2, 21)
    ledger.drawn(1, 7)
    ledger.account("trained", 2, 17)
    with pytest.raises(AssertionError, match="drew 1 rollouts and took 2 from the buffer, but"):
        ledger.end()
    ledger.account("surplus", 1, 11, reason="aged")
    ledger.end()
    totals = ledger.totals
    for unit, drawn, held in [("rollouts", 6, 1), ("tokens", 57, 9)]:
        assert totals[f"{unit}_drawn"] == drawn
        assert totals[f"{unit}_buffered"] - totals[f"{unit}_taken"] == held
        fates = sum(totals[f"{unit}_{fate}"] for fate in FATES)
        assert drawn + totals[f"{unit}_taken"] == fates


def test_saved_and_loaded_goes_on_in_the_middle_of_a_step():
    ledger, restored = Ledger(), Ledger()
    ledger.begin(4)
    ledger.drawn(2, 9)
    ledger.seconds("rollout", 0.1)
    restored.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    for one in (ledger, restored):
        one.account("failed", 2, 9, reason="timeout")
        one.end()
    assert restored.state_dict() == ledger.state_dict()
    assert restored.metrics() == ledger.metrics()


def test_a_state_is_a_copy():
    ledger = Ledger()
    state = ledger.state_dict()
    ledger.begin(0)
    ledger.drawn(1, 1)
    assert state == Ledger().state_dict()


def test_a_phase_is_timed_and_may_lie_between_steps():
    ledger = Ledger()
    with ledger.phase("checkpoint"):
        pass
    assert 0 <= ledger.totals["seconds_checkpoint"] < 1
    with pytest.raises(KeyError), ledger.phase("reward"):
        raise KeyError
    assert "seconds_reward" not in ledger.totals


def test_counts_of_numpy_become_plain():
    ledger = Ledger()
    ledger.begin(0)
    ledger.drawn(np.int64(3), np.int32(5))
    assert type(ledger.totals["rollouts_drawn"]) is int


def test_it_says_what_is_wrong():
    ledger = Ledger()
    with pytest.raises(ValueError, match="no step is open: begin comes before counting rollouts"):
        ledger.drawn(1, 1)
    with pytest.raises(ValueError, match="no step is open: begin comes before end"):
        ledger.end()
    ledger.begin(2)
    with pytest.raises(ValueError, match="step 2 must end before step 3 begins"):
        ledger.begin(3)
    with pytest.raises(
        ValueError, match="one of trained, filtered, surplus, failed, buffered, got 'lost'"
    ):
        ledger.account("lost", 1, 1)
    with pytest.raises(ValueError, match="tokens must be non-negative, got -1"):
        ledger.drawn(1, -1)
    assert ledger.totals["rollouts_drawn"] == 0
    with pytest.raises(ValueError, match="seconds of reward must be finite and non-negative"):
        ledger.seconds("reward", float("nan"))
    state = ledger.state_dict()
    del state["step_counts"]["rollouts_drawn"]
    with pytest.raises(ValueError, match="step_counts lacks rollouts_drawn"):
        Ledger().load_state_dict(state)
    with pytest.raises(TypeError):
        ledger.updates(0.5)
