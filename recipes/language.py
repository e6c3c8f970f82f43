"""Train a causal language model; called by `recipes/train.py`. For diffusion: `recipes/diffusion.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config

from rl.config.language import RolloutConfig
from rl.policies.loading import pretrained
from rl.trainer import RolloutTrainer
from rollouts.prompts import check_rows, ensure_pad_token

from .arguments import RecipeArguments
from .config import ConfigError
from .data import embedded_task, load_data


def make_trainer(
    recipe: RecipeArguments, config: RolloutConfig, model_config: ModelConfig
) -> RolloutTrainer:
    """The trainer of a causal language model that the settings describe.

    Raises:
        ConfigError: if data, model or reward is missing, or there are too few prompts.
    """
    rows, validation, rewards = prepare(recipe, config, model_config)
    tokenizer = load_tokenizer(recipe, model_config)
    for part in (rows, validation):
        if part:
            how: Any = {"id_column": config.id_column, "duplicates": config.duplicates}
            count = check_rows(part, **how)
            if part is rows and count < config.prompts_per_step:
                raise ConfigError(
                    f"prompts_per_step={config.prompts_per_step} exceeds the {count} prompts of the "
                    f"training data; write prompts_per_step: {count} or less"
                )
    return RolloutTrainer(
        load_model(model_config, trust_remote_code=recipe.trust_remote_code),
        rewards,
        config,
        rows,
        eval_dataset=validation or None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )


def prepare(
    recipe: RecipeArguments, config: RolloutConfig, model_config: ModelConfig
) -> tuple[Any, Any, list[Any]]:
    """Training rows, validation rows and rewards; an embedded task also names its model.

    Raises:
        ConfigError: if data, model or reward is missing.
    """
    if recipe.task is not None:
        folder, rows, validation, rewards = embedded_task(recipe, seed=config.seed)
        model_config.model_name_or_path = model_config.model_name_or_path or str(folder)
        return rows, validation, recipe.rewards or rewards
    if model_config.model_name_or_path is None:
        raise ConfigError("no model: write model_name_or_path, a folder or a hub id")
    rows, validation = load_data(recipe, seed=config.seed, id_column=config.id_column)
    return rows, validation, recipe.rewards


def load_tokenizer(recipe: RecipeArguments, model_config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template and pad token the settings name."""
    tokenizer = _loaded(
        AutoTokenizer,
        model_config.model_name_or_path or "",
        revision=model_config.model_revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    if recipe.chat_template is not None:
        if not Path(recipe.chat_template).is_file():
            raise ConfigError(
                f"chat_template must be a file with a Jinja template, got {recipe.chat_template!r}, "
                "which does not exist"
            )
        try:
            tokenizer.chat_template = Path(recipe.chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"chat_template {recipe.chat_template} is not UTF-8: {error}"
            ) from None
    ensure_pad_token(tokenizer, recipe.pad_token)
    return tokenizer


def _loaded(kind: Any, source: str, **settings: Any) -> Any:
    """`pretrained`, with what libraries say of damaged files or missing parts as one line."""
    try:
        return pretrained(kind, source, **settings)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(
            f"model_name_or_path={source!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def load_model(model_config: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model the settings name, by TRL's conventions."""
    assert model_config.model_name_or_path is not None
    dtype = model_config.dtype
    return _loaded(
        AutoModelForCausalLM,
        model_config.model_name_or_path,
        trust_remote_code=trust_remote_code,
        revision=model_config.model_revision,
        dtype=dtype if dtype in (None, "auto") else getattr(torch, dtype),
        attn_implementation=model_config.attn_implementation,
    )
