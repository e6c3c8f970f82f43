"""The stages of the line that diffusion models have of their own: scores, credits, cuts, rewards."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from rl import advantages, branch_advantages
from rl.denoising import (
    DENOISING,
    DenoisingScorer,
    advantage_of,
    cut,
    decisions_of,
    down_sample_of,
    image_prompt_maker,
    kl_of,
    load_denoiser,
    load_image_rewards,
    loss_of,
    make_denoising_planner,
    reward_of,
    validations_of,
)
from rl.prompt_history import PromptHistory
from rl.weigh import has_signal, with_credit
from rollouts.image_rewards import brightness, contrast
from rollouts.rewards import RewardError
from tests import tiny_denoising as tiny
from tests.tiny_pipelines import add_tiny_text_encoder, add_tiny_vae, image_prompts, tiny_sd

torch.set_num_threads(1)

LORA = dict(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], lora_dropout=0.1)


def config(**settings):
    return tiny.config("unused", **settings)


def drawn(around=None, *, budgets=(6, 3), plan=None, dtype=torch.float64):
    """An engine, and rollouts of prompt 0 from two roots and of prompt 1 from one, as `BRANCHED`."""
    engine = tiny.engine(around or tiny.pipeline(dtype=dtype))
    plan = plan or config().step_plan(0)
    prompts = image_prompts(len(budgets))
    return engine, engine.generate(prompts, list(budgets), seeds_N=range(sum(budgets)), params=plan)


def weighed(rollouts, *, seed=0):
    """Weights on trained edges, different for all, of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    weight_NT = torch.rand(rollouts.mask_NT.shape, generator=generator, dtype=torch.float64) + 0.5
    weight_NT[:, [e for e in range(weight_NT.shape[1]) if e not in rollouts.tree.plan.trained]] = 0
    weight_NT[torch.rand(weight_NT.shape, generator=generator) < 0.2] = 0
    return replace(rollouts, weight_NT=weight_NT)


def adapted(*, moved=0.0, dtype=torch.float64):
    """A pipeline whose denoiser has an adapter, at 0 as peft makes it or `moved` from there."""
    around = tiny.pipeline(dtype=dtype)
    torch.manual_seed(1)
    model, _ = load_denoiser(around, None, LoraConfig(**LORA))
    model.to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(moved * torch.randn_like(weight))
    return around, model


# Scores


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_before_any_update_scores_are_those_recorded(beta):
    around, model = adapted(dtype=torch.float32)
    engine, rollouts = drawn(around)
    rollouts = replace(rollouts, weight_NT=rollouts.mask_NT.double())
    logprob_NT = DenoisingScorer(engine, beta=beta).logprobs(model, rollouts)
    assert logprob_NT.dtype == torch.float64 and logprob_NT.requires_grad
    assert torch.equal(logprob_NT.detach(), rollouts.logprob_NT)  # all rows, so in the same batches


def test_a_fresh_adapter_has_no_kl_and_a_moved_one_that_of_its_gaussians():
    around, model = adapted()
    engine, rollouts = drawn(around)
    rollouts = weighed(rollouts)
    scorer = DenoisingScorer(engine, beta=0.1)
    scorer.logprobs(model, rollouts)
    assert (scorer.kl_NT == 0).all()

    around, model = adapted(moved=0.5)
    engine, rollouts = drawn(around)
    rollouts = weighed(rollouts)
    scorer = DenoisingScorer(engine, beta=0.1)
    logprob_NT = scorer.logprobs(model, rollouts)
    expected_NT = torch.zeros_like(logprob_NT)
    for n, t in (rollouts.weight_NT != 0).nonzero().tolist():
        row = rollouts.take(torch.tensor([n]))
        mean, std = engine.replay(row, step=t)
        reference, _ = engine.replay(row, step=t, reference=True)
        # sum |mean - mean_ref|^2 / (2 std^2)
        expected_NT[n, t] = (mean - reference).detach().square().sum() / (2 * std.item() ** 2)
    torch.testing.assert_close(scorer.kl_NT.detach(), expected_NT, rtol=1e-9, atol=0)
    assert scorer.kl_NT.max() > 1e-3
    # Of the scores of either way, no digit but the last differs.
    plain_NT = DenoisingScorer(engine).logprobs(model, rollouts)
    torch.testing.assert_close(logprob_NT, plain_NT, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_kl_reaches_the_adapter_and_nothing_else():
    around, model = adapted(moved=0.5)
    engine, rollouts = drawn(around)
    rollouts = weighed(rollouts)
    scorer = DenoisingScorer(engine, beta=0.1)
    kl = kl_of(config(beta=0.1), scorer)
    value, sums = kl(scorer.logprobs(model, rollouts), rollouts, denominator=7.0)
    weight_NT, kl_NT = rollouts.weight_NT, scorer.kl_NT.detach()
    expected = float((weight_NT * kl_NT).sum()) / 7
    assert value.item() == pytest.approx(expected, rel=1e-12) and expected > 1e-3
    # Statistics are not weighted.
    assert float(sums["kl_k3"]) == pytest.approx(float(kl_NT[weight_NT != 0].sum()))
    assert int(sums["kl_tokens"]) == int((weight_NT != 0).sum())
    value.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == ("lora" in name), name
    assert any(float(w.grad.abs().max()) > 1e-6 for w in model.parameters() if w.grad is not None)
    assert kl_of(config(beta=0.0), scorer) is None


def test_edges_without_weight_cost_nothing_and_score_0():
    around, model = adapted()
    engine, rollouts = drawn(around)
    weight_NT = torch.zeros(9, 4, dtype=torch.float64)
    weight_NT[:4, 1] = 1.0  # before the split: two roots
    weight_NT[3, 2] = 1.0
    rollouts = replace(rollouts, weight_NT=weight_NT)
    for beta, times in ((0.0, 1), (0.1, 2)):
        before = engine.replay_evaluations
        scorer = DenoisingScorer(engine, beta=beta)
        logprob_NT = scorer.logprobs(model, rollouts)
        assert engine.replay_evaluations - before == 3 * times
        assert ((logprob_NT != 0) == (weight_NT != 0)).all()
        assert scorer.elements == 64


def test_entropies_are_not_recomputed():
    engine, rollouts = drawn()
    with pytest.raises(TypeError, match="no entropy"):
        DenoisingScorer(engine).statistics(engine.denoiser, rollouts)


def test_ratios_of_sums_and_of_means_differ_by_the_elements_of_a_latent():
    """By hand: one decision of 64 elements, 3.2 nats likelier, so its mean 0.05 nats."""
    engine, _ = drawn()
    scorer = DenoisingScorer(engine)
    scorer.elements = 64
    old_NT, one_NT = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    new_NT = old_NT + 3.2
    found = {}
    for reduction in ("sum", "mean"):
        loss = loss_of(config(logprob_reduction=reduction, epsilon=0.1, epsilon_high=0.2), scorer)
        found[reduction], _ = loss(new_NT, old_NT, one_NT[0], one_NT, denominator=2.0)
    assert float(found["sum"]) == pytest.approx(-1.2 / 2)  # cut off at 1 + epsilon_high
    assert float(found["mean"]) == pytest.approx(-math.exp(3.2 / 64) / 2)
    # The lower clip, and the dual clip above it.
    loss = loss_of(config(epsilon=0.1, epsilon_high=0.2, delta=3.0), scorer)
    assert float(loss(-new_NT, old_NT, -one_NT[0], one_NT, denominator=1.0)[0]) == 0.9
    assert float(loss(new_NT, old_NT, -one_NT[0], one_NT, denominator=1.0)[0]) == 3.0


# Micro-batches


@pytest.mark.parametrize("states", [1, 2, 3, 100])
def test_a_cut_has_every_decision_once_one_step_at_a_time(states):
    _, rollouts = drawn()
    rollouts = weighed(rollouts)
    parts = cut(rollouts, states=states)
    total_NT = torch.zeros_like(rollouts.weight_NT)
    times_NT = torch.zeros_like(rollouts.weight_NT)
    states_seen = 0
    for part in parts:
        (step,) = (part.weight_NT != 0).any(dim=0).nonzero().flatten().tolist()
        assert (part.weight_NT[:, step] != 0).all()
        distinct = part.node_NS[:, step].unique()
        assert len(distinct) <= states
        states_seen += len(distinct)
        rows = part.seed_N  # 0 .. 8, the rows of `rollouts`
        total_NT[rows] += part.weight_NT
        times_NT[rows] += (part.weight_NT != 0).double()
        assert torch.equal(part.logprob_NT, rollouts.logprob_NT[rows])
    assert torch.equal(total_NT, rollouts.weight_NT)
    assert torch.equal(times_NT, (rollouts.weight_NT != 0).double())
    # One evaluation serves all children of a state: no state is in two parts.
    active = [rollouts.weight_NT[:, t] != 0 for t in range(4)]
    assert states_seen == sum(len(rollouts.node_NS[a, t].unique()) for t, a in enumerate(active))
    assert cut(replace(rollouts, weight_NT=torch.zeros_like(total_NT)), states=states) == []


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_gradients_of_a_cut_add_up_to_that_of_the_whole(beta):
    around, model = adapted(moved=0.5)
    engine, rollouts = drawn(around)
    generator = torch.Generator().manual_seed(3)
    advantage_NT = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    rollouts = replace(weighed(rollouts), advantage_NT=advantage_NT)
    with torch.no_grad():  # ratios other than 1, some of them clipped
        for weight in (w for name, w in model.named_parameters() if "lora_B" in name):
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    settings = config(beta=beta, epsilon=0.05, epsilon_high=0.05)
    scorer = DenoisingScorer(engine, beta=beta)
    loss, kl = loss_of(settings, scorer), kl_of(settings, scorer)
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def of(parts):
        total, clipped = 0.0, 0.0
        for rows in parts:
            logprob_NT = scorer.logprobs(model, rows)
            columns = (rows.logprob_NT, rows.advantage_NT, rows.weight_NT)
            value, sums = loss(logprob_NT, *columns, denominator=5.0)
            if kl is not None:
                value = value + beta * kl(logprob_NT, rows, denominator=5.0)[0]
            value.backward()
            total += float(value.detach())
            clipped += float(sums["clipped_low"] + sums["clipped_high"])
        gradient = torch.cat([weight.grad.flatten() for weight in trained])
        for weight in trained:
            weight.grad = None
        return total, clipped, gradient

    whole, clipped, gradient = of([rollouts])
    assert clipped > 0 and gradient.abs().max() > 1e-3
    for states in (1, 4):
        in_parts, of_parts, added = of(cut(rollouts, states=states))
        assert in_parts == pytest.approx(whole, rel=1e-10) and of_parts == clipped
        torch.testing.assert_close(added, gradient, rtol=1e-9, atol=1e-12)


# Credits

REWARDS = [1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.3, 0.6, 0.9]
"""Branches 1, 0, .5 (mean .5) and 0, 0, 0 of prompt 0, whose mean is .25; .3, .6, .9 of prompt 1."""


def scored(reward_N=REWARDS):
    _, rollouts = drawn()
    return replace(rollouts, reward_N=torch.tensor(reward_N, dtype=torch.float64))


def credit(rollouts, *, history=None, rows=None, prompts=None, **settings):
    settings = {"credit_scale": "none", "advantage_clip": None} | settings
    rows = rows or {f"prompt-{i}": i for i in range(2)}
    return advantage_of(config(**settings), rows, history)(rollouts, prompts or image_prompts(2))


def test_credit_is_compared_with_the_prompt_or_with_siblings():
    rollouts = scored()
    # Means .25 and .6.
    expected = [0.75, -0.25, 0.25, -0.25, -0.25, -0.25, -0.3, 0.0, 0.3]
    assert credit(rollouts).tolist() == pytest.approx(expected)
    # 1 - (0 + .5)/2, 0 - (1 + .5)/2, .5 - 1/2; .3 - .75, .6 - .6, .9 - .45.
    expected = [0.75, -0.75, 0.0, 0.0, 0.0, 0.0, -0.45, 0.0, 0.45]
    assert credit(rollouts, baseline="siblings").tolist() == pytest.approx(expected, abs=1e-12)


def test_credit_is_divided_by_the_std_of_the_prompt_or_of_the_batch():
    rollouts = scored()
    plain = credit(rollouts)
    everything = np.array(REWARDS)
    batch = credit(rollouts, credit_scale="batch")
    torch.testing.assert_close(batch, plain / everything.std(), rtol=1e-7, atol=0)
    assert torch.equal(
        credit(rollouts, credit_scale="prompt"),
        advantages.grpo(rollouts.reward_N, rollouts.prompt_N),
    )
    siblings = credit(rollouts, baseline="siblings")
    std_N = torch.tensor([everything[:6].std()] * 6 + [everything[6:].std()] * 3)
    scaled = credit(rollouts, baseline="siblings", credit_scale="prompt")
    torch.testing.assert_close(scaled, siblings / std_N, rtol=1e-7, atol=0)
    tree = credit(rollouts, baseline="parent", credit_scale="prompt")
    plain = credit(rollouts, baseline="parent")
    torch.testing.assert_close(tree, plain / std_N[:, None], rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("baseline", "function"),
    [
        ("branch", branch_advantages.branch_mean),
        ("leave_one_out", branch_advantages.leave_branch_out),
        ("depth", branch_advantages.depth_normalised),
        ("parent", branch_advantages.parent_difference),
    ],
)
def test_credits_of_the_steps_of_one_chain_are_those_of_the_tree(baseline, function):
    rollouts = scored()
    tree = rollouts.tree
    columns = (tree.parent_M, tree.step_M, tree.leaves_M, rollouts.prompt_N)
    expected_NT = function(rollouts.reward_N, rollouts.node_NS, *columns)
    assert torch.equal(credit(rollouts, baseline=baseline), expected_NT)
    std = np.array(REWARDS).std()
    scaled = credit(rollouts, baseline=baseline, credit_scale="batch")
    torch.testing.assert_close(scaled, expected_NT / std, rtol=1e-7, atol=0)


@pytest.mark.parametrize("baseline", ["prompt", "siblings", "branch", "leave_one_out", "parent"])
@pytest.mark.parametrize("scale", ["none", "prompt", "batch"])
def test_equal_rewards_earn_exactly_nothing(baseline, scale):
    rollouts = scored([0.1] * 6 + [0.7] * 3)
    found = credit(rollouts, baseline=baseline, credit_scale=scale)
    # Roots of one prompt have equal means here, so nothing is compared across prompts.
    assert (found == 0).all()
    assert not has_signal(with_credit(rollouts, found)).any()


def test_credit_is_cut_off_at_both_ends():
    found = credit(scored(), baseline="siblings", advantage_clip=0.5)
    expected = [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, -0.45, 0.0, 0.45]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_history_is_of_data_set_rows_and_is_told_every_step():
    """Two steps that draw the prompts in another order; the second knows the first's rewards."""
    history = PromptHistory(steps=2)
    rows, prompts = {"prompt-0": 7, "prompt-1": 4}, image_prompts(2)
    settings = {"baseline": "history", "history": history, "rows": rows}
    first = credit(scored(), prompts=prompts, **settings)
    r = np.array(REWARDS)
    assert history.past(7) == REWARDS[:6] and history.past(4) == REWARDS[6:]
    expected = (r[:6] - r[:6].mean()) / r[:6].std(ddof=1)
    assert first[:6].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    second = credit(scored([0.8] * 9), prompts=prompts[::-1], **settings)
    known = np.array(REWARDS[6:] + [0.8] * 6)  # of data-set row 4, now the batch's prompt 0
    assert second[0].item() == pytest.approx((0.8 - known.mean()) / known.std(ddof=1), rel=1e-6)
    assert history.past(4) == REWARDS[6:] + [0.8] * 6


def test_a_buffer_of_few_rewards_is_used_once_it_is_full():
    history = PromptHistory(rewards=6)
    settings = {"baseline": "buffer", "history_steps": 6, "history": history}
    rollouts = scored()
    r = np.array(REWARDS)
    found = credit(rollouts, **settings)
    # Prompt 0 has 6 rewards, its own; prompt 1 has 3, so all of the step's count.
    assert found[0].item() == pytest.approx((1 - r[:6].mean()) / r[:6].std(), rel=1e-4)
    assert found[8].item() == pytest.approx((0.9 - r.mean()) / r.std(), rel=1e-4)
    found = credit(scored([0.0] * 6 + [0.3, 0.3, 0.6]), **settings)
    known = np.array([0.3, 0.6, 0.9, 0.3, 0.3, 0.6])
    assert found[8].item() == pytest.approx((0.6 - known.mean()) / known.std(), rel=1e-4)


def test_nothing_scored_earns_nothing():
    none = scored().take(torch.zeros(0, dtype=torch.int64))
    assert credit(none, baseline="parent").shape == (0,)


def test_a_credit_of_steps_leaves_their_mean_as_the_rows():
    """By hand: the last of four edges drew no noise, so its credit does not count."""
    _, rollouts = drawn(plan=replace(config().step_plan(0), stochastic=(0, 1, 2)))
    advantage_NT = torch.tensor([[1.0, -1.0, 0.0, 5.0]] * 9, dtype=torch.float64)
    advantage_NT[0] = torch.tensor([3.0, 0.0, 3.0, 5.0])
    advantage_NT[8] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    found = with_credit(rollouts, advantage_NT)
    assert found.advantage_NT[0].tolist() == [3, 0, 3, 0]
    assert found.advantage_N.tolist() == [2.0, *[0.0] * 8]
    assert has_signal(found).tolist() == [True] * 8 + [False]  # opposite credits are a signal
    one_a_row = with_credit(rollouts, torch.arange(9.0))
    assert one_a_row.advantage_NT is None and has_signal(one_a_row).tolist() == [False] + [True] * 8


# Rows and steps that train


def test_the_best_and_the_worst_of_each_branch_train():
    rollouts = with_credit(scored(), torch.tensor([0.9, -0.9, 0.1, 0, 0, 0, -0.4, 0.2, 0.4]))
    assert down_sample_of(config())(rollouts, 0.0).tolist() == list(range(9))
    assert down_sample_of(config(branch_threshold=0.0))(rollouts, 0.0).tolist() == [0, 1, 6, 8]
    assert down_sample_of(config(branch_threshold=0.5))(rollouts, 0.0).tolist() == [0, 1]
    assert down_sample_of(config(branch_threshold=0.3))(rollouts, 0.0).tolist() == [0, 1, 6, 8]


def test_trained_steps_weigh_alike_or_by_their_noise():
    engine, rollouts = drawn()  # edges 0 .. 2 are trained, 3 draws noise as well
    assert decisions_of(config())(rollouts).tolist() == [[1, 1, 1, 0]] * 9
    found = decisions_of(config(noise_weight="std"))(rollouts)
    std = [engine.replay(rollouts, step=step)[1][0].item() for step in range(4)]
    expected = [s / np.mean(std[:3]) for s in std[:3]] + [0.0]  # of all edges but the last
    assert found.tolist() == [pytest.approx(expected, rel=1e-6)] * 9


def test_validation_samples_once_with_noise_and_once_without():
    found = validations_of(config(eval_rollouts_per_prompt=5))
    assert {name: count for name, (count, _) in found.items()} == {"deterministic": 5, "sampled": 5}
    still, noisy = found["deterministic"][1], found["sampled"][1]
    assert (still.num_steps, still.stochastic, still.level, still.splits) == (4, (), 0.0, ())
    assert (noisy.num_steps, noisy.stochastic, noisy.level, noisy.splits) == (
        4,
        (0, 1, 2, 3),
        1,
        (),
    )
    found = validations_of(config(validation_steps=7))
    assert found["sampled"][1].stochastic == tuple(range(7))
    # The noise of training where it draws some on part of the chain only.
    part = tiny.CHAIN | {"stochastic": {"schedule": "last_steps", "last": 3}}
    assert validations_of(config(plan=part))["sampled"][1].stochastic == (1, 2, 3)


# Rewards


def test_rewards_are_of_decoded_images_in_row_order():
    engine, rollouts = drawn()
    prompts = [replace(p, columns={"colour": p.key}) for p in image_prompts(2)]
    prompts = [prompts[p] for p in rollouts.prompt_N]
    seen = []

    def told(image_NHWC, texts, metadata):
        seen.extend(zip(texts, [row["colour"] for row in metadata], strict=True))
        return np.zeros(len(texts)), {"detail": np.ones(len(texts))}

    reward = reward_of(
        config(reward_weights=[2.0, -1.0, 0.0]), [brightness, contrast, told], engine
    )
    images, result = reward(prompts, rollouts, max_failed_share=0.0)
    image_NHWC = engine.decode(rollouts)
    assert len(images) == 9 and np.array_equal(np.stack(images), image_NHWC)
    expected = 2 * brightness(image_NHWC, [], []) - contrast(image_NHWC, [], [])
    assert np.asarray(result.reward_N).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    keys = [f"{p}" for p in [0] * 6 + [1] * 3]
    assert seen == [(f"a picture of {k}", f"prompt-{k}") for k in keys]


def test_a_reward_that_fails_stops_the_run_or_is_counted():
    engine, rollouts = drawn()
    prompts = [image_prompts(2)[p] for p in rollouts.prompt_N]

    def fails_on_1(image_NHWC, texts, metadata):
        if "a picture of 1" in texts:
            raise KeyError("no verifier")
        return np.full(len(texts), 0.5)

    reward = reward_of(config(), [fails_on_1], engine)
    with pytest.raises(RewardError, match="no verifier"):
        reward(prompts, rollouts, max_failed_share=0.0)
    _, result = reward(prompts, rollouts, max_failed_share=0.5)
    assert sorted(result.failed) == [6, 7, 8]


def test_a_sample_that_is_not_finite_never_becomes_an_image():
    engine, rollouts = drawn()
    rollouts.tree.latent_M[rollouts.node_NS[4, -1]] = math.nan
    prompts = [image_prompts(2)[p] for p in rollouts.prompt_N]
    reward = reward_of(config(), [brightness], engine)
    with pytest.raises(FloatingPointError, match="1 samples are NaN .* first of prompt prompt-0"):
        reward(prompts, rollouts, max_failed_share=1.0)


# What is loaded


def test_only_the_denoiser_trains_or_only_its_adapter():
    around = tiny.pipeline()
    model, processor = load_denoiser(around, None)
    assert model is around.unet and processor is around
    assert all(weight.requires_grad for weight in model.parameters())

    around = tiny_sd()
    around.register_modules(vae=torch.nn.Linear(2, 2))
    model, _ = load_denoiser(around, None, LoraConfig(**LORA))
    assert not any(weight.requires_grad for weight in around.vae.parameters())
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora" in name), name
    assert sum(weight.requires_grad for weight in model.parameters()) > 0
    dropout = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropout and set(dropout) == {0.0}


def test_a_pipeline_is_loaded_from_a_folder(tmp_path):
    around = tiny_sd()
    add_tiny_text_encoder(around)
    add_tiny_vae(around)
    around.register_modules(  # or a folder has no place for what was None at first
        **{name: getattr(around, name) for name in ("text_encoder", "tokenizer", "vae")}
    )
    around.to(torch.float16).save_pretrained(tmp_path)
    model, processor = load_denoiser(str(tmp_path), None)
    assert processor.unet is model
    expected = around.unet.state_dict()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, expected[name].float())


def test_a_pipeline_without_a_denoiser_is_refused():
    class Nothing(DiffusionPipeline):
        pass

    with pytest.raises(ValueError, match="Nothing has neither a unet nor a transformer to train"):
        load_denoiser(Nothing(), None)


def test_image_rewards_are_names_or_functions():
    assert load_image_rewards("brightness", None) == [brightness]
    assert load_image_rewards([tiny.bright, "contrast"], [1.0, 2.0]) == [tiny.bright, contrast]
    with pytest.raises(ValueError, match="reward_funcs is empty; name at least one image reward"):
        load_image_rewards([], None)
    with pytest.raises(ValueError, match="reward_weights has 1 entries for 2 image rewards"):
        load_image_rewards([brightness, contrast], [1.0])
    with pytest.raises(ValueError, match=r"no image reward 'brightnes' \(nearest: 'brightness'\)"):
        load_image_rewards("brightnes", None)


def test_prompts_are_texts_with_keys():
    rows = [{"prompt": "a cat", "id": "c"}, {"prompt": "a cat", "id": "d"}]
    prompts, report = image_prompt_maker(config(id_column="id"), None)(rows)
    assert [p.key for p in prompts] == ["c", "d"] and report.kept == 2
    with pytest.raises(ValueError, match="rows 0 and 1"):
        image_prompt_maker(config(), None)(rows)


def test_validation_may_be_on_prompts_of_training():
    prompts = image_prompts(2)
    DENOISING.refuse_overlap(prompts, prompts)


# Budgets in whole branches


@pytest.mark.parametrize("allocator", ["uniform", "neyman", "gvm", "leave_one_out"])
def test_budgets_are_whole_branches(allocator):
    settings = config(allocator=allocator, prompts_per_step=4, rollouts_per_prompt=9)
    planner = make_denoising_planner(settings, [f"k{i}" for i in range(6)])
    for step in range(4):
        proposal = planner.propose()
        assert proposal.budget_P.sum() == 36 and (proposal.budget_P % 3 == 0).all()
        assert (proposal.budget_P >= 3).all()
        prompt_N = np.repeat(np.arange(4), proposal.budget_P)
        reward_N = (np.arange(36) % (2 + step) == 0) * (proposal.index_P[prompt_N] < 4)
        planner.observe(proposal, reward_N.astype(float), prompt_N)


@pytest.mark.parametrize(("share", "worth"), [(1.0, 6.0), (0.0, 2.0), (0.5, 3.0)])
def test_siblings_count_as_what_they_tell(share, worth):
    """Six leaves of two branches: 6 / (w + 3 (1 - w)) independent rollouts, all successes."""
    settings = config(sibling_within_share=share, prompts_per_step=1, success_above=0.5)
    planner = make_denoising_planner(settings, ["k"])
    proposal = planner.propose()
    planner.observe(proposal, np.ones(6), np.zeros(6, dtype=np.int64))
    a, b = planner.posterior.parameters()
    assert (float(a[0]), float(b[0])) == (pytest.approx(1 + worth), 1.0)
