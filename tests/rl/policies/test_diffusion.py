"""What only diffusion models have: scores, micro-batches, rewards, loading, budgets."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from rl.policies.contract import ScoredDecisions
from rl.policies.denoiser import (
    image_prompts as prompts_of,
)
from rl.policies.denoiser import (
    load_denoiser,
    load_image_rewards,
    require_adapter,
)
from rl.policies.diffusion import DiffusionPolicy, cut
from rl.stages.denoising_objective import denoising_kl, denoising_loss, denoising_objective_of
from rl.stages.planning import make_denoising_planner
from rollouts.rewards.contract import RewardError
from rollouts.rewards.image import brightness, contrast
from tests import tiny_denoising as tiny
from tests.tiny_denoising import drawn
from tests.tiny_pipelines import add_tiny_text_encoder, add_tiny_vae, image_prompts, tiny_sd

pytestmark = pytest.mark.slow  # whole runs

torch.set_num_threads(1)

LORA = dict(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], lora_dropout=0.1)


def config(**settings):
    return tiny.config("unused", **settings)


def weighed(rollouts, *, seed=0):
    """Weights on trained edges, different for all, of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    weight_NT = torch.rand(rollouts.mask_NT.shape, generator=generator, dtype=torch.float64) + 0.5
    weight_NT[:, [e for e in range(weight_NT.shape[1]) if e not in rollouts.tree.plan.trained]] = 0
    weight_NT[torch.rand(weight_NT.shape, generator=generator) < 0.2] = 0
    return replace(rollouts, weight_NT=weight_NT)


def policy_of(engine, rewards=(), **settings):
    """A policy around an engine; with `beta` its adapter must not have moved yet."""
    return DiffusionPolicy(
        config(**settings),
        denoiser=engine.denoiser,
        pipeline=engine.pipeline,
        rewards=list(rewards),
        engine=engine,
        whole=nullcontext,
        prompts=image_prompts(1),
    )


def adapted(*, moved=0.0, dtype=torch.float64):
    """A pipeline whose denoiser has an adapter, at 0 as peft makes it or `moved` from there."""
    around = tiny.pipeline(dtype=dtype)
    torch.manual_seed(1)
    model, _ = load_denoiser(around, None, LoraConfig(**LORA))
    model.to(dtype)
    move(model, moved)
    return around, model


def move(model, by=0.5):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(by * torch.randn_like(weight))


# Scores


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_before_any_update_scores_are_those_recorded(beta):
    around, model = adapted(dtype=torch.float32)
    engine, rollouts = drawn(around)
    rollouts = replace(rollouts, weight_NT=rollouts.mask_NT.double())
    logprob_NT = policy_of(engine, beta=beta).score(model, rollouts).logprob_NT
    assert logprob_NT.dtype == torch.float64 and logprob_NT.requires_grad
    assert torch.equal(logprob_NT.detach(), rollouts.logprob_NT)  # all rows, so in the same batches


def test_a_fresh_adapter_has_no_kl_and_a_moved_one_that_of_its_gaussians():
    around, model = adapted()
    engine, rollouts = drawn(around)
    rollouts = weighed(rollouts)
    policy = policy_of(engine, beta=0.1)
    assert (policy.score(model, rollouts).kl_NT == 0).all()

    move(model)
    _, rollouts = drawn(around)
    rollouts = weighed(rollouts)
    scored = policy.score(model, rollouts)
    logprob_NT, kl_NT = scored.logprob_NT, scored.kl_NT.detach()
    expected_NT = torch.zeros_like(logprob_NT)
    for n, t in (rollouts.weight_NT != 0).nonzero().tolist():
        row = rollouts.take(torch.tensor([n]))
        mean, std = engine.replay(row, step=t)
        reference, _ = engine.replay(row, step=t, reference=True)
        # sum |mean - mean_ref|^2 / (2 std^2)
        expected_NT[n, t] = (mean - reference).detach().square().sum() / (2 * std.item() ** 2)
    torch.testing.assert_close(kl_NT, expected_NT, rtol=1e-9, atol=0)
    assert kl_NT.max() > 1e-3
    # Of the scores of either way, no digit but the last differs.
    plain_NT = policy_of(engine).score(model, rollouts).logprob_NT
    torch.testing.assert_close(logprob_NT, plain_NT, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_kl_reaches_the_adapter_and_nothing_else():
    around, model = adapted()
    policy = policy_of(tiny.engine(around), beta=0.1)
    move(model)
    _, rollouts = drawn(around)
    rollouts = weighed(rollouts)
    scored = policy.score(model, rollouts)
    value, sums = denoising_kl(config(beta=0.1))(scored, rollouts, denominator=7.0)
    weight_NT, kl_NT = rollouts.weight_NT, scored.kl_NT.detach()
    expected = float((weight_NT * kl_NT).sum()) / 7
    assert value.item() == pytest.approx(expected, rel=1e-12) and expected > 1e-3
    # Log-probabilities that are means have a KL that is one too, over 64 elements of a latent.
    of_means = denoising_kl(config(beta=0.1, logprob_reduction="mean"))
    mean, _ = of_means(scored, rollouts, denominator=7.0)
    assert mean.item() == pytest.approx(expected / 64, rel=1e-12)
    # Statistics are neither weighted nor divided.
    assert float(sums["kl_k3"]) == pytest.approx(float(kl_NT[weight_NT != 0].sum()))
    assert int(sums["kl_tokens"]) == int((weight_NT != 0).sum())
    value.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == ("lora" in name), name
    assert any(float(w.grad.abs().max()) > 1e-6 for w in model.parameters() if w.grad is not None)
    assert denoising_objective_of(config(beta=0.0), []).kl_function is None


def test_edges_without_weight_cost_nothing_and_score_0():
    around, model = adapted()
    engine, rollouts = drawn(around)
    weight_NT = torch.zeros(9, 4, dtype=torch.float64)
    weight_NT[:4, 1] = 1.0  # before the split: two roots
    weight_NT[3, 2] = 1.0
    rollouts = replace(rollouts, weight_NT=weight_NT)
    for beta, times in ((0.0, 1), (0.1, 2)):
        before = engine.replay_evaluations
        scored = policy_of(engine, beta=beta).score(model, rollouts)
        logprob_NT = scored.logprob_NT
        assert engine.replay_evaluations - before == 3 * times
        assert ((logprob_NT != 0) == (weight_NT != 0)).all()
        assert rollouts.elements == 64


def test_entropies_are_not_recomputed():
    engine, rollouts = drawn()
    with pytest.raises(TypeError, match="no entropy"):
        policy_of(engine).score(engine.denoiser, rollouts, entropy=True)


def test_ratios_of_sums_and_of_means_differ_by_the_elements_of_a_latent():
    """By hand: one decision of 64 elements, 3.2 nats likelier, so its mean 0.05 nats."""
    old_NT, one_NT = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    new_NT = old_NT + 3.2
    found = {}
    for reduction in ("sum", "mean"):
        made = config(logprob_reduction=reduction, epsilon=0.1, epsilon_high=0.2)
        sizes = {"denominator": 2.0, "elements": 64}
        found[reduction], _ = denoising_loss(made)(new_NT, old_NT, one_NT[0], one_NT, **sizes)
    assert float(found["sum"]) == pytest.approx(-1.2 / 2)  # cut off at 1 + epsilon_high
    assert float(found["mean"]) == pytest.approx(-math.exp(3.2 / 64) / 2)
    # The lower clip, and the dual clip above it.
    loss = denoising_loss(config(epsilon=0.1, epsilon_high=0.2, delta=3.0))
    sizes = {"denominator": 1.0, "elements": 64}
    assert float(loss(-new_NT, old_NT, -one_NT[0], one_NT, **sizes)[0]) == 0.9
    assert float(loss(new_NT, old_NT, -one_NT[0], one_NT, **sizes)[0]) == 3.0


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
    loss, kl = denoising_loss(settings), denoising_kl(settings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def of(parts):
        total, clipped = 0.0, 0.0
        for rows in parts:
            columns = (rows.logprob_NT, rows.advantage_NT, rows.weight_NT)
            logprob_NT, kl_NT = engine.logprobs_and_kl(rows)
            value, sums = loss(logprob_NT, *columns, denominator=5.0, elements=rows.elements)
            if beta:
                scored = ScoredDecisions(logprob_NT=logprob_NT, kl_NT=kl_NT)
                value = value + beta * kl(scored, rows, denominator=5.0)[0]
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


# Rewards


def test_rewards_are_of_decoded_images_in_row_order():
    engine, rollouts = drawn()
    prompts = [replace(p, columns={"colour": p.key}) for p in image_prompts(2)]
    prompts = [prompts[p] for p in rollouts.prompt_N]
    seen = []

    def told(image_NHWC, texts, metadata):
        seen.extend(zip(texts, [row["colour"] for row in metadata], strict=True))
        return np.zeros(len(texts)), {"detail": np.ones(len(texts))}

    rewards = [brightness, contrast, told]
    reward = policy_of(engine, rewards, reward_weights=[2.0, -1.0, 0.0]).reward
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

    reward = policy_of(engine, [fails_on_1]).reward
    with pytest.raises(RewardError, match="no verifier"):
        reward(prompts, rollouts, max_failed_share=0.0)
    _, result = reward(prompts, rollouts, max_failed_share=0.5)
    assert sorted(result.failed) == [6, 7, 8]


def test_a_sample_that_is_not_finite_never_becomes_an_image():
    engine, rollouts = drawn()
    rollouts.tree.latent_M[rollouts.node_NS[4, -1]] = math.nan
    prompts = [image_prompts(2)[p] for p in rollouts.prompt_N]
    reward = policy_of(engine, [brightness]).reward
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_train_only_beside_an_adapter(dtype):
    kind = str(dtype).removeprefix("torch.")
    message = f"would train in {kind}, .*use_peft: true, .* dtype: float32, with bf16: true"
    with pytest.raises(ValueError, match=message):
        load_denoiser(tiny.pipeline(dtype=dtype), None)
    model, _ = load_denoiser(tiny.pipeline(dtype=dtype), None, LoraConfig(**LORA))
    trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert trained == {torch.float32} and model.dtype == dtype
    for wide in (torch.float32, torch.float64):
        assert load_denoiser(tiny.pipeline(dtype=wide), None)[0].dtype == wide


def test_a_reference_policy_is_the_model_with_its_adapters_off():
    require_adapter(adapted()[1])
    with pytest.raises(ValueError, match="beta: .*UNet2DConditionModel has none: write use_peft"):
        require_adapter(load_denoiser(tiny.pipeline(), None)[0])
    with pytest.raises(ValueError, match="lora_B.* is not 0: the adapters change it already"):
        require_adapter(adapted(moved=0.5)[1])


def test_a_pipeline_that_brings_an_adapter_has_a_reference_while_it_is_fresh(tmp_path):
    """It trains alone; once it was trained, the model without it is not where the run begins."""
    around = tiny.pipeline()
    around.unet.add_adapter(LoraConfig(**(LORA | {"lora_dropout": 0.0})))
    assert tiny.trainer(tmp_path, pipeline=around, beta=0.1).args.beta == 0.1
    around.unet.conv_in.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="but conv_in.weight trains and is in no adapter: give a"):
        require_adapter(around.unet)
    with torch.no_grad():
        next(w for n, w in around.unet.named_parameters() if "lora_B" in n).add_(1.0)
    with pytest.raises(ValueError, match="lora_B.* is not 0: the adapters change it already"):
        tiny.trainer(tmp_path, pipeline=around, beta=0.1)


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
    prompts, report = prompts_of(rows, config(id_column="id"))
    assert [p.key for p in prompts] == ["c", "d"] and report.kept == 2
    with pytest.raises(ValueError, match="rows 0 and 1"):
        prompts_of(rows, config())


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
