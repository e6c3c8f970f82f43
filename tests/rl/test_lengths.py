"""Expected lengths: by hand, and the same after a resume and in any order."""

import numpy as np

from rl.lengths import ExpectedLengths


def seen(rows):
    """Expectations after rollouts of prompts "a" and "b": pairs of place and length."""
    lengths = ExpectedLengths()
    lengths.observe(["a", "b"], np.array([p for p, _ in rows]), np.array([n for _, n in rows]))
    return lengths


ROWS = [(0, 10), (1, 2), (0, 30), (1, 0)]


def test_by_hand():
    # "a": (10 + 30) / 2; "b": (2 + 0) / 2; one never seen: 42 / 4.
    assert seen(ROWS).of(["b", "c", "a"]).tolist() == [1.0, 10.5, 20.0]


def test_before_any_rollout_all_are_equal():
    assert ExpectedLengths().of(["a", "b"]).tolist() == [1.0, 1.0]


def test_the_order_of_rollouts_changes_nothing_also_not_the_state():
    assert str(seen(ROWS).state_dict()) == str(seen(ROWS[::-1]).state_dict())


def test_a_resumed_run_expects_the_same():
    resumed = ExpectedLengths()
    resumed.load_state_dict(seen(ROWS).state_dict())
    whole = seen(ROWS)
    for lengths in (resumed, whole):
        lengths.observe(["a", "c"], np.array([0, 1]), np.array([2, 8]))
    assert resumed.of(["a", "b", "c", "d"]).tolist() == whole.of(["a", "b", "c", "d"]).tolist()
    assert str(resumed.state_dict()) == str(whole.state_dict())


def test_who_made_which_rollouts_changes_nothing_also_not_the_state():
    keys, rows = [f"prompt {i}" for i in range(40)], np.arange(80) % 40
    alone, shared = ExpectedLengths(), ExpectedLengths()
    alone.observe(keys, rows, np.arange(80))
    for part in (slice(41, 80), slice(0, 41)):
        shared.observe(keys, rows[part], np.arange(80)[part])
    assert str(alone.state_dict()) == str(shared.state_dict())
    assert alone.of(keys).tolist() == [(i + i + 40) / 2 for i in range(40)]


def test_a_prompt_whose_rollouts_were_made_by_nobody_is_expected_to_be_like_the_others():
    lengths = ExpectedLengths()
    lengths.observe(["a", "b"], np.array([0]), np.array([6]))
    assert lengths.of(["b"]).tolist() == [6.0]
