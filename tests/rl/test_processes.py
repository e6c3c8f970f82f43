"""Two processes do what one does: the same decisions, the same weights, and they stop together.

A launch costs some twenty seconds, so one launch makes several runs.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny

pytestmark = pytest.mark.slow

LIMIT = 300  # seconds a launch may take on a busy machine


def launch(*words: object) -> subprocess.CompletedProcess:
    """`tests/tiny.py` on two CPU processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--main_process_port", str(port), str(Path(tiny.__file__)), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)


def words(settings: dict) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def logs_of(folder: Path) -> list[dict]:
    """Step logs without times."""
    return [
        {n: v for n, v in row.items() if "seconds" not in n and n != "step_time"}
        for row in tiny.step_logs(folder)
    ]


RUNS = {
    # Three steps and a checkpoint, for one process to go on from.
    "small": {"reward": "small_digit", "per_device_train_batch_size": 2, "max_steps": 4}
    | {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4},
    "large": {"reward": "small_digit", "per_device_train_batch_size": 5, "max_steps": 4}
    | {"trainer": "grpo", "updates_per_step": 2, "pilot_rollouts": 2, "gvm_gradient_norm": "mean"},
    # One prompt of sixteen has accepted rows, so most steps have none and some have a single one.
    "sparse": {"reward": "one_prompt", "per_device_train_batch_size": 5, "max_steps": 7, "seed": 7},
}


def on_two_processes(folder: Path) -> None:
    arguments = [
        ["--and", folder / name, *words({"use_cpu": "true"} | settings)]
        for name, settings in RUNS.items()
    ]
    done = launch(*[word for run in arguments for word in run][1:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("world size 2") == 2 * len(RUNS)  # of both processes, in every run


def on_one_process(folder: Path, name: str, **changes: object) -> None:
    settings = RUNS[name] | {"reward": tiny.REWARDS[RUNS[name]["reward"]]} | changes
    made = tiny.run(folder / name, data=tiny.rows("ab"), eval_dataset=tiny.rows("c"), **settings)
    made.save_model(str(folder / name / "final"))


def validation(folder: Path) -> list[dict]:
    return [row for row in tiny.lines(folder, "metrics.jsonl") if "eval_pass_rate" in row]


def assert_same(ours: Path, theirs: Path) -> None:
    assert tiny.lines(ours) == tiny.lines(theirs)
    start = tiny.model().state_dict()
    one, other = (load_file(run / "final" / "model.safetensors") for run in (ours, theirs))
    assert one.keys() == other.keys()
    moved = max(float((start[name] - other[name]).abs().max()) for name in other)
    apart = max(float((one[name] - other[name]).abs().max()) for name in other)
    assert apart < 1e-5 < 1e-3 < moved


def test_two_processes_do_what_one_does(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    on_two_processes(two)
    for name, settings in RUNS.items():
        on_one_process(one, name, per_device_train_batch_size=100)
        assert_same(two / name, one / name)
        assert len(tiny.lines(one / name)) == settings["max_steps"]
        for ours, theirs in zip(logs_of(two / name), logs_of(one / name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)

    trained = [row["ledger/rollouts_trained"] for row in tiny.step_logs(one / "sparse")]
    assert 1 in trained and 0 in trained  # a process without rows, and both
    assert validation(two / "small") == validation(one / "small") != []

    # And one process goes on from a checkpoint of two.
    on_one_process(two, "small", resume_from_checkpoint=str(two / "small" / "checkpoint-3"))
    assert_same(two / "small", one / "small")


def test_a_reward_that_raises_on_one_process_stops_both(tmp_path):
    done = launch(tmp_path, "--use_cpu", "true", "--reward", "breaks_on_rank_1")
    assert done.returncode != 0
    assert "RewardError" in done.stderr
    assert "raised KeyError: 'no such verifier'" in done.stderr
    assert "rank 1 failed, all stop: RewardError" in done.stderr  # what the other process says
    assert "world size" not in done.stdout
