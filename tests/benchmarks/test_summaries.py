"""Recorded results are short, and say what was measured to enough digits."""

import json
from pathlib import Path

from benchmarks import summaries

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_one_line_per_row_and_five_digits(tmp_path):
    summary = {
        "command": "python x.py",
        "seeds": [1, 2],
        "rows": [{"arm": "a", "mean": [0.123456789, None]}, {"arm": "b", "mean": [2.0, 1e-9]}],
        "cases": {"one": {"seconds": 123456.789}},
    }
    path = tmp_path / "made" / "x.json"
    summaries.write(path, summary)
    found = json.loads(path.read_text())
    assert found["rows"][0] == {"arm": "a", "mean": [0.12346, None]}
    assert found["rows"][1]["mean"] == [2.0, 1e-9]
    assert found["cases"]["one"]["seconds"] == 123460.0
    assert (found["command"], found["seeds"]) == ("python x.py", [1, 2])
    assert len(path.read_text().splitlines()) == 2 + 2 + (2 + 2) + (2 + 1)


def test_recorded_results_are_summaries_as_the_scripts_write_them():
    paths = list(RESULTS.glob("*.json"))
    assert len(paths) >= 10
    for path in paths:
        summary = json.loads(path.read_text())
        assert "runs" not in summary, path.name
        assert summary == summaries.rounded(summary), path.name
        assert len(path.read_text().splitlines()) < 500, path.name
