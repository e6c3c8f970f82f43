"""Settings of a run beside those of the training: policy, task, data, rewards; and their checks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trl import ModelConfig

from rl.config.language import RolloutConfig
from rl.config.own import nearest
from rollouts.rewards.text import BUILT_IN, WITH_ARGUMENTS, check_reward_name

from .config import ConfigError

T = TypeVar("T")

TASKS = {
    "language": {"arithmetic": ".arithmetic.task", "maze": ".maze.task"},
    "diffusion": {"digits": ".images.task"},
}
"""Embedded tasks of each kind of policy: modules of this package with `prepare(settings, seed=...)`.

The names begin with a dot because the package has two: `recipes` here, `apportion_recipes` installed.
"""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What the weights of a model may be loaded as."""

DATA = (
    *("dataset_name", "dataset_config", "dataset_split", "dataset_limit", "validation_name"),
    *("validation_split", "validation_size", "prompt_column", "answer_column", "prompt_template"),
    *("system_prompt", "conversational"),
)
"""Settings of the data set. An embedded task brings its own data and takes none of these."""

OF_LANGUAGE = ("answer_column", "system_prompt", "conversational", "chat_template", "pad_token")
"""Settings that a diffusion model has no use for."""


@dataclass
class RecipeArguments:
    """What a run trains on, beside the model and the settings of training."""

    policy: str = field(
        default="language",
        metadata={"help": "What is trained: language (a causal LM) or diffusion (a pipeline)."},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "Embedded task: arithmetic, maze, digits. Brings model, data and rewards."
        },
    )
    task_settings: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the embedded task, as in its README."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a .jsonl, .json, .csv, .parquet or .txt file, a folder, or a hub id."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a hub data set; of validation_name too where that is the same."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    validation_name: str | None = field(
        default=None, metadata={"help": "Held-out prompts. Default: drawn from the training rows."}
    )
    validation_split: str = field(default="test", metadata={"help": "Split of validation_name."})
    validation_size: int = field(
        default=128, metadata={"help": "Held-out prompts drawn where no validation_name is given."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Column given to rewards as `answer`."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text with {column} fields that becomes the prompt."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "Makes prompts conversational, with this first message."}
    )
    conversational: bool = field(
        default=False, metadata={"help": "Turn text prompts into a message of role user."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a chat template, for a tokenizer without one."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Pad token, for a tokenizer without one."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that comes with a language model or its tokenizer."},
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards: built-in names, path/to/file.py:function, folders or hub ids of reward "
            "models, or soft_overlong(max_completion_len=..., soft_punish_cache=...)."
        },
    )
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads per process. Default: OMP_NUM_THREADS, else the CPUs this process may "
            "use, shared by the processes. (Launchers set OMP_NUM_THREADS to 1: that 1 is not counted.)"
        },
    )
    report: bool = field(
        default=True, metadata={"help": "End with a table and pictures of the run."}
    )


def task_settings(recipe: RecipeArguments) -> dict[str, Any] | None:
    """The settings of the embedded task as a mapping; a command line gives them as JSON.

    Raises:
        ConfigError: if they are no mapping.
    """
    given = recipe.task_settings
    try:
        settings = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        settings = given
    if settings is not None and not isinstance(settings, dict):
        raise ConfigError(
            f"task_settings must be a mapping, on the command line as JSON such as "
            f"'{{\"train\": 50}}', got {given!r}"
        )
    return settings


def read_settings(kind: type[T], given: Mapping[str, Any] | str, *, where: str) -> T:
    """An instance of the dataclass `kind`: settings of an embedded task, or JSON of them.

    Args:
        where: the name of these settings in a YAML file, for messages.

    Raises:
        ValueError: for a setting that does not exist.
    """
    values = json.loads(given) if isinstance(given, str) else dict(given)
    check_names(kind, values, where=where)
    return kind(**values)


def check_names(kind: type, given: Mapping[str, Any], *, where: str) -> None:
    """Refuse names that are no fields of the dataclass `kind`.

    Raises:
        ValueError: with the nearest name and all names there are.
    """
    names = [item.name for item in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            raise ValueError(
                f"{where} has no {name!r}.{nearest(name, names)} It has {', '.join(names)}"
            )


def check_model(model_config: ModelConfig) -> None:
    """Refuse a model's settings that are known to be wrong before it is loaded.

    Raises:
        ConfigError: with what to write instead.
    """
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_config, name):
            raise ConfigError(
                f"{name} is not supported: a policy trains and generates in the weights it is given; "
                "leave it out, and write dtype: bfloat16 and use_peft: true to save memory"
            )
    dtype = model_config.dtype
    if dtype not in (None, *DTYPES):
        raise ConfigError(
            f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{nearest(str(dtype), DTYPES)}"
        )
    name = model_config.model_name_or_path or ""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(
            f"model_name_or_path={name!r}: no such folder; write one that exists, or a hub id such as "
            "Qwen/Qwen3-0.6B"
        )


def check_recipe(recipe: RecipeArguments, config: RolloutConfig) -> None:
    """Refuse what is known to be wrong before a task is prepared or anything is loaded.

    Raises:
        ConfigError: with what to write instead.
        ValueError: for a reward that does not exist.
    """
    if recipe.policy not in TASKS:
        raise ConfigError(f"policy must be language or diffusion, got {recipe.policy!r}")
    if recipe.num_threads is not None and recipe.num_threads < 1:
        raise ConfigError(f"num_threads must be at least 1, got {recipe.num_threads}")
    for name in ("validation_size", "dataset_limit"):
        value, least = getattr(recipe, name), int(name == "dataset_limit")
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    weights = config.reward_weights
    if weights is not None and recipe.rewards and len(weights) != len(recipe.rewards):
        raise ConfigError(
            f"reward_weights has {len(weights)} entries for {len(recipe.rewards)} rewards: write one "
            "each"
        )
    names = [*BUILT_IN, *WITH_ARGUMENTS]
    if recipe.policy == "diffusion":
        from rollouts.rewards.image import IMAGE_REWARDS
        from rollouts.rewards.image_models import MODEL_REWARDS

        names = [*IMAGE_REWARDS, *MODEL_REWARDS]
    for spec in recipe.rewards:
        check_reward_name(spec, names)
    defaults = RecipeArguments()
    given = [name for name in DATA if getattr(recipe, name) != getattr(defaults, name)]
    known = TASKS[recipe.policy]
    if recipe.task is not None and recipe.task not in known:
        of = " for a diffusion model" if recipe.policy == "diffusion" else ""
        raise ConfigError(
            f"task must be one of {', '.join(known)}{of}, got {recipe.task!r}."
            f"{nearest(recipe.task, known)}"
        )
    if recipe.task is not None and given:
        raise ConfigError(
            f"task {recipe.task!r} brings its data, so {' and '.join(given)} would have no effect: "
            "leave it out, or leave out task"
        )
    for name in OF_LANGUAGE if recipe.policy == "diffusion" else ():
        if getattr(recipe, name) != getattr(defaults, name):
            raise ConfigError(f"{name} has no meaning for a diffusion model: leave it out")
    if recipe.task is None and recipe.task_settings:
        raise ConfigError(f"task_settings={recipe.task_settings} needs task, which is not set")
    if recipe.validation_name is None and "validation_split" in given:
        raise ConfigError("validation_split needs validation_name: it is a split of that data set")
    if recipe.validation_name is not None and "validation_size" in given and recipe.validation_size:
        raise ConfigError(
            "validation_size draws prompts from the training rows, and validation_name names others: "
            "write one of them"
        )
