"""Training a diffusion model, called by `recipes/train.py` where a YAML says `policy: diffusion`."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from trl import ModelConfig, get_peft_config

from recipes.config import ConfigError
from recipes.data import load_rows, split_validation
from recipes.images.task import ImageTask
from rl.arguments import nearest
from rl.denoising_config import DenoisingConfig
from rl.denoising_trainer import DenoisingTrainer
from rollouts.diffusers_engine import DiffusersEngine
from rollouts.sde import VARIANCE_PRESERVING

if TYPE_CHECKING:
    from recipes.train import RecipeArguments

TASKS = {"digits": "recipes.images.task"}
"""Embedded tasks: modules with `prepare(settings, seed) -> ImageTask`."""

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


def make_trainer(
    recipe: RecipeArguments, config: DenoisingConfig, model_config: ModelConfig
) -> DenoisingTrainer:
    """The trainer that the settings describe.

    Raises:
        ConfigError: if task, data, model or reward is missing.
    """
    task = prepare(recipe, config, model_config)
    return DenoisingTrainer(
        task.pipeline,
        task.rewards,
        config,
        task.rows,
        eval_dataset=task.validation or None,
        peft_config=lora_config(model_config),
        engine=engine_of(task, config),
    )


def prepare(
    recipe: RecipeArguments, config: DenoisingConfig, model_config: ModelConfig
) -> ImageTask:
    """Pipeline, prompts and rewards: of an embedded task, or as the settings name them."""
    if recipe.task is not None:
        task = _embedded(recipe, config)
        for name, value in task.settings.items():
            setattr(config, name, value)
        return replace(task, rewards=list(recipe.rewards) or task.rewards)
    rows, validation = _data(recipe, config)
    if not recipe.rewards:
        raise ConfigError(
            "no reward: write rewards, names of image rewards or path/to/file.py:function"
        )
    return ImageTask(
        pipeline=load_pipeline(config, model_config),
        rows=rows,
        validation=validation or [],
        rewards=list(recipe.rewards),
    )


def engine_of(task: ImageTask, config: DenoisingConfig) -> DiffusersEngine:
    """The engine of the task's pipeline."""
    return DiffusersEngine(task.pipeline, encode=task.encode, **config.engine_settings())


def _embedded(recipe: RecipeArguments, config: DenoisingConfig) -> ImageTask:
    if recipe.task not in TASKS:
        raise ConfigError(
            f"task must be one of {', '.join(TASKS)} for a diffusion model, got {recipe.task!r}."
            f"{nearest(str(recipe.task), TASKS)}"
        )
    made: Callable[..., ImageTask] = import_module(TASKS[recipe.task]).prepare
    with PartialState().main_process_first():
        return made(recipe.task_settings or {}, seed=config.seed)


def _data(recipe: RecipeArguments, config: DenoisingConfig) -> tuple[Any, Any]:
    if recipe.dataset_name is None:
        raise ConfigError("nothing to train on: write task, or dataset_name with your prompts")
    columns: dict[str, Any] = {
        "prompt_column": recipe.prompt_column,
        "prompt_template": recipe.prompt_template,
    }
    rows = load_rows(
        recipe.dataset_name,
        config=recipe.dataset_config,
        split=recipe.dataset_split,
        limit=recipe.dataset_limit,
        **columns,
    )
    if recipe.validation_name is not None:
        same = recipe.validation_name == recipe.dataset_name
        validation = load_rows(
            recipe.validation_name,
            config=recipe.dataset_config if same else None,
            split=recipe.validation_split,
            **columns,
        )
        return rows, validation
    size = recipe.validation_size
    if len(rows) <= size == type(recipe).validation_size:  # the default, which nobody asked for
        size = len(rows) // 5
        told = f"{size} are held out" if size else "the prompts of training are validated with too"
        warnings.warn(
            f"validation_size: {recipe.validation_size} leaves nothing to train on of {len(rows)} "
            f"prompts, so {told}; write validation_size, 0 for no validation",
            stacklevel=2,
        )
        if not size:  # allowed: a sample is no answer that could be memorised
            return rows, rows
    if size:
        return split_validation(rows, size, seed=config.seed, id_column=config.id_column)
    return rows, None


def load_pipeline(config: DenoisingConfig, model_config: ModelConfig) -> Any:
    """The pipeline the settings name, with a scheduler whose steps are Gaussian actions.

    Under rule `ddim` a scheduler of another class is replaced (`ddim_of`), and a line says so. A
    safety checker is not loaded: its black images would be rewarded.

    Raises:
        ConfigError: if no model is named, or rule `ddim` does not fit it.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline

    name = model_config.model_name_or_path
    if name is None:
        raise ConfigError("no model: write model_name_or_path, a folder or a hub id")
    parts: Any = DiffusionPipeline.load_config(name, revision=model_config.model_revision)
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
    dtype = model_config.dtype
    pipeline = DiffusionPipeline.from_pretrained(
        name,
        revision=model_config.model_revision,
        torch_dtype=torch.float32 if dtype in (None, "auto") else getattr(torch, dtype),
        use_safetensors=True,
        **absent,
    )
    assert isinstance(config.plan, dict)
    if config.plan["rule"] == "ddim" and type(pipeline.scheduler) is not DDIMScheduler:
        own = pipeline.scheduler
        pipeline.scheduler = ddim_of(own)
        spacing = (
            "leading, not by linspace" if own.config.get("timestep_spacing") == "linspace" else ""
        )
        print(
            f"{type(own).__name__} is replaced by DDIMScheduler for rule ddim"
            + (f", its timesteps spaced {spacing}" if spacing else ""),
            file=sys.stderr,
        )
    return pipeline.to(PartialState().device)


def ddim_of(scheduler: Any) -> Any:
    """DDIM with the noise levels of another scheduler, such as the PNDM of Stable Diffusion 1.

    Where the other's settings do not say how the chain closes, it closes at the first noise level, as
    in every release of Stable Diffusion, and not at alpha 1 as is DDIMScheduler's own default: the
    last step then draws noise and can be trained. Timesteps spaced by linspace become Stable
    Diffusion's, leading with an offset of 1: DDIM goes down by whole strides, so that its steps would
    not end where the next one begins. Levels that betas do not say, as of CogVideoX, whose
    `snr_shift_scale` shifts them, are taken from the other scheduler's table.

    Raises:
        ConfigError: if the scheduler has no betas, is set up for a flow model, is made for a model
            that is sampled in another way, or has a setting that DDIM would drop.
    """
    from diffusers import DDIMScheduler

    given: Any = scheduler.config
    name = type(scheduler).__name__
    fits = given.get("prediction_type", "epsilon") in VARIANCE_PRESERVING
    if "beta_start" not in given or given.get("use_flow_sigmas") or not fits:
        raise ConfigError(
            f"rule ddim is for models that predict {', '.join(VARIANCE_PRESERVING)}, and the "
            f"{name} of this one is not of that kind; for a flow-matching model "
            f"write rule: flow_sde, constant_sde or cps in plan"
        )
    if name not in DDIM_CAN_REPLACE:
        raise ConfigError(
            f"rule ddim cannot replace {name}: a model that comes with it is sampled in another way "
            f"than by small steps of a diffusion, or at other noise levels. Schedulers it replaces: "
            f"{', '.join(DDIM_CAN_REPLACE)}"
        )
    _refuse_dropped(scheduler)
    kept: dict[str, Any] = {}
    if given.get("timestep_spacing") == "linspace":
        kept |= {"timestep_spacing": "leading", "steps_offset": 1}
    known = inspect.signature(DDIMScheduler.__init__).parameters
    settings = {key: value for key, value in given.items() if key in known}
    settings |= {"clip_sample": False, "thresholding": False}
    settings["set_alpha_to_one"] = given.get("set_alpha_to_one", False)
    try:
        made = DDIMScheduler(**settings | kept)
    except NotImplementedError as error:
        raise ConfigError(f"rule ddim cannot replace this {name}: {error}") from error
    levels = scheduler.alphas_cumprod.double()
    if (levels - made.alphas_cumprod).abs().max() > 1e-6:
        before = torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
        kept |= {"trained_betas": (1 - levels / before).tolist(), "rescale_betas_zero_snr": False}
        made = DDIMScheduler(**settings | kept)
    return made


def _refuse_dropped(scheduler: Any) -> None:
    """Raise ConfigError for a setting of a scheduler that DDIM does not have and that says something."""
    from diffusers import DDIMScheduler

    known = {*inspect.signature(DDIMScheduler.__init__).parameters, *SOLVER_ONLY, *IN_THE_LEVELS}
    own = inspect.signature(type(scheduler).__init__).parameters
    for key, value in scheduler.config.items():
        if key.startswith("_") or key in known or not value:
            continue
        if key not in own or value != own[key].default:
            raise ConfigError(
                f"{key}={value!r} of {type(scheduler).__name__} is no setting of DDIMScheduler, which "
                f"replaces it for rule ddim: the model would be sampled in another way than it says. "
                f"Save the pipeline with a DDIMScheduler of your choice and name that folder"
            )


def lora_config(model_config: ModelConfig) -> Any:
    """The LoraConfig of `use_peft`, on the attention where no modules are named; else None."""
    config: Any = get_peft_config(model_config)
    if config is None:
        return None
    config.task_type = None  # of language models
    modules = config.target_modules or ATTENTION
    if (
        isinstance(modules, str) and modules != "all-linear"
    ):  # TRL takes a lone name out of its list
        modules = [modules]
    config.target_modules = modules
    config.lora_dropout = 0.0
    return config
