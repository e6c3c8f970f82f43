"""What a run is made of besides its settings: model, adapters, prompts, functions, libraries.

Written to `run.json` and into every checkpoint, and compared when a run is resumed. What is too long
to write is a digest of 32 hexadecimal digits. Axes: P prompts.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rl.config.methods import OWN_STAGES, method_of
from rl.config.own import is_own
from rollouts.prompts import Prompt

LIBRARIES = (
    *("torch", "transformers", "trl", "accelerate", "peft", "diffusers", "datasets", "tokenizers"),
    *("numpy", "safetensors", "deepspeed", "vllm", "apportion"),
)

DECIDED = ("weights", "weights_not_saved", "sampling_functions")
"""Origins that a resumed run must share: without them its checkpoint is not what it was, or the rollouts
are not."""

SAMPLING = ("selector", "allocator", "stopping")
"""Stages that decide which rollouts are made."""


def origins(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    rewards: Sequence[Callable[..., Any]],
    *,
    has_reference: bool,
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Names and digests of everything that `rewards` of rollouts of `model` depend on.

    Args:
        model: before any training.
        has_reference: whether the run compares with the model as it is now.
        own: functions of the user's own, by the stage that they are in; see `own_functions`.

    Returns:
        `model`, its name or folder; `model_config` and `weights`, digests of its configuration and of
        the names and shapes of its weights; `weights_not_saved`, a digest of the first values of
        weights that a checkpoint does not hold (those below an adapter, or of the reference), or
        None; `prompts` and `validation`, digests of what the policy and the rewards read; `rewards`,
        a list of what `described` says; `sampling_functions` and `training_functions`, the same of
        the user's own by stage, or None.
    """
    adapted = bool(getattr(model, "peft_config", None))
    unsaved: list[torch.nn.Parameter] = []
    if adapted or has_reference:
        unsaved = [w for w in model.parameters() if not (adapted and w.requires_grad)]
    return {
        "model": _name_of(model),
        "model_config": _config_of(model),
        "weights": _digest(f"{name} {_shape(w)}\n" for name, w in model.named_parameters()),
        "weights_not_saved": _values(unsaved),
        "prompts": _content(prompts),
        "validation": _content(held_out) if held_out else None,
        "rewards": [described(reward) for reward in rewards],
        "sampling_functions": _described(own, lambda stage: stage in SAMPLING),
        "training_functions": _described(own, lambda stage: stage not in SAMPLING),
    }


def own_functions(config: Any, **given: Any) -> dict[str, Any]:
    """Functions of the user's own by their stage: those that settings name, and those that are given."""
    stages = [stage for stage in OWN_STAGES if is_own(getattr(config, stage, None))]
    named = {stage: method_of(config, stage).function for stage in stages}
    return named | {stage: f for stage, f in given.items() if f is not None}


def _described(
    own: Mapping[str, Any] | None, which: Callable[[str], bool]
) -> dict[str, str] | None:
    return {stage: described(f) for stage, f in (own or {}).items() if which(stage)} or None


def described(reward: Any) -> str:
    """A reward's name, its file and a digest of its source; of a script that runs, only its own lines.

    For example `exact (/home/me/rewards.py, 5f0c...)`. Arguments that a partial function brings are
    part of it.
    """
    function, given = reward, dict[Any, Any]()
    while isinstance(function, functools.partial):
        given = dict(enumerate(function.args)) | function.keywords | given
        function = function.func
    name = getattr(reward, "__name__", None) or getattr(
        function, "__name__", type(function).__name__
    )
    function = inspect.unwrap(function)
    code: Any = function
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        code = type(function)
    try:
        file = inspect.getsourcefile(code)
        is_script = getattr(code, "__module__", "") == "__main__"
        source = inspect.getsource(code) if is_script or file is None else Path(file).read_text()
    except (OSError, TypeError, ValueError):
        file, source = None, ""
    more = f", {json.dumps(given, default=_kind, sort_keys=True)}" if given else ""
    return f"{name} ({file or 'no file'}, {_digest([source])}{more})"


def adapter_settings(model: Any) -> dict[str, Any]:
    """What a model's adapters are like, as plain values under the names of the settings."""
    adapters = getattr(model, "peft_config", None) or {}
    found: dict[str, Any] = {"use_peft": bool(adapters)}
    for name, config in adapters.items():
        suffix = "" if name == "default" else f" of {name}"
        modules = getattr(config, "target_modules", None)
        found |= {
            f"lora_r{suffix}": getattr(config, "r", None),
            f"lora_alpha{suffix}": getattr(config, "lora_alpha", None),
            f"lora_target_modules{suffix}": modules
            if isinstance(modules, str)
            else sorted(modules or []),
        }
    return found


def versions() -> dict[str, str]:
    """The libraries that are installed, with their versions."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _name_of(model: Any) -> str | None:
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not name:
        return None
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _config_of(model: Any) -> str | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if config is None:
        return None
    own = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    own.pop("transformers_version", None)
    return _digest([json.dumps(own, default=_kind, sort_keys=True)])


def _shape(weight: torch.nn.Parameter) -> tuple[int, ...]:
    """The whole weight's, also of one that DeepSpeed has cut into parts."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _values(weights: list[torch.nn.Parameter]) -> str | None:
    """A digest of the first values of each weight; None if there is none, or not all are here."""
    if not weights or any(w.is_meta or not w.numel() for w in weights):
        return None
    return _digest(w.detach().reshape(-1)[:16].float().cpu().numpy().tobytes() for w in weights)


def _content(prompts: Sequence[Prompt]) -> str:
    """A digest of what the policy reads and what the rewards are given."""
    return _digest(part for prompt in prompts for part in _parts(prompt))


def _parts(prompt: Prompt) -> tuple[str, bytes, str]:
    try:
        columns = json.dumps(prompt.columns, default=_kind, sort_keys=True)
    except (TypeError, ValueError, RecursionError):  # keys of several kinds, or a value in itself
        columns = ",".join(sorted(map(str, prompt.columns)))
    return prompt.key, array("q", prompt.token_ids).tobytes(), columns


def _kind(value: Any) -> str:
    """For what JSON cannot say; its text may hold an address, which is another in each process."""
    return type(value).__name__


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))  # ["ab", "c"] and ["a", "bc"] must differ
        digest.update(data)
    return digest.hexdigest()
