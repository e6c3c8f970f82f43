"""Every method that YAML can name, in the trainer: what trains, what is accounted for, resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rl.config.methods import ADVANTAGES, ALLOCATORS, DOWN_SAMPLERS, SELECTORS, STOPPINGS
from rl.stages.weigh import weigh
from samplers.ledger import FATES
from samplers.refill import RefillError
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs


def rows():
    """Eight prompts with the columns that some selectors read."""
    return [
        row | {"start": i / 8, "place": [float(i % 3), float(i)], "solution": "123"}
        for i, row in enumerate(tiny.rows("a"))
    ]


SELECTIONS = {
    "static_band": {"selection_column": "start"},
    "diverse": {"selection_column": "place", "selection_gamma": 0.1},
    "mopps": {"selection_candidates": 2},
}
EVERYWHERE = {"starts_delta": 0.0, "starts_until": 1.0, "posterior_decay_chosen": 0.9}
"""Prompts are started along something whatever their pass rate."""
STOPS = {"early": {"stopping_threshold": 1.0}, "early_unbiased": {"stopping_threshold": 1.0}}
METHODS: dict[str, dict] = (
    {f"select {n}": {"selector": n} | SELECTIONS.get(n, {}) for n in SELECTORS}
    | {f"allocate {n}": {"allocator": n} for n in ALLOCATORS}
    | {f"scale {n}": {"allocator": "neyman", "allocation_scale": n} for n in ("thompson_std",)}
    | {
        f"stop {n}": {"stopping": n, "stopping_round_size": 2} | STOPS.get(n, {})
        for n in STOPPINGS
        if n != "none"
    }
    | {
        f"rows {n}": {"down_sampling": n, "rows_per_prompt": 4, "trainer": "grpo"}
        for n in DOWN_SAMPLERS
        if n != "none"
    }
    | {
        f"advantage {n}": {
            "trainer": "grpo",
            "advantage": n,
            "reward_kl": 0.1 * n.endswith("tokens"),
        }
        for n in ADVANTAGES
    }
    | {
        "starts along traces": {"starts": "traces"} | EVERYWHERE,
        "starts along a column, pilots": {
            "starts": "column",
            "starts_column": "solution",
            "starts_plain_share": 0.0,
            "allocator": "neyman",
            "pilot_rollouts": 2,
            "budget_min": 2,
        }
        | EVERYWHERE,
        "starts, refill with a buffer, and stop": {
            "starts": "column",
            "starts_column": "solution",
            "starts_memory_tokens": 20,
            "refill": True,
            "prompts_per_step": 3,
            "refill_min_prompts": 5,
            "refill_max_age": 1,
            "stopping": "early",
            "stopping_threshold": 0.3,
            "stopping_round_size": 2,
            "advantage": "leave_one_out",
            "trainer": "grpo",
        }
        | EVERYWHERE,
        "refill": {"refill": True, "prompts_per_step": 3},
        "refill with a buffer": {
            "refill": True,
            "prompts_per_step": 3,
            "refill_min_prompts": 5,
            "refill_max_age": 1,
        },
        "refill and stop": {
            "refill": True,
            "prompts_per_step": 3,
            "stopping": "positive",
            "stopping_round_size": 2,
            "selector": "posterior_mean",
        },
        "hapo": {
            "trainer": "grpo",
            "loss": "hapo",
            "adaptive_temperature_tau": 0.1,
            "updates_per_step": 2,
        },
        "tokens d3s": {"trainer": "grpo", "token_selection": "d3s"},
        "tokens entropy": {"trainer": "grpo", "token_selection": "entropy"},
        "all together": {
            "trainer": "grpo",
            "selector": "posterior_mean",
            "allocator": "leave_one_out",
            "stopping": "early_unbiased",
            "stopping_round_size": 3,
            "advantage": "leave_one_out",
            "down_sampling": "d3s",
            "updates_per_step": 2,
            "token_selection": "d3s",
            "mask_truncated_completions": True,
            "beta": 0.1,
            "importance_correction": "token_truncate",
        },
    }
)


def settings_of(name):
    return {
        "data": rows(),
        "reward": tiny.small_digit,
        "max_steps": 4,
        "prompts_per_step": 4,
        "allocator": "uniform",
    } | METHODS[name]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_accounts_for_everything_and_resumes_exactly(tmp_path, name):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    settings = settings_of(name) | {"save_strategy": "steps", "save_steps": 2}
    whole = tiny.run(tmp_path / "whole", **settings)
    tiny.run(tmp_path / "cut", callbacks=[Stop()], **settings)  # at step 3, saved at step 2
    resumed = tiny.run(tmp_path / "cut", resume=True, **settings)
    weights, expected = tiny.parameters(resumed), tiny.parameters(whole)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert tiny.lines(tmp_path / "cut") == tiny.lines(tmp_path / "whole")

    start = tiny.model().state_dict()
    assert any(not torch.equal(expected[key], start[key]) for key in start)  # something trained
    held = 0
    for log, step in zip(
        tiny.step_logs(tmp_path / "whole"), tiny.lines(tmp_path / "whole"), strict=True
    ):
        counts = {fate: log[f"ledger/rollouts_{fate}"] for fate in (*FATES, "drawn", "taken")}
        assert counts["drawn"] == sum(step["budgets"])
        assert counts["taken"] == held
        held = counts["buffered"]
        assert counts["drawn"] + counts["taken"] == sum(counts[fate] for fate in FATES)
        assert len(set(step["prompts"])) == len(step["prompts"])  # nor twice in several visits


def test_a_stopping_rule_saves_rollouts_and_its_weights_reach_the_rows(tmp_path):
    settings = settings_of("stop early_unbiased") | {"trainer": "grpo", "max_steps": 1}
    made = tiny.trainer(tmp_path, **(settings | {"advantage": "leave_one_out"}))
    made.ledger.begin(0)
    groups, (visit,) = made.sampling.draw(made.policy, version=0)
    assert len(visit.proposals) > 1
    assert sum(p.budget_P.sum() for p in visit.proposals) < 4 * 6
    batch = weigh(
        groups,
        [visit],
        made.objective,
        made.policy,
        made.ranks,
        progress=0.0,
        ledger=made.ledger,
    )
    # Rows of all rounds stand by prompt, then slot: ties between rows are broken by their order.
    prompt_N, seed_N = groups.rollouts.prompt_N, groups.rollouts.seed_N.tolist()
    assert prompt_N.tolist() == sorted(prompt_N.tolist())
    place = {seed: i for p in visit.proposals for i, seed in enumerate(p.seed_N.tolist())}
    in_round = {seed: p.round for p in visit.proposals for seed in p.seed_N.tolist()}
    for p in range(4):
        order = [(in_round[s], place[s]) for s, q in zip(seed_N, prompt_N, strict=True) if q == p]
        assert order == sorted(order)
    assert set(groups.weight_P.tolist()) <= {0.0, 1.0, 2.0}  # stopped, never condemned, 1 / rho
    assert (groups.weight_P != 1).any()
    size_P = groups.rollouts.prompt_N.bincount(minlength=4)
    expected = groups.weight_P[batch.rollouts.prompt_N] / size_P[batch.rollouts.prompt_N]
    assert torch.allclose(batch.weight_K, expected.to(batch.weight_K))
    assert (batch.weight_K > 0).all()


def test_refill_without_a_mixed_group_accounts_for_discarded_pilots_once(tmp_path):
    settings = settings_of("refill") | {
        "trainer": "grpo",
        "reward": lambda completions, **_: [0.0] * len(completions),
        "refill_max_draws": 2,
        "refill_at_cap": "partial",
        "pilot_rollouts": 1,
        "pilot_use": "discard",
        "rollouts_per_prompt": 4,
        "max_steps": 2,
    }
    made = tiny.run(tmp_path, **settings)
    totals = made.ledger.totals
    assert totals["rollouts_trained"] == 0
    assert totals["rollouts_filtered"] == totals["rollouts_drawn"] > 0


def test_refill_trains_on_mixed_groups_only_and_on_as_many_as_asked_for(tmp_path):
    made = tiny.trainer(tmp_path, **(settings_of("refill") | {"trainer": "grpo", "max_steps": 2}))
    made.train()
    for log, step in zip(tiny.step_logs(tmp_path), tiny.lines(tmp_path), strict=True):
        mixed = [
            (n, r) for n, r in zip(step["budgets"], step["reward_sums"], strict=True) if 0 < r < n
        ]
        assert len(mixed) >= 3
        # The first three in order of dispatch train, whatever else is mixed is surplus.
        assert log["ledger/rollouts_trained"] == sum(n for n, _ in mixed[:3])
        assert log["ledger/rollouts_surplus"] == sum(n for n, _ in mixed[3:])


def test_what_waits_in_the_buffer_trains_first_and_too_old_it_is_dropped(tmp_path):
    made = tiny.trainer(tmp_path, **(settings_of("refill with a buffer") | {"max_steps": 8}))
    made.train()
    logs = tiny.step_logs(tmp_path)
    assert sum(log["ledger/rollouts_taken"] for log in logs) > 0
    # With five drawn and three wanted the surplus grows until it is enough: then nothing is drawn.
    idle = [log for log in logs if not log["ledger/rollouts_drawn"]]
    assert idle and all(log["ledger/rollouts_trained"] for log in idle)
    totals = made.sampling.buffer.refill.metrics()
    assert totals["refill_total/groups_accepted"] == 3 * 8


def test_groups_keep_their_prompt_pass_rate_and_weight_through_the_buffer(tmp_path):
    settings = settings_of("refill with a buffer") | {"trainer": "grpo"}
    stop = {"stopping": "early_unbiased", "stopping_round_size": 2, "stopping_threshold": 1.0}
    made = tiny.trainer(tmp_path, **(settings | stop | {"refill_max_age": 9}))
    known, seen = {}, []
    for step in range(6):
        made.ledger.begin(step)
        groups, visits = made.sampling.draw(made.policy, version=step)
        for visit in visits:
            columns = (visit.index_P, visit.proposals[0].pass_rate_P, visit.group_weight_P)
            for place, (row, pass_rate, weight) in enumerate(zip(*columns, strict=True)):
                seeds = [
                    s
                    for r in visit.rounds
                    for s in r.rollouts.seed_N[r.rollouts.prompt_N == place].tolist()
                ]
                known[frozenset(seeds)] = (made.prompts[row].key, pass_rate, weight)
        for p, prompt in enumerate(groups.prompts):
            seeds = frozenset(groups.rollouts.seed_N[groups.rollouts.prompt_N == p].tolist())
            expected = known.pop(seeds)  # whole, and once only
            assert (prompt.key, groups.pass_rate_P[p], groups.weight_P[p]) == expected
            assert groups.rollouts.prompt_ids[p] == prompt.token_ids
            seen.append(expected)
        counts, of_refill = made.ledger.metrics(), made.sampling.buffer.refill.metrics()
        for fate in ("filtered", "buffered"):
            assert counts[f"ledger/rollouts_{fate}"] == of_refill[f"refill/rollouts_{fate}"]
        size = len(groups.rollouts)
        made.ledger.account("trained", size, int(groups.rollouts.length_N.sum()))
        made.ledger.end()
    assert {weight for *_, weight in seen} > {1.0}  # some went on by lot
    assert len({pass_rate for _, pass_rate, _ in seen}) > 3


@pytest.mark.parametrize("at_cap", ["raise", "partial", "pad"])
def test_the_three_things_that_can_happen_at_the_cap(tmp_path, at_cap):
    settings = settings_of("refill") | {
        "reward": tiny.one_prompt,  # mixed for one prompt alone
        "trainer": "grpo",
        "advantage": "leave_one_out",
        "refill_at_cap": at_cap,
        "refill_max_draws": 2,
        "max_steps": 1,
        "seed": 4,  # the prompt that is mixed is drawn
    }
    made = tiny.trainer(tmp_path, **settings)
    if at_cap == "raise":
        with pytest.raises(RefillError, match="of 3 groups carry gradient after 6 were drawn"):
            made.train()
        return
    batch = tiny.collect(made, version=0)
    assert len(batch.prompts) == 1 and len(batch.rollouts)
    assert batch.denominator == pytest.approx(1.0 if at_cap == "partial" else 3.0)


def test_pods_compares_the_rows_it_keeps(tmp_path):
    made = tiny.trainer(tmp_path, **settings_of("rows pods"))
    batch = tiny.collect(made, version=0)
    rollouts = batch.rollouts
    for p in rollouts.prompt_N.unique():
        of_prompt = rollouts.prompt_N == p
        reward_n, advantage_n = rollouts.reward_N[of_prompt], rollouts.advantage_N[of_prompt]
        assert len(reward_n) == 4
        expected = (reward_n - reward_n.mean()) / (reward_n.std() + 1e-4)
        assert torch.allclose(advantage_n, expected)


@pytest.mark.parametrize(("weight_rows", "share"), [("trained", 1 / 4), ("drawn", 1 / 6)])
def test_a_prompts_weight_is_shared_by_the_rows_that_train_or_by_those_drawn(
    tmp_path, weight_rows, share
):
    settings = settings_of("rows balanced") | {"weight_rows": weight_rows}
    batch = tiny.collect(tiny.trainer(tmp_path, **settings))
    assert torch.allclose(batch.weight_K, torch.full_like(batch.weight_K, share))


def test_rows_that_share_the_weight_of_all_drawn_ones_are_divided_by_that_of_all(tmp_path):
    """Sum over all rows of weight * length, dropped ones included; else it is that of the kept rows."""
    settings = settings_of("rows balanced") | {"length_weight": "token_mean"}
    found = {}
    for weight_rows in ("drawn", "trained"):
        made = tiny.trainer(tmp_path / weight_rows, **settings, weight_rows=weight_rows)
        found[weight_rows] = tiny.collect(made)
    drawn = found["drawn"].visits[0].rounds[0].rollouts
    assert len(drawn) > len(found["drawn"].rollouts)
    assert found["drawn"].denominator == pytest.approx(float(drawn.length_N.sum()) / 6)
    assert found["drawn"].original_denominator == found["drawn"].denominator
    assert found["trained"].original_denominator == found["drawn"].denominator
    assert abs(found["trained"].denominator - found["drawn"].denominator) > 0.1


def test_d3s_keeps_its_share_by_schedule_and_leaves_advantages_alone(tmp_path):
    for progress, keep in [(0, 6), (2, 15), (4, 24)]:
        made = tiny.trainer(tmp_path / str(progress), **settings_of("rows d3s"))
        made.planner._step = 0
        batch = tiny.collect(made, version=progress)
        assert batch.metrics["select/rows_kept"] == keep
        full = made.objective.advantage(batch.visits[0].rounds[0].rollouts)
        assert set(batch.rollouts.advantage_N.tolist()) <= set(full.tolist())


def test_truncated_completions_leave_and_are_counted(tmp_path):
    settings = settings_of("advantage leave_one_out") | {"max_completion_length": 2}
    plain = tiny.collect(tiny.trainer(tmp_path / "a", **settings))
    settings["mask_truncated_completions"] = True
    made = tiny.trainer(tmp_path / "b", **settings)
    masked = tiny.collect(made, version=0)
    assert plain.rollouts.truncated_N.any()
    assert not masked.rollouts.truncated_N.any()
    whole = ~plain.rollouts.truncated_N
    assert torch.equal(masked.rollouts.seed_N, plain.rollouts.seed_N[whole])
    # Advantages are those of full groups.
    assert torch.equal(masked.rollouts.advantage_N, plain.rollouts.advantage_N[whole])
    counted = made.ledger.totals["rollouts_filtered_truncated"]
    assert counted >= int((~whole).sum()) > 0


def test_a_run_ends_by_its_tokens_and_schedules_follow_them(tmp_path):
    settings = settings_of("rows d3s") | {
        "max_steps": 50,
        "max_generated_tokens": 300,
        "eval_dataset": tiny.rows("c"),
        "eval_strategy": "steps",
        "eval_steps": 40,
        "save_strategy": "steps",
        "save_steps": 40,
    }
    made = tiny.run(tmp_path, **settings)
    logs = tiny.step_logs(tmp_path)
    tokens = [log["ledger_total/tokens_drawn"] for log in logs]
    assert tokens[-1] >= 300 > tokens[-2]
    last = made.state.global_step
    assert [
        log["step"] for log in tiny.lines(tmp_path, "metrics.jsonl") if "eval_reward" in log
    ] == [last]
    assert (tmp_path / f"checkpoint-{last}").is_dir()
    kept = [log["select/rows_kept"] for log in logs]
    spent = [0, *tokens[:-1]]
    shares = [0.25 + 0.75 * max(s / 300, step / 50) for step, s in enumerate(spent)]
    assert kept == [np.floor(share * 24 + 0.5) for share in shares]


def test_a_selector_needs_its_column(tmp_path):
    with pytest.raises(ValueError, match="column 'nope' is missing in row 0"):
        tiny.trainer(
            tmp_path,
            data=rows(),
            prompts_per_step=4,
            selector="static_band",
            selection_column="nope",
        )


def test_selection_by_the_posterior_prefers_what_it_has_seen_to_be_hard_and_possible(tmp_path):
    settings = {"selector": "posterior_mean", "prompts_per_step": 2, "max_steps": 1}
    settings |= {"posterior_prior": "flat"}
    made = tiny.trainer(tmp_path, data=rows(), **settings)
    planner = made.planner
    planner.posterior.add(np.arange(8), [0, 4, 2, 8, 8, 8, 8, 8], [8] * 8)
    assert set(planner.propose().index_P.tolist()) == {1, 2}  # .0875 and .0955 before .0682


@pytest.mark.parametrize("allocator", ["cost_aware", "neyman"])
def test_lengths_reach_the_planner_where_budgets_go_by_them(tmp_path, allocator):
    settings = settings_of("allocate cost_aware") | {"allocator": allocator, "max_steps": 3}
    made = tiny.trainer(tmp_path, **settings)
    made.train()
    state = made.planner.state_dict()
    seen_D = state["draw_D"] > 0
    length_D = state["next_length_D"]
    if allocator == "neyman":
        assert np.isnan(length_D).all()
        return
    keys = [made.planner.keys[i] for i in np.flatnonzero(seen_D)]
    assert length_D[seen_D].tolist() == made.sampling.lengths.of(keys).tolist()
    assert np.isnan(length_D[~seen_D]).all() and len(set(length_D[seen_D].tolist())) > 1


@pytest.mark.parametrize("objective", ["em", "mean"])
@pytest.mark.parametrize(
    ("above", "success", "accepted"),
    [
        (0.5, [1, 0, 1, 0], [1, 0, 1, 0]),  # yes or no: all that pass, not the best alone
        (None, [0.9, 0.2, 0.6, 0.0], [1, 0, 0, 0]),  # shares of full marks: the best
        (None, [0, 0, 1, 1], [0, 0, 1, 1]),  # rewards of any range, above their mean
    ],
)
def test_raft_accepts_by_success_and_not_by_the_range_of_rewards(
    above, success, accepted, objective
):
    from rl.config.build import advantage_of, successes
    from rl.objective.weights import objective_weight
    from rollouts.batch import Rollouts

    rollouts = Rollouts(
        prompt_N=torch.zeros(4, dtype=torch.int64),
        mask_NT=torch.ones(4, 1, dtype=torch.bool),
        logprob_NT=torch.zeros(4, 1),
        version=0,
        reward_N=torch.tensor([-7.0, -9.0, -8.0, -30.0], dtype=torch.float64),
        success_N=torch.tensor(success, dtype=torch.float64),
    )
    made = tiny.config("unused", trainer="raft", objective=objective, success_above=above)
    advantage_N = advantage_of(made)(rollouts)
    assert advantage_N.tolist() == accepted
    weight_N = objective_weight(objective, successes(rollouts), rollouts.prompt_N, num_prompts=1)
    share = sum(accepted) if objective == "em" else 4
    assert (weight_N * advantage_N).tolist() == [a / share for a in accepted]


def test_several_rewards_can_be_compared_by_themselves_and_wait_with_their_groups(tmp_path):
    from rl.objective.advantages import normalised_sum

    def large(completions, **_):
        return [100.0 * (len(text) > 3) for text in completions]

    settings = {"trainer": "grpo", "refill": True, "refill_min_prompts": 9, "refill_max_age": 3}
    settings |= {"prompts_per_step": 3, "allocator": "uniform", "reward_weights": [1.0, 0.5]}
    settings |= {"multi_objective_aggregation": "normalize_then_sum", "success_above": 10.0}
    made = tiny.trainer(tmp_path, reward=[tiny.small_digit, large], **settings)
    seen, inner = [], made.objective.advantage
    watched = lambda *a: seen.append(a[0]) or inner(*a)  # noqa: E731
    made.objective = replace(made.objective, advantage=watched)
    made.train()
    weight_F = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for rollouts in seen:
        assert torch.equal(rollouts.reward_NF @ weight_F, rollouts.reward_N)
        expected_N = normalised_sum(rollouts.reward_NF, rollouts.prompt_N, weight_F=weight_F)
        assert torch.equal(inner(rollouts), expected_N) and expected_N.any()
    held = made.sampling.buffer.state_dict()["held"]
    assert held and all("reward_NF" in group["columns"] for group in held.values())
