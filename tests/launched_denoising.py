"""Diffusion runs on several processes: what `tests/launched.py` starts in place of itself.

`python tests/launched_denoising.py FOLDER [--and FOLDER ...]`: the run of `RUNS` that
the folder is called after, with the weights it ends with in `final.safetensors`. A set-up that is
refused prints `refused: ...`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests import tiny_denoising as tiny  # noqa: E402
from tests.launched import sharded_without_gpu  # noqa: E402
from tests.tiny import parameters  # noqa: E402

# Of Adam's steps those on gradients that are rounding alone differ between processes; of SGD's none.
COMMON: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 2e-3,
    "max_grad_norm": 1.0,
    "max_steps": 3,
}

RUNS: dict[str, dict[str, Any]] = {
    # Processes differ in their micro-batches, and one of them may have none.
    "branches": {"per_device_train_batch_size": 2, "updates_per_step": 2, "ema_decay": 0.9}
    | {"save_strategy": "steps", "save_steps": 2, "images_every": 1},
    "tree": {"baseline": "leave_one_out", "noise_weight": "std", "allocator": "neyman"}
    | {
        "stopping": "positive",
        "stopping_round_size": 3,
        "success_above": 0.62,
        "num_iterations": 2,
    },
    "lora": {"lora": True, "beta": 0.1, "baseline": "history", "learning_rate": 0.1},
    # Three rows, so that one process has more micro-batches than the other.
    "odd": {"prompts_per_step": 1, "rollouts_per_prompt": 3, "per_device_train_batch_size": 1},
    # Two rows of one branch are all that trains, on one process alone.
    "few": {"prompts_per_step": 1, "rollouts_per_prompt": 3, "branch_threshold": 0.0}
    | {"plan": tiny.BRANCHED | {"trained": {"schedule": "last_steps", "last": 2}}},
}


def run(folder: Path, **changes: Any) -> tiny.DenoisingTrainer:
    """The run that `folder` is called after on the processes there are, validated at its end."""
    settings = COMMON | RUNS[folder.name] | changes
    if settings.pop("lora", False):
        settings["peft_config"] = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    made = tiny.run(folder, eval_dataset=tiny.rows(2), **settings)
    made.evaluate()
    if made.ranks.is_main:
        save_file(parameters(made), folder / "final.safetensors")
    made.save_model(str(folder / "final"))
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights a run ended with."""
    return load_file(folder / "final.safetensors")


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    changes: dict[str, Any] = {}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        sharded_without_gpu()
    if "true" in (os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")):
        changes = {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}
    folders = [word for word in sys.argv[1:] if word != "--and"]
    for folder in map(Path, folders):
        try:
            made = run(folder, **changes)
        except ValueError as error:
            print(f"refused: {error}", flush=True)
            continue
        wrapper = type(made.model_wrapped).__name__
        kind = made.accelerator.distributed_type.value
        print(f"trained {folder.name} as {kind} {wrapper} of {made.args.world_size}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
