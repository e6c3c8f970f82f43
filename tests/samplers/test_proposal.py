import pytest

from samplers.proposal import admit


@pytest.mark.parametrize(
    ("success_n", "reason"), [([1, 1], "all_pass"), ([0, 0], "all_fail"), ([0.9, 0.9], "all_fail")]
)
def test_successes_say_whether_equal_rewards_pass(success_n, reason):
    assert admit([7.0, 7.0], success_n).reason == reason


def test_without_successes_a_reward_of_1_passes():
    assert [admit([r, r]).reason for r in (1.0, 0.99, 0.0)] == ["all_pass", "all_fail", "all_fail"]


def test_successes_of_another_group_are_refused():
    with pytest.raises(ValueError, match=r"one number per reward, got shapes \(3,\) and \(2,\)"):
        admit([1, 1], [1, 1, 1])
