"""The embedded task `digits`: its pipeline, prompts and reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.config.own import nearest

from ..arguments import check_names, read_settings
from . import digits


@dataclass
class DigitsSettings:
    """`task_settings` of the YAML file."""

    folder: str = "runs/digits-pretrained"
    """Where the pretrained pipeline is, or is put. A name of its own for each setting keeps both."""
    pretraining: dict[str, Any] = field(default_factory=dict)
    """Fields of `digits.Digits` that are to differ from their defaults."""
    reward: str = "correct"
    """correct (1 where the classifier reads the prompted digit) or probability (its probability)."""


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """A pipeline, its prompts and its rewards."""

    pipeline: Any
    rows: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    rewards: list[Any]
    encode: Callable | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run that the pipeline dictates."""


def prepare(settings: Mapping[str, Any] | str, *, seed: int) -> ImageTask:
    """The pretrained digits, the ten prompts, which also validate, and the classifier's reward.

    Args:
        settings: fields of `DigitsSettings`, or the same as JSON.
        seed: of the run. Nothing here depends on it.

    Raises:
        ValueError: for a setting that does not exist or does not fit.
    """
    chosen = read_settings(DigitsSettings, settings, where="task_settings")
    check_names(digits.Digits, chosen.pretraining, where="task_settings.pretraining")
    rewards = {"correct": digits.digit_correct, "probability": digits.digit_probability}
    if chosen.reward not in rewards:
        raise ValueError(
            f"task_settings.reward must be one of {', '.join(rewards)}, got {chosen.reward!r}."
            f"{nearest(chosen.reward, rewards)}"
        )
    folder = digits.pretrain(chosen.folder, digits.Digits(**chosen.pretraining))
    rows = [{"prompt": prompt} for prompt in digits.PROMPTS]
    size = digits.SIZE_ARGUMENT
    return ImageTask(
        pipeline=digits.load(folder),
        rows=rows,
        validation=rows,
        rewards=[rewards[chosen.reward]],
        encode=digits.encode,
        settings={"guidance_scale": 1.0, "height": size, "width": size},
    )
