"""What a level took is read from a curve, and arms are compared seed by seed."""

import json
import math

import pytest

from benchmarks.to_level import (
    FAMILIES,
    TASKS,
    Cell,
    collect,
    end_of,
    grid,
    mean_of_curve,
    ratio_interval,
    spent_to,
    steps_between_validations,
)


def curve(*points):
    return [{"tokens": t, "cpu_seconds": t / 10, "pass_rate": p} for t, p in points]


RISES = curve((0, 0.2), (100, 0.4), (200, 0.3), (300, 0.6))


def test_a_level_is_reached_where_the_straight_line_between_validations_crosses_it():
    # .3 is halfway from .2 to .4; .5 is two thirds of the way from .3 to .6.
    assert spent_to(RISES, 0.3) == pytest.approx(50)
    assert spent_to(RISES, 0.5) == pytest.approx(200 + 100 * 2 / 3)
    assert spent_to(RISES, 0.5, "cpu_seconds") == pytest.approx(20 + 10 * 2 / 3)


def test_a_level_counts_when_it_is_reached_first_although_the_curve_falls_below_it_again():
    assert spent_to(RISES, 0.4) == 100


def test_a_level_at_the_start_costs_nothing_and_one_never_reached_has_no_cost():
    assert spent_to(RISES, 0.2) == 0
    assert spent_to(RISES, 0.61) is None


def test_the_mean_of_a_curve_is_that_of_its_trapezoids_up_to_the_given_tokens():
    # (.2 + .4)/2, (.4 + .3)/2 and half of the last piece: from .3 to .45 over 50 tokens.
    expected = (100 * 0.3 + 100 * 0.35 + 50 * 0.375) / 250
    assert mean_of_curve(RISES, 250) == pytest.approx(expected)


def test_a_curve_that_ends_a_little_early_keeps_its_last_value():
    assert mean_of_curve(curve((0, 0.5), (90, 0.5)), 100) == pytest.approx(0.5)


def test_the_end_is_the_mean_of_the_last_three_validations():
    assert end_of(RISES) == pytest.approx((0.4 + 0.3 + 0.6) / 3)


def test_ratios_are_paired_by_seed():
    # Every seed takes half of its partner's: the interval has no width, whatever the seeds took.
    assert ratio_interval([5, 50, 500], [10, 100, 1000]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_two_ratios_by_hand():
    # Logarithms 0 and log 4: mean log 2, s.e. log 2, and t(.975, 1 degree of freedom) = 12.706.
    middle, low, high = ratio_interval([1, 4], [1, 1])
    assert middle == pytest.approx(2)
    assert math.log(high) == pytest.approx(math.log(2) * (1 + 12.7062), rel=1e-4)
    assert math.log(low) == pytest.approx(math.log(2) * (1 - 12.7062), rel=1e-4)


def test_a_seed_that_never_reached_the_level_leaves_no_ratio():
    assert ratio_interval([1, None], [1, 1]) is None
    assert ratio_interval([1], [1]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_have_names_that_name_them_and_every_family_has_as_many(family):
    cells = grid(family)
    assert [Cell.named(cell.name) for cell in cells] == cells and len(set(cells)) == 36
    alone = any(cell.rollouts == 1 for cell in cells)
    assert alone == (FAMILIES[family].get("trainer") == "raft++")


def test_validations_are_about_equally_far_apart_in_tokens_for_every_shape():
    task = TASKS["arithmetic"]
    for cell in grid("raft"):
        apart = steps_between_validations(task, cell) * cell.prompts * cell.rollouts
        assert apart * task.mean_length == pytest.approx(task.validate_every, rel=0.3)


def test_runs_with_tuning_seeds_are_collected_and_the_best_cell_has_the_most_seeds(tmp_path):
    task = TASKS["arithmetic"]
    runs = {("32x2-u1-lr0.0003", 1): 0.4, ("32x2-u1-lr0.0003", 2): 0.6}
    runs |= {("64x1-u1-lr0.0003", 1): 0.9, ("64x1-u1-lr0.0003", 11): 0.1}  # 11 is no tuning seed
    for (cell, seed), rate in runs.items():
        folder = tmp_path / "arithmetic" / "raft" / f"{cell}-seed{seed}"
        folder.mkdir(parents=True)
        flat = curve((0, rate), (task.tokens, rate))
        (folder / "result.json").write_text(json.dumps({"curve": flat}))
    assert collect(tmp_path, task) == {
        "raft": {
            "best": "32x2-u1-lr0.0003",
            "runs": 3,
            "mean_of_curve": {
                "64x1-u1-lr0.0003": [pytest.approx(0.9)],
                "32x2-u1-lr0.0003": [pytest.approx(0.4), pytest.approx(0.6)],
            },
        }
    }
