"""Supervised warm start of a tiny model: a task's solutions, TRL's SFTTrainer, an ordinary checkpoint.

A folder that was made with the same settings is left as it is, so a second run costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import datasets
import torch
import transformers
import trl
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from rl.run.checkpoint import TornCheckpointError, seal, verify
from rl.run.tracking import no_progress_bars

from .arguments import check_names, read_settings
from .config import parse
from .tiny_model import build_model

Row = dict[str, Any]

SETTINGS_FILE = "warm_start.json"
"""What a folder was made with, beside the checkpoint."""


@dataclass
class WarmStart:
    """What the warm start depends on; another value of any of these makes another checkpoint."""

    seed: int = field(default=0, metadata={"help": "Of weights, order and corruptions."})
    data_seed: int = field(default=0, metadata={"help": "Of the problems."})
    validation: int = field(
        default=28, metadata={"help": "Validation problems of each level, which are left out."}
    )
    rows: int = field(default=26_000, metadata={"help": "Worked solutions to train on."})
    steps: int = field(default=1400, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Solutions of a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak; falls linearly to 0."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_layers: int = field(default=3, metadata={"help": "Decoder layers."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})


@dataclass
class TaskSettings:
    """`task_settings` of the YAML file of an embedded language task.

    Example::

        TaskSettings(folder="runs/warm-start", train=100, warm_start={"steps": 600})
    """

    folder: str | None = None
    """Where the warm-started model is, or is put. A name of its own for each setting keeps both.
    Default: runs/TASK-warm-start."""
    train: int = 100
    """Training prompts of each level."""
    validation: int = 28
    """Validation prompts of each level."""
    data_seed: int = 0
    """Of the problems. It is not the run's seed, so that every run is judged on the same prompts."""
    warm_start: dict[str, Any] = field(default_factory=dict)
    """Fields of `WarmStart` that are to differ from their defaults."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an embedded language task consists of."""

    name: str
    levels: Sequence[Any]
    """Dataclasses, one per level; a warm start made with others is made anew."""
    problems: Callable[..., tuple[list[Row], list[Row]]]
    """`(seed, *, train, validation)` -> training rows and validation rows."""
    solutions: Callable[..., list[Row]]
    """`(data_seed, *, size, held_out, seed)` -> rows with `prompt` and `completion`; or with `input_ids`
    and `completion_mask`, where more than one part of a text is to be learnt."""
    build_tokenizer: Callable[[], PreTrainedTokenizerFast]
    rewards: Sequence[Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `WarmStart` that differ for this task."""


@dataclass
class Place:
    """Where the command writes, and on how many threads it computes."""

    folder: str = field(metadata={"help": "Checkpoint folder to make."})
    num_threads: int | None = field(default=None, metadata={"help": "Default: all cores."})


def prepare(
    task: Task, settings: Mapping[str, Any] | str
) -> tuple[Path, list[Row], list[Row], list[Any]]:
    """The warm-started model, training rows, validation rows and rewards of a task.

    Args:
        task: what is prepared.
        settings: fields of `TaskSettings`, or the same as JSON. The run's seed is not among them, so
            seeds of one setting share model and prompts; `warm_start: {seed: 1}` makes another model.

    Raises:
        ValueError: for a setting that does not exist or does not fit.
    """
    chosen = read_settings(TaskSettings, settings, where="task_settings")
    check_names(WarmStart, chosen.warm_start, where="task_settings.warm_start")
    shared = {"data_seed": chosen.data_seed, "validation": chosen.validation}
    for name in shared.keys() & chosen.warm_start.keys():
        raise ValueError(f"write {name} in task_settings itself, it serves rollouts and warm start")
    train, validation = task.problems(
        chosen.data_seed, train=chosen.train, validation=chosen.validation
    )
    wanted = WarmStart(**{**task.defaults, **shared, **chosen.warm_start})
    folder = warm_start(task, chosen.folder or f"runs/{task.name}-warm-start", wanted)
    return folder, train, validation, list(task.rewards)


def warm_start(task: Task, folder: str | Path, settings: WarmStart, *, quiet: bool = False) -> Path:
    """Make the checkpoint, unless `folder` holds it already.

    The folder appears under its name when it is complete. One that was made with other settings,
    or that is damaged, is made anew and replaced at the end.

    Args:
        task: whose model is made.
        folder: where the checkpoint goes.
        settings: what it depends on.
        quiet: no progress bar and no messages.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder holds something else than a warm start, which is not touched.
    """
    folder = Path(folder)
    wanted = _identity(task, settings)

    def say(text: str) -> None:
        if not quiet:
            _say(text)

    if folder.exists() and any(folder.iterdir()):
        if not (folder / SETTINGS_FILE).is_file():
            raise ValueError(
                f"{folder} is not empty and has no {SETTINGS_FILE}, so it is not a warm start; "
                f"choose another folder or remove it"
            )
        different = _difference(folder, wanted)
        if not different:
            say(f"{folder} is there already")
            return folder
        say(f"{folder} is made anew, because {different}")
    started = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        say(f"{settings.steps} steps of {settings.batch_size} worked solutions")
        _train(task, staging / "scratch", staging / "new", settings, quiet=quiet)
        (staging / "new" / SETTINGS_FILE).write_text(json.dumps(wanted, indent=1))
        seal(staging / "new")
        if folder.exists():
            os.replace(folder, staging / "old")
        os.replace(staging / "new", folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"{folder} after {time.perf_counter() - started:.0f} s")
    return folder


def _identity(task: Task, settings: WarmStart) -> dict[str, Any]:
    return {"settings": asdict(settings), "levels": [asdict(level) for level in task.levels]}


def _difference(folder: Path, wanted: dict[str, Any]) -> str:
    """Why the folder will not do; empty if it will."""
    try:
        verify(folder)
        found = json.loads((folder / SETTINGS_FILE).read_text())
    except (TornCheckpointError, json.JSONDecodeError) as error:
        return f"it is damaged: {error}"
    if found.get("levels") != wanted["levels"]:
        return "the levels of the problems have changed"
    old, new = found.get("settings", {}), wanted["settings"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in changed)


def _say(text: str) -> None:
    print(f"warm start: {text}", file=sys.stderr, flush=True)


class _Tenths(TrainerCallback):
    """Says after every tenth of the steps how far it is, where no progress bar does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % max(1, state.max_steps // 10) == 0:
            _say(f"step {state.global_step} of {state.max_steps}")


def _train(task: Task, scratch: Path, folder: Path, settings: WarmStart, *, quiet: bool) -> None:
    # Levels do not depend on how many training problems are drawn; 1 is the fewest.
    _, held_out = task.problems(settings.data_seed, train=1, validation=settings.validation)
    rows = task.solutions(
        settings.data_seed, size=settings.rows, held_out=held_out, seed=settings.seed
    )
    columns = (
        ("input_ids", "completion_mask") if "input_ids" in rows[0] else ("prompt", "completion")
    )
    tokenizer = task.build_tokenizer()
    model = build_model(
        tokenizer,
        seed=settings.seed,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
    )
    config = trl.SFTConfig(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(30, settings.steps // 10),
        adam_beta2=0.98,
        weight_decay=0.01,
        max_grad_norm=1.0,
        completion_only_loss=True,
        seed=settings.seed,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=quiet or not sys.stderr.isatty(),
    )
    with no_progress_bars():
        trainer = trl.SFTTrainer(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_list(
                [{column: row[column] for column in columns} for row in rows]
            ),
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    if not quiet and not sys.stderr.isatty():
        trainer.add_callback(_Tenths())
    trainer.train()
    with no_progress_bars():
        trainer.save_model(str(folder))
    for path in folder.glob("*.bin"):  # training arguments, pickled: no part of a checkpoint
        path.unlink()


def command(task: Task, arguments: list[str] | None = None) -> None:
    """Parse the command line and make the checkpoint of a task.

    Command line: `--folder runs/warm-start [--seed 1] [--config file.yaml]`.
    """
    of_type = get_type_hints(WarmStart)
    own = make_dataclass(
        "WarmStart",
        [
            (f.name, of_type[f.name], field(default=value, metadata=f.metadata))
            for f in fields(WarmStart)
            for value in [task.defaults.get(f.name, f.default)]
        ],
    )
    place, given = parse((Place, own), arguments)
    torch.set_num_threads(place.num_threads or os.cpu_count() or 1)
    transformers.utils.logging.set_verbosity_error()
    warm_start(task, place.folder, WarmStart(**asdict(given)))
