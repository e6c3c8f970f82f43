"""A resumed run goes on in the run of its tracker."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rl.run.tracker_runs import FILE, TrackerRuns
from tests import tiny


def test_the_run_of_a_tracker_is_found_again(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_RESUME", "never")
    (tmp_path / FILE).write_text(json.dumps({"wandb": "abc123", "trackio": "brave-run-3"}))
    runs, args = TrackerRuns(str(tmp_path)), SimpleNamespace(run_name=None)
    with runs.continued(args, from_step=4):
        assert os.environ["WANDB_RUN_ID"] == "abc123" and os.environ["WANDB_RESUME"] == "allow"
        assert args.run_name == "brave-run-3"
    assert "WANDB_RUN_ID" not in os.environ and os.environ["WANDB_RESUME"] == "never"
    assert args.run_name is None
    with runs.continued(args, from_step=0):  # a new run
        assert "WANDB_RUN_ID" not in os.environ and args.run_name is None
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    args.run_name = "mine"
    with runs.continued(args, from_step=4):
        assert os.environ["WANDB_RUN_ID"] == "mine" and args.run_name == "mine"


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"wandb": 3, "trackio": null}'])
def test_a_damaged_list_of_trackers_is_none(tmp_path, monkeypatch, content):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / FILE).write_bytes(content)
    with TrackerRuns(str(tmp_path)).continued(SimpleNamespace(run_name=None), from_step=4):
        assert "WANDB_RUN_ID" not in os.environ


RESUMED = """
import sys
sys.path.insert(0, {root!r})
from tests import tiny
more = dict(report_to={tracker!r}, save_strategy="steps", save_steps=1, reward=tiny.small_digit)
tiny.run({folder!r}, max_steps={steps}, resume={steps} > 1 or None, **more)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_go_on_with_their_run(tmp_path, tracker):
    pytest.importorskip(tracker)
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}
    known = []
    for steps in (1, 2):
        script = RESUMED.format(
            root=str(Path(tiny.__file__).parents[1]),
            folder=str(tmp_path / "run"),
            tracker=tracker,
            steps=steps,
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=os.environ | own,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        known.append(json.loads((tmp_path / "run" / FILE).read_text())[tracker])
    assert known[0] and known[0] == known[1]
    if tracker == "wandb":
        logs = [path.stem for path in (tmp_path / "wandb").rglob("*.wandb")]
        assert logs == [f"run-{known[0]}"] * 2
