"""Save and load checkpoints that are whole or absent, and hold nothing that can execute.

A checkpoint is written under a temporary name, described by a manifest of sizes and checksums,
synced and renamed. One whose manifest is missing or wrong is torn: it is named in a warning and the
one before it is used. State is a nested dict of arrays (safetensors) and plain values (JSON). The
optimizer's files are the base class's, loaded as weights only; those of DeepSpeed are pickles that it
loads without reserve, so they are looked through first (`refuse_code`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers.utils import logging

from rl.ranks import Ranks

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
STAGING = ".staging"
_ARRAYS, _PLAIN, _AT = "apportion_state.safetensors", "apportion_state.json", "__array__"
_NAME = re.compile(r"checkpoint-[0-9]+")


class TornCheckpointError(ValueError):
    """A checkpoint folder that is not what its manifest says; the message says where."""


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write a nested dict of arrays and plain values into `folder`; `load_state` gives it back exactly.

    Raises:
        TypeError: for a value that is neither an array nor JSON, with its path.
    """
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray):
            arrays[path] = np.ascontiguousarray(value)
            return {_AT: path}
        if isinstance(value, dict):
            return {str(key): plain(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"state{path} is a {type(value).__name__}; write an array or a plain value")

    text = json.dumps(plain(state, ""), indent=1)
    folder = Path(folder)
    save_file(arrays, folder / _ARRAYS)
    (folder / _PLAIN).write_text(text)


def load_state(folder: str | Path) -> dict[str, Any]:
    """What `save_state` wrote into `folder`, of which nothing executes when it is loaded.

    Raises:
        pickle.UnpicklingError: as `refuse_code`.
    """
    folder = Path(folder)
    refuse_code(folder)
    arrays = load_file(folder / _ARRAYS)

    def rebuild(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {_AT}:
                return arrays[value[_AT]]
            return {key: rebuild(item) for key, item in value.items()}
        return [rebuild(item) for item in value] if isinstance(value, list) else value

    return rebuild(json.loads((folder / _PLAIN).read_text()))


def refuse_code(folder: str | Path) -> None:
    """Raise if loading DeepSpeed's part of a checkpoint would run anything but its own classes.

    DeepSpeed 0.19 unpickles `global_step*/*.pt` without restriction. Each file is loaded here first as
    weights only, its tensors left on disk, with the classes of DeepSpeed that it names (settings of
    the optimizer such as its loss scaler), the members of enumerations and no functions.

    Raises:
        pickle.UnpicklingError: naming the file and what it would call.
    """
    for path in sorted(Path(folder).glob("global_step*/*.pt")):
        named = get_unsafe_globals_in_checkpoint(str(path))
        own = [_class_of_deepspeed(name) for name in named]
        try:
            with safe_globals([*filter(None, own), (_member, "builtins.getattr")]):
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = [name for name, cls in zip(named, own, strict=True) if cls is None]
            raise pickle.UnpicklingError(
                f"{path} is not loaded: it would run {', '.join(unknown) or 'code'}, which no "
                f"checkpoint of DeepSpeed needs ({str(error).splitlines()[0]})"
            ) from None


def _member(cls: object, name: str) -> Enum:
    """In the place of `getattr`, by which early Pythons 3.11 write members of enumerations."""
    if not (isinstance(cls, type) and issubclass(cls, Enum) and name in cls.__members__):
        raise pickle.UnpicklingError(f"{name!r} of {cls!r} is no member of an enumeration")
    return cls[name]


def _class_of_deepspeed(name: str) -> type | None:
    """The class of that full name, if it is one and DeepSpeed's."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith("deepspeed."):
        return None
    found = getattr(import_module(module), attribute, None)
    return found if isinstance(found, type) else None


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return {"bytes": path.stat().st_size, "blake2b": digest}


def seal(folder: str | Path) -> None:
    """Write the manifest of everything in `folder` and sync it all to disk."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        sync(path)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        descriptions = list(pool.map(_describe, files))
    manifest = {str(p.relative_to(folder)): d for p, d in zip(files, descriptions, strict=True)}
    text = json.dumps({"name": folder.name, "files": manifest}, indent=1)
    (folder / MANIFEST).write_text(text)
    sync(folder / MANIFEST)
    for path in {p.parent for p in files} | {folder}:
        sync(path)


def verify(folder: str | Path) -> None:
    """Check `folder` against its manifest.

    Raises:
        TornCheckpointError: naming the first file that is missing, short, changed or unreadable, or
            what is wrong with the manifest.
    """
    folder = Path(folder)
    for name, expected in _manifest(folder).items():
        path = folder / name
        try:
            if not path.is_file():
                raise TornCheckpointError(f"{path} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise TornCheckpointError(
                    f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
                )
            if _describe(path) != expected:
                raise TornCheckpointError(f"{path} does not have the checksum of its manifest")
        except OSError as error:
            raise TornCheckpointError(f"{path} cannot be read: {error}") from None


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file that a checkpoint should hold.

    Raises:
        TornCheckpointError: if the manifest is missing, or is anything but what `seal` writes.
    """
    path = folder / MANIFEST
    try:
        manifest = read_object(path)
    except FileNotFoundError:
        raise TornCheckpointError(
            f"{folder} has no {MANIFEST}: it was not written to the end"
        ) from None
    except (OSError, ValueError) as error:
        raise TornCheckpointError(f"{path} is damaged: {error}") from None
    files, name = manifest.get("files"), manifest.get("name", folder.name)
    if not isinstance(files, dict) or not files:
        raise TornCheckpointError(f"{path} is damaged: files is {start_of(files)}")
    for file, expected in files.items():
        keys = set(expected) if isinstance(expected, dict) else None
        if keys != {"bytes", "blake2b"}:
            raise TornCheckpointError(f"{path} is damaged: {file} is {start_of(expected)}")
        is_text = file.encode(errors="replace").decode() == file  # no half of a surrogate pair
        if not file or not is_text or Path(file).is_absolute() or ".." in Path(file).parts:
            raise TornCheckpointError(f"{path} is damaged: it names {file!r}, outside its folder")
    is_run_state = isinstance(name, str) and _NAME.fullmatch(name) is not None
    if is_run_state and (missing := {_ARRAYS, _PLAIN} - files.keys()):
        raise TornCheckpointError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    if name != folder.name and _NAME.fullmatch(folder.name):
        raise TornCheckpointError(f"{folder} was made as {start_of(name)}: it was renamed")
    return files


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no UTF-8, no JSON, or JSON of another kind; the message says which.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{start_of(value)} instead of an object")
    return value


def start_of(value: Any) -> str:
    """The beginning of a value as text, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def stage(run_folder: str | Path, name: str) -> Path:
    """An empty folder to write the checkpoint `name` into; `commit` makes it appear in the run."""
    staging = Path(run_folder) / STAGING
    remove(staging)
    (staging / name).mkdir(parents=True)
    return staging


def commit(run_folder: str | Path, name: str) -> Path:
    """Seal the staged checkpoint `name` and give it its name, in one step.

    A kill before the rename leaves earlier checkpoints as they were and no trace under `name`. The
    run's logs are synced first, so that no checkpoint stands without the lines that lead to it.
    """
    run_folder = Path(run_folder)
    staging, final = run_folder / STAGING, run_folder / name
    for path in run_folder.glob("*.jsonl"):
        if path.is_file():
            sync(path)
    seal(staging / name)
    if os.path.lexists(final):  # of a run that went on from an earlier step, or no folder at all
        os.replace(final, staging / "replaced")
    os.replace(staging / name, final)
    sync(run_folder)
    remove(staging)
    return final


@contextmanager
def writing(run_folder: str | Path, name: str, ranks: Ranks) -> Iterator[Path]:
    """Give the staging folder to write `name` into; committed when the block ends, on all ranks.

    Raises:
        OSError: if it cannot be written. What was staged is removed; earlier checkpoints are whole.
    """
    try:
        with ranks.together():
            staging = stage(run_folder, name) if ranks.is_main else Path(run_folder) / STAGING
        with ranks.together():
            yield staging
        with ranks.together():
            if ranks.is_main:
                commit(run_folder, name)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap OSError
        if ranks.is_main:
            remove(Path(run_folder) / STAGING)
        raise OSError(
            f"{name} could not be written to {run_folder}: {error}; earlier checkpoints are whole: "
            "free space and write resume_from_checkpoint: true"
        ) from error


def set_aside(run_folder: str | Path, *, after: int) -> None:
    """Rename the checkpoints of steps later than `after` to `superseded-...`, each with a warning.

    A run that goes on from an earlier step, because later ones are torn or by request, makes its own;
    the old ones must neither be resumed from nor count when the oldest is deleted.
    """
    for path in checkpoints(run_folder):
        if _step_of(path) > after:
            aside = path.with_name(f"superseded-{path.name}")
            remove(aside)
            os.replace(path, aside)
            logger.warning(f"{path.name} is not of this run any more, renamed to {aside.name}")


def require_optimizer(folder: str | Path) -> None:
    """Raise if a checkpoint holds a model alone: a run would go on with an empty optimizer.

    Raises:
        ValueError: naming the setting by which it was made.
    """
    folder = Path(folder)
    if not any(next(folder.glob(name), None) for name in ("optimizer*", "global_step*")):
        raise ValueError(
            f"{folder} has no optimizer, as save_only_model: true makes it, so its run cannot go on; "
            "start another with model_name_or_path set to this folder and another output_dir"
        )


def best_of(folder: str | Path) -> str | None:
    """The best checkpoint that the one in `folder` knew of, beside it; None if there is none.

    What is written of it is where it was: a run that was moved, or copied, finds its own.
    """
    folder = Path(folder)
    best = read_object(folder / "trainer_state.json").get("best_model_checkpoint")
    if best is None:
        return None
    found = folder.parent / Path(best).name
    try:
        verify(found)
    except TornCheckpointError as error:
        logger.warning(f"the best checkpoint so far cannot be used: {error}")
        return None
    if found.resolve() != Path(best).resolve():
        logger.warning(f"the best checkpoint so far is {found}: the run was moved from {best}")
    return str(found)


def rotate(run_folder: str | Path, *, keep: int | None, best: str | None) -> None:
    """Delete the oldest whole checkpoints beyond `keep`, never the best one."""
    if keep is None or keep < 1:
        return
    for path in checkpoints(run_folder)[keep:]:
        if best is None or Path(best).resolve() != path.resolve():
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(run_folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        return []
    found = [path for path in run_folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def latest_whole(run_folder: str | Path, *, up_to: str | Path | None = None) -> Path | None:
    """The newest checkpoint that is whole, of those up to `up_to`, or None if there is none at all.

    Each torn one passed over is named in a warning.

    Raises:
        TornCheckpointError: if there are checkpoints and none of them is whole.
    """
    found, run_folder = checkpoints(run_folder), Path(run_folder)
    for path in sorted(run_folder.iterdir()) if run_folder.is_dir() else ():
        if _NAME.fullmatch(path.name) and path not in found:
            logger.warning(f"{path} is no folder and not used")
    if up_to is not None:
        found = [path for path in found if _step_of(path) <= _step_of(Path(up_to))]
    for path in found:
        try:
            verify(path)
        except TornCheckpointError as error:
            logger.warning(f"checkpoint {path.name} is torn and not used: {error}")
            continue
        return path
    if found:
        raise TornCheckpointError(
            f"none of the {len(found)} checkpoints in {run_folder} is whole; start again in a new "
            "output_dir"
        )
    return None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the file or folder on disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
