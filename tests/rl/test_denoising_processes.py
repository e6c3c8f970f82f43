"""Diffusion on two CPU processes is diffusion on one: decisions, weights, validation, what is left.

A launch costs some ten seconds, so one launch makes several runs.
"""

from pathlib import Path

import pytest
import torch

from tests import launched_denoising
from tests.launched import CONFIGS, DDP, errors_of, launch
from tests.launched_denoising import RUNS, run, weights
from tests.tiny import lines, step_logs
from tests.tiny_denoising import difference, start

pytestmark = pytest.mark.slow
torch.set_num_threads(1)

SCRIPT = Path(launched_denoising.__file__)


def launched(*folders, flags=DDP):
    return launch(*((folder, {}) for folder in folders), flags=flags, script=SCRIPT)


def logs_of(folder):
    """Logs of steps and of validation, without times."""
    return [
        {n: v for n, v in row.items() if "seconds" not in n and n not in ("step_time", "runtime")}
        for row in lines(folder, "metrics.jsonl")
        if "loss" in row or "eval_reward" in row
    ]


def test_two_processes_do_what_one_does(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    done = launched(*(two / name for name in RUNS))
    assert done.returncode == 0, errors_of(done)
    for name in RUNS:
        text = f"trained {name} as MULTI_CPU DistributedDataParallel of 2"
        assert done.stdout.count(text) == 2, done.stdout
        run(one / name)
        for row, expected in zip(lines(two / name), lines(one / name), strict=True):
            # Batches of another size round otherwise, and a pixel on the edge of two of its 256 levels
            # falls to the other: 1 / 255 of one of 64 pixels in a mean.
            rewards = {"reward_sums": 1e-3, "pass_rates_before": 1e-4}
            for column, off in rewards.items():
                assert row.pop(column) == pytest.approx(expected.pop(column), abs=off), name
            assert row == expected, name
        ours, theirs = weights(two / name), weights(one / name)
        # At its learning rate of .1 an adapter moves by .3, and a reward's last digit by 2e-5 of that.
        assert difference(ours, theirs) < (1e-4 if name == "lora" else 1e-5), name
        moved = {n: w for n, w in start().items() if n in theirs}
        assert name == "lora" or difference(moved, theirs) > 1e-4, name
        for row, expected in zip(logs_of(two / name), logs_of(one / name), strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    assert min(row["ledger/rollouts_trained"] for row in step_logs(one / "few")) == 2
    names = {path.name for path in (two / "branches" / "images").iterdir()}
    assert names == {path.name for path in (one / "branches" / "images").iterdir()}
    assert (two / "lora" / "final" / "lora").is_dir()
    adapter = [w.abs().max() for n, w in weights(two / "lora").items() if "lora_B" in n]
    assert max(adapter) > 1e-4  # which is 0 at first
    assert (two / "branches" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("config", ["zero2.yaml", "fsdp2.yaml"])
def test_sharded_denoisers_are_refused_before_anything_is_drawn(tmp_path, config):
    kind = "DEEPSPEED" if config == "zero2.yaml" else "FSDP"
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    flags = ("--config_file", str(CONFIGS / config), "--mixed_precision", "no")
    done = launched(tmp_path / "branches", flags=flags)
    assert done.returncode == 0, errors_of(done)
    text = f"refused: a diffusion model trains on several processes with DDP, not with {kind}"
    assert done.stdout.count(text) == 2, done.stdout
    assert not (tmp_path / "branches" / "steps.jsonl").exists()
