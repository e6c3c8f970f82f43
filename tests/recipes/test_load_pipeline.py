"""The pipeline of a user's folder: what stands for its scheduler, and its safety checker left out."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig
from trl import ModelConfig

from recipes.config import ConfigError
from recipes.diffusion import load_pipeline
from rl.config.diffusion import DenoisingConfig
from rl.policies.pipeline import ddim_of, flow_of
from rollouts.diffusion.recording_scheduler import Recording, recording_scheduler
from tests.tiny_pipelines import add_tiny_text_encoder, add_tiny_vae, tiny_sd, tiny_sd3

PLAN = {"num_steps": 4, "rule": "ddim", "level": 1.0, "last_edge": "trained"}

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def save(folder, *, scheduler=None, checker=None):
    """A whole Stable Diffusion of tiny parts."""
    pipeline = tiny_sd()
    add_tiny_text_encoder(pipeline)
    add_tiny_vae(pipeline)
    parts = {name: getattr(pipeline, name) for name in ("text_encoder", "tokenizer", "vae")}
    pipeline.register_modules(**parts, scheduler=scheduler or pipeline.scheduler)
    if checker is not None:
        pipeline.register_modules(safety_checker=checker)
        pipeline.register_to_config(requires_safety_checker=True)
    pipeline.save_pretrained(folder)
    return folder


def load(folder, *, rule="ddim"):
    config = DenoisingConfig(output_dir=str(folder), plan=PLAN | {"rule": rule}, use_cpu=True)
    return load_pipeline(config, ModelConfig(model_name_or_path=str(folder)))


def tiny_checker():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    size |= {"num_hidden_layers": 1}
    vision = size | {"image_size": 32, "patch_size": 16}
    return StableDiffusionSafetyChecker(
        CLIPConfig(text_config=size, vision_config=vision, projection_dim=8)
    )


@pytest.mark.slow
def test_a_safety_checker_is_not_loaded_and_a_line_says_so(tmp_path, capfd):
    folder = save(tmp_path / "checked", checker=tiny_checker())
    capfd.readouterr()
    pipeline = load(folder)
    said = capfd.readouterr().err
    assert said.count("is not loaded: it makes images black, and they would be rewarded") == 1
    assert "disabled the safety checker" not in said
    assert pipeline.safety_checker is None
    assert (folder / "safety_checker").is_dir()
    load(save(tmp_path / "unchecked"))
    assert "safety" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(skip_prk_steps=True),
        PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False),
        EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading"),
        EulerDiscreteScheduler(prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_ddim_takes_the_noise_levels_and_its_last_step_draws_noise(scheduler, tmp_path, capfd):
    pipeline = load(save(tmp_path / "model", scheduler=scheduler))
    said = capfd.readouterr().err
    assert f"{type(scheduler).__name__} is replaced by DDIMScheduler for rule ddim" in said
    ours = pipeline.scheduler
    assert type(ours) is DDIMScheduler
    assert ours.config.prediction_type == scheduler.config.prediction_type
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod)
    assert ours.final_alpha_cumprod == ours.alphas_cumprod[0]
    plan = DenoisingConfig(output_dir=str(tmp_path), plan=PLAN, use_cpu=True).step_plan(0)
    assert plan.trained[-1] == 3
    recording = Recording(plan=plan, window=(0, 4))
    recorded = recording_scheduler(ours)
    recorded.recording = recording
    recorded.set_timesteps(4)
    assert recording.std[-1] > 0
    # A step ends at the noise level where the next one begins.
    torch.testing.assert_close(recording.levels[:-1, 2:], recording.levels[1:, :2])


def test_defaults_of_another_scheduler_and_its_own_end_are_kept():
    # The default of this class is to close at alpha 1, and its betas are not DDIMScheduler's.
    given = DDIMParallelScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = ddim_of(given)
    torch.testing.assert_close(ours.alphas_cumprod, given.alphas_cumprod)
    assert not torch.equal(ours.alphas_cumprod, DDIMScheduler().alphas_cumprod)
    assert ours.final_alpha_cumprod == 1
    assert not ours.config.clip_sample and not ours.config.thresholding


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        EDMEulerScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_rule_ddim_is_refused_where_the_model_is_of_another_kind(scheduler):
    name = type(scheduler).__name__
    with pytest.raises(
        ValueError, match=f"rule ddim is for models that predict epsilon.*{name}.*rule: flow_sde"
    ):
        ddim_of(scheduler)


def test_rule_ddim_is_refused_for_a_flow_matching_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: {})
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: tiny_sd3())
    with pytest.raises(
        ConfigError, match="rule ddim is for .* for a flow-matching model write rule"
    ):
        load(tmp_path / "sd3")
    assert (
        type(load(tmp_path / "sd3", rule="flow_sde").scheduler) is FlowMatchEulerDiscreteScheduler
    )


@pytest.mark.parametrize("shift", [3.0, 4.0])
@pytest.mark.parametrize("zero", [False, True])
def test_levels_that_betas_do_not_say_are_taken_whole(shift, zero):
    given = CogVideoXDDIMScheduler(
        snr_shift_scale=shift,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero,
        timestep_spacing="trailing",
    )
    ours = ddim_of(given)
    torch.testing.assert_close(
        ours.alphas_cumprod, given.alphas_cumprod.float(), rtol=1e-4, atol=1e-6
    )
    assert recording_scheduler(ours).config.trained_betas is not None


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (LCMScheduler(), "cannot replace LCMScheduler: .* sampled in another way.*PNDMScheduler"),
        (TCDScheduler(), "cannot replace TCDScheduler"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas=True of EulerDiscrete"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type='continuous' of Euler"),
        (DPMSolverMultistepScheduler(use_lu_lambdas=True), "use_lu_lambdas=True of DPMSolver"),
        (DPMSolverMultistepScheduler(use_beta_sigmas=True), "use_beta_sigmas=True of DPMSolver"),
        (
            DDPMScheduler(beta_schedule="sigmoid"),
            "cannot replace this DDPMScheduler: sigmoid is not",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_scheduler_whose_settings_ddim_would_drop_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        ddim_of(scheduler)


def test_how_another_scheduler_solves_is_no_matter():
    ddim_of(PNDMScheduler(skip_prk_steps=True))
    ddim_of(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3))


@pytest.mark.parametrize(
    "given",
    [
        # As Sana and Wan come.
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    ],
    ids=["Sana", "Wan"],
)
def test_another_solver_of_flows_is_replaced_with_its_shift(given):
    ours = flow_of(given)
    assert type(ours) is FlowMatchEulerDiscreteScheduler
    given.set_timesteps(20)
    ours.set_timesteps(20)
    # Both go down one line from noise, shift t / (1 + (shift - 1) t), in steps of nearly one size.
    shift = given.config.flow_shift
    straight = [s / (shift - (shift - 1) * s) for s in (given.sigmas[:-1], ours.sigmas[:-1])]
    torch.testing.assert_close(straight[0][:15], straight[1][:15].float(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (PNDMScheduler(), "PNDMScheduler of this one is not set up for a flow.*write rule: ddim"),
        (DPMSolverMultistepScheduler(), "DPMSolverMultistepScheduler of this one is not set up"),
        (
            UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, thresholding=True
            ),
            "thresholding=True of UniPCMultistepScheduler is no setting of FlowMatchEuler",
        ),
    ],
    ids=["PNDM", "DPM", "thresholding"],
)
def test_flow_rules_are_refused_where_the_model_is_of_another_kind(scheduler, message):
    with pytest.raises(ValueError, match=message):
        flow_of(scheduler)
