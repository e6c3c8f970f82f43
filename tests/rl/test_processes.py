"""Two processes do what one does: the same decisions, the same weights, and they stop together.

A launch costs some twenty seconds, so one launch makes several runs.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
    """Step logs without times, and without the norm, which DDP's reduction rounds otherwise."""
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


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    arguments = [
        ["--and", folder / name, *words({"use_cpu": "true"} | settings)]
        for name, settings in RUNS.items()
    ]
    done = launch(*[word for run in arguments for word in run][1:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("world size 2") == 2 * len(RUNS)  # of both processes, in every run
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name, settings in RUNS.items():
        reward = tiny.REWARDS[settings["reward"]]
        tiny.run(
            folder / name,
            data=tiny.rows("ab"),
            eval_dataset=tiny.rows("c"),
            **settings | {"reward": reward, "per_device_train_batch_size": 100},
        ).save_model(str(folder / name / "final"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_close(ours: dict, theirs: dict, start: dict) -> None:
    assert theirs.keys() <= ours.keys()  # a file holds tied weights once
    moved = max(float((start[name] - theirs[name]).abs().max()) for name in theirs)
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert apart < 1e-5 < 1e-3 < moved


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(launched, alone, name, tmp_path):
    assert tiny.lines(launched / name) == tiny.lines(alone / name)
    assert len(tiny.lines(launched / name)) == RUNS[name]["max_steps"]
    start = dict(tiny.model().state_dict())
    assert_close(weights(launched / name), weights(alone / name), start)
    for ours, theirs in zip(logs_of(launched / name), logs_of(alone / name), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_some_step_had_rows_for_one_process_only(alone):
    trained = [row["ledger/rollouts_trained"] for row in tiny.step_logs(alone / "sparse")]
    assert 1 in trained and 0 in trained


def test_validation_is_the_same(launched, alone):
    ours, theirs = (
        [row for row in tiny.lines(run / "small", "metrics.jsonl") if "eval_pass_rate" in row]
        for run in (launched, alone)
    )
    assert ours == theirs and len(theirs) == 1


def test_one_process_goes_on_from_a_checkpoint_of_two(launched, alone):
    made = tiny.run(
        launched / "small",
        data=tiny.rows("ab"),
        eval_dataset=tiny.rows("c"),
        resume=str(launched / "small" / "checkpoint-3"),
        **RUNS["small"] | {"reward": tiny.small_digit},
    )
    assert tiny.lines(launched / "small") == tiny.lines(alone / "small")
    assert_close(tiny.parameters(made), weights(alone / "small"), dict(tiny.model().state_dict()))


def test_a_reward_that_raises_on_one_process_stops_both(tmp_path):
    done = launch(tmp_path, "--use_cpu", "true", "--reward", "breaks_on_rank_1")
    assert done.returncode != 0
    assert "RewardError" in done.stderr
    assert "raised KeyError: 'no such verifier'" in done.stderr
    assert "rank 1 failed, all stop: RewardError" in done.stderr  # what the other process says
    assert "world size" not in done.stdout
