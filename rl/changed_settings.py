"""Settings of a resumed run against those it had: refused, told and remembered, or of no matter."""

from __future__ import annotations

import json
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

PREFIXES = (
    *("logging_", "log_", "hub_", "push_to_hub", "dataloader_", "save_", "ddp_", "trackio_"),
    *("gradient_checkpointing", "activation_checkpointing", "completions_", "images_", "vllm_"),
    *("eval_on_start", "eval_steps", "eval_strategy", "eval_delay", "include_"),
)
OTHERS = (
    *("output_dir", "run_name", "report_to", "project", "disable_tqdm", "resume_from_checkpoint"),
    *(
        "if_run_exists",
        "do_train",
        "do_eval",
        "do_predict",
        "local_rank",
        "per_device_eval_batch_size",
    ),
    *("per_device_train_batch_size", "micro_batch_tokens", "generation_batch_size"),
    *(
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "skip_memory_metrics",
    ),
)
"""Settings that no rollout and no update depends on: paths, logs, speed, memory."""


def refuse_decisive(args: Any, saved: dict[str, Any], folder: str) -> None:
    """Raise if a setting that decides which rollouts are made differs from that of a checkpoint.

    Args:
        args: the settings now.
        saved: decisive settings of the checkpoint; one that did not exist yet is not compared.
        folder: the checkpoint, for the message.

    Raises:
        ValueError: naming each with its old and its new value.
    """
    changed = [
        f"{name} was {saved[name]!r}, is {value!r}"
        for name, value in args.decisive_settings().items()
        if name in saved and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"{folder} was made with other settings, so its run cannot be continued exactly: "
            f"{'; '.join(changed)}; write the old values, or another output_dir"
        )


def changes(old: dict[str, Any], settings: dict[str, Any], *, step: int) -> list[dict[str, Any]]:
    """How the settings of a run changed up to now: each resume that changed some, with their values.

    Changes after `step` are of steps that the resumed run makes again: they are undone before
    settings are compared, and forgotten.

    Args:
        old: `run.json` of the run that is resumed.
        settings: those now.
        step: the step it goes on from.

    Returns:
        [{"step": 6, "settings": {"learning_rate": [1e-5, 1e-6]}}, ...]: from step 7 on it is 1e-6.
        The last, if it is of now, is told in a warning.
    """
    earlier, before = list(old.get("changes", [])), dict(old.get("settings", {}))
    while earlier and earlier[-1]["step"] >= step:
        undone = earlier.pop()["settings"]
        before |= {name: value for name, (value, _) in undone.items()}
    now = json.loads(json.dumps(settings, default=str))
    found = {
        name: [before[name], value]
        for name, value in now.items()
        if name in before and before[name] != value and not _is_of_no_matter(name)
    }
    if not found:
        return earlier
    told = "; ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in found.items())
    logger.warning(f"the run goes on from step {step} with other settings: {told}")
    return [*earlier, {"step": step, "settings": found}]


def _is_of_no_matter(name: str) -> bool:
    return name in OTHERS or name.startswith(PREFIXES)
