"""The update in the trainer: every loss, the KL, the engine's mismatch, micro-batches of any cut."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from rl.config.methods import LOSSES
from rl.objective import hapo
from rl.objective.token_selection import top_tokens
from rl.policies.contract import ScoredDecisions
from rl.step import mini_batches
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs


def settings(**changes):
    return {
        "reward": tiny.small_digit,
        "trainer": "grpo",
        "advantage": "leave_one_out",
        "allocator": "uniform",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    } | changes


def of_loss(name):
    return {"advantage": "raft", "objective": "em"} if name in ("raft", "raft_pp") else {}


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_by_rows_or_tokens_and_fused_heads_give_one_update(tmp_path, loss):
    common = settings(
        loss=loss,
        max_steps=1,
        prompts_per_step=4,
        rollouts_per_prompt=5,
        updates_per_step=2,
        num_iterations=2,
        **of_loss(loss),
    )
    cuts = [
        {"per_device_train_batch_size": 20},
        {"micro_batch_tokens": 64, "fused_logprobs": True},
    ]
    if loss == "dapo":
        cuts += [{"per_device_train_batch_size": 3}, {"micro_batch_tokens": 20}]
    runs = [
        tiny.run(tmp_path / str(i), model=tiny.model(dtype=torch.float64), **(common | cut))
        for i, cut in enumerate(cuts)
    ]
    start, expected = tiny.model(dtype=torch.float64).state_dict(), tiny.parameters(runs[0])
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in start)
    for run in runs[1:]:
        weights = tiny.parameters(run)
        for name in expected:
            assert torch.allclose(weights[name], expected[name], atol=1e-9), name
    assert runs[0].ledger.totals["updates"] == 2 * 2


def scored(made):
    """One collected and prepared step of a trainer, and its log-probabilities before the update."""
    batch = tiny.prepare(made, tiny.collect(made, version=0))
    rows = batch.rollouts
    return batch, made.policy.scorer.logprobs(made.model, rows) if len(rows) else None


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_weighted"])
def test_the_kl_is_to_the_policy_before_training_and_a_mean_over_what_trains(tmp_path, kl):
    made = tiny.trainer(tmp_path, **settings(beta=0.3, kl=kl))
    batch, _ = scored(made)
    rows = batch.rollouts
    # Before any update the policy is its own reference.
    assert torch.allclose(rows.reference_logprob_NT, rows.logprob_NT, atol=1e-5)

    with torch.no_grad():
        for weight in made.model.parameters():
            weight.add_(
                0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    made.ledger.end()
    batch, logprob_NT = scored(made)
    rows = batch.rollouts
    d_NT = logprob_NT - rows.reference_logprob_NT
    assert d_NT.abs().max() > 0.01
    ratio_NT = (logprob_NT - rows.logprob_NT).exp()
    k_NT = {
        "k2": d_NT**2 / 2,
        "k3": (-d_NT).exp() - 1 + d_NT,
        "k3_weighted": ratio_NT * ((-d_NT).exp() - 1 + d_NT),
    }[kl]
    plain = replace(made.objective, kl_function=None)
    score = ScoredDecisions(logprob_NT=logprob_NT)
    with_kl, statistics = made.objective.loss(batch, rows, score, share=1)
    without, _ = plain.loss(batch, rows, score, share=1)
    # Its own denominator: rows without a signal count in the loss's, and not here.
    assert float(rows.weight_NT.sum()) < 0.9 * batch.denominator
    expected = 0.3 * (rows.weight_NT * k_NT).sum() / rows.weight_NT.sum()
    assert float((with_kl - without).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(statistics["kl_tokens"]) == int(rows.mask_NT.sum())


@pytest.mark.parametrize("share", [1, 3])
def test_of_several_updates_each_divides_loss_and_kl_and_bonus_by_its_share(tmp_path, share):
    """Three updates have a third of the rows each, so that each divides by a third of the sums."""
    changes = {"beta": 0.3, "kl": "k2", "entropy_coef": 0.2}
    made = tiny.trainer(tmp_path, model=tiny.model(dtype=torch.float64), **settings(**changes))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the reference
        for weight in made.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype))
    batch = tiny.prepare(made, tiny.collect(made))
    rows = replace(batch.rollouts, advantage_N=torch.ones_like(batch.rollouts.advantage_N))
    score = made.policy.score(made.model, rows, entropy=True)
    whole, _ = made.objective.loss(batch, rows, score, share=share)
    only_loss = replace(made.objective, kl_function=None)
    loss, _ = only_loss.loss(batch, rows, replace(score, entropy_NT=None), share=share)
    # At ratio 1 the surrogate is minus the weighted advantage; the engine records float32.
    surrogate = float(rows.weight_NT.sum()) / batch.denominator
    assert loss.item() == pytest.approx(-share * surrogate, rel=1e-6) and surrogate > 0.3
    kl_NT = (score.logprob_NT - rows.reference_logprob_NT) ** 2 / 2
    kl_weight_NT = rows.weight_NT if rows.kl_weight_NT is None else rows.kl_weight_NT
    kl = 0.3 * (kl_weight_NT * kl_NT).sum() / batch.kl_denominator
    bonus = 0.2 * score.entropy_NT[rows.bonus_NT].sum() / batch.bonus_denominator
    expected = share * float((kl - bonus).detach())
    assert float((whole - loss).detach()) == pytest.approx(expected, rel=1e-6)
    assert float(kl.detach()) > 1e-3 and float(bonus.detach()) > 1e-3


def test_the_kl_lowers_rewards_and_not_what_the_planner_learns(tmp_path):
    made = tiny.trainer(tmp_path, **settings(reward_kl=0.5))
    plain = tiny.trainer(tmp_path, **settings())
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight, other in zip(made.model.parameters(), plain.model.parameters(), strict=True):
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise))
            other.copy_(weight)
    lowered, batch = (tiny.collect(t, version=0) for t in (made, plain))
    drawn = batch.visits[0].rounds[0].rollouts
    reference_NT = made.policy.scorer.logprobs(tiny.model(), drawn).detach()
    cost_N = (drawn.logprob_NT - reference_NT).sum(1)
    expected = drawn.reward_N - 0.5 * cost_N
    by_seed = dict(zip(drawn.seed_N.tolist(), expected.tolist(), strict=True))
    rows = lowered.rollouts
    assert len(rows) == len(drawn)  # no group is constant any more
    assert rows.reward_N.tolist() == pytest.approx(
        [by_seed[s] for s in rows.seed_N.tolist()], abs=1e-4
    )
    ours, theirs = made.planner.posterior.state_dict(), plain.planner.posterior.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in ("alpha_D", "beta_D"))


def test_an_adapter_switched_off_is_the_reference(tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    made = tiny.trainer(tmp_path, peft_config=adapter, **settings(beta=0.1))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=noise)
    batch, _ = scored(made)
    rows = batch.rollouts
    assert (rows.reference_logprob_NT - rows.logprob_NT).abs().max() > 1e-3
    plain = made.policy.scorer.logprobs(tiny.model(), rows)
    assert torch.allclose(rows.reference_logprob_NT, plain, atol=1e-5)


def test_an_adapter_that_changes_the_model_already_is_no_reference(tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match=r"lora_B.* is not 0: .*Merge them"):
        tiny.trainer(tmp_path, peft_config=adapter, **settings(beta=0.1))
    tiny.trainer(tmp_path, peft_config=adapter, **settings())  # without a KL it may


def test_a_resumed_run_keeps_the_reference_of_its_start(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    common = settings(beta=0.2, max_steps=4, save_strategy="steps", save_steps=2)
    whole = tiny.run(tmp_path / "whole", **common)
    tiny.run(tmp_path / "cut", callbacks=[Stop()], **common)
    resumed = tiny.run(tmp_path / "cut", resume=True, **common)
    weights, expected = tiny.parameters(resumed), tiny.parameters(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    kl = [log["kl"] for log in tiny.step_logs(tmp_path / "whole")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4


class Mismatched:
    """An engine whose recorded log-probabilities are off by a known amount."""

    def __init__(self, engine, offset):
        self.engine, self.offset = engine, offset

    def load_weights(self, model):
        self.engine.load_weights(model)

    def generate(self, *args, **kwargs):
        rollouts = self.engine.generate(*args, **kwargs)
        logprob_NT = torch.where(rollouts.mask_NT, rollouts.logprob_NT - self.offset, 0.0)
        return replace(rollouts, logprob_NT=logprob_NT)


@pytest.mark.parametrize(
    ("correction", "cap", "floor", "factor"),
    [
        ("token_truncate", 2.0, None, 1.5),
        ("token_truncate", 1.2, None, 1.2),
        ("token_mask", 1.2, None, 0.0),
        ("token_mask", 2.0, 0.9, 1.5),
    ],
)
def test_the_engines_mismatch_is_weighed_in(tmp_path, correction, cap, floor, factor):
    offset = float(torch.tensor(1.5).log())
    changes = {
        "importance_correction": correction,
        "importance_cap": cap,
        "importance_floor": floor,
    }
    made = tiny.trainer(tmp_path, **settings(**changes))
    plain = tiny.trainer(tmp_path, **settings())
    made.policy.engine = Mismatched(made.policy.engine, offset)
    (batch, logprob_NT), (expected, _) = scored(made), scored(plain)
    if factor == 0:
        assert not len(batch.rollouts)
        return
    weight_NT, plain_NT = batch.rollouts.weight_NT, expected.rollouts.weight_NT
    assert torch.allclose(weight_NT, factor * plain_NT, rtol=1e-4)
    assert batch.denominator == expected.denominator
    assert torch.allclose(batch.rollouts.old_logprob_NT, logprob_NT, atol=1e-5)
    assert batch.metrics["importance/ratio_mean"] == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("rows", ["trained", "all"])
def test_the_kl_covers_the_rows_that_it_is_told_to(tmp_path, rows):
    changes = {"beta": 0.3, "kl": "k3", "kl_rows": rows}
    made = tiny.trainer(tmp_path, model=tiny.model(dtype=torch.float64), **settings(**changes))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the reference
        for weight in made.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype))
    collected = tiny.collect(made, version=0)
    batch = tiny.prepare(made, collected)
    drawn = collected.visits[0].rounds[0].rollouts
    silent = len(drawn) - int((made.objective.advantage(drawn, []) != 0).sum())
    assert silent > 0 and len(batch.rollouts) == len(drawn) - silent * (rows == "trained")
    logprob_NT = made.policy.scorer.logprobs(made.model, batch.rollouts)
    plain = replace(batch.rollouts, reference_logprob_NT=logprob_NT.detach())
    score = ScoredDecisions(logprob_NT=logprob_NT)
    kl = made.objective.loss(batch, batch.rollouts, score, share=1)[0]
    kl = kl - made.objective.loss(batch, plain, score, share=1)[0]
    # TRL's mean over rows of the mean over their tokens.
    d_NT = logprob_NT - batch.rollouts.reference_logprob_NT
    k3_NT = ((-d_NT).exp() - 1 + d_NT) * batch.rollouts.mask_NT
    of_rows = k3_NT.sum(1) / batch.rollouts.length_N
    assert kl.item() == pytest.approx(0.3 * of_rows.mean().item(), rel=1e-6)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_the_kl_does_not_go_by_the_engines_mismatch(tmp_path, correction):
    """As in TRL, which adds it after the correction: the KL is of two policies, whoever drew."""
    changes = {"beta": 0.3, "importance_cap": 1.2}
    made = tiny.trainer(tmp_path, **settings(importance_correction=correction, **changes))
    plain = tiny.trainer(tmp_path, **settings(beta=0.3))
    made.policy.engine = Mismatched(made.policy.engine, float(torch.tensor(1.5).log()))
    (batch, _), (expected, _) = scored(made), scored(plain)
    assert torch.equal(batch.rollouts.kl_weight_NT, expected.rollouts.weight_NT)
    assert batch.kl_denominator == expected.kl_denominator
    factors = batch.rollouts.weight_NT.sum() / expected.rollouts.weight_NT.sum()
    assert factors == pytest.approx(1.2 if correction == "token_truncate" else 0.0, abs=1e-4)


@pytest.mark.parametrize("scope", ["batch", "response"])
@pytest.mark.parametrize("selection", ["d3s", "entropy"])
def test_only_the_chosen_tokens_train_and_are_counted_as_trained(tmp_path, selection, scope):
    common = {"token_selection": selection, "token_scope": scope, "length_weight": "token_mean"}
    made = tiny.trainer(tmp_path, **settings(token_fraction_initial=0.3, **common))
    collected = tiny.collect(made, version=0)
    batch = tiny.prepare(made, collected)
    rows = batch.rollouts
    statistics = made.policy.scorer.statistics(made.model, collected.rollouts)
    score_NT = statistics.entropy_NT * collected.rollouts.mask_NT
    if selection == "d3s":
        score_NT = score_NT * collected.rollouts.advantage_N.abs()[:, None]
    of_row = {seed: row for row, seed in enumerate(collected.rollouts.seed_N.tolist())}
    kept_NT = torch.zeros_like(collected.rollouts.mask_NT)
    for row, seed in zip(rows.weight_NT, rows.seed_N.tolist(), strict=True):
        kept_NT[of_row[seed]] = row != 0
    total = int(collected.rollouts.mask_NT.sum())
    if scope == "batch":
        assert kept_NT.sum() == -(-3 * total // 10)
        left_NT = collected.rollouts.mask_NT & ~kept_NT
        assert score_NT[kept_NT].min() >= score_NT[left_NT].max() - 1e-6
    else:
        lengths = collected.rollouts.length_N
        assert kept_NT.sum(1).tolist() == [-(-3 * n // 10) for n in lengths.tolist()]
    assert made.ledger.totals["tokens_trained"] == int(kept_NT.sum())
    made.ledger.end()
    # The denominator falls as the weight does; before, it was that of all tokens of the step.
    before = float((collected.weight_K * collected.rollouts.length_N).sum())
    share = float(rows.weight_NT.sum()) / before
    assert batch.denominator == pytest.approx(collected.denominator * share)


def test_tokens_go_by_their_own_advantages_where_they_have_them(tmp_path):
    changes = {
        "advantage": "batch_whitened_tokens",
        "reward_kl": 0.1,
        "length_weight": "token_mean",
    }
    made = tiny.trainer(
        tmp_path, **settings(token_selection="d3s", token_fraction_initial=0.3, **changes)
    )
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the reference, so that credit differs along a row
        for weight in made.model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=noise))
    collected = tiny.collect(made, version=0)
    rows = tiny.prepare(made, collected).rollouts
    entropy_NT = made.policy.scorer.statistics(made.model, collected.rollouts).entropy_NT
    mask_NT, advantage_NT = collected.rollouts.mask_NT, collected.rollouts.advantage_NT
    expected_NT = top_tokens(advantage_NT, entropy_NT, mask_NT, fraction=0.3)
    by_row_NT = top_tokens(collected.rollouts.advantage_N, entropy_NT, mask_NT, fraction=0.3)
    assert not torch.equal(expected_NT, by_row_NT)
    kept = dict(zip(rows.seed_N.tolist(), (rows.weight_NT != 0), strict=True))
    none_T = torch.zeros(mask_NT.shape[1], dtype=torch.bool)
    kept_NT = torch.stack([kept.get(seed, none_T) for seed in collected.rollouts.seed_N.tolist()])
    assert torch.equal(kept_NT, expected_NT)


class Labelled:
    """An engine whose rollouts come with strata, as those of a search agent do."""

    def __init__(self, engine, label):
        self.engine, self.label = engine, label

    def generate(self, *args, **kwargs):
        rollouts = self.engine.generate(*args, **kwargs)
        return replace(rollouts, stratum_N=self.label(rollouts))

    def __getattr__(self, name):
        return getattr(self.engine, name)


def test_one_stratum_is_grpo_and_more_are_not(tmp_path):
    labels = {
        "none": None,
        "constant": lambda rollouts: torch.full_like(rollouts.prompt_N, 7),
        "lengths": lambda rollouts: rollouts.length_N % 2,
    }
    weights = {}
    for name, label in labels.items():
        made = tiny.trainer(tmp_path / name, **settings(advantage="stratified", max_steps=1))
        if label is not None:
            made.policy.engine = Labelled(made.policy.engine, label)
        made.train()
        weights[name] = tiny.parameters(made)
    grpo = tiny.parameters(tiny.run(tmp_path / "grpo", **settings(advantage="grpo", max_steps=1)))
    same = {
        name: all(torch.equal(found[key], grpo[key]) for key in grpo)
        for name, found in weights.items()
    }
    assert same == {"none": True, "constant": True, "lengths": False}


def test_all_tokens_and_all_rows_give_the_plain_update(tmp_path):
    plain = tiny.run(tmp_path / "plain", **settings(max_steps=1))
    whole = {"row_fraction_initial": 1.0, "token_fraction_initial": 1.0}
    d3s = settings(max_steps=1, down_sampling="d3s", token_selection="d3s", **whole)
    other = tiny.run(tmp_path / "d3s", **d3s)
    weights, expected = tiny.parameters(other), tiny.parameters(plain)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_tokens_are_drawn_around_the_pivot_of_the_step_before(tmp_path):
    made = tiny.trainer(tmp_path, **settings(loss="hapo", adaptive_temperature_tau=0.2))
    seen = []

    class Look(Mismatched):
        def generate(self, *args, params, **kwargs):
            seen.append(params.adaptive_temperature)
            return self.engine.generate(*args, params=params, **kwargs)

    made.policy.engine = Look(made.policy.engine, 0.0)
    pivots = []
    for step in range(3):
        batch = tiny.prepare(made, tiny.collect(made, version=step))
        made.ledger.end()
        rows = batch.rollouts
        pivots.append(made.policy.pivot)
        assert pivots[-1] == hapo.pivot(rows.entropy_NT, rows.mask_NT)
        expected = hapo.heterogeneity(rows.entropy_NT, rows.mask_NT, pivots[-1])
        assert torch.equal(rows.heterogeneity_NT, expected)
    assert seen[0] is None
    assert seen[1:] == [pivot.adaptive_temperature(0.2) for pivot in pivots[:2]]


def test_what_ratios_compare_with_may_be_recomputed(tmp_path):
    made = tiny.trainer(tmp_path, **settings(old_logprobs="trainer"))
    made.policy.engine = Mismatched(made.policy.engine, 0.5)
    batch, logprob_NT = scored(made)
    score = ScoredDecisions(logprob_NT=logprob_NT)
    _, statistics = made.objective.loss(batch, batch.rollouts, score, share=1)
    assert float(statistics["ratio"] / statistics["tokens"]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("updates", "iterations"), [(1, 1), (3, 1), (2, 3)])
def test_every_row_is_trained_on_once_an_iteration(tmp_path, updates, iterations):
    made = tiny.trainer(tmp_path, **settings(updates_per_step=updates, num_iterations=iterations))
    batch = tiny.collect(made, version=0)
    parts = mini_batches(batch, made.objective)
    assert len(parts) == updates * iterations
    rows = torch.cat(parts).bincount(minlength=len(batch.rollouts))
    assert (rows == iterations).all()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_adapter_is_drawn_by_the_seed_of_the_run(tmp_path):
    from peft import LoraConfig

    drawn = []
    for place, (before, seed) in enumerate([(0, 3), (1, 3), (0, 4)]):
        policy = tiny.model()
        torch.manual_seed(before)
        adapter = LoraConfig(r=2, target_modules=["q_proj"])
        made = tiny.trainer(
            tmp_path / str(place), model=policy, peft_config=adapter, **settings(seed=seed)
        )
        weights = {k: v for k, v in made.model.state_dict().items() if "lora_A" in k}
        drawn.append(torch.cat([weight.flatten() for weight in weights.values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


ENTROPY = {"entropy_coef": 0.3, "top_entropy_quantile": 0.4, "beta": 0.1}


@pytest.mark.parametrize(
    "changes",
    [{"entropy_coef": 0.3}, {"top_entropy_quantile": 0.4, "beta": 0.1}, ENTROPY],
    ids=["bonus", "quantile and KL", "all"],
)
def test_the_loss_with_entropies_is_that_of_autograd_over_every_row_of_the_step(tmp_path, changes):
    made = tiny.trainer(tmp_path, model=tiny.model(dtype=torch.float64), **settings(**changes))
    collected = tiny.collect(made, version=0)
    everything = collected.rollouts
    # Groups without signal stay where entropies count.
    assert len(everything) == 36 and (everything.advantage_N == 0).any()
    batch = tiny.prepare(made, collected)
    found = made.policy.score(made.model, batch.rollouts, entropy="entropy_coef" in changes)
    loss, _ = made.objective.loss(batch, batch.rollouts, found, share=1)
    parameters = list(made.model.parameters())
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)

    both = made.policy.scorer.statistics(made.model, everything, differentiable=True)
    mask_NT = everything.mask_NT
    share = changes.get("top_entropy_quantile", 1.0)
    threshold = torch.quantile(both.entropy_NT[mask_NT].detach(), 1 - share)
    kept_NT = mask_NT & (both.entropy_NT >= threshold)
    ratio_NT = (both.logprob_NT - both.logprob_NT.detach()).exp()
    row_NT = mask_NT / mask_NT.sum(1, keepdim=True) / 36
    policy = (row_NT * kept_NT * everything.advantage_N[:, None] * ratio_NT).sum()
    bonus = both.entropy_NT[kept_NT].mean()
    # The policy is its own reference, so the KL has no gradient yet.
    expected = -policy - changes.get("entropy_coef", 0.0) * bonus
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        # The engine records float32, so that ratios start at 1 up to 1e-7.
        torch.testing.assert_close(one, other, atol=3e-8, rtol=0)
    assert max(float(g.abs().max()) for g in ours) > 1e-3


def test_micro_batches_add_up_with_entropies_too(tmp_path):
    common = settings(max_steps=2, updates_per_step=2, **ENTROPY)
    cuts = [
        {"per_device_train_batch_size": 40},
        {"per_device_train_batch_size": 5},
        {"micro_batch_tokens": 64, "fused_logprobs": True},
    ]
    runs = [
        tiny.run(tmp_path / str(i), model=tiny.model(dtype=torch.float64), **(common | cut))
        for i, cut in enumerate(cuts)
    ]
    expected = tiny.parameters(runs[0])
    for run in runs[1:]:
        for name, value in tiny.parameters(run).items():
            assert torch.allclose(value, expected[name], atol=1e-9), name
    log = tiny.step_logs(tmp_path / "0")[0]
    assert log["entropy"] > 0.1 and log["select/token_share"] < 0.6


def test_the_entropy_rises_under_a_bonus_and_falls_under_a_penalty(tmp_path):
    def last(coefficient):
        folder = tmp_path / str(coefficient)
        tiny.run(folder, **settings(entropy_coef=coefficient, max_steps=6, reward=tiny.one_prompt))
        return tiny.step_logs(folder)[-1]["entropy"]

    assert last(1.0) > last(-1.0) + 0.1


def test_a_reference_that_follows_is_trls_mixture_and_survives_a_resume(tmp_path):
    common = settings(
        beta=0.3, sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=2
    )
    common |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "seed": 5}
    start, seen = tiny.model().state_dict(), {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            seen[state.global_step] = {n: w.detach().clone() for n, w in model.named_parameters()}

    made = tiny.run(tmp_path / "whole", callbacks=[Watch()], **common)
    reference = dict(made.policy.reference._whole().named_parameters())
    for name, value in reference.items():
        once = 0.6 * seen[2][name] + 0.4 * start[name]
        torch.testing.assert_close(value, 0.6 * seen[4][name] + 0.4 * once, atol=1e-6, rtol=0)
    assert any((value - start[name]).abs().max() > 1e-4 for name, value in reference.items())

    folder = tmp_path / "whole" / "checkpoint-3"
    assert (folder / "reference.safetensors").is_file()
    again = tiny.run(tmp_path / "whole", resume=str(folder), **common)
    for name, value in again.policy.reference._whole().named_parameters():
        assert torch.equal(value, reference[name]), name
    for name, value in tiny.parameters(again).items():
        assert torch.equal(value, tiny.parameters(made)[name]), name


def test_a_reference_that_cannot_follow_is_refused_before_the_first_rollout(tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="sync_ref_model moves the policy.*there is no KL"):
        tiny.config(tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match="ref_model_mixup_alpha must be above 0 and at most 1"):
        tiny.config(tmp_path, ref_model_mixup_alpha=1.5)
    adapter = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="that of an adapter is the model without it"):
        tiny.trainer(tmp_path, peft_config=adapter, **settings(beta=0.1, sync_ref_model=True))
