"""What the diffusion engine refuses rather than turn into images: NaN, safety checkers, sizes."""

import dataclasses
import math
import warnings

import diffusers
import pytest
import torch
from peft import LoraConfig

from rollouts.batch import concatenate
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.diffusion.pipeline_arguments import REFUSED
from rollouts.step_plan import StepPlan
from tests.tiny_pipelines import (
    ENGINE_SETTINGS,
    PIPELINES,
    RULES,
    add_tiny_text_encoder,
    add_tiny_vae,
    ddim,
    embeddings,
    image_prompts,
    tiny_pipeline,
)

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()


def engine(name="sd", *, pipeline=None, **settings):
    settings = {"encode": embeddings(name)} | ENGINE_SETTINGS[name] | settings
    return DiffusersEngine(pipeline or tiny_pipeline(name), **settings)


def plan(name="sd", **settings):
    rule, level = RULES[name]
    return StepPlan(num_steps=3, rule=rule, level=level, stochastic=(0, 1), **settings)


class Overflowing(torch.nn.Module):
    """Around a decoder: NaN where the latent's first number is positive."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, x, *others, **more):
        image = self.decoder(x, *others, **more)
        return torch.where(x[:, :1, :1, :1] > 0, math.nan, image)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_images_with_nan_are_counted_and_named_by_row(name, batch_size):
    pipeline = tiny_pipeline(name)
    add_tiny_vae(pipeline)
    pipeline.vae.post_quant_conv = torch.nn.Identity()
    pipeline.vae.decoder = Overflowing(pipeline.vae.decoder)
    ours = engine(name, pipeline=pipeline, batch_size=batch_size)
    rollouts = ours.generate(image_prompts(2), [3, 3], seeds_N=range(6), params=plan(name))
    x_N = rollouts.tree.latent_M[rollouts.node_NS[:, -1], 0, 0, 0]
    rows = (x_N > 0).nonzero().flatten().tolist()
    assert 0 < len(rows) < 6
    named = f"{len(rows)} of 6 rows, {rows}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(FloatingPointError, match=f"images with NaN of {named}.*bfloat16.*force_up"):
        ours.decode(rollouts)


def test_latents_with_nan_are_not_blamed_on_the_vae():
    ours = engine()
    rollouts = ours.generate(image_prompts(1), [3], seeds_N=range(3), params=plan())
    rollouts.tree.latent_M[rollouts.node_NS[1, -1]] = math.nan
    with pytest.raises(FloatingPointError, match="latents of finished samples are NaN.* 1 of 3"):
        ours.decode(rollouts)


def nan_from(ours, step):
    """Let the denoiser put out NaN for the first row of its `step`-th call and of those after it."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) > step:
            output[0][0] = math.nan
        return output

    return ours.denoiser.register_forward_hook(hook)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_latents_with_nan_are_named_by_their_step(step):
    ours = engine(guidance_scale=1.0)
    with (
        nan_from(ours, step),
        pytest.raises(
            FloatingPointError,
            match=f"latents that step {step} made are NaN or infinite in 1 of 4 rows",
        ),
    ):
        ours.generate(image_prompts(2), [2, 2], seeds_N=range(4), params=plan())


def test_children_with_nan_are_named_by_the_step_of_the_split():
    ours = engine(guidance_scale=1.0)
    with (
        nan_from(ours, 1),
        pytest.raises(
            FloatingPointError, match="latents that step 1 made are NaN or infinite in 2 of 4 rows"
        ),
    ):
        ours.generate(image_prompts(2), [2, 2], seeds_N=range(4), params=plan(splits=((1, 2),)))


def test_a_pipeline_with_a_safety_checker_is_refused():
    pipeline = tiny_pipeline("sd")
    pipeline.safety_checker = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match="black.*safety_checker=None, requires_safety_checker=False"
    ):
        engine(pipeline=pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_size_is_both_sides_in_what_the_pipeline_can_make(name):
    multiple = 8 if name in ("sd", "sdxl") else 16
    wrong = [(64, None), (None, 64), (0, 64), (64, 0), (-64, 64), (64, -8), (64, 68), (60, 64)]
    for height, width in [*wrong, *([(64, 72)] if multiple == 16 else [])]:
        message = f"multiples of {multiple} for .*got height={height} and width={width}"
        with pytest.raises(ValueError, match=message):
            engine(name, height=height, width=width)
    engine(name, height=None, width=None)
    engine(name, height=multiple, width=2 * multiple)


def test_guidance_that_the_model_does_not_read_is_said_once():
    with pytest.warns(UserWarning, match=r"guidance_scale=2\.0 has no effect.*QwenImage") as found:
        ours = engine("qwen", guidance_scale=2.0)
    assert len(found) == 1
    rollouts = ours.generate(image_prompts(1), [1], seeds_N=[0], params=plan("qwen"))
    plain = engine("qwen").generate(image_prompts(1), [1], seeds_N=[0], params=plan("qwen"))
    assert torch.equal(rollouts.tree.latent_M, plain.tree.latent_M)
    for name in PIPELINES:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            engine(name)


@pytest.mark.parametrize(
    ("name", "dropped", "absent"),
    [
        ("qwen", ["negative_prompt_embeds"], "negative_prompt_embeds"),
        ("flux", [], "negative_prompt_embeds, negative_pooled_prompt_embeds"),
    ],
)
def test_true_guidance_without_a_negative_prompt_is_refused(name, dropped, absent):
    def encode(prompts):
        return {k: v for k, v in embeddings(name)(prompts).items() if k not in dropped}

    ours = engine(name, encode=encode, pipeline_kwargs={"true_cfg_scale": 3.0})
    with pytest.raises(ValueError, match=rf"true_cfg_scale=3\.0 has no effect without {absent}, "):
        ours.generate(image_prompts(1), [1], seeds_N=[0], params=plan(name))


# --- arguments of the pipeline ------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_the_engine_the_plan_or_the_data_decide_is_refused(name):
    with pytest.raises(ValueError, match=f"pipeline_kwargs must not contain '{name}': "):
        engine(pipeline_kwargs={name: None})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_skp": 1}, "StableDiffusionPipeline takes no clip_skp .*Did you mean clip_skip?"),
        ({"true_cfg_scale": 2.0}, "StableDiffusionPipeline takes no true_cfg_scale"),
        ({"clip_skip": 1}, "'clip_skip'. has no effect: it says how .* encode= gives"),
        ({"prompt_embeds": 1}, "not contain 'prompt_embeds': embeddings are of the prompts"),
    ],
)
def test_an_argument_without_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        engine(pipeline_kwargs=settings)


def samples(name="sd", **settings):
    pipeline = tiny_pipeline(name)
    torch.manual_seed(1)
    add_tiny_text_encoder(pipeline)
    ours = engine(name, pipeline=pipeline, encode=None, **settings)
    return ours.generate(image_prompts(2), [1, 1], seeds_N=[0, 1], params=plan(name)).tree


def test_arguments_of_the_encoder_reach_it():
    plain, same = samples(), samples(pipeline_kwargs={"lora_scale": None})
    assert torch.equal(plain.latent_M, same.latent_M)
    # With some transformers, diffusers looks for a part of CLIP that is no longer there.
    with pytest.raises(ValueError, match="StableDiffusionPipeline fails with {'clip_skip': 7}"):
        samples(pipeline_kwargs={"clip_skip": 7})


def test_guidance_rescale_acts_in_the_call():
    plain, other = samples(), samples(pipeline_kwargs={"guidance_rescale": 0.7})
    assert not torch.equal(plain.latent_M, other.latent_M)


@pytest.mark.slow
def test_a_negative_prompt_is_encoded_for_all_or_for_each():
    plain, blank, other = samples(), samples(negative_prompt=""), samples(negative_prompt="dark")
    assert torch.equal(plain.latent_M, blank.latent_M)
    assert not torch.equal(plain.latent_M, other.latent_M)
    assert torch.equal(plain.conditions["prompt_embeds"], other.conditions["prompt_embeds"])
    pipeline = tiny_pipeline("sd")
    torch.manual_seed(1)
    add_tiny_text_encoder(pipeline)
    ours = engine(pipeline=pipeline, encode=None, negative_prompt_column="against")
    prompts = [
        dataclasses.replace(prompt, columns={"against": text})
        for prompt, text in zip(image_prompts(2), ("", "dark"), strict=True)
    ]
    each = ours.generate(prompts, [1, 1], seeds_N=[0, 1], params=plan()).tree
    for row, tree in enumerate((plain, other)):
        states = each.prompt_M == row
        torch.testing.assert_close(each.latent_M[states], tree.latent_M[tree.prompt_M == row])
    with pytest.raises(
        ValueError, match="'against' must be a text of every prompt.*prompt-0 has No"
    ):
        ours.check(image_prompts(2), [plan()])


def test_a_negative_prompt_without_effect_is_told():
    with pytest.warns(UserWarning, match="negative_prompt has no effect.*guidance_scale above 1"):
        samples(negative_prompt="dark", guidance_scale=1.0)
    with pytest.raises(
        ValueError, match="encode= gives the embeddings: let it give negative_prompt"
    ):
        engine(negative_prompt="dark")
    with pytest.raises(ValueError, match="say the same thing: write one"):
        engine(encode=None, negative_prompt="dark", negative_prompt_column="against")


# --- guidance -----------------------------------------------------------------------------------


class Pair(diffusers.QwenImagePipeline):
    """Guides by a pair although its model has no guidance_embeds, as Sana's does."""

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1 and not self.distilled


@pytest.mark.parametrize("distilled", [False, True])
def test_guidance_by_a_pair_is_kept_unless_the_pipeline_was_distilled(distilled):
    parts = tiny_pipeline("qwen").components
    pipeline = Pair(**parts)
    pipeline.distilled = distilled
    settings = dict(pipeline=pipeline, guidance_scale=4.0, pipeline_kwargs={})
    if distilled:
        with pytest.warns(UserWarning, match="guidance_scale=4.0 has no effect"):
            ours = engine("qwen", **settings)
    else:
        ours = engine("qwen", **settings)
    assert ("guidance_scale" in ours._arguments) is not distilled
    assert not hasattr(pipeline, "_guidance_scale")


@pytest.mark.parametrize(
    ("name", "reads"),
    [("BriaFiboPipeline", True), ("FluxPipeline", False), ("Flux2Pipeline", False)],
)
def test_guidance_by_a_pair_is_known_by_the_calls_negative_prompt(name, reads):
    """With a model that says guidance_embeds is false, and a pipeline that does not tell either."""
    ours = engine("qwen")
    ours.pipeline.__class__ = getattr(diffusers, name)
    assert ours.denoiser.config.guidance_embeds is False
    assert bool(ours._reads_guidance(4.0)) is reads


# --- embeddings ---------------------------------------------------------------------------------


class Stacking(diffusers.StableDiffusionPipeline):
    """Takes lists of embeddings of different lengths, as Z-Image does."""

    @torch.no_grad()
    def __call__(
        self, prompt_embeds, latents=None, num_inference_steps=50, generator=None, **kwargs
    ):
        raise NotImplementedError


def stacking_call(
    self,
    prompt_embeds=None,
    negative_prompt_embeds=None,
    latents=None,
    num_inference_steps=50,
    generator=None,
    output_type="pil",
    height=None,
    width=None,
    guidance_scale=1.0,
    return_dict=True,
):
    longest = max(map(len, prompt_embeds))
    stacked = [torch.nn.functional.pad(x, (0, 0, 0, longest - len(x))) for x in prompt_embeds]
    return diffusers.StableDiffusionPipeline.__call__.__wrapped__(
        self,
        prompt_embeds=torch.stack(stacked),
        latents=latents,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type=output_type,
        height=height,
        width=width,
        guidance_scale=guidance_scale,
        return_dict=return_dict,
    )


Stacking.__call__ = torch.no_grad()(stacking_call)


def lists(prompts):
    return {
        "prompt_embeds": [torch.full((2 + int(p.key[-1]), 16), 0.1 * len(p.key)) for p in prompts]
    }


def test_embeddings_may_be_lists_of_different_lengths():
    parts = {k: v for k, v in tiny_pipeline("sd").components.items() if k != "image_encoder"}
    pipeline = Stacking(**parts, requires_safety_checker=False)
    ours = engine(pipeline=pipeline, encode=lists, guidance_scale=1.0)
    rollouts = ours.generate(image_prompts(3), [2, 0, 2], seeds_N=range(4), params=plan())
    assert [len(x) for x in rollouts.tree.conditions["prompt_embeds"]] == [2, 3, 4]
    with torch.no_grad():
        assert torch.equal(ours.logprobs(rollouts), rollouts.logprob_NT)
    both = concatenate([rollouts, rollouts])  # two rounds of one step
    assert [len(x) for x in both.tree.conditions["prompt_embeds"]] == [2, 3, 4]
    chained = concatenate([rollouts, rollouts], offsets=[0, 3])
    assert [len(x) for x in chained.tree.conditions["prompt_embeds"]] == [2, 3, 4, 2, 3, 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "lists of one tensor for each prompt, got prompt_embeds of type str"),
        ([1.0, 2.0], "lists of one tensor for each prompt, got prompt_embeds of type list"),
        ([torch.zeros(3, 16)], r"prompt_embeds of shape \(1, ...\) for 2 prompts"),
    ],
)
def test_embeddings_of_another_kind_are_refused(value, message):
    ours = engine(encode=lambda prompts: {"prompt_embeds": value})
    with pytest.raises(ValueError, match=message):
        ours.generate(image_prompts(2), [1, 1], seeds_N=[0, 1], params=plan())


# --- pipelines ----------------------------------------------------------------------------------


def test_a_second_denoiser_is_refused():
    pipeline = tiny_pipeline("sd3")
    pipeline.transformer_2 = pipeline.transformer
    with pytest.raises(ValueError, match=r"two denoisers, of which transformer_2.*Wan 2\.2 A14B"):
        engine("sd3", pipeline=pipeline)


def test_a_fused_lora_is_refused_and_an_unfused_one_is_not():
    pipeline = tiny_pipeline("sd")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    engine(pipeline=pipeline)
    pipeline.fuse_lora(components=["unet"])
    with pytest.raises(
        ValueError, match=r"LoRA that is fused into .*to_q and \d+ other.*unfuse_lora"
    ):
        engine(pipeline=pipeline)
    pipeline.unfuse_lora(components=["unet"])
    engine(pipeline=pipeline)


def test_an_ip_adapter_is_refused():
    pipeline = tiny_pipeline("sd")
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match="IP-Adapter, which needs an image for each prompt"):
        engine(pipeline=pipeline)


def test_a_cache_between_steps_is_refused():
    pipeline = tiny_pipeline("flux")
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="cache that carries activations.*disable_cache"):
        engine("flux", pipeline=pipeline)


# --- before the first rollout -------------------------------------------------------------------


def test_plans_are_checked_without_an_evaluation_of_the_denoiser():
    ours = engine()
    calls = []
    ours.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    ours.check(image_prompts(2), [plan(), plan(trained=(1,))])
    assert not calls and ours.evaluations == 0
    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = ddim(set_alpha_to_one=True)
    closing = engine(pipeline=pipeline)
    closing.check(image_prompts(1), [plan()])
    last = StepPlan(num_steps=3, rule="ddim", level=1.0, stochastic=(0, 1, 2), trained=(2,))
    with pytest.raises(ValueError, match=r"trained need edges.*std 0 at \[2\]"):
        closing.check(image_prompts(1), [plan(), last])
    with pytest.raises(ValueError, match="rule flow_sde is for models that predict flow"):
        ours.check(
            image_prompts(1), [StepPlan(num_steps=3, rule="flow_sde", level=1.0, stochastic=())]
        )


def test_pure_noise_whose_noise_is_predicted_is_refused():
    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = ddim(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=0
    )
    ours = engine(pipeline=pipeline)
    with pytest.raises(ValueError, match=r"edge 0 starts from pure noise \(alpha 0\)"):
        ours.check(image_prompts(1), [plan()])
