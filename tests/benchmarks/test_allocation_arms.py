"""The comparison of arms: it refuses unequal arms, counts pairs right, and deals budgets fairly."""

import numpy as np
import pytest

from benchmarks.allocation_arms import ARMS, FREE, permuted
from benchmarks.arms import check_manifests, summarise
from rl.config.language import RolloutConfig
from samplers import allocation


def test_a_difference_between_arms_names_the_setting_and_both_values():
    manifests = {
        "a": {"learning_rate": 1e-4, "updates": 1},
        "b": {"learning_rate": 3e-4, "updates": 1},
    }
    with pytest.raises(ValueError, match="learning_rate is 0.0001 in a and 0.0003 in b"):
        check_manifests(manifests)


def test_a_setting_one_arm_lacks_is_a_difference():
    with pytest.raises(ValueError, match="updates is 1 in a and None in b"):
        check_manifests({"a": {"updates": 1}, "b": {}})


def test_equal_manifests_pass():
    check_manifests({"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}})


def test_arms_change_only_what_may_differ():
    assert {key for _, settings, _, _ in ARMS.values() for key in settings} <= set(FREE)


def test_every_arm_generates_the_same_rollouts():
    totals = set()
    for _, settings, _, _ in ARMS.values():
        config = RolloutConfig(output_dir="unused", use_cpu=True, report_to="none", **settings)
        totals.add(config.rollouts_per_step)
    assert len(totals) == 1


@pytest.mark.parametrize("seed", range(5))
def test_permuted_budgets_keep_the_multiset_the_sum_and_the_dead(seed):
    std_P = np.random.default_rng(seed).random(12)
    std_P[::4] = 0
    budget_P = permuted(std_P, 96, minimum=4, maximum=None)
    plain_P = allocation.neyman(std_P, 96, minimum=4, maximum=None)
    assert sorted(budget_P) == sorted(plain_P)
    assert (budget_P[::4] == 4).all()
    assert not np.array_equal(budget_P, plain_P)
    assert np.array_equal(budget_P, permuted(std_P, 96, minimum=4, maximum=None))


def run(arm, seed, *curve):
    return {
        "arm": arm,
        "seed": seed,
        "totals": {
            "rollouts_drawn": 10, "rollouts_trained": 4, "tokens_drawn": 50, "tokens_trained": 20,
            "updates": 2, "seconds_rollout": 1.5,
        },
        "mixed": [0.5],
        "validation": [
            {"tokens_drawn": 25 * i, "eval_pass_rate": p, "eval_greedy_accuracy": p / 2}
            for i, p in enumerate(curve)
        ],
    }  # fmt: skip


def test_summary_by_hand():
    rows = summarise(
        [
            run("uniform", 1, 0.2, 0.4),
            run("uniform", 2, 0.2, 0.5),
            run("gvm", 1, 0.2, 0.5),
            run("gvm", 2, 0.2, 0.8),
        ],
        what={"uniform": "even", "gvm": "by the root"},
        baseline="uniform",
    )
    uniform, gvm = rows
    assert uniform["pass_rate"] == {"mean": pytest.approx(0.45), "min": 0.4, "max": 0.5}
    assert "pass_rate_final_minus_uniform" not in uniform
    # Differences .1 and .3: mean .2, std .1414, over sqrt 2.
    assert gvm["pass_rate_final_minus_uniform"]["mean"] == pytest.approx(0.2)
    assert gvm["pass_rate_final_minus_uniform"]["se"] == pytest.approx(0.1)
    # Curve means .35 - .30 and .50 - .35.
    assert gvm["pass_rate_curve_mean_minus_uniform"]["mean"] == pytest.approx(0.1)
    assert gvm["pass_rate_gain"]["mean"] == pytest.approx(0.45)
    assert gvm["seconds"] == {"rollout": 1.5}
