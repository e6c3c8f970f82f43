"""DeepSpeed ZeRO 1 to 3 on two CPU processes do what one process does, stop together and resume.

A launch costs some ten seconds (the first of a machine forty more, for DeepSpeed builds its shared
memory extension), so each stage makes all its runs in one.
"""

import contextlib
import os
from pathlib import Path

import psutil
import pytest
import torch

from tests import tiny
from tests.launched import (
    CONFIGS,
    RUNS,
    SHARDED,
    SHARDED_ON_CPU,
    assert_same,
    errors_of,
    launch,
    on_one_process,
    weights,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_lock_of_a_killed_build():
    """DeepSpeed waits 300 s for a lock, also for one whose process was killed, and then gives up."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    for lock in Path(folder).glob("*/lock") if folder else []:
        with contextlib.suppress(FileNotFoundError):
            if not builders(before=lock.stat().st_mtime):
                lock.unlink()


def builders(before: float) -> list[psutil.Process]:
    """Launched runs that began before a time, and so may have taken a lock then."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "launched.py" in " ".join(process.cmdline()) and process.create_time() <= before:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name in SHARDED:
        on_one_process(folder / name, name)
    return folder


def under_zero(stage: int) -> tuple[str, ...]:
    config = CONFIGS / ("zero3.yaml" if stage == 3 else "zero2.yaml")
    flags = ("--config_file", str(config), "--mixed_precision", "no")
    return (*flags, "--zero_stage", "1") if stage == 1 else flags


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_does_what_one_process_does_and_resumes(stage, one_process, tmp_path):
    """Uneven rows, a process without any, empty steps, several updates a step, gradient norms at the
    head, validation and the exported model; then a run that breaks in step 4 and is resumed.
    """
    runs = {name: SHARDED_ON_CPU | RUNS[name] for name in SHARDED}
    small, broken = runs["small"], tmp_path / "broken"
    first = [(tmp_path / name, settings) for name, settings in runs.items()]
    first += [(broken, small | {"fault": "generation@3"})]
    resumed = [(broken, small | {"resume_from_checkpoint": "true"})]
    # ZeRO-3 numbers modules per process and compares the numbers: a failed process must start anew.
    launches = [first, resumed] if stage == 3 else [first + resumed]
    output = ""
    for runs_of in launches:
        done = launch(*runs_of, flags=under_zero(stage))
        assert done.returncode == 0, errors_of(done)
        output += done.stdout
    assert output.count("world size 2") == 2 * (len(runs) + 1)
    assert output.count("trained as DEEPSPEED DeepSpeedEngine") == 2 * (len(runs) + 1)
    for name in SHARDED:
        assert_same(tmp_path / name, one_process / name)
    trained = [row["ledger/rollouts_trained"] for row in tiny.step_logs(tmp_path / "sparse")]
    assert 1 in trained and 0 in trained  # a process without rows, and both

    assert "rank 1 failed, all stop: MemoryError: no memory for generation" in output
    assert tiny.lines(broken) == tiny.lines(tmp_path / "small")
    for name, value in weights(tmp_path / "small").items():
        assert torch.equal(value, weights(broken)[name])


def test_zero_1_does_what_one_process_does(one_process, tmp_path):
    """DeepSpeed's optimizer of stages 1 and 2 is one; the stage decides which gradients it keeps."""
    names = ("small", "sparse")
    done = launch(
        *[(tmp_path / name, SHARDED_ON_CPU | RUNS[name]) for name in names], flags=under_zero(1)
    )
    assert done.returncode == 0, errors_of(done)
    assert done.stdout.count("trained as DEEPSPEED DeepSpeedEngine") == 2 * len(names)
    for name in names:
        assert_same(tmp_path / name, one_process / name)
