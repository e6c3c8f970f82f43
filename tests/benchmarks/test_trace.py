"""The simulator: what it claims of its policy, of the oracle, and of its books."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import trace
from benchmarks.trace import Simulation, simulate, summarise
from benchmarks.trace_arms import (
    ALLOCATIONS,
    DOWNSAMPLERS,
    RECIPES,
    SELECTIONS,
    STOPPINGS,
    Arm,
    Batch,
    all_rows,
    centred,
    cross_arms,
    grpo,
    leave_one_out,
    mandatory_arms,
    raft,
    reference,
)
from benchmarks.trace_policy import (
    POOLS,
    TRACES,
    Policy,
    Settings,
    costs,
    excess_log_loss,
    oracle_budget,
    oracle_over_uniform,
    variance,
)
from rl.objective import advantages
from samplers.stopping import Counts

SMALL = Settings(num_prompts=48, prompts_per_step=8, rollouts_per_prompt=8, steps=5)


def small(arm, *, pool="uniform", trace="learning", seed=1, settings=SMALL):
    return simulate(Arm.parse(arm), pool=pool, trace=trace, seed=seed, settings=settings)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("binary", [True, False])
def test_advantages_are_those_of_the_trainer(seed, binary):
    generator = np.random.default_rng(seed)
    prompt_N = generator.permutation(np.repeat(np.arange(12), generator.integers(1, 9, 12)))
    reward_N = generator.random(len(prompt_N))
    if binary:
        reward_N = (reward_N < 0.4).astype(float)
    reward, prompt = torch.tensor(reward_N), torch.tensor(prompt_N)
    for ours, theirs in [
        (leave_one_out(reward_N, prompt_N), advantages.leave_one_out(reward, prompt)),
        (centred(reward_N, prompt_N), advantages.centred(reward, prompt)),
        (grpo(reward_N, prompt_N), advantages.grpo(reward, prompt, correction=0, eps=1e-6)),
        (
            grpo(reward_N, prompt_N, correction=1, eps=1e-4),
            advantages.grpo(reward, prompt, correction=1, eps=1e-4),
        ),
        (raft(reward_N, prompt_N), advantages.raft(reward, prompt)),
    ]:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-14)


def closed_form(a):
    """(E sqrt(p (1-p)))^2 / E[p (1-p)] for p ~ Beta(a, a)."""
    root = math.exp(
        2 * (math.lgamma(a + 0.5) - math.lgamma(a)) + math.lgamma(2 * a) - math.lgamma(2 * a + 1)
    )
    return root**2 / (a / (2 * (2 * a + 1)))


@pytest.mark.parametrize(
    ("pool", "a", "table"),
    [("uniform", 1, 0.925), ("skewed", 0.5, 0.811), ("very_skewed", 0.2, 0.559)],
)
def test_the_oracle_gains_what_theory_says(pool, a, table):
    assert closed_form(a) == pytest.approx(table, abs=6e-4)
    # 20 pools of 10,000 prompts; their spread gives the standard error of the mean.
    ratios = [oracle_over_uniform(POOLS[pool](10_000, np.random.default_rng(s))) for s in range(20)]
    error = np.std(ratios, ddof=1) / math.sqrt(20)
    assert error < 2e-3
    assert abs(np.mean(ratios) - closed_form(a)) < 4 * error
    # In integers, with many rollouts to hand out, the same gain.
    cost_P = costs("mean", POOLS[pool](500, np.random.default_rng(0)), np.ones(500))
    best_P = oracle_budget("mean", cost_P, 500 * 400)
    even_P = np.full(500, 400)
    found = variance("mean", cost_P, best_P) / variance("mean", cost_P, even_P)
    real = np.sqrt(cost_P).sum() ** 2 / (500 * cost_P.sum())
    assert found == pytest.approx(real, abs=3e-3)


@pytest.mark.slow
def test_a_gradient_has_the_mean_and_the_variance_that_allocation_assumes():
    # No transfer: the prompts' own parameters hold the signal, the shared ones only noise.
    settings = replace(SMALL, transfer=0.0)
    policy = Policy("uniform", "static", 3, settings)
    index_P, budget_P = np.array([4, 0, 11, 30]), np.array([2, 4, 8, 3])
    prompt_N = np.repeat(np.arange(4), budget_P)
    rate_P, norm_P = policy.rate_D[index_P], policy.norm_D[index_P]
    generator = np.random.default_rng(0)
    own, noise = [], []
    for _ in range(6000):
        reward_N = (generator.random(17) < rate_P[prompt_N]).astype(float)
        kept = all_rows(Batch(reward_N, prompt_N, 4, 0.0, generator))
        gradient = policy.gradient(index_P, prompt_N, reward_N, kept.weight_K)
        own.append(gradient.own_D[index_P])
        noise.append(np.square(gradient.shared_M).sum())
        policy.advance(None)
    standard_error = np.std(own, axis=0) / math.sqrt(6000)
    # d p / d logit = p (1 - p), averaged over 4 prompts.
    assert (abs(np.mean(own, axis=0) - rate_P * (1 - rate_P) / 4) < 4 * standard_error).all()
    expected = settings.noise**2 / 16 * variance("mean", costs("mean", rate_P, norm_P), budget_P)
    assert abs(np.mean(noise) - expected) < 4 * np.std(noise) / math.sqrt(6000)


class TestTraces:
    def test_static_leaves_the_pass_rates_alone(self):
        simulation = Simulation(Arm("vade"), "skewed", "static", 1, SMALL)
        before_D = simulation.policy.rate_D.copy()
        figures = simulation.run()
        np.testing.assert_array_equal(simulation.policy.rate_D, before_D)
        assert figures["pass_rate"] == figures["pass_rate_start"] == before_D.mean()
        assert figures["rollouts_to_threshold"] is None

    def test_drifting_raises_every_logit_by_the_same(self):
        policy = Policy("uniform", "drifting", 1, SMALL)
        logit_D = np.log(policy.rate_D / (1 - policy.rate_D))
        for _ in range(10):
            policy.advance(None)
        moved_D = np.log(policy.rate_D / (1 - policy.rate_D))
        np.testing.assert_allclose(moved_D - logit_D, 0.2, rtol=1e-9)

    def test_a_walk_stays_inside_and_stays_uniform(self):
        settings = replace(SMALL, num_prompts=4000, walk=0.1)
        policy = Policy("uniform", "walk", 1, settings)
        start_D = policy.rate_D.copy()
        for _ in range(100):
            policy.advance(None)
            assert ((policy.rate_D >= 0) & (policy.rate_D <= 1)).all()
        assert abs(np.corrcoef(start_D, policy.rate_D)[0, 1]) < 4 / math.sqrt(4000)
        assert abs(policy.rate_D.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)

    def test_learning_learns_on_held_out_prompts_too_and_never_the_hopeless(self):
        simulation = Simulation(Arm(), "half_dead", "learning", 1, replace(SMALL, steps=100))
        held_out = simulation.policy.held_out_D.mean()
        figures = simulation.run()
        assert figures["pass_rate"] > figures["pass_rate_start"] + 0.05
        assert figures["held_out"] > held_out + 0.02
        assert (simulation.policy.rate_D[::2] == 0).all()

    def test_without_transfer_nothing_is_learnt_on_held_out_prompts(self):
        settings = replace(SMALL, steps=10, transfer=0.0)
        simulation = Simulation(Arm(), "uniform", "learning", 1, settings)
        before_D = simulation.policy.held_out_D.copy()
        simulation.run()
        np.testing.assert_allclose(simulation.policy.held_out_D, before_D, atol=1e-15)

    def test_the_unknown_is_refused(self):
        with pytest.raises(ValueError, match="one of static, drifting, walk, learning, got 'up'"):
            Policy("uniform", "up", 1, SMALL)


@pytest.mark.parametrize("pool", POOLS)
def test_pools_are_what_they_are_called(pool):
    rate_D = POOLS[pool](10_000, np.random.default_rng(0))
    assert ((rate_D >= 0) & (rate_D <= 1)).all()
    expected = {"half_dead": 0.25, "mostly_solved": 0.8 * 30 / 31 + 0.1}
    assert rate_D.mean() == pytest.approx(expected.get(pool, 0.5), abs=0.02)
    assert (rate_D == 0).mean() == (0.5 if pool == "half_dead" else 0)


ARMS = [
    "uniform",
    "refill",
    "vade/loo",
    "uniform/oracle",
    "uniform/em_gvm",
    "uniform/em_gvm_discard",
    "uniform/uniform/none/d3s",
    *(f"uniform/uniform/{name}" for name in STOPPINGS if name != "none"),
]


@pytest.mark.parametrize("arm", ARMS)
def test_every_rollout_is_accounted_for(arm):
    simulation = Simulation(Arm.parse(arm), "half_dead", "learning", 2, SMALL)
    figures = simulation.run()
    totals = simulation.ledger.totals
    assert totals["rollouts_drawn"] == simulation.drawn == figures["rollouts"]
    for unit in ("rollouts", "tokens"):
        fates = sum(totals[f"{unit}_{fate}"] for fate in ("trained", "filtered", "surplus"))
        assert totals[f"{unit}_drawn"] == fates
    wasted = sum(value for name, value in figures.items() if name.startswith("waste_"))
    assert figures["trained_share"] + wasted == pytest.approx(1)
    # All arms generate alike; a refill or a stopping rule may end within one more step.
    assert 0 <= figures["rollouts"] - 5 * 64 < 4 * 64
    if arm not in ("refill", *(a for a in ARMS if a.count("/") == 2)):
        assert figures["rollouts"] == 5 * 64


@pytest.mark.parametrize("arm", ["refill", "vade/loo_thompson"])
def test_a_run_is_a_function_of_its_seed(arm):
    assert small(arm) == small(arm)
    assert small(arm) != small(arm, seed=2)


def test_arms_meet_the_same_pool():
    policies = [Simulation(Arm(name), "skewed", "learning", 4, SMALL).policy for name in SELECTIONS]
    for policy in policies:
        np.testing.assert_array_equal(policy.rate_D, policies[0].rate_D)
        np.testing.assert_array_equal(policy.norm_D, policies[0].norm_D)


def test_the_oracle_is_never_beaten_and_the_posterior_is_between():
    settings = replace(SMALL, num_prompts=64, prompts_per_step=32, steps=20)
    oracle, posterior, even = (
        simulate(Arm.parse(name), pool="skewed", trace="static", seed=1, settings=settings)
        for name in ("uniform/oracle", "uniform/loo", "uniform")
    )
    assert even["variance_over_uniform"] == 1
    assert oracle["variance_over_oracle"] == pytest.approx(1, rel=1e-12)
    assert 1 < posterior["variance_over_oracle"] < even["variance_over_oracle"]


def test_a_refill_trains_on_mixed_groups_only():
    simulation = Simulation(Arm("refill"), "uniform", "learning", 1, SMALL)
    simulation.run()
    totals = simulation.ledger.totals
    assert totals["rollouts_filtered_down_sampled"] == 0
    assert totals["rollouts_trained"] == 8 * 8 * totals["updates"]


@pytest.mark.parametrize(
    "arm", ["refill", "refill/uniform/early", "refill/em_gvm", "refill/em_gvm_both"]
)
def test_a_refill_sees_every_round_of_its_groups(arm, monkeypatch):
    shares = []
    end = trace.Refill.end

    def counted(refill, **more):
        filled = end(refill, **more)
        shares.append(refill.metrics()["refill/rollouts_drawn"])
        assert all(
            group.kept == (0 < group.reward_sum < group.rollouts) for group in filled.accepted
        )
        return filled

    monkeypatch.setattr(trace.Refill, "end", counted)
    simulation = Simulation(Arm.parse(arm), "half_dead", "learning", 1, SMALL)
    simulation.run()
    totals = simulation.ledger.totals
    assert sum(shares) == totals["rollouts_drawn"] == simulation.drawn
    metrics = simulation.refill.metrics()
    assert metrics["refill_total/rollouts_drawn"] == totals["rollouts_drawn"]
    assert metrics["refill_total/tokens_drawn"] == totals["tokens_drawn"]


def test_lots_undo_what_stopping_does_to_the_gradient():
    # 40,000 groups of p = .9, Beta(1, 1): 4 alike have P(mixed) = 4/9 and are condemned.
    size, p, generator = 40_000, 0.9, np.random.default_rng(0)
    right_PS = (generator.random((size, 8)) < p).astype(float)
    prompt_N = np.repeat(np.arange(size), 8)
    chance_P = generator.random(size)
    once_P = np.ones(size)
    bias = {}
    for name in ("early_alike", "early_unbiased"):
        rule = STOPPINGS[name].rule
        four = right_PS[:, :4].sum(axis=1)
        answer = rule(Counts.of(once_P, once_P, four, 4, 4, chance_P))
        goes_on_P, weight_P = answer if isinstance(answer, tuple) else (answer, once_P)
        alike_P = (four == 0) | (four == 4)
        assert goes_on_P[~alike_P].all()
        assert goes_on_P[alike_P].mean() == pytest.approx(
            0.5 * (name == "early_unbiased"), abs=0.02
        )
        advantage_PS = leave_one_out(right_PS.ravel(), prompt_N).reshape(size, 8)
        # A stopped group has leave-one-out gradient 0: its rollouts are all alike.
        gradient_P = goes_on_P * (advantage_PS * (right_PS - p)).mean(axis=1)
        gradient_P = gradient_P * weight_P
        error = gradient_P.std() / math.sqrt(size)
        bias[name] = (gradient_P.mean() - p * (1 - p)) / error
    assert abs(bias["early_unbiased"]) < 4
    assert bias["early_alike"] < -8


@pytest.mark.parametrize("name", ["early", "early_alike", "early_unbiased"])
def test_stopping_generates_fewer_rollouts_per_update(name):
    assert small(f"uniform/uniform/{name}", pool="half_dead")["updates"] > 5


def test_excess_nats_by_hand():
    # Beta(1, 1) gives 4 of 8 the probability 1/9; the truth, at 1/2, gives C(8, 4) / 256.
    one = (np.array([1.0]), np.array([1.0]), np.array([0.5]), np.array([4]), np.array([8]))
    assert excess_log_loss(*one) == pytest.approx(math.log(70 / 256 * 9))
    # A posterior that is sure of the truth predicts as well; the hopeless prompt has p = 0.
    sure = (np.array([3e6]), np.array([7e6]), np.array([0.3]), np.array([2]), np.array([8]))
    assert excess_log_loss(*sure) == pytest.approx(0, abs=1e-5)
    dead = (np.array([1.0]), np.array([9.0]), np.array([0.0]), np.array([0]), np.array([1]))
    assert excess_log_loss(*dead) == pytest.approx(math.log(10 / 9))


def test_recipes_are_arms_that_can_be():
    assert all(Arm.parse(str(arm)) == arm and arm.is_possible for arm in RECIPES.values())
    figures = small(str(RECIPES["everything"]), pool="half_dead")
    assert figures["rollouts"] > 0 and figures["waste_down_sampled"] == 0


def test_names_of_arms():
    for arm in [*mandatory_arms(), *cross_arms()]:
        assert Arm.parse(str(arm)) == arm
        assert arm.is_possible
        assert reference(arm).is_possible
    assert str(Arm(rows="d3s")) == "uniform/uniform/none/d3s"
    assert str(Arm("vade")) == "vade"
    assert len(set(mandatory_arms())) == len(mandatory_arms())
    covered = list(zip(*mandatory_arms(), strict=True))
    tables = (SELECTIONS, ALLOCATIONS, STOPPINGS, DOWNSAMPLERS)
    for used, table in zip(covered, tables, strict=True):
        assert set(used) == set(table)
    with pytest.raises(ValueError, match="'pod' in arm 'vade/loo/none/pod' is none of all, grpo"):
        Arm.parse("vade/loo/none/pod")
    with pytest.raises(ValueError, match="EM has its own rows"):
        Arm.parse("uniform/em_gvm/none/pods")


@pytest.mark.parametrize("arm", mandatory_arms(), ids=str)
def test_every_arm_runs(arm):
    settings = replace(SMALL, steps=2)
    figures = simulate(arm, pool="half_dead", trace="learning", seed=1, settings=settings)
    assert all(value is None or math.isfinite(value) for value in figures.values())


def result(arm, seed, **figures):
    plain = small("uniform", settings=replace(SMALL, steps=1))
    return {
        "pool": "uniform", "trace": "learning", "arm": arm, "seed": seed,
        "figures": plain | figures,
    }  # fmt: skip


def test_differences_are_paired_by_seed():
    results = [
        result("uniform", 1, pass_rate=0.5, rollouts_to_threshold=100.0),
        result("uniform", 2, pass_rate=0.7, rollouts_to_threshold=300.0),
        result("vade", 1, pass_rate=0.6, rollouts_to_threshold=50.0),
        result("vade", 2, pass_rate=0.9, rollouts_to_threshold=None),
    ]
    row = summarise(results)[1]
    assert row["arm"] == "vade"
    # Differences .1 and .2: mean .15, standard error .1 / sqrt(2) / sqrt(2) = .05.
    assert row["pass_rate_minus_uniform"]["mean"] == pytest.approx(0.15)
    assert row["pass_rate_minus_uniform"]["se"] == pytest.approx(0.05)
    assert row["rollouts_over_uniform"]["mean"] == 0.5
    assert row["rollouts_over_uniform"]["seeds"] == 1
    assert row["rollouts_to_threshold"]["seeds"] == 1


@pytest.mark.slow
def test_the_program_writes_a_table_a_picture_and_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "trace.json"
    arguments = ["--quick", "--steps", "2", "--seeds", "2", "--arms", "vade", "uniform/em_gvm"]
    monkeypatch.setattr("sys.argv", ["trace.py", *arguments, "--output", str(output)])
    trace.main()
    document = json.loads(output.read_text())
    arms = {row["arm"] for row in document["summary"]}
    assert arms == {"uniform", "vade", "uniform/em_uniform", "uniform/em_gvm"}
    assert document["settings"]["steps"] == 2
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "learning trace, half_dead pool" in capsys.readouterr().out
    assert set(TRACES) == {"static", "drifting", "walk", "learning"}
