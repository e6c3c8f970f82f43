"""A run that is killed at any moment and resumed is the run that was never killed.

Real processes, real SIGKILL. What is compared: every decision, the weights bit for bit, the optimizer,
the schedule, the generators and the ledger.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rl.run import checkpoint
from tests import tiny

pytestmark = pytest.mark.slow

LIMIT = 240  # seconds a run may take on a busy machine
STEPS = 30
SETTINGS = {
    "--reward": "small_digit",
    "--max_steps": STEPS,
    "--save_strategy": "steps",
    "--save_steps": 3,
    "--save_total_limit": 2,
    "--lr_scheduler_type": "cosine",
    "--learning_rate": 0.01,
    "--eval_strategy": "steps",
    "--eval_steps": 10,
}
PILOTS = {
    "--pilot_rollouts": 2,
    "--pilot_estimate": "pilot",
    "--gvm_gradient_norm": "rms",
    "--updates_per_step": 2,
    "--trainer": "grpo",
}


def start(folder: Path, settings: dict) -> subprocess.Popen:
    words = [str(word) for pair in settings.items() for word in pair]
    log = open(folder.with_suffix(".log"), "a")  # noqa: SIM115 -- the process keeps it
    script = str(Path(tiny.__file__))
    return subprocess.Popen([sys.executable, script, str(folder), *words], stdout=log, stderr=log)


def finish(folder: Path, settings: dict) -> None:
    process = start(folder, settings)
    assert process.wait(LIMIT) == 0, folder.with_suffix(".log").read_text()[-3000:]


def kill_when(process: subprocess.Popen, condition) -> bool:
    """SIGKILL as soon as `condition()`; False if the process ended before."""
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def steps_of(folder: Path) -> list[str]:
    path = folder / "steps.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def whole_steps(folder: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in checkpoint.checkpoints(folder)}


def assert_same_run(folder: Path, expected: Path) -> None:
    assert steps_of(folder) == steps_of(expected)
    assert len(steps_of(expected)) == STEPS

    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    last = f"checkpoint-{STEPS}"
    for name in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (torch.load(run / last / name) for run in (folder, expected))
        assert_equal(ours, theirs)
    ours, theirs = (checkpoint.load_state(run / last) for run in (folder, expected))
    assert_equal(ours["stages"]["sampling"]["planner"], theirs["stages"]["sampling"]["planner"])
    assert ours["empty_steps"] == theirs["empty_steps"]

    ours, theirs = (
        {
            name: count
            for name, count in json.loads((run / "final" / "ledger.json").read_text()).items()
            if "seconds" not in name
        }
        for run in (folder, expected)
    )
    assert ours == theirs

    ours, theirs = (
        [
            {n: v for n, v in row.items() if "second" not in n and n not in TIMES}
            for row in tiny.lines(run, "metrics.jsonl")
            if "train_runtime" not in row
        ]
        for run in (folder, expected)
    )
    assert ours == theirs


TIMES = ("step_time", "train_loss")


def assert_equal(one, other) -> None:
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in other:
            assert_equal(one[key], other[key])
    elif isinstance(other, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(other, np.ndarray):
        np.testing.assert_array_equal(one, other)
    elif isinstance(other, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unkilled") / "run"
    finish(folder, SETTINGS)
    return folder


def test_a_run_killed_again_and_again_is_the_run_never_killed(unkilled, tmp_path):
    folder = tmp_path / "run"
    generator = random.Random(7)
    resume = SETTINGS | {"--if_run_exists": "resume"}

    # Before the first checkpoint: it starts over.
    assert kill_when(start(folder, SETTINGS), lambda: len(steps_of(folder)) >= 1)
    if not whole_steps(folder):  # a slow poll may have missed the moment
        assert (folder / "steps.jsonl").exists()

    # While a checkpoint is written, as often as it takes to leave one unfinished.
    staging, torn = folder / checkpoint.STAGING, False
    for _ in range(3):
        after = len(steps_of(folder)) + 3
        found = kill_when(
            start(folder, resume),
            lambda after=after: len(steps_of(folder)) >= after and staging.exists(),
        )
        assert found, "the run ended before it could be killed"
        torn = staging.exists()
        if torn:
            break
    assert torn

    # At some step, wherever it is then; and a checkpoint whose file lost its end afterwards.
    moment = len(steps_of(folder)) + generator.randrange(4, 8)
    assert kill_when(start(folder, resume), lambda: len(steps_of(folder)) >= moment)
    newest, before, *_ = checkpoint.checkpoints(folder)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    finish(folder, SETTINGS | {"--resume_from_checkpoint": "true"})
    log = folder.with_suffix(".log").read_text()
    assert "stopped before its first checkpoint; starting again" in log
    assert f"checkpoint {newest.name} is torn and not used" in log
    resumed_from = json.loads((folder / "run.json").read_text())["resumed_from_step"]
    assert f"checkpoint-{resumed_from}" == before.name
    assert not staging.exists()
    assert_same_run(folder, unkilled)


def test_pilots_gradient_norms_and_inner_updates_survive_a_kill(tmp_path):
    settings = SETTINGS | PILOTS
    finish(tmp_path / "whole", settings)
    folder = tmp_path / "run"
    moment = random.Random(3).randrange(8, 20)
    assert kill_when(start(folder, settings), lambda: len(steps_of(folder)) >= moment)
    finish(folder, settings | {"--if_run_exists": "resume"})
    assert json.loads((folder / "run.json").read_text())["resumed_from_step"] >= 3
    assert_same_run(folder, tmp_path / "whole")
