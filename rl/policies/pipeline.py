"""Read pipelines from a folder or the hub, with a scheduler that the noise rule can use."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from rl.policies.loading import no_progress_bars
from rollouts.diffusion.sde import VARIANCE_PRESERVING

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
"""What LoRA adapts unless lora_target_modules says otherwise: the attention of diffusers' models."""

DDIM_CAN_REPLACE = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
    *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"),
    *("DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
)
"""Schedulers of diffusers that solve the same diffusion, in more or other steps. Models of others, such
as LCM's and TCD's, are distilled to jump."""

SOLVER_ONLY = (
    *("skip_prk_steps", "solver_order", "solver_type", "algorithm_type", "lower_order_final"),
    *("euler_at_final", "predict_x0", "disable_corrector", "solver_p", "interpolation_type"),
    *("variance_type", "final_sigmas_type", "noise_sampler_seed", "lambda_min_clipped"),
)
"""Settings that say how another scheduler solves, not which noise levels the model knows."""

IN_THE_LEVELS = ("snr_shift_scale",)
"""Settings that act on the table of noise levels alone, which `ddim_of` takes whole."""


OF_DIFFUSIONS = (
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset", "use_flow_sigmas", "flow_shift"),
)
"""Settings of schedulers set up for a flow that a flow does not read, or that `flow_of` takes over."""


def read_pipeline(
    name: str,
    *,
    rule: str,
    device: Any,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Any:
    """A pipeline whose steps are Gaussian actions, on the device.

    A safety checker is not loaded: its black images would be rewarded. A line says so.

    Args:
        name: a folder or hub id.
        rule: the noise rule; a scheduler of a class that it cannot use is replaced (`set_scheduler`).
        device: where all of it goes.
        dtype: of its weights.
        revision: commit of a hub id; None takes the newest.

    Raises:
        ValueError: if the rule does not fit the model.
    """
    from diffusers import DiffusionPipeline

    parts: Any = DiffusionPipeline.load_config(name, revision=revision)
    absent: dict[str, Any] = {}
    if (parts.get("safety_checker") or [None])[0] is not None:
        absent = {"safety_checker": None}
        if "requires_safety_checker" in parts:
            absent["requires_safety_checker"] = False
        print(
            f"the safety checker of {name} is not loaded: it makes images black, and they would be "
            f"rewarded",
            file=sys.stderr,
        )
    with no_progress_bars() if Path(name).is_dir() else nullcontext():
        pipeline = DiffusionPipeline.from_pretrained(
            name, revision=revision, torch_dtype=dtype, use_safetensors=True, **absent
        )
    set_scheduler(pipeline, rule)
    return pipeline.to(device)


def set_scheduler(pipeline: Any, rule: str) -> None:
    """Replace a scheduler that the rule cannot use, in place, and say so; see `ddim_of`, `flow_of`.

    Raises:
        ValueError: as `ddim_of` and `flow_of`.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    own = pipeline.scheduler
    if type(own) is (DDIMScheduler if rule == "ddim" else FlowMatchEulerDiscreteScheduler):
        return
    made = pipeline.scheduler = ddim_of(own) if rule == "ddim" else flow_of(own)
    line = f"{type(own).__name__} is replaced by {type(made).__name__} for rule {rule}"
    if rule != "ddim":
        line += f", with shift {made.config.shift}"
    elif own.config.get("timestep_spacing") == "linspace":
        line += ", its timesteps spaced leading, not by linspace"
    print(line, file=sys.stderr)


def place(pipeline: Any, device: torch.device) -> None:
    """Move what the pipeline holds to the device of the run; what is offloaded stays where it is."""
    modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    if any(hasattr(module, "_hf_hook") for module in modules):
        return
    if getattr(pipeline, "hf_device_map", None):
        return
    weights = (weight for module in modules for weight in module.parameters())
    if any(weight.device.type != device.type for weight in weights):
        pipeline.to(device)


def lora_of(peft_config: Any) -> Any:
    """The adapter's settings, those of attention where they name no modules.

    Args:
        peft_config: a LoraConfig or another of PEFT's, the arguments of a LoraConfig, or None.
    """
    from peft import LoraConfig

    if isinstance(peft_config, Mapping):
        peft_config = LoraConfig(**peft_config)
    if getattr(peft_config, "target_modules", ATTENTION) is None:
        peft_config = copy.copy(peft_config)
        peft_config.target_modules = set(ATTENTION)
    return peft_config


def flow_of(scheduler: Any) -> Any:
    """The Euler scheduler of flow matching in the place of another solver of flows, with its shift.

    Sana comes with a DPMSolverMultistepScheduler and Wan with a UniPCMultistepScheduler that are set up
    for flows. The levels of n steps lie on the same shifted line, but not at the same places.

    Raises:
        ValueError: if the scheduler is not set up for a flow, or has a setting that would be dropped.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    given: Any = scheduler.config
    if given.get("prediction_type") != "flow_prediction" or not given.get("use_flow_sigmas"):
        raise ValueError(
            f"rules flow_sde, constant_sde and cps are for flow-matching models, and the "
            f"{type(scheduler).__name__} of this one is not set up for a flow; for a model that "
            f"predicts {', '.join(VARIANCE_PRESERVING)} write rule: ddim in plan"
        )
    target = FlowMatchEulerDiscreteScheduler
    _refuse_dropped(scheduler, target, OF_DIFFUSIONS)
    known = inspect.signature(target.__init__).parameters
    settings = {key: value for key, value in given.items() if key in known}
    return target(**settings | {"shift": given.get("flow_shift", 1.0)})


def ddim_of(scheduler: Any) -> Any:
    """DDIM with the noise levels of another scheduler, such as the PNDM of Stable Diffusion 1.

    Where the other's settings do not say how the chain closes, it closes at the first noise level, as
    in every release of Stable Diffusion, and not at alpha 1 as is DDIMScheduler's own default: the
    last step then draws noise and can be trained. Timesteps spaced by linspace become Stable
    Diffusion's, leading with an offset of 1: DDIM goes down by whole strides, so that its steps would
    not end where the next one begins. Levels that betas do not say, as of CogVideoX, whose
    `snr_shift_scale` shifts them, are taken from the other scheduler's table.

    Raises:
        ValueError: if the scheduler has no betas, is set up for a flow model, is made for a model
            that is sampled in another way, or has a setting that DDIM would drop.
    """
    from diffusers import DDIMScheduler

    given: Any = scheduler.config
    name = type(scheduler).__name__
    fits = given.get("prediction_type", "epsilon") in VARIANCE_PRESERVING
    if "beta_start" not in given or given.get("use_flow_sigmas") or not fits:
        raise ValueError(
            f"rule ddim is for models that predict {', '.join(VARIANCE_PRESERVING)}, and the "
            f"{name} of this one is not of that kind; for a flow-matching model "
            f"write rule: flow_sde, constant_sde or cps in plan"
        )
    if name not in DDIM_CAN_REPLACE:
        raise ValueError(
            f"rule ddim cannot replace {name}: a model that comes with it is sampled in another way "
            f"than by small steps of a diffusion, or at other noise levels. Schedulers it replaces: "
            f"{', '.join(DDIM_CAN_REPLACE)}"
        )
    _refuse_dropped(scheduler, DDIMScheduler, IN_THE_LEVELS)
    kept: dict[str, Any] = {}
    if given.get("timestep_spacing") == "linspace":
        kept |= {"timestep_spacing": "leading", "steps_offset": 1}
    known = inspect.signature(DDIMScheduler.__init__).parameters
    settings = {key: value for key, value in given.items() if key in known}
    settings |= {"clip_sample": False, "thresholding": False}
    settings["set_alpha_to_one"] = given.get("set_alpha_to_one", False)
    try:
        made: Any = DDIMScheduler(**settings | kept)
    except NotImplementedError as error:
        raise ValueError(f"rule ddim cannot replace this {name}: {error}") from error
    levels = scheduler.alphas_cumprod.double()
    if (levels - made.alphas_cumprod).abs().max() > 1e-6:
        before = torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
        kept |= {"trained_betas": (1 - levels / before).tolist(), "rescale_betas_zero_snr": False}
        made = DDIMScheduler(**settings | kept)
    return made


def _refuse_dropped(scheduler: Any, target: Any, taken_over: tuple[str, ...]) -> None:
    """Raise ValueError for a setting of a scheduler that says something and that `target` lacks."""
    known = {*inspect.signature(target.__init__).parameters, *SOLVER_ONLY, *taken_over}
    own = inspect.signature(type(scheduler).__init__).parameters
    for key, value in scheduler.config.items():
        if key.startswith("_") or key in known or not value:
            continue
        if key not in own or value != own[key].default:
            raise ValueError(
                f"{key}={value!r} of {type(scheduler).__name__} is no setting of {target.__name__}, "
                f"which replaces it for the rule of plan: the model would be sampled in another way "
                f"than it says. Save the pipeline with a {target.__name__} of your choice and name "
                f"that folder"
            )
