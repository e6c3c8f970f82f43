"""What the diffusion engine refuses rather than turn into images: NaN, safety checkers, sizes."""

import math
import warnings

import diffusers
import pytest
import torch

from rollouts.diffusers_engine import DiffusersEngine
from rollouts.step_plan import StepPlan
from tests.tiny_pipelines import (
    ENGINE_SETTINGS,
    PIPELINES,
    RULES,
    add_tiny_vae,
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
