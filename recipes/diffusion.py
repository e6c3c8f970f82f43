"""Train a diffusion model; called by `recipes/train.py` if a YAML says `policy: diffusion`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from trl import ModelConfig, get_peft_config

from rl.config.diffusion import DenoisingConfig
from rl.denoising_trainer import DenoisingTrainer
from rl.policies import pipeline as denoising_pipeline
from rl.policies.pipeline import ATTENTION, read_pipeline
from rollouts.diffusion.engine import DiffusersEngine

from .arguments import RecipeArguments
from .config import ConfigError
from .data import embedded_task, load_data
from .images.task import ImageTask


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
        task: ImageTask = embedded_task(recipe, seed=config.seed)
        for name, value in task.settings.items():
            setattr(config, name, value)
        return replace(task, rewards=list(recipe.rewards) or task.rewards)
    rows, validation = load_data(recipe, seed=config.seed, id_column=config.id_column)
    return ImageTask(
        pipeline=load_pipeline(config, model_config),
        rows=rows,
        validation=validation or [],
        rewards=list(recipe.rewards),
    )


def engine_of(task: ImageTask, config: DenoisingConfig) -> DiffusersEngine:
    """The engine of the task's pipeline."""
    return DiffusersEngine(task.pipeline, encode=task.encode, **config.engine_settings())


def load_pipeline(config: DenoisingConfig, model_config: ModelConfig) -> Any:
    """The pipeline the settings name, with a scheduler whose steps are Gaussian actions.

    Raises:
        ConfigError: if no model is named, or the rule of the plan does not fit it.
    """
    name = model_config.model_name_or_path
    if name is None:
        raise ConfigError("no model: write model_name_or_path, a folder or a hub id")
    dtype = model_config.dtype
    assert isinstance(config.plan, dict)
    try:
        return read_pipeline(
            name,
            rule=config.plan["rule"],
            device=PartialState().device,
            dtype=torch.float32 if dtype in (None, "auto") else getattr(torch, dtype),
            revision=model_config.model_revision,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def ddim_of(scheduler: Any) -> Any:
    """`rl.policies.pipeline.ddim_of`, whose refusals are settings' errors here.

    Raises:
        ConfigError: if DDIM cannot take the scheduler's place.
    """
    try:
        return denoising_pipeline.ddim_of(scheduler)
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
