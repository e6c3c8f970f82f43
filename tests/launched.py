"""Runs of the tiny trainer on several processes: `launch` for tests, and the script it starts.

`python tests/launched.py RUN [--and RUN ...]` where RUN is FOLDER [--fault KIND@STEP] [--setting value
...]: runs as of `tests/tiny.py`, in one launch, because a launch costs ten seconds. With a fault,
process 1 fails at that step. Where both processes raise, both print `stopped: ...` and go on with the
next run, so that a run can be broken and resumed in one launch.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from rl.ranks import leave  # noqa: E402
from rl.trainer import RolloutTrainer  # noqa: E402
from tests import tiny  # noqa: E402

LIMIT = 300  # seconds a launch may take on a busy machine
CONFIGS = ROOT / "recipes" / "accelerate"

DDP = ("--multi_gpu", "--mixed_precision", "no")
ON_CPU = {"use_cpu": "true"}
SHARDED_ON_CPU = {"ddp_backend": "gloo", "bf16": "false"}
"""With --use_cpu accelerate leaves DeepSpeed and FSDP out and runs DDP."""


def launch(
    *runs: tuple[Path, dict[str, Any]],
    flags: tuple[str, ...] = DDP,
    script: Path = Path(__file__),
) -> subprocess.CompletedProcess:
    """Runs (folder and settings) on two processes, one after the other in one launch of `script`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", str(port)]
    command += [str(script)]
    for i, (folder, settings) in enumerate(runs):
        command += ["--and"] * (i > 0) + [str(folder)]
        command += [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.send_signal(signal.SIGABRT)  # which prints a traceback
            process.kill()
            output, errors = process.communicate()
            raise AssertionError(f"no end after {LIMIT} s:\n{output}\n{errors[-20000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def errors_of(done: subprocess.CompletedProcess) -> str:
    """What a launch that failed wrote, without the list of modules a crash prints."""
    lines = [line for line in done.stderr.splitlines() if "Extension modules:" not in line]
    return "\n".join(lines)[-12000:]


RUNS: dict[str, dict[str, Any]] = {
    # Few rows train, in micro-batches of two, so processes differ in how many they have.
    "small": {"reward": "small_digit", "per_device_train_batch_size": 2, "max_steps": 4}
    | {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    | {"lr_scheduler_type": "cosine", "max_grad_norm": 0.1},
    "large": {"reward": "small_digit", "per_device_train_batch_size": 5, "max_steps": 4}
    | {"trainer": "grpo", "updates_per_step": 2, "pilot_rollouts": 2, "gvm_gradient_norm": "mean"}
    # Small batches of generation, so that processes also differ in how often they run the model.
    | {"generation_batch_size": 3},
    # What the trainer can be told to do at once, the reference policy and recomputed columns included.
    "methods": {"reward": "small_digit", "trainer": "grpo", "max_steps": 3, "beta": 0.1}
    | {"selector": "vade", "stopping": "early_unbiased", "stopping_round_size": 2, "loss": "dapo"}
    | {"down_sampling": "d3s", "token_selection": "d3s", "importance_correction": "token_truncate"}
    | {"micro_batch_tokens": 24, "num_iterations": 2, "allocator": "leave_one_out"}
    | {"share_prompts": "always"},
    "refill": {"reward": "small_digit", "trainer": "grpo", "max_steps": 4, "refill": "true"}
    | {"prompts_per_step": 3, "refill_min_prompts": 5, "refill_max_age": 2, "loss": "gspo"},
    # Prompts start along what was done for them before, by whichever process.
    "starts": {"reward": "small_digit", "trainer": "grpo", "max_steps": 5, "starts": "traces"}
    | {"starts_delta": 0.0, "starts_until": 1.0, "posterior_decay_chosen": 0.9}
    | {"allocator": "neyman", "refill": "true", "prompts_per_step": 4, "refill_max_age": 1},
    "replay": {"reward": "small_digit", "trainer": "grpo", "max_steps": 4, "replay_share": 0.4}
    | {"per_device_train_batch_size": 5, "beta": 0.1, "allocator": "uniform"},
    # Rollouts end when their first character has decided, on whichever process.
    "verdicts": {"reward": "decided_digit", "trainer": "grpo", "max_steps": 3, "verdict_every": 1}
    | {
        "stopping": "balanced",
        "stopping_round_size": 2,
        "allocator": "uniform",
        "updates_per_step": 2,
    }
    | {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": "true"},
    # Every row trains where entropies count, also those that no group tells from its others.
    "entropies": {"reward": "small_digit", "trainer": "grpo", "max_steps": 3, "beta": 0.1}
    | {"entropy_coef": 0.1, "top_entropy_quantile": 0.5, "loss": "dapo", "allocator": "uniform"}
    | {"per_device_train_batch_size": 5, "mask_truncated_completions": "true"},
    # One prompt of sixteen has accepted rows, so most steps have none and some have a single one.
    "sparse": {"reward": "one_prompt", "per_device_train_batch_size": 5, "max_steps": 7, "seed": 7}
    | {"posterior_prior": "flat"},
}

SHARDED = ("small", "large", "methods", "sparse")
"""Runs for sharded weights and optimizers: uneven rows, none at all, several updates and passes, a
reference policy. What the others add does not depend on who holds which weights; DDP runs all."""


def on_one_process(folder: Path, name: str, **changes: Any) -> None:
    """`RUNS[name]` in this process, in one micro-batch, with its weights in `final`."""
    settings = RUNS[name] | {"reward": tiny.REWARDS[RUNS[name]["reward"]]}
    settings |= {"per_device_train_batch_size": 100} | changes
    made = tiny.run(folder, data=tiny.rows("ab"), eval_dataset=tiny.rows("c"), **settings)
    made.save_model(str(folder / "final"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights a run ended with."""
    return load_file(folder / "final" / "model.safetensors")


def assert_same(ours: Path, theirs: Path, *, tolerance: float = 2e-5) -> None:
    """The same decisions, and weights that have moved by 1e-3 or more and differ by less.

    Float32 sums in another order: observed differences are at most 1.1e-5, of one weight
    whose gradient is small beside its rounding.
    """
    assert tiny.lines(ours) == tiny.lines(theirs)
    one, other, start = weights(ours), weights(theirs), tiny.model().state_dict()
    moved = max(float((start[name] - other[name]).abs().max()) for name in other)
    assert moved > 1e-3
    assert set(one) >= set(other)  # wrappers also write tied weights under their second name
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=tolerance)


def with_fault(kind: str, at_step: int) -> type:
    """A trainer of which process 1 fails in step `at_step`, unless the kind is "none"."""

    class Faulty(RolloutTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            wrapper = type(self.model_wrapped).__name__
            print(f"trained as {self.accelerator.distributed_type.value} {wrapper}", flush=True)
            return result

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if kind != "none" and self.ranks.rank == 1 and self.state.global_step == at_step:
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                put(self, kind)
            return super().training_step(*args, **kwargs)

    return Faulty


def put(trainer: Any, kind: str) -> None:
    """Break one stage of a trainer."""
    policy, loss = trainer.policy, trainer.objective.loss_function

    def raises(*_: Any, **__: Any) -> Any:
        raise MemoryError(f"no memory for {kind}")

    def not_finite(*args: Any, **kwargs: Any) -> Any:
        value, statistics = loss(*args, **kwargs)
        return value * float("nan"), statistics

    if kind == "generation":
        policy.engine.generate = raises
    elif kind == "reward":
        policy.reward = raises
    else:
        broken = not_finite if kind == "nan" else raises
        trainer.objective = replace(trainer.objective, loss_function=broken)


def sharded_without_gpu() -> None:
    """Let accelerate take CPU processes for GPU ones, which alone it shards with FSDP2."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")


def taken(words: list[str], name: str) -> str | None:
    """Remove `--name value` from `words`; the value, or None."""
    if name not in words:
        return None
    at = words.index(name)
    value = words[at + 1]
    del words[at : at + 2]
    return value


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        sharded_without_gpu()
    runs: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        runs.append([]) if word == "--and" else runs[-1].append(word)
    for words in runs:
        kind, _, step = (taken(words, "--fault") or "none@0").partition("@")
        tiny.RolloutTrainer = with_fault(kind, int(step))  # type: ignore[misc]
        try:
            tiny._main(*words)
        except (MemoryError, RuntimeError, ArithmeticError) as error:
            if kind not in ("generation", "reward", "nan"):  # one process alone cannot go on
                raise
            print(f"stopped: {type(error).__name__}: {error}", flush=True)
    leave()


if __name__ == "__main__":
    main()
