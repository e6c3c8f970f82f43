"""The picture of the README: where the rollouts of a run's steps went."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "where_rollouts_went.py"


@pytest.fixture
def run(tmp_path):
    """Two steps: groups of 8 and 4 that fail, of 4 that passes, of 8 with 1, 4 and 7 passes of 8."""
    steps = [
        {"budgets": [8, 4, 8], "reward_sums": [0, 4, 1]},
        {"budgets": [4, 8, 8], "reward_sums": [0, 4, 7]},
    ]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, steps)))
    return tmp_path


def test_rollouts_are_counted_at_the_share_of_their_group_that_passed(run):
    # None: (8 + 4) / 2 steps; an eighth, four and seven: 8 / 2 each; all: 4 / 2.
    counts = runpy.run_path(str(SCRIPT))["rollouts_by_share"](run)
    assert counts.tolist() == [6, 4, 0, 0, 4, 0, 0, 4, 2]


def test_a_mixed_group_is_never_counted_as_wasted(tmp_path):
    step = {"budgets": [100, 100], "reward_sums": [1, 99]}
    (tmp_path / "steps.jsonl").write_text(json.dumps(step))
    counts = runpy.run_path(str(SCRIPT))["rollouts_by_share"](tmp_path)
    assert counts[0] == counts[-1] == 0
    assert counts[1] == counts[7] == 100


def test_the_picture_says_how_much_was_wasted(run, capsys):
    runpy.run_path(str(SCRIPT))["draw"]([run, run], ["one", "other"])
    assert "one: 20.0 rollouts a step, 40.0% wasted" in capsys.readouterr().out
