"""What a process computes on: its CPU threads, and one GPU of several."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainingArguments


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


def set_threads(num_threads: int | None, state: PartialState) -> None:
    """Set this process's CPU threads, and print them with the processes and the device.

    Args:
        num_threads: None: as OMP_NUM_THREADS says, else an even share of the CPUs.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    threads = num_threads or _asked_threads() or max(1, available_cpus() // max(local, 1))
    torch.set_num_threads(threads)
    if state.is_main_process:
        print(
            f"{state.num_processes} process(es), {threads} CPU thread(s) each, device {state.device}",
            file=sys.stderr,
        )


def use_one_gpu(config: TrainingArguments) -> None:
    """Train on one GPU if a lone process sees several, and say how to use them all.

    transformers would wrap the model in `nn.DataParallel`, which copies it in every call and which
    rollouts do not go through. With several processes each has its GPU already.
    """
    if config.n_gpu > 1:
        print(
            f"warning: one of {config.n_gpu} GPUs is used. To use all: accelerate launch "
            f"--multi_gpu --num_processes {config.n_gpu} -m {__package__}.train --config ...",
            file=sys.stderr,
        )
        config._n_gpu = 1
