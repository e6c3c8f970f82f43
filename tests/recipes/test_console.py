"""What a run prints: its own lines, and nothing of libraries that asks nothing of the user."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from recipes import console

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, ..."),
        (
            "diffusers.pipelines.pipeline_utils",
            "self.vae=None of type <class 'NoneType'> cannot be saved.",
        ),
        (
            "diffusers.models.modeling_utils",
            "There are modules in UNet2DConditionModel that should be kept in float32: []. Casting ...",
        ),
    ],
)
def test_messages_that_ask_nothing_are_left_out_and_others_of_their_logger_are_not(
    name, message, monkeypatch
):
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "filters", [])
    record = logging.LogRecord(name, logging.WARNING, "", 0, "%s", (message,), None)
    other = logging.LogRecord(name, logging.WARNING, "", 0, "kept in float32: ['norm']", (), None)
    assert logger.filter(record)
    console.quiet()
    assert not logger.filter(record)
    assert logger.filter(other)


def test_a_warning_is_one_line(monkeypatch, recwarn):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    console.plain_warnings()
    assert warnings.formatwarning("too small", UserWarning, "a.py", 3) == "warning: too small\n"
    found = warnings.formatwarning("old", FutureWarning, "a.py", 3)
    assert found == "a.py:3: FutureWarning: old\n"


@pytest.mark.slow
def test_a_diffusion_run_of_the_script_prints_its_own_lines_alone(tmp_path):
    """By its path, from another folder, without the project on the path."""
    task = {"folder": str(tmp_path / "digits"), "pretraining": {"steps": 2}}
    words = ["--config", "images/branch", "--task_settings", json.dumps(task)]
    words += ["--max_steps", "1", "--prompts_per_step", "2", "--output_dir", str(tmp_path / "run")]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DS_ACCELERATOR")}
    result = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "train.py"), *words, "--use_cpu", "true"],
        cwd=tmp_path,
        env=env | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    ours = ("process(es), ", "digits: ", "step ", "Loading pipeline components...", "warning: ")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert [line for line in lines if not any(own in line for own in ours)] == []
