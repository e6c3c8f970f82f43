"""What a run leaves behind and says: its folder, its log lines, trackers, a quiet terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from transformers.utils import logging

from rl.run import tracking
from rl.run.progress import PIPED_WIDTH
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs


def test_a_run_folder(tmp_path):
    made = tiny.run(tmp_path, reward=tiny.small_digit, max_steps=3, completions_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "completions",
        "metrics.jsonl",
        "run.json",
        "steps.jsonl",
    ]
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["settings"]["prompts_per_step"] == 6
    assert about["prompts"] == 24 and about["processes"] == 1 and about["resumed_from_step"] == 0
    assert len(about["data_fingerprint"]) == 32

    logs = tiny.lines(tmp_path, "metrics.jsonl")
    assert [row["step"] for row in logs] == [1, 2, 3, 3]  # the last one closes the run
    assert logs[-1]["train_loss"] == pytest.approx(sum(row["loss"] for row in logs[:3]) / 3)

    keys = {prompt.key for prompt in made.prompts}
    for number, step in enumerate(tiny.lines(tmp_path), start=1):
        assert step["step"] == number
        assert set(step["prompts"]) <= keys
        for column in ("draws", "budgets", "reward_sums", "pass_rates_before"):
            assert len(step[column]) == 6
        assert sum(step["posterior_histogram"]) == 24
        assert step["failures"] == []


def test_log_lines_are_means_over_their_steps(tmp_path):
    tiny.run(tmp_path / "1", reward=tiny.small_digit, max_steps=4, logging_steps=1)
    tiny.run(tmp_path / "2", reward=tiny.small_digit, max_steps=4, logging_steps=2)
    each, pairs = tiny.step_logs(tmp_path / "1"), tiny.step_logs(tmp_path / "2")
    assert [row["step"] for row in pairs] == [2, 4]
    for name in ("reward", "groups/mixed_share", "completions/mean_length", "loss"):
        expected = [(each[i][name] + each[i + 1][name]) / 2 for i in (0, 2)]
        assert [row[name] for row in pairs] == pytest.approx(expected, abs=1e-4)
    # The ledger's totals are sums over the run, whatever is logged.
    assert (
        pairs[-1]["ledger_total/rollouts_drawn"] == each[-1]["ledger_total/rollouts_drawn"] == 144
    )


def test_lines_after_the_checkpoint_and_torn_lines_are_cut(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    tracking._cut(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    tracking._cut(path, 0)
    assert path.read_text() == ""


def test_progress_bars_are_back_as_they_were():
    datasets.disable_progress_bars()
    try:
        with tracking.no_progress_bars():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled()  # off before, so off after
    finally:
        datasets.enable_progress_bars()
    with pytest.raises(KeyError), tracking.no_progress_bars():
        raise KeyError
    assert logging.is_progress_bar_enabled() and not datasets.are_progress_bars_disabled()


def test_a_terminal_shows_one_live_line_and_gets_its_cursor_back(tmp_path, capsys):
    def breaks(completions, **_):
        raise OSError("gone")

    made = tiny.trainer(tmp_path / "1", reward=breaks)
    made.progress._live = True
    with pytest.raises(Exception, match="gone"):
        made.train()
    assert not made.progress._progress.live.is_started

    made = tiny.trainer(tmp_path / "2", max_steps=2)
    made.progress._live, made.progress._quiet = True, False
    made.train()
    (task,) = made.progress._progress.tasks
    assert task.completed == task.total == 2
    assert task.description.startswith("reward ")


@pytest.mark.slow
def test_a_run_says_one_line_a_step_and_nothing_else(tmp_path):
    arguments = ["--max_steps", "2", "--completions_every", "1", "--gvm_gradient_norm", "mean"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "2"]
    done = subprocess.run(
        [sys.executable, str(Path(tiny.__file__)), str(tmp_path / "run"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore::UserWarning"},  # of budgets under `em`
    )
    # DeepSpeed, where it is installed, says on import which accelerator it takes.
    said = [line for line in done.stdout.splitlines() if "real_accelerator.py" not in line]
    assert said == ["world size 1"]
    one, two, validation = done.stderr.splitlines()
    of_step = r"step \d/2 \| reward 0\.\d{3} \| [\d.]+ s/step \| mixed \d+% \| .*"
    assert re.fullmatch(of_step, one) and re.fullmatch(of_step, two), done.stderr
    assert re.fullmatch(r"step 2/2 \| validation [\d.]+% greedy [\d.]+%", validation)
    assert max(map(len, (one, two, validation))) <= PIPED_WIDTH


# Trackers


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = {"reward": tiny.small_digit, "completions_every": 1, "logging_steps": 2}
    tiny.run(tmp_path / "run", report_to="tensorboard", max_steps=4, **settings)
    (file,) = (tmp_path / "board").rglob("events.out.*")
    events = EventAccumulator(str(file))
    events.Reload()
    expected = {row["step"]: row["reward"] for row in tiny.step_logs(tmp_path / "run")}
    found = {scalar.step: scalar.value for scalar in events.Scalars("train/reward")}
    assert found == pytest.approx(expected)
    tables = events.Tensors("completions/text_summary")
    assert [table.step for table in tables] == [1, 2, 3, 4]
    assert b"| completion |" in tables[0].tensor_proto.string_val[0]
    assert "train/ledger_total/tokens_trained" in events.Tags()["scalars"]


TRACKED = """
import sys
sys.path.insert(0, {root!r})
from tests import tiny
tiny.run({folder!r}, report_to={tracker!r}, reward=tiny.small_digit, completions_every=1, max_steps=2,
         logging_steps=2)
"""


def tracked(folder, tracker, **environment):
    """A run in a process of its own: trackers leave threads and globals behind."""
    script = TRACKED.format(
        root=str(Path(tiny.__file__).parents[1]), folder=str(folder / "run"), tracker=tracker
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    done = tracked(
        tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_PROJECT="tiny"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "wandb").rglob("*.wandb")
    content = log.read_bytes()
    assert b"train/reward" in content and b"train/ledger_total/tokens_trained" in content
    tables = list((tmp_path / "wandb").rglob("completions*.table.json"))
    assert len(tables) == 2
    assert "completion" in json.loads(tables[0].read_text())["columns"]


@pytest.mark.slow
def test_trackio_offline(tmp_path):
    pytest.importorskip("trackio")
    done = tracked(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    import sqlite3

    (path,) = tmp_path.glob("*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics")]
    rewards = [row["train/reward"] for row in rows if "train/reward" in row]
    assert rewards == pytest.approx([r["reward"] for r in tiny.step_logs(tmp_path / "run")])
    assert sum("completions" in row for row in rows) == 2
