"""Train a policy on rollouts that go where they carry gradient.

    accelerate launch recipes/train.py --config recipes/arithmetic/gvm_raft.yaml [--learning_rate 1e-4]
    accelerate launch recipes/train.py --config recipes/math/gvm_raft.yaml \
        --model_name_or_path PATH_OR_HUB_ID --dataset_name prompts.jsonl --rewards math_verify

Installed: `apportion train --config arithmetic/gvm_raft`, or on several processes
`accelerate launch -m apportion_recipes.train --config arithmetic/gvm_raft`.

Every setting is a key of the YAML file or an argument; arguments win. `--help` lists them all, and
`--policy diffusion --help` those of a diffusion run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script: this folder is on the path, in the place of its parent
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]
    __package__ = _here.name  # which relative imports go by (PEP 366)

from .console import plain_warnings, quiet

quiet()  # before the libraries are imported

from accelerate import PartialState
from rich.console import Console
from trl import ModelConfig

from rl.config.language import RolloutConfig
from rl.ranks import leave
from rl.run.checkpoint import TornCheckpointError
from rl.run.end import NoSignalError
from rl.run.tracking import RunExistsError
from rl.trainer import RolloutTrainer
from rollouts.rewards.contract import RewardError
from samplers.refill import RefillError

from . import language
from .arguments import TASKS, RecipeArguments, check_model, check_recipe, task_settings
from .config import ConfigError, parse, peek
from .devices import set_threads, use_one_gpu

EXPECTED = (
    *(ConfigError, ValueError, OSError, RewardError, NoSignalError, FloatingPointError),
    *(RefillError, ImportError),  # of a library that a setting needs
)
"""Errors whose message says what to do; anything else shows its traceback."""


def main(arguments: Sequence[str] | None = None) -> RolloutTrainer:
    """Parse, prepare, train, save and report; returns the trainer.

    Raises:
        NoSignalError: after all that, if the run ended for want of signal.
    """
    is_diffusion = peek("policy", arguments) == "diffusion"
    if not is_diffusion and (task := peek("task", arguments)) in TASKS["diffusion"]:
        raise ConfigError(f"task {task!r} trains a diffusion model: write policy: diffusion too")
    settings: type = RolloutConfig
    if is_diffusion:
        if find_spec("diffusers") is None:
            raise ConfigError(
                "policy: diffusion needs diffusers: pip install 'apportion[diffusion]'"
            )
        from rl.config.diffusion import DenoisingConfig

        settings = DenoisingConfig
    elif {"--help", "-h"} & set(sys.argv[1:] if arguments is None else arguments):
        print("settings of a diffusion run: recipes/train.py --policy diffusion --help\n")
    recipe, config, model_config = parse((RecipeArguments, settings, ModelConfig), arguments)
    recipe.task_settings = task_settings(recipe)
    if peek("lora_dropout", arguments) is None:  # TRL's default is .05, which would be told as off
        model_config.lora_dropout = 0.0
    check_model(model_config)
    check_recipe(recipe, config)
    state = PartialState()
    set_threads(recipe.num_threads, state)
    use_one_gpu(config)
    if is_diffusion:
        from .diffusion import make_trainer  # diffusers is loaded only where it is needed

        trainer: RolloutTrainer = make_trainer(recipe, config, model_config)
    else:
        trainer = language.make_trainer(recipe, config, model_config)
    trainer.recipe = asdict(recipe) | asdict(model_config)
    ended: NoSignalError | None = None
    try:
        trainer.train()
    except NoSignalError as error:  # the run is over and its model as good as any
        ended = error
    final = Path(str(config.output_dir)) / "final"
    trainer.save_model(str(final))
    if recipe.report and state.is_main_process:
        from .report.report import report

        report([config.output_dir])
        Console().print(f"model: {final}")
    leave()
    if ended is not None:
        raise ended
    return trainer


def run(arguments: Sequence[str] | None = None) -> None:
    """`main` as a command: an expected error ends it with a message instead of a traceback."""
    plain_warnings()
    try:
        main(arguments)
    except (TornCheckpointError, RunExistsError, *EXPECTED) as error:
        if os.environ.get("APPORTION_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
