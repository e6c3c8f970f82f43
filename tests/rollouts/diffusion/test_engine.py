from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionInpaintPipeline
from peft import LoraConfig, get_peft_model

from rollouts.diffusion.engine import DiffusersEngine
from rollouts.diffusion.sde import gaussian_kl
from rollouts.diffusion.tree import seeded_generator, seeded_noise
from rollouts.step_plan import StepPlan
from tests.tiny_pipelines import (
    ENGINE_SETTINGS,
    PIPELINES,
    RULES,
    add_tiny_text_encoder,
    add_tiny_vae,
    embeddings,
    image_prompts,
    tiny_pipeline,
    tiny_sd,
    tiny_unet,
)

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()


def engine(name="sd", *, dtype=torch.float32, pipeline=None, **settings):
    pipeline = pipeline or tiny_pipeline(name, dtype=dtype)
    settings = {"encode": embeddings(name, dtype=dtype)} | ENGINE_SETTINGS[name] | settings
    return DiffusersEngine(pipeline, **settings)


def arguments(name):
    """What the engine's settings are to the pipeline itself."""
    settings = dict(ENGINE_SETTINGS[name])
    return settings.pop("pipeline_kwargs", {}) | settings


def plan(name="sd", *, num_steps=5, stochastic=None, **settings):
    rule, level = RULES[name]
    edges = tuple(range(num_steps)) if stochastic is None else stochastic
    return StepPlan(num_steps=num_steps, rule=rule, level=level, stochastic=edges, **settings)


TREE = dict(stochastic=(0, 1, 3), splits=((1, 2), (3, 3)))
"""Two splits, one edge of noise before them, deterministic edges between and after."""


def two_trees(name="sd", **settings):
    """Prompt 0 has one tree of six samples, prompt 1 two."""
    ours = engine(name, **settings)
    plan_ = plan(name, **TREE)
    return ours, ours.generate(image_prompts(2), [6, 12], seeds_N=range(18), params=plan_)


# --- every pipeline ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_draws_trees_and_replays_them_exactly(name):
    ours, rollouts = two_trees(name)
    assert len(rollouts) == 18
    assert rollouts.mask_NT.tolist() == [[True, True, False, True, False]] * 18
    # 3 roots; a state for each before edges 0 and 1, 2 before edges 2 and 3, 6 before edge 4 and at
    # the end.
    assert len(rollouts.tree) == 3 * (1 + 1 + 2 + 2 + 6 + 6)
    assert ours.evaluations == 3 * (1 + 1 + 2 + 2 + 6) == rollouts.tree.plan.evaluations(3)
    logprob_NT = ours.logprobs(rollouts)
    assert torch.equal(logprob_NT, rollouts.logprob_NT)  # the ratio is exactly 1
    assert ours.replay_evaluations == 3 * (1 + 1 + 2)
    logprob_NT.sum().backward()
    parameters = dict(ours.denoiser.named_parameters())
    silent = {n for n, p in parameters.items() if p.grad is None or not p.grad.any()}
    # The last block's text stream goes nowhere, by design of SD3 and Qwen-Image.
    text = ("add_q_proj", "norm_added_q", "to_add_out", "txt_mlp")
    assert all(any(part in n for part in text) for n in silent), silent


@pytest.mark.parametrize("name", PIPELINES)
def test_a_plan_without_noise_is_the_unmodified_pipeline(name):
    # Whatever the engine does to the pipeline, the samples are those of the pipeline alone.
    pipeline = tiny_pipeline(name)
    prompts = image_prompts(2)
    expected = pipeline(
        **embeddings(name)(prompts),
        **arguments(name),
        num_inference_steps=4,
        generator=[seeded_generator(seed, "root", 0) for seed in (7, 8)],
        output_type="latent",
    )[0]
    ours = engine(name, pipeline=pipeline)
    rollouts = ours.generate(
        prompts, [1, 1], seeds_N=[7, 8], params=plan(name, num_steps=4, stochastic=())
    )
    assert torch.equal(rollouts.tree.latent_M[rollouts.node_NS[:, -1]], expected)
    assert not rollouts.mask_NT.any()


# --- trees ------------------------------------------------------------------------------------


def test_siblings_share_states_up_to_their_split_and_none_is_stored_twice():
    _, rollouts = two_trees()
    tree, node_NS = rollouts.tree, rollouts.node_NS
    assert rollouts.prompt_N.tolist() == [0] * 6 + [1] * 12
    assert rollouts.branch_N.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    for row, nodes in enumerate(node_NS.tolist()):
        assert tree.parent_M[nodes].tolist() == [-1, *nodes[:-1]]
        assert tree.step_M[nodes].tolist() == list(range(6))
        assert (tree.prompt_M[nodes] == rollouts.prompt_N[row]).all()
    # State i + 1 follows edge i: edges 0 and 1 are before the split, edge 1 is the split.
    distinct = [[len(set(node_NS[r : r + 6, s].tolist())) for s in range(6)] for r in (0, 6, 12)]
    assert distinct == [[1, 1, 2, 2, 6, 6]] * 3
    assert node_NS.unique().tolist() == list(range(len(tree)))
    assert tree.leaves_M.tolist() == [(node_NS == m).sum().item() for m in range(len(tree))]
    assert len(tree.latent_M.flatten(1).unique(dim=0)) == len(tree)


@pytest.mark.slow
def test_the_first_sample_of_a_tree_is_the_chain_that_does_not_branch():
    # One row at a time, so that batches are the same: the windows of a tree join bitwise.
    for name in ("sd", "sd3", "flux"):
        one = dict(seeds_N=range(10, 16), params=plan(name, **TREE))
        tree = engine(name, batch_size=1).generate(image_prompts(1), [6], **one)
        line = engine(name, batch_size=1).generate(
            image_prompts(1), [1], seeds_N=[10], params=plan(name, stochastic=TREE["stochastic"])
        )
        assert torch.equal(tree.tree.latent_M[tree.node_NS[0]], line.tree.latent_M[line.node_NS[0]])
        assert torch.equal(tree.logprob_NT[0], line.logprob_NT[0])


def hooked_rows(ours, roots, plan_):
    """Rows that the denoiser saw while samples of one prompt were drawn."""
    rows = []

    def hook(module, args, kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    leaves = roots * plan_.leaves_per_root
    handle = ours.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    ours.generate(image_prompts(1), [leaves], seeds_N=range(leaves), params=plan_)
    handle.remove()
    return sum(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "roots", "evaluations"),
    [
        (dict(num_steps=10), 8, 80),
        (dict(num_steps=10, splits=((6, 4),)), 2, 38),  # 2 (7 + 4 * 3)
        (dict(num_steps=10, splits=((0, 4),)), 2, 74),  # 2 (1 + 4 * 9)
        (dict(num_steps=10, splits=((9, 4),)), 2, 20),  # 2 * 10
        (dict(num_steps=10, splits=((6, 1),)), 2, 20),
        # Binary at 0, 3, 6, 9: 1 + 2 * 3 + 4 * 3 + 8 * 3 + 16 * 10 + 0
        (dict(num_steps=20, splits=((0, 2), (3, 2), (6, 2), (9, 2))), 1, 203),
    ],
)
def test_evaluations_are_those_of_the_formula(settings, roots, evaluations):
    for name, guidance, factor in (("sd", 1.0, 1), ("sd", 3.0, 2), ("qwen", None, 2)):
        if name == "qwen" and settings["num_steps"] == 20:
            continue
        ours = engine(name, guidance_scale=guidance) if guidance else engine(name)
        plan_ = plan(name, **settings)
        assert hooked_rows(ours, roots, plan_) == factor * evaluations
        assert ours.evaluations == plan_.evaluations(roots) == evaluations


# --- noise ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_do_not_depend_on_batch_order_or_size():
    settings = dict(params=plan(**TREE))
    prompts = image_prompts(3)
    seeds = torch.arange(18).view(3, 6)
    order = [2, 0, 1]
    ours = engine(batch_size=1).generate(prompts, [6] * 3, seeds_N=seeds.flatten(), **settings)
    for batch_size, same in ((1, torch.equal), (4, None), (16, None)):
        other = engine(batch_size=batch_size).generate(
            [prompts[p] for p in order], [6] * 3, seeds_N=seeds[order].flatten(), **settings
        )
        rows = torch.arange(18).view(3, 6)[order].flatten()
        states = ours.tree.latent_M[ours.node_NS[rows]]
        theirs = other.tree.latent_M[other.node_NS]
        assert torch.equal(states[:, 0], theirs[:, 0])  # the noise of the roots is theirs alone
        if same is not None:
            assert same(states, theirs)
            assert same(ours.logprob_NT[rows], other.logprob_NT)
        torch.testing.assert_close(states, theirs, rtol=1e-4, atol=1e-4)


def test_every_draw_is_the_noise_of_its_first_samples_seed():
    ours, rollouts = two_trees()
    tree = rollouts.tree
    for step in (0, 1, 3):
        with torch.no_grad():
            mean, std = ours.replay(rollouts, step=step)
        parents = rollouts.node_NS[:, step].unique()
        for child in rollouts.node_NS[:, step + 1].unique().tolist():
            first = (rollouts.node_NS[:, step + 1] == child).nonzero()[0].item()
            place = (parents == tree.parent_M[child]).nonzero().item()
            shape = mean[place : place + 1].shape
            z = seeded_noise([rollouts.seed_N[first].item()], step, shape)[0]
            torch.testing.assert_close(tree.latent_M[child], mean[place] + std[place] * z)


def test_noise_differs_between_seeds_steps_and_purposes():
    draws = [seeded_noise([seed], step, torch.Size([1, 5])) for seed in (1, 2) for step in (0, 1)]
    draws.append(torch.randn(1, 1, 5, generator=seeded_generator(1, "root", 0))[0])
    assert len(torch.cat(draws).unique(dim=0)) == 5
    pair = seeded_noise([1, 2], 0, torch.Size([2, 5]))
    assert torch.equal(pair, torch.cat([draws[0], draws[2]]))


@pytest.mark.slow
def test_samples_of_a_prompt_that_share_their_start_differ_by_their_edges_alone():
    prompts, silent_first = image_prompts(2), plan(stochastic=(1, 3), shared_start=True)
    ours = engine(batch_size=1)
    shared = ours.generate(
        prompts, [3, 2], seeds_N=range(10, 15), params=silent_first, start_seeds_P=[10, 50]
    )
    x_NS = shared.tree.latent_M[shared.node_NS]
    for rows in ([0, 1, 2], [3, 4]):
        for row in rows[1:]:
            assert torch.equal(x_NS[row, :2], x_NS[rows[0], :2])  # the first edge has no noise
            assert not torch.equal(x_NS[row, 2], x_NS[rows[0], 2])
    assert not torch.equal(x_NS[0, 0], x_NS[3, 0])
    # The sample whose own seed is the start's is the one it would be alone, and a later round that
    # is given the same start goes on from it.
    alone = ours.generate(
        prompts, [1, 0], seeds_N=[10], params=replace(silent_first, shared_start=False)
    )
    assert torch.equal(x_NS[0], alone.tree.latent_M[alone.node_NS[0]])
    later = ours.generate(prompts[:1], [1], seeds_N=[12], params=silent_first, start_seeds_P=[10])
    assert torch.equal(x_NS[2], later.tree.latent_M[later.node_NS[0]])


@pytest.mark.slow
def test_a_shared_start_is_the_law_of_a_split_at_the_first_noise():
    # One root that splits where noise begins: the same states for the first sample, and the same
    # Gaussian for the others, for fewer evaluations.
    ours = engine(batch_size=1)
    shared = ours.generate(
        image_prompts(1),
        [3],
        seeds_N=[5, 6, 7],
        params=plan(stochastic=(2, 3), shared_start=True),
        start_seeds_P=[5],
    )
    evaluated = ours.evaluations
    split = ours.generate(
        image_prompts(1), [3], seeds_N=[5, 6, 7], params=plan(stochastic=(2, 3), splits=((2, 3),))
    )
    x_NS, y_NS = (r.tree.latent_M[r.node_NS] for r in (shared, split))
    torch.testing.assert_close(x_NS, y_NS, rtol=1e-4, atol=1e-4)
    assert (evaluated, ours.evaluations - evaluated) == (15, 9)  # 3 * 5; 3 + 3 * 2


def test_a_start_is_given_where_it_is_shared_and_nowhere_else():
    ours, request = engine(), dict(seeds_N=[0, 1])
    for params, starts in (
        (plan(), [1]),
        (plan(shared_start=True), None),
        (plan(shared_start=True), [1, 2]),
    ):
        with pytest.raises(
            ValueError, match="start_seeds_P must be one seed for each of 1 prompts"
        ):
            ours.generate(image_prompts(1), [2], params=params, start_seeds_P=starts, **request)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_a_shift_is_that_of_a_scheduler_made_with_it(name):
    pipeline, other = tiny_pipeline(name), tiny_pipeline(name)
    other.scheduler = type(other.scheduler).from_config(
        other.scheduler.config, shift=2.0, use_dynamic_shifting=False
    )
    ours, theirs = (
        engine(name, pipeline=p, **s) for p, s in ((pipeline, dict(shift=2.0)), (other, {}))
    )
    one = dict(seeds_N=[3], params=plan(name))
    shifted = ours.generate(image_prompts(1), [1], **one)
    assert torch.equal(
        shifted.tree.latent_M, theirs.generate(image_prompts(1), [1], **one).tree.latent_M
    )
    assert pipeline.scheduler.config.shift == 2.0  # saved with the pipeline
    plain = engine(name).generate(image_prompts(1), [1], **one)
    assert not torch.equal(shifted.tree.levels, plain.tree.levels)
    if name == "flux":  # it gives sigmas 1, .8, .6, .4, .2: the shift by hand, at sigma = .8
        assert shifted.tree.levels[1, 1].item() == pytest.approx(2 * 0.8 / (1 + 0.8))


def test_a_shift_of_other_schedulers_is_refused():
    with pytest.raises(ValueError, match=r"shift=3\.0 is a setting of FlowMatch.*has a DDIMSched"):
        engine(shift=3.0)
    with pytest.raises(ValueError, match=r"shift must be positive and finite, got 0\.0"):
        engine("sd3", shift=0.0)


# --- replay -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_fewer_rows_replay_within_float_noise(name):
    ours = engine(name)
    branching = plan(name, num_steps=10, stochastic=tuple(range(9)), splits=((3, 4),))
    request = dict(seeds_N=range(16), params=branching)
    rollouts = ours.generate(image_prompts(2), [8, 8], **request)
    part = rollouts.take(torch.tensor([3, 0, 1, 3]))
    with torch.no_grad():
        mismatch = (ours.logprobs(part) - part.logprob_NT).abs().max().item()
    # At most 1.2e-4 nats were seen, in summed log-probabilities of some 300.
    assert mismatch < 1e-3


def test_edges_without_weight_are_not_evaluated():
    ours, rollouts = two_trees()
    weight_NT = torch.zeros(18, 5)
    weight_NT[:6, 3] = 0.5  # one tree, two states, six children
    logprob_NT = ours.logprobs(replace(rollouts, weight_NT=weight_NT))
    assert ours.replay_evaluations == 2
    assert not logprob_NT[weight_NT == 0].any()
    torch.testing.assert_close(logprob_NT[:6, 3], rollouts.logprob_NT[:6, 3], rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_half_precision_latents_are_stored_and_scored_as_such(name, dtype):
    ours, rollouts = two_trees(name, dtype=dtype)
    assert rollouts.tree.latent_M.dtype == dtype
    assert rollouts.logprob_NT.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(ours.logprobs(rollouts), rollouts.logprob_NT)


@pytest.mark.slow
def test_fresh_lora_has_ratio_one_and_adapters_off_is_the_reference():
    base, rollouts = two_trees()
    for wrapped in (False, True):
        pipeline = tiny_pipeline("sd")
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"])
        if wrapped:
            pipeline.unet = get_peft_model(pipeline.unet, config)
        else:
            pipeline.unet.add_adapter(config)
        ours = engine(pipeline=pipeline)
        assert torch.equal(ours.logprobs(rollouts), rollouts.logprob_NT)
        mean, std = ours.replay(rollouts, step=3)
        mean_ref, _ = ours.replay(rollouts, step=3, reference=True)
        assert mean.requires_grad and not mean_ref.requires_grad
        assert gaussian_kl(mean, mean_ref, std).eq(0).all()
        with torch.no_grad():
            for name, parameter in ours.denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        with torch.no_grad():
            assert not torch.equal(ours.logprobs(rollouts), rollouts.logprob_NT)
        assert torch.equal(ours.logprobs(rollouts, reference=True), rollouts.logprob_NT)
        mean, std = ours.replay(rollouts, step=3)
        assert gaussian_kl(mean, mean_ref, std).gt(0).all()  # the adapters are on again
    with pytest.raises(ValueError, match="reference policy needs LoRA adapters.*UNet2DCond"):
        base.replay(rollouts, step=3, reference=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3"])  # Flux rotates in float32
def test_the_gradient_is_that_of_central_differences(name):
    ours, rollouts = two_trees(name, dtype=torch.float64)
    advantage_N = torch.linspace(-1, 1, 18, dtype=torch.float64)
    active = rollouts.mask_NT

    def surrogate():
        ratio = ((ours.logprobs(rollouts) - rollouts.logprob_NT) / 256).exp()
        clipped = ratio.clamp(0.99, 1.01)
        gain = torch.minimum(advantage_N[:, None] * ratio, advantage_N[:, None] * clipped)
        return gain[active].sum() / 18

    chosen = list(ours.denoiser.parameters())[::30][:5]
    assert len(chosen) > 1
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from ratio 1, where the clip has a corner
        for parameter in ours.denoiser.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 1e-3)
    surrogate().backward()
    for parameter in chosen:
        place = parameter.grad.abs().argmax()
        flat, expected = parameter.data.view(-1), parameter.grad.view(-1)[place].item()
        values = []
        with torch.no_grad():
            for shift in (1e-5, -2e-5):
                flat[place] += shift
                values.append(surrogate().item())
            flat[place] += 1e-5
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-5, abs=1e-9)


# --- prompts ----------------------------------------------------------------------------------


def test_prompts_are_read_by_the_pipelines_own_text_encoder():
    pipeline = tiny_pipeline("sd")
    add_tiny_text_encoder(pipeline)
    prompts = image_prompts(3)
    expected = pipeline(
        prompt=[prompt.prompt for prompt in prompts],
        **ENGINE_SETTINGS["sd"],
        num_inference_steps=3,
        generator=[seeded_generator(seed, "root", 0) for seed in (7, 8, 9)],
        output_type="latent",
    )[0]
    ours = engine(pipeline=pipeline, encode=None)
    silent = plan(num_steps=3, stochastic=())
    rollouts = ours.generate(prompts, [1, 1, 1], seeds_N=[7, 8, 9], params=silent)
    assert torch.equal(rollouts.tree.latent_M[rollouts.node_NS[:, -1]], expected)
    assert set(rollouts.tree.conditions) == {"prompt_embeds", "negative_prompt_embeds"}
    embeds = rollouts.tree.conditions["prompt_embeds"]
    assert not torch.equal(embeds[0], embeds[1])


# --- images -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_images_are_those_of_the_pipeline(name):
    pipeline = tiny_pipeline(name)
    add_tiny_vae(pipeline)
    prompts = image_prompts(2)
    expected = pipeline(
        **embeddings(name)(prompts),
        **arguments(name),
        num_inference_steps=3,
        generator=[seeded_generator(seed, "root", 0) for seed in (7, 8)],
        output_type="np",
    )[0]
    ours = engine(name, pipeline=pipeline)
    silent = plan(name, num_steps=3, stochastic=())
    images = ours.decode(ours.generate(prompts, [1, 1], seeds_N=[7, 8], params=silent))
    assert images.dtype == np.uint8 and images.shape == (2, 64, 64, 3)
    assert np.array_equal(images, (expected * 255).round().astype(np.uint8))


@pytest.mark.slow
def test_without_a_vae_samples_are_pixels():
    ours, rollouts = two_trees(batch_size=5)
    images = ours.decode(rollouts)
    assert images.shape == (18, 8, 8, 4) and images.dtype == np.uint8
    x = rollouts.tree.latent_M[rollouts.node_NS[7, -1]]
    # -1 is black and 1 white
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    assert np.abs(images[7].astype(float) - expected.numpy()).max() <= 1
    assert images.min() == 0 and images.max() == 255
    flux, packed = two_trees("flux")
    with pytest.raises(ValueError, match=r"without a VAE.*got latents of shape \(16, 16\)"):
        flux.decode(packed)


# --- the pipeline afterwards, weights -----------------------------------------------------------


def test_the_pipeline_is_left_as_it_was():
    pipeline = tiny_pipeline("sd3")
    scheduler, config = pipeline.scheduler, dict(pipeline.config)
    ours = engine("sd3", pipeline=pipeline)
    ours.generate(image_prompts(1), [1], seeds_N=[0], params=plan("sd3"))
    silent = replace(plan("sd3", trained=(4,)), rule="cps")
    with pytest.raises(ValueError, match=r"trained need edges.*has std 0 at \[4\]"):
        ours.generate(image_prompts(1), [1], seeds_N=[0], params=silent)
    assert pipeline.scheduler is scheduler and dict(pipeline.config) == config
    assert not pipeline.transformer._forward_pre_hooks


@pytest.mark.slow
def test_weights_of_another_model_are_taken():
    ours, rollouts = two_trees()
    other = tiny_pipeline("sd", seed=1).unet
    with torch.no_grad():
        before = ours.logprobs(rollouts)
        ours.load_weights(ours.denoiser)
        assert torch.equal(ours.logprobs(rollouts), before)
        ours.load_weights(other)
        assert not torch.equal(ours.logprobs(rollouts), before)
    for mine, its in zip(ours.denoiser.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


# --- refusals ---------------------------------------------------------------------------------


def test_requests_are_checked():
    ours = engine()

    def ask(budget=(2, 4), seeds=range(6), count=2, splits=((1, 2),)):
        request = dict(seeds_N=seeds, params=plan(splits=splits))
        return ours.generate(image_prompts(count), budget, **request)

    with pytest.raises(ValueError, match=r"multiple of 2, got \[3, 4\]"):
        ask(budget=[3, 4])
    with pytest.raises(ValueError, match="seeds_N has 5 entries, but budget_P asks for 6"):
        ask(seeds=range(5))
    with pytest.raises(ValueError, match="budget_P has 2 entries for 3 prompts"):
        ask(count=3)
    with pytest.raises(ValueError, match=r"at least 0 and not all 0, got \[0, 0\]"):
        ask(budget=[0, 0], seeds=[])
    with pytest.raises(ValueError, match=r"budget_P must be 1-d integers, got torch\.float32"):
        ask(budget=[2.0, 4.0])
    with pytest.raises(ValueError, match="must have different seeds"):
        ask(seeds=[0, 1, 2, 3, 3, 4])
    assert len(ask(seeds=[0, 1, 0, 1, 2, 3])) == 6  # of two prompts


def test_a_prompt_without_budget_keeps_its_place():
    rollouts = engine().generate(image_prompts(3), [1, 0, 2], seeds_N=[5, 6, 7], params=plan())
    assert rollouts.prompt_N.tolist() == [0, 2, 2]
    assert len(rollouts.tree.conditions["prompt_embeds"]) == 3


def parts_of_sd():
    parts = tiny_pipeline("sd").components
    return {name: part for name, part in parts.items() if name != "image_encoder"}


def test_pipelines_that_cannot_be_recorded_are_refused():
    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = PNDMScheduler()
    with pytest.raises(ValueError, match="PNDMScheduler are not first-order Gaussian"):
        engine(pipeline=pipeline)
    pipeline = tiny_sd()
    pipeline.unet = tiny_unet(dropout=0.1)
    with pytest.raises(ValueError, match=r"has dropout 0\.1: with it the ratio.*is noise"):
        engine(pipeline=pipeline)
    inpainting = StableDiffusionInpaintPipeline(**parts_of_sd(), requires_safety_checker=False)
    with pytest.raises(ValueError, match="Inpaint.*overwrites part of the latents"):
        engine(pipeline=inpainting)


def test_dropout_of_adapters_added_later_is_refused():
    ours, rollouts = two_trees()
    ours.denoiser.add_adapter(LoraConfig(r=2, lora_dropout=0.1, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"lora_dropout.*has dropout 0\.1"):
        ours.generate(image_prompts(1), [1], seeds_N=[0], params=plan())
    with pytest.raises(ValueError, match=r"lora_dropout.*has dropout 0\.1"):
        ours.logprobs(rollouts)


class Shifting(diffusers.StableDiffusionPipeline):
    """Does not start from the latents it is given."""

    def prepare_latents(self, *args, **kwargs):
        return super().prepare_latents(*args, **kwargs) + 1


class Blending(diffusers.StableDiffusionPipeline):
    """Does not return the latents of its last step."""

    @torch.no_grad()
    def __call__(
        self,
        latents,
        num_inference_steps,
        guidance_scale,
        height,
        width,
        generator=None,
        output_type="pil",
        **others,
    ):
        others |= dict(latents=latents, num_inference_steps=num_inference_steps, height=height)
        others |= dict(width=width, guidance_scale=guidance_scale, generator=generator)
        x, flags = super().__call__(output_type=output_type, **others)
        return x + 1, flags


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Shifting, "it was given before its first step"), (Blending, "after its last step")],
)
def test_a_pipeline_that_changes_latents_is_refused(kind, message):
    ours = engine(pipeline=kind(**parts_of_sd(), requires_safety_checker=False))
    with pytest.raises(ValueError, match=f"changed the latents {message}"):
        ours.generate(image_prompts(1), [2], seeds_N=[0, 1], params=plan(splits=((1, 2),)))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="true_cfg_scale=3.0 needs a negative prompt: write"):
        engine("qwen", encode=None)
    with pytest.raises(ValueError, match="encode_prompt of Shifting returns is not known here"):
        engine(pipeline=Shifting(**parts_of_sd(), requires_safety_checker=False), encode=None)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        engine(batch_size=0)
    half = engine(encode=lambda prompts: embeddings("sd")(prompts[:1]))
    with pytest.raises(ValueError, match=r"prompt_embeds of shape \(1, 3, 16\) for 2 prompts"):
        half.generate(image_prompts(2), [1, 1], seeds_N=[0, 1], params=plan())


def test_replay_of_what_has_no_density_or_another_table_is_refused():
    ours, rollouts = two_trees()
    with pytest.raises(ValueError, match=r"edge 2 is deterministic.*with noise are \[0, 1, 3\]"):
        ours.replay(rollouts, step=2)
    ours.pipeline.scheduler = type(ours.pipeline.scheduler).from_config(
        ours.pipeline.scheduler.config, beta_end=0.02
    )
    with pytest.raises(ValueError, match="table differs from the one the rollouts were made with"):
        ours.logprobs(rollouts)
