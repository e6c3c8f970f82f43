"""Two processes do what one does: the same decisions, the same weights, and they stop together.

A launch costs some ten seconds, so one launch makes several runs.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.launched import ON_CPU, RUNS, assert_same, errors_of, launch, on_one_process, weights

pytestmark = pytest.mark.slow


def logs_of(folder: Path) -> list[dict]:
    """Step logs without times."""
    return [
        {n: v for n, v in row.items() if "seconds" not in n and n != "step_time"}
        for row in tiny.step_logs(folder)
    ]


def validation(folder: Path) -> list[dict]:
    return [row for row in tiny.lines(folder, "metrics.jsonl") if "eval_pass_rate" in row]


def assert_identical(ours: Path, theirs: Path) -> None:
    """The same decisions and the same weights, bit for bit."""
    assert tiny.lines(ours) == tiny.lines(theirs)
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_do_what_one_does(tmp_path):
    """Whatever fails on one process stops both with its cause, and the run resumes as if unbroken."""
    two, one = tmp_path / "two", tmp_path / "one"
    small = ON_CPU | RUNS["small"]
    broken = {kind: two / kind for kind in ("generation", "reward", "nan")}
    runs = [(two / name, ON_CPU | settings) for name, settings in RUNS.items()]
    for kind, folder in broken.items():
        runs += [(folder, small | {"fault": f"{kind}@3"})]
        runs += [(folder, small | {"resume_from_checkpoint": "true"})]
    # Checkpoints are far apart, and both processes come to the same end: both save what they have.
    saved, rare = two / "saved", small | {"save_steps": 100}
    runs += [(saved, rare | {"fault": "reward@3"})]
    runs += [(saved, rare | {"resume_from_checkpoint": "true"})]
    done = launch(*runs)
    assert done.returncode == 0, errors_of(done)
    assert done.stdout.count("world size 2") == 2 * (len(RUNS) + len(broken) + 1)
    assert done.stdout.count("trained as MULTI_CPU DistributedDataParallel") >= 2 * len(RUNS)
    for name, settings in RUNS.items():
        on_one_process(one / name, name)
        assert_same(two / name, one / name)
        assert len(tiny.lines(one / name)) == settings["max_steps"]
        for ours, theirs in zip(logs_of(two / name), logs_of(one / name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    trained = [row["ledger/rollouts_trained"] for row in tiny.step_logs(one / "sparse")]
    assert 1 in trained and 0 in trained  # a process without rows, and both
    shares = [row["starts/share"] for row in tiny.step_logs(two / "starts")]
    assert max(shares) > 0.5  # starts were chosen
    shares = [row["verdicts/decided_share"] for row in tiny.step_logs(two / "verdicts")]
    assert shares[0] == 0 and min(shares[1:]) > 0.5  # the first step checks, the others end
    assert validation(two / "verdicts") == validation(one / "verdicts") != []
    assert validation(two / "small") == validation(one / "small") != []

    why = {kind: f"MemoryError: no memory for {kind}" for kind in ("generation", "reward")}
    why["nan"] = "FloatingPointError: the loss or a log-probability is NaN or infinite"
    for kind, folder in broken.items():
        assert f"stopped: {why[kind]}" in done.stdout
        assert f"rank 1 failed, all stop: {why[kind]}" in done.stdout
        assert_identical(folder, two / "small")
    # An error that all processes hear of costs none of the steps before it.
    assert json.loads((saved / "run.json").read_text())["resumed_from_step"] == 3
    assert_identical(saved, two / "small")
    assert done.stdout.count("stopped: ") == 2 * (len(broken) + 1)

    # And one process goes on from a checkpoint of two.
    shutil.copytree(two / "small", two / "copy")
    resume = str(two / "copy" / "checkpoint-2")
    on_one_process(two / "copy", "small", resume_from_checkpoint=resume)
    assert_same(two / "copy", one / "small")


def test_a_process_that_is_killed_ends_the_run_which_resumes(tmp_path):
    """The launcher notices, names it and ends the other; nothing half-written is left."""
    small, killed, whole = ON_CPU | RUNS["small"], tmp_path / "killed", tmp_path / "whole"
    started = time.monotonic()
    done = launch((killed, small | {"fault": "kill@3"}))
    assert time.monotonic() - started < 120
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr and "rank      : 1" in done.stderr
    assert "world size" not in done.stdout

    done = launch((killed, small | {"resume_from_checkpoint": "true"}), (whole, small))
    assert done.returncode == 0, errors_of(done)
    assert_identical(killed, whole)


def test_a_reward_that_raises_on_one_process_stops_both(tmp_path):
    done = launch((tmp_path, ON_CPU | {"reward": "breaks_on_rank_1"}))
    assert done.returncode != 0
    assert "RewardError" in done.stderr
    assert "raised KeyError: 'no such verifier'" in done.stderr
    assert "RewardError: on process 1: at least" in done.stderr  # what the other process says
    assert "world size" not in done.stdout
