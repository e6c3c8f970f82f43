"""Published methods as settings of one plan: their stochastic, branching and trained edges and cost."""

from pathlib import Path

import pytest
import yaml

from rl.config.denoising_plans import plan_at

PEERS = Path(__file__).resolve().parents[3] / "recipes" / "images" / "peers"
RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(PEERS.glob("*.yaml"))}
SETTINGS = {name: recipe["plan"] for name, recipe in RECIPES.items()}


def edges(first, stop):
    return tuple(range(first, stop))


def at(name, step, num_train_steps=100):
    return plan_at(SETTINGS[name], step, num_train_steps=num_train_steps)


@pytest.mark.parametrize(
    ("name", "step", "stochastic", "splits", "trained", "cost"),
    [
        ("ddpo", 0, edges(0, 50), (), edges(0, 50), 50),
        # (T - L + 1) + k (L - 1): 7 + 5 * 13 and 1 + 5 * 19.
        ("b2_released", 0, edges(0, 20), ((6, 5),), edges(6, 20), 72),
        ("b2_released", 99, edges(0, 20), ((0, 5),), edges(0, 20), 96),
        ("b2_within_branch", 0, edges(0, 20), ((6, 5),), edges(6, 19), 72),
        ("b2_within_branch", 99, edges(0, 20), ((0, 5),), edges(0, 19), 96),
        ("flow_grpo", 0, edges(0, 10), (), edges(0, 9), 10),
        # k T with a split at edge 0 is 1 + k (T - 1).
        ("dance_grpo", 0, edges(0, 16), ((0, 12),), None, 1 + 12 * 15),
        ("mix_grpo", 0, edges(0, 4), (), edges(0, 4), 25),
        ("mix_grpo", 25, edges(1, 5), (), edges(1, 5), 25),
        ("branch_grpo", 0, edges(0, 20), ((0, 2), (3, 2), (6, 2), (9, 2)), edges(0, 20), 203),
        # (t0 + 1) + k (T - t0 - 1).
        ("temp_flow_grpo", 0, (0,), ((0, 6),), (0,), 1 + 6 * 9),
        ("temp_flow_grpo", 12, (3,), ((3, 6),), (3,), 4 + 6 * 6),
    ],
)
def test_published_plans(name, step, stochastic, splits, trained, cost):
    plan = at(name, step)
    assert (plan.stochastic, plan.splits) == (stochastic, splits)
    assert trained is None or plan.trained == trained
    assert plan.evaluations(1) == cost
    assert plan.evaluations(7) == 7 * cost
    assert (plan.num_steps, plan.rule, plan.level) == tuple(
        SETTINGS[name][key] for key in ("num_steps", "rule", "level")
    )


def test_every_published_plan_holds_at_every_training_step():
    assert len(SETTINGS) == 9
    for name in SETTINGS:
        for step in range(100):
            plan = at(name, step)
            assert plan.trained
            assert plan == at(name, step)


def test_b2_costs_83_88_a_prefix_on_average_of_the_linear_100():
    costs = [at("b2_released", step).evaluations(1) for step in range(100)]
    assert sum(costs) / 100 == pytest.approx(83.88)
    leaves = {at("b2_released", step).leaves_per_root for step in range(100)}
    assert leaves == {5}
    # Copies of the state would ask for the split edge 5 times instead of once.
    assert sum(costs) / 100 + 4 == pytest.approx(87.88)


def test_b2_takes_the_number_of_training_steps_for_its_stages_unless_told_otherwise():
    assert at("b2_released", 29, num_train_steps=30).first_split == 0
    told = SETTINGS["b2_released"]["trained"] | {"stages": 7}
    plans = [
        plan_at(SETTINGS["b2_released"] | {"trained": told}, s, num_train_steps=30)
        for s in (0, 6, 29)
    ]
    assert [plan.first_split for plan in plans] == [6, 0, 0]


def test_the_fast_variant_shares_one_deterministic_prefix_up_to_a_random_window():
    starts = set()
    for step in range(100):
        plan = at("flow_grpo_fast", step)
        start = plan.first_split
        assert plan.stochastic == plan.trained == (start, start + 1, start + 2)
        assert plan.splits == ((start, 24),)
        assert plan.evaluations(1) == (start + 1) + 24 * (9 - start)
        starts.add(start)
    assert starts == {0, 1, 2}


def test_dance_grpo_trains_another_60_percent_at_every_step_and_never_the_last_edge():
    trained = [at("dance_grpo", step).trained for step in range(100)]
    assert {len(edges) for edges in trained} == {9}
    assert len(set(trained)) > 50
    assert max(max(edges) for edges in trained) == 14


def test_temp_flow_grpo_costs_45_nk_a_cycle_and_its_prefixes():
    # sum_j (T - 1 - j) = 45 for each of the K children, and prefixes of sum_j (j + 1) = 45.
    cycle = [at("temp_flow_grpo", step) for step in range(9)]
    assert [plan.trained for plan in cycle] == [(j,) for j in range(9)]
    assert sum(plan.evaluations(4) for plan in cycle) == 4 * (45 * 6 + 45)
    assert at("temp_flow_grpo", 9) == cycle[0]


def test_mix_grpo_rolls_back_after_the_last_edge_before_its_stop():
    # A window of 4 moves by 1 every 25 steps; 23 places lie before the stop, and then it begins anew.
    assert at("mix_grpo", 22 * 25, num_train_steps=10**5).stochastic == (22,)
    assert at("mix_grpo", 23 * 25, num_train_steps=10**5).stochastic == (0, 1, 2, 3)
    assert at("mix_grpo", 10**4, num_train_steps=10**5).stochastic == (9, 10, 11, 12)


def test_children_may_differ_between_edges():
    settings = {"num_steps": 6, "rule": "ddim", "level": 1.0}
    plan = plan_at(settings | {"branch": {"at": [1, 3], "children": [2, 3]}}, 0, num_train_steps=1)
    assert plan.splits == ((1, 2), (3, 3))


PLAIN = {"num_steps": 6, "rule": "ddim", "level": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traned": "all_steps"}, "plan has no setting 'traned'.*Did you mean 'trained'"),
        ({"rule": "dim"}, "rule must be one of ddim.*got 'dim'.*Did you mean 'ddim'"),
        ({"level": "1e-1"}, "level must be a number, got '1e-1'"),
        ({"num_steps": "6"}, "num_steps must be an integer, got '6'"),
        ({"last_edge": True}, "last_edge must be one of untrained, trained, got True"),
        ({"trained": "last_step"}, "trained.schedule must be one of .*Did you mean 'last_steps'"),
        ({"trained": "last_steps"}, r"trained needs last, got \{\}"),
        ({"trained": [1, 2]}, r"trained must be the name of a schedule .* got \[1, 2\]"),
        (
            {"trained": {"schedule": "last_steps", "lats": 3}},
            "trained has no setting 'lats'.*Did you mean 'last'",
        ),
        (
            {"trained": {"schedule": "all_steps", "last": 3}},
            "trained has no setting 'last', there are none",
        ),
        ({"trained": {"schedule": "last_steps", "last": 7}}, r"last must be in 1..6, got 7"),
        (
            {"trained": {"schedule": "last_steps", "last": 1}},
            "training step 0 trains no edge: the last, 5, is left out",
        ),
        ({"branch": 5}, "branch must be a mapping of at and children, got 5"),
        ({"branch": {"at": [1]}}, r"branch needs children, got \{'at': \[1\]\}"),
        ({"branch": {"at": 1, "children": 2}}, "or a list of edges, got 1"),
        (
            {"branch": {"at": "train_start", "children": 2}},
            "branch.at must be one of .* got 'train_start'.*Did you mean 'trained_start'",
        ),
        (
            {"branch": {"at": [1, 2], "children": [2]}},
            r"one for each of 2 edges, got \[2\]",
        ),
        ({"branch": {"at": [6], "children": 2}}, r"must lie in 0..5, got \(6,\)"),
        (
            {"stochastic": {"schedule": "sliding_window", "size": 2}, "trained": "all_steps"},
            r"trained need edges that draw noise, but \[2, 3, 4\]",
        ),
    ],
)
def test_settings_errors_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_at(PLAIN | changes, 0, num_train_steps=10)


def test_what_is_missing_and_steps_out_of_range_are_said():
    with pytest.raises(ValueError, match="plan needs num_steps, level, got {'rule': 'ddim'}"):
        plan_at({"rule": "ddim"}, 0, num_train_steps=10)
    with pytest.raises(ValueError, match=r"step must be in 0..9, got 10"):
        plan_at(PLAIN, 10, num_train_steps=10)
