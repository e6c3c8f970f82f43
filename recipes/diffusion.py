"""Training a diffusion model, called by `recipes/train.py` where a YAML says `policy: diffusion`."""

from __future__ import annotations

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
from rl.config.diffusion import DenoisingConfig
from rl.config.own import nearest
from rl.denoising_trainer import DenoisingTrainer
from rl.policies import pipeline as denoising_pipeline
from rl.policies.pipeline import ATTENTION, read_pipeline
from rollouts.diffusion.engine import DiffusersEngine

if TYPE_CHECKING:
    from recipes.train import RecipeArguments

TASKS = {"digits": "recipes.images.task"}
"""Embedded tasks: modules with `prepare(settings, seed) -> ImageTask`."""


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
