"""Train a policy on rollouts that go where they carry gradient.

    accelerate launch recipes/train.py --config recipes/arithmetic/gvm_raft.yaml [--learning_rate 1e-4]
    accelerate launch recipes/train.py --config recipes/math/gvm_raft.yaml \
        --model_name_or_path PATH_OR_HUB_ID --dataset_name prompts.jsonl --rewards math_verify

Every setting is a key of the YAML file or an argument; arguments win. `--help` lists them all, and
`--policy diffusion --help` those of a diffusion run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `recipes` beside this file
# DeepSpeed, where it is installed, says on import that it found no GPU; the device is printed anyway.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.msg)

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config

from recipes.config import ConfigError, parse, peek
from recipes.data import load_rows, split_validation
from rl.config.own import nearest
from rl.config.settings import RolloutConfig
from rl.policies.language import pretrained
from rl.ranks import leave
from rl.run.checkpoint import TornCheckpointError
from rl.run.end import NoSignalError
from rl.run.tracking import RunExistsError
from rl.trainer import RolloutTrainer
from rollouts.prompts import check_rows, ensure_pad_token
from rollouts.rewards.contract import RewardError
from rollouts.rewards.text import BUILT_IN, WITH_ARGUMENTS, check_reward_name
from samplers.refill import RefillError

TASKS = {"arithmetic": "recipes.arithmetic.task"}
"""Embedded tasks: modules with `prepare(recipe, seed) -> (model folder, rows, validation, rewards)`."""

DIFFUSION_TASKS = ("digits",)
"""Embedded tasks of `recipes/diffusion.py`, which is loaded only where it is needed."""

EXPECTED = (
    *(ConfigError, ValueError, OSError, RewardError, NoSignalError, FloatingPointError),
    *(RefillError, ImportError),  # of a library that a setting needs
)
"""Errors whose message says what to do; anything else shows its traceback."""


@dataclass
class RecipeArguments:
    """What a run trains on, beside the model and the settings of training."""

    policy: str = field(
        default="language",
        metadata={"help": "What is trained: language (a causal LM) or diffusion (a pipeline)."},
    )
    task: str | None = field(
        default=None,
        metadata={"help": "Embedded task: arithmetic, digits. Brings model, data and rewards."},
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


def main(arguments: list[str] | None = None) -> RolloutTrainer:
    """Parse, prepare, train, save and report; returns the trainer.

    Raises:
        NoSignalError: after all that, if the run ended for want of signal.
    """
    is_diffusion = peek("policy", arguments) == "diffusion"
    if not is_diffusion and (task := peek("task", arguments)) in DIFFUSION_TASKS:
        raise ConfigError(f"task {task!r} trains a diffusion model: write policy: diffusion too")
    settings: type[RolloutConfig] = RolloutConfig
    if is_diffusion:
        from rl.config.diffusion import DenoisingConfig

        settings = DenoisingConfig
    elif {"--help", "-h"} & set(sys.argv[1:] if arguments is None else arguments):
        print("settings of a diffusion run: recipes/train.py --policy diffusion --help\n")
    recipe, config, model_config = parse((RecipeArguments, settings, ModelConfig), arguments)
    if recipe.policy not in ("language", "diffusion"):
        raise ConfigError(f"policy must be language or diffusion, got {recipe.policy!r}")
    recipe.task_settings = _task_settings(recipe)
    if peek("lora_dropout", arguments) is None:  # TRL's default is .05, which would be told as off
        model_config.lora_dropout = 0.0
    _check_model(model_config)
    _check_recipe(recipe, config)
    state = PartialState()
    _set_threads(recipe, state)
    if is_diffusion:
        from recipes.diffusion import make_trainer

        trainer: RolloutTrainer = make_trainer(recipe, config, model_config)
    else:
        trainer = language_trainer(recipe, config, model_config)
    trainer.recipe = asdict(recipe) | asdict(model_config)
    ended: NoSignalError | None = None
    try:
        trainer.train()
    except NoSignalError as error:  # the run is over and its model as good as any
        ended = error
    final = Path(str(config.output_dir)) / "final"
    trainer.save_model(str(final))
    if recipe.report and state.is_main_process:
        from recipes.report.report import report

        report([config.output_dir])
        Console().print(f"model: {final}")
    leave()
    if ended is not None:
        raise ended
    return trainer


def _task_settings(recipe: RecipeArguments) -> dict[str, Any] | None:
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


def _check_model(model_config: ModelConfig) -> None:
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


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What the weights of a model may be loaded as."""

DATA = (
    *("dataset_name", "dataset_config", "dataset_split", "dataset_limit", "validation_name"),
    *("validation_split", "validation_size", "prompt_column", "answer_column", "prompt_template"),
    *("system_prompt", "conversational"),
)
"""Settings of data, which an embedded task brings."""

OF_LANGUAGE = ("answer_column", "system_prompt", "conversational", "chat_template", "pad_token")
"""Settings of recipes that a diffusion model has no use for."""


def _check_recipe(recipe: RecipeArguments, config: RolloutConfig) -> None:
    """Refuse what is known to be wrong before a task is prepared or anything is loaded."""
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
    known = DIFFUSION_TASKS if recipe.policy == "diffusion" else TASKS
    if recipe.task in known and given:
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


def language_trainer(
    recipe: RecipeArguments, config: RolloutConfig, model_config: ModelConfig
) -> RolloutTrainer:
    """The trainer of a causal language model that the settings describe."""
    rows, validation, rewards = task_or_data(recipe, config, model_config)
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


def available_cpus() -> int:
    """CPUs that this process may use: by its affinity, and by the quota of its control group."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):
        return cpus


def _asked_threads() -> int | None:
    """OMP_NUM_THREADS, unless it is the 1 that launchers set where nobody did."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(value) if value.isdecimal() else 0
    launched = any(n.startswith("ACCELERATE_") or n == "LOCAL_WORLD_SIZE" for n in os.environ)
    return None if threads < 1 or (threads == 1 and launched) else threads


def _set_threads(recipe: RecipeArguments, state: PartialState) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    threads = recipe.num_threads or _asked_threads() or max(1, available_cpus() // max(local, 1))
    torch.set_num_threads(threads)
    if state.is_main_process:
        print(
            f"{state.num_processes} process(es), {threads} CPU thread(s) each, device {state.device}",
            file=sys.stderr,
        )


def task_or_data(
    recipe: RecipeArguments, config: RolloutConfig, model_config: ModelConfig
) -> tuple[Any, Any, list[Any]]:
    """Training rows, validation rows and rewards; an embedded task also names its model.

    Raises:
        ConfigError: if task, data, model or reward is missing.
    """
    if recipe.task is not None:
        if recipe.task not in TASKS:
            raise ConfigError(
                f"task must be one of {', '.join(TASKS)}, got {recipe.task!r}."
                f"{nearest(recipe.task, TASKS)}"
            )
        prepare: Callable[..., tuple] = import_module(TASKS[recipe.task]).prepare
        with PartialState().main_process_first():
            folder, rows, validation, rewards = prepare(
                recipe.task_settings or {}, seed=config.seed
            )
        model_config.model_name_or_path = model_config.model_name_or_path or str(folder)
        return rows, validation, recipe.rewards or rewards
    if recipe.dataset_name is None:
        raise ConfigError("nothing to train on: write task, or dataset_name with your prompts")
    if model_config.model_name_or_path is None:
        raise ConfigError("no model: write model_name_or_path, a folder or a hub id")
    if not recipe.rewards:
        raise ConfigError("no reward: write rewards, names or path/to/file.py:function")
    columns: dict[str, Any] = {
        "prompt_column": recipe.prompt_column,
        "answer_column": recipe.answer_column,
        "prompt_template": recipe.prompt_template,
        "system_prompt": recipe.system_prompt,
        "conversational": recipe.conversational,
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
    elif recipe.validation_size:
        rows, validation = split_validation(
            rows, recipe.validation_size, seed=config.seed, id_column=config.id_column
        )
    else:
        validation = None
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


def _plain_warning(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """A warning as one line; those that are not about use keep their place in the code."""
    if issubclass(category, UserWarning):
        return f"warning: {message}\n"
    return f"{where[0]}:{where[1]}: {category.__name__}: {message}\n"


if __name__ == "__main__":
    warnings.formatwarning = _plain_warning  # type: ignore[assignment]
    try:
        main()
    except (TornCheckpointError, RunExistsError, *EXPECTED) as error:
        if os.environ.get("APPORTION_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
