"""Write a run's folder: run.json, log lines and tables of completions.

A run folder holds `run.json` (settings, data fingerprint), `metrics.jsonl` (every log line),
`steps.jsonl` (every decision: prompts, draws, budgets, reward sums), `completions/*.parquet`, and the
checkpoints. One process writes it at a time.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from rl.policies.loading import no_progress_bars
from rl.run import checkpoint
from rl.run.changed_settings import ChangedRunError
from rl.run.origins import versions
from rollouts.prompts import Prompt, PromptReport, data_fingerprint

logger = logging.get_logger(__name__)

METRICS, STEPS, RUN = "metrics.jsonl", "steps.jsonl", "run.json"
TRACKED = ("data_fingerprint", "prompts", "validation_prompts", "processes", "versions", "command")
"""What trackers get of `run.json`, besides settings, recipe and origins."""
FOLDERS = ("completions", "validation", "images")
"""Folders that a run may make in its own."""


class RunExistsError(ChangedRunError):
    """The output folder already holds a run, or another process is writing it."""


def is_asked(resume: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` asks to go on with a run."""
    return resume not in (None, False, "") and str(resume).lower() not in ("false", "0", "no")


def holds_run(folder: str | Path) -> bool:
    """Whether steps of a run were made in a folder."""
    return (Path(folder) / STEPS).exists() or bool(checkpoint.checkpoints(folder))


def checkpoint_to_resume(args: Any, resume: str | bool | None) -> Path | None:
    """The whole checkpoint a run goes on from, or None to start at step 0.

    Args:
        args: the settings; `output_dir` and `if_run_exists` are read.
        resume: None, True (or "true") for the newest of `output_dir`, or a checkpoint folder. A torn
            one is named in a warning and the newest whole one before it is used.

    Raises:
        RunExistsError: if `output_dir` holds a run and nothing says to resume it, or the
            checkpoint named is of another run.
        ValueError: if there is nothing to resume.
    """
    run_folder = Path(args.output_dir)
    found_run = holds_run(run_folder)
    if isinstance(resume, str) and resume.lower() in ("true", "1", "yes"):
        resume = True
    if not is_asked(resume):
        if not found_run:
            return None
        if args.if_run_exists != "resume":
            raise RunExistsError(
                f"output_dir={run_folder} already holds a run; write resume_from_checkpoint: true to "
                "continue it (if_run_exists: resume does so where nothing changed), or another "
                "output_dir"
            )
        resume = True
    if resume is True:
        if not found_run and not (run_folder / RUN).exists():
            raise ValueError(
                f"nothing to resume: output_dir={run_folder} holds no run; leave "
                "resume_from_checkpoint out to start one (if_run_exists: resume does either)"
            )
        found = checkpoint.latest_whole(run_folder)
        if found is None:
            logger.warning(f"{run_folder} was stopped before its first checkpoint; starting again")
        return found
    path = Path(str(resume))
    if found_run and path.resolve().parent != run_folder.resolve():
        raise RunExistsError(
            f"output_dir={run_folder} already holds a run, and resume_from_checkpoint={path} is of "
            "another; write another output_dir"
        )
    if not path.is_dir():
        near = [p.name for p in checkpoint.checkpoints(path.parent)]
        raise ValueError(
            f"resume_from_checkpoint={path} is not a folder"
            + (f"; {path.parent} has {', '.join(near)}" if near else "")
        )
    if path not in checkpoint.checkpoints(path.parent):  # of another name: nothing came before it
        checkpoint.verify(path)
        return path
    return checkpoint.latest_whole(path.parent, up_to=path)


def require_space(args: Any, model: torch.nn.Module) -> None:
    """Refuse to start where the checkpoints, and one more while it is written, will not fit.

    A checkpoint is estimated as the weights, two Adam moments of the trained ones in float32, and a
    tenth more. Without `save_total_limit` two must fit, which is no promise for the rest.

    Raises:
        OSError: with the bytes free and needed.
    """
    folder, checkpoints = args.output_dir, (args.save_total_limit or 1) + 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(p.numel() * 8 for p in model.parameters() if p.requires_grad)
    needed = int(1.1 * (weights + moments) * checkpoints)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"output_dir={folder} has {free / 1e9:.2f} GB free, {checkpoints} checkpoints need about "
            f"{needed / 1e9:.2f} GB; free space, lower save_total_limit, or choose another output_dir"
        )


def about(
    args: Any,
    prompts: list[Prompt],
    held_out: list[Prompt],
    report: PromptReport,
    *,
    origins: dict[str, Any],
    recipe: dict[str, Any],
    adapters: dict[str, Any] | None = None,
    from_step: int,
) -> dict[str, Any]:
    """What `run.json` says of a run, as plain values; trackers get it beside the settings.

    Args:
        args: the settings.
        prompts, held_out, report: the data.
        origins: as `rl.run.origins` gives them.
        recipe: settings besides `args` by which model, data and rewards were found.
        adapters: what the model's adapters are like, as `rl.run.origins.adapter_settings` gives it.
        from_step: the step the run goes on from.
    """
    args.of_run = {}
    found = {
        "settings": args.to_dict(),
        "recipe": recipe,
        "origins": origins,
        "adapters": adapters or {},
        "data_fingerprint": data_fingerprint([prompt.key for prompt in prompts]),
        "prompts": len(prompts),
        "validation_prompts": len(held_out),
        "prompt_report": dataclasses.asdict(report),
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
        "device": str(args.device),
        "versions": versions(),
        "command": command_line(sys.argv),
        "resumed_from_step": from_step,
    }
    found = json.loads(json.dumps(found, default=str))
    args.of_run = {
        f"run/{name}": value if isinstance(value, (str, int, float)) else json.dumps(value)
        for part in (
            *(found["adapters"], found["recipe"], found["origins"]),
            {n: found[n] for n in TRACKED},
        )
        for name, value in part.items()
        if value is not None
    }
    return found


def command_line(words: list[str]) -> list[str]:
    """The words of a command without what is secret in it, such as the value of `--hub_token`."""
    shown, is_secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        names_one = name.startswith("--") and name.endswith(("token", "password", "secret", "key"))
        shown.append(
            "<secret>" if is_secret else f"{name}=<secret>" if names_one and equals else word
        )
        is_secret = names_one and not equals
    return shown


class RunFolder(TrainerCallback):
    """The files of a run; written by the main process alone."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @contextmanager
    def claimed(self, args: Any, *, from_step: int, about: dict[str, Any]) -> Iterator[None]:
        """Hold the folder for this run; on entering, what lies after `from_step` is cleared: lines
        are cut off, checkpoints are renamed.

        The lock is the operating system's and ends with the process, however it ends.

        Args:
            args: the settings.
            from_step: the step the run goes on from; 0 for a new one.
            about: what `run.json` is to say.

        Raises:
            RunExistsError: if another process holds it.
        """
        if not args.should_save:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _make_way(self.folder / ".lock")
        with open(self.folder / ".lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise RunExistsError(
                    f"output_dir={self.folder} is in use by process {lock.read().strip() or '?'}; wait "
                    "for it, stop it, or write another output_dir"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            for name in (METRICS, STEPS):
                _cut(self.folder / name, from_step)
            for name in FOLDERS:
                _make_way(self.folder / name, for_folder=True)
            checkpoint.set_aside(self.folder, after=from_step)
            _make_way(self.folder / RUN)
            _replace(self.folder / RUN, json.dumps(about, indent=1, default=str))
            yield

    def write_step(self, record: dict[str, Any]) -> None:
        """Add a step's decisions to `steps.jsonl`."""
        _append(self.folder / STEPS, record)

    def write_completions(
        self, table: list[dict[str, Any]], *, step: int, folder: str = "completions", name: str = ""
    ) -> None:
        """Write a table of completions as parquet, to `folder`/[`name`-]step-....parquet."""
        from datasets import Dataset

        target = self.folder / folder / f"{f'{name}-' if name else ''}step-{step:06d}.parquet"
        target.parent.mkdir(exist_ok=True)
        with no_progress_bars():
            Dataset.from_list(table).to_parquet(str(target))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            _append(self.folder / METRICS, {"step": state.global_step, **logs})


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """What `run.json` of a run folder says; nothing, with a warning, where it is not whole."""
    try:
        about = checkpoint.read_object(folder / RUN)
        if not isinstance(about.get("settings"), dict):
            raise ValueError(f"settings is {checkpoint.start_of(about.get('settings'))}")
        if not _are_changes(about.get("changes", [])):
            raise ValueError(f"changes is {checkpoint.start_of(about['changes'])}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning(f"{folder / RUN} is damaged and not used: {error}")
        return {}
    return about


def _are_changes(value: Any) -> bool:
    """Whether that is what `changed_settings.Compared.changes` gives."""
    return isinstance(value, list) and all(
        isinstance(change, dict)
        and type(change.get("step")) is int
        and isinstance(change.get("settings"), dict)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in change["settings"].values())
        for change in value
    )


def _cut(path: Path, from_step: int) -> None:
    """Keep the log lines up to `from_step`; drop torn or damaged lines with a warning."""
    _make_way(path)
    if not path.exists():
        return
    kept, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        step = _step_of(line)
        if step is not None and from_step and step <= from_step:
            kept.append(line + b"\n")
        elif step is None and line:
            damaged.append(str(number))
    if damaged and from_step:
        logger.warning(f"{path}: left out what is no whole line, in line {', '.join(damaged[:9])}")
    _replace(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a line of a log, or None if that is not what it is."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None


def _make_way(path: Path, *, for_folder: bool = False) -> None:
    """Rename what cannot be the run's file or folder of that name, with a warning."""
    if for_folder:
        usable = path.is_dir() or not os.path.lexists(path)
    elif path.is_file():
        usable = os.access(path, os.R_OK | os.W_OK)
    else:
        usable = not os.path.lexists(path)
    if usable:
        return
    aside = path.with_name(f"{path.name}.damaged")
    checkpoint.remove(aside)
    os.replace(path, aside)
    what = "folder" if for_folder else "file that can be read and written"
    logger.warning(f"{path} is no {what}, renamed to {aside.name}")


def _replace(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, whatever happens to the machine."""
    temporary = path.with_name(f"{path.name}.tmp")
    checkpoint.remove(temporary)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    checkpoint.sync(temporary)
    os.replace(temporary, path)
    checkpoint.sync(path.parent)
