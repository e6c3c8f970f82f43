"""Pictures of a task's validation completions, and the tables they are made of."""

import pandas
import pytest

from recipes.report.run_folder import Run, validation_tables
from recipes.report.task_pictures import PICTURES, before_and_after

MAZE = "c5>c5vc6v\nGd6Sd5"


def run_of(folder, *, task="maze", tables=None):
    (folder / "validation").mkdir()
    for step, completions in (tables or {}).items():
        rows = [
            {"step": step, "prompt_key": key, "prompt": MAZE, "completion": text, "reward": 0.0}
            for key, text in completions.items()
        ]
        pandas.DataFrame(rows).to_parquet(folder / "validation" / f"step-{step:06d}.parquet")
    return Run(folder=folder, name="run", about={"settings": {}, "recipe": {"task": task}})


def test_the_first_and_the_last_table_that_can_be_read(tmp_path):
    run = run_of(tmp_path, tables={s: {"a": f"c{s}"} for s in (0, 5, 10, 15)})
    (tmp_path / "validation" / "step-000015.parquet").write_text("torn")
    assert [[row["step"] for row in table] for table in validation_tables(run)] == [[0], [10]]
    assert ["step-000015.parquet cannot be read" in note for note in run.notes] == [True]


def test_one_table_is_shown_once_and_none_is_no_error(tmp_path):
    for name, tables, expected in (("one", {3: {"a": "c5"}}, 1), ("none", {}, 0)):
        (tmp_path / name).mkdir()
        assert len(validation_tables(run_of(tmp_path / name, tables=tables))) == expected


@pytest.mark.slow
def test_a_picture_has_a_line_of_prompts_for_each_validation(tmp_path):
    keys = [f"key{i}" for i in range(20)]
    tables = {0: dict.fromkeys(keys, "c5d6"), 4: dict.fromkeys(keys[1:], "c5c6d6")}
    run = run_of(tmp_path, tables=tables)
    ((caption, path),) = before_and_after(run, tmp_path / "page.html").items()
    assert "held-out prompts, steps 0 and 4" in caption
    assert path == tmp_path / "page-run-paths.png" and path.stat().st_size > 5000


def test_a_task_without_pictures_has_none(tmp_path):
    assert "arithmetic" not in PICTURES
    run = run_of(tmp_path, task="arithmetic", tables={0: {"a": "4"}})
    assert before_and_after(run, tmp_path / "page.html") == {}
    assert before_and_after(Run(folder=tmp_path, name="x"), tmp_path / "page.html") == {}
