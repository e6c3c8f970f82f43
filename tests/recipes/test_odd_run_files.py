"""The report of run folders whose files are odd: what is wrong is noted, the rest is shown."""

import json

import pytest

from recipes.report.report import main
from recipes.report.run_folder import read_run
from tests.recipes.report.test_report import fake_run

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def folder(tmp_path):
    return fake_run(tmp_path / "run", steps=12, validate_every=4)


def shown(folder, capsys):
    """What the command line prints, on one line; the page is there."""
    main([str(folder)])
    assert (folder / "report.html").is_file()
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"[]", "run.json is torn"),
        (b'"text"', "run.json is torn"),
        (b"\xff\xfe\x00{", "run.json is torn"),
        (b'{"settings": null, "prompts": 3}', "run.json has no settings"),
        (b'{"prompts": 3}', "run.json has no settings"),
    ],
)
def test_a_run_json_that_is_none(folder, capsys, content, note):
    (folder / "run.json").write_bytes(content)
    text = shown(folder, capsys)
    assert note in text and "Learning" in text


@pytest.mark.parametrize("planned", [None, "many", [3]])
def test_a_number_of_steps_that_is_none(folder, capsys, planned):
    about = {"settings": {"max_steps": planned}, "validation_prompts": "28"}
    (folder / "run.json").write_text(json.dumps(about))
    text = shown(folder, capsys)
    assert "12" in text and "still running" not in text


def test_a_metric_that_is_text(folder, capsys):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    at = next(i for i, row in enumerate(rows) if row.get("step") == 5)
    rows[at]["reward"] = "high"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(folder, capsys)
    assert f"line {at + 1} of metrics.jsonl is torn and left out: reward is 'high', not a" in text
    run = read_run(folder, "run")
    assert [row["step"] for row in run.log] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"pass_rates_before": None}, "pass_rates_before is None, not a list of finite numbers"),
        ({"pass_rates_before": [0.5]}, "budgets and pass_rates_before differ in length"),
        ({"pass_rates_before": [float("nan")] * 24}, "pass_rates_before is [nan"),
        ({"budgets": "8"}, "budgets is '8', not a list"),
        ({"posterior_histogram": [None]}, "posterior_histogram is [None], not a list"),
        ({"step": float("inf")}, "line 3 of steps.jsonl is torn and left out (killed"),
    ],
)
def test_a_decision_that_is_not_whole(folder, capsys, change, note):
    path = folder / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2] |= change
    rows[2] = {name: value for name, value in rows[2].items() if value is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert note in shown(folder, capsys)
    assert [row["step"] for row in read_run(folder, "run").steps] == [1, 2, *range(4, 13)]
