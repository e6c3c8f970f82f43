"""The command `apportion` and how it finds recipes. As installed: tests/test_wheel.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes import cli, where
from recipes.config import parse, peek
from recipes.data import load_rows

ROOT = Path(__file__).resolve().parents[2]


def test_recipes_are_listed_with_a_line_each(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"arithmetic/everything", "images/peers/flow_grpo", "math/gvm_raft"} <= set(names)
    assert not [name for name in names if name.startswith("accelerate")]
    assert not [name for name in names if "/_" in name]  # what recipes are based on
    assert all(len(line.split()) > 3 for line in lines)


def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / "arithmetic" / "everything.yaml"
    for name in ("arithmetic/everything", "arithmetic/everything.yaml", path):
        assert where.recipe_file(name) == path
    assert where.recipe_file("recipes/arithmetic/everything.yaml") == path
    assert peek("task", ["--config", "arithmetic/everything"]) == "arithmetic"
    assert where.recipe_file("nothing/here") == Path("nothing/here")


def test_a_file_of_ones_own_goes_before_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "gvm_raft.yaml").write_text("task: mine\n")
    assert peek("task", ["--config", "math/gvm_raft.yaml"]) == "mine"


def test_prompts_that_a_recipe_names_are_found_from_anywhere(tmp_path, monkeypatch):
    from recipes.arguments import RecipeArguments

    source = "recipes/images/prompts/animals.jsonl"
    here = load_rows(ROOT / source)
    monkeypatch.chdir(tmp_path)
    assert load_rows(source) == here
    path = ROOT / "recipes" / "images" / "peers" / "ddpo.yaml"
    named = yaml.safe_load(path.read_text())["dataset_name"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"dataset_name": named}))
    (given,) = parse((RecipeArguments,), ["--config", "run.yaml"])
    assert load_rows(given.dataset_name)
    with pytest.raises(
        ValueError, match="no file or folder 'recipes/images/prompts/nothing.jsonl'"
    ):
        load_rows("recipes/images/prompts/nothing.jsonl")


def test_a_file_of_ones_own_may_be_based_on_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: arithmetic/grpo\n")
    assert peek("task", ["--config", "mine.yaml"]) == "arithmetic"
    (tmp_path / "arithmetic").mkdir()
    (tmp_path / "arithmetic" / "grpo").write_text("task: mine\n")
    assert peek("task", ["--config", "mine.yaml"]) == "mine"


def test_a_recipe_is_copied_with_what_it_is_based_on(tmp_path, monkeypatch, capsys):
    package = tmp_path / "package"
    (package / "own").mkdir(parents=True)
    (package / "own" / "run.yaml").write_text("# A run.\nbase: shared.yaml\nseed: 1\n")
    (package / "own" / "shared.yaml").write_text("# What runs share.\nseed: 2\n")
    monkeypatch.setattr(where, "PACKAGE", package)
    cli.main(["recipes", "copy", "own/run", str(tmp_path / "mine")])
    assert f"apportion train --config {tmp_path / 'mine' / 'run.yaml'}" in capsys.readouterr().out
    for name in ("run.yaml", "shared.yaml"):
        copied = (tmp_path / "mine" / name).read_text()
        assert copied == (package / "own" / name).read_text()
    (tmp_path / "mine" / "run.yaml").write_text("seed: 3\n")
    with pytest.raises(SystemExit, match=r"run.yaml is there already"):
        cli.main(["recipes", "copy", "own/run", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "run.yaml").read_text() == "seed: 3\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'"),
        (["recipes", "copy", "arithmetic/everthing", "x"], "Did you mean 'arithmetic/everything'"),
        (["recipes", "copy", "../README", "x"], "no recipe '../README'"),
    ],
)
def test_a_word_that_means_nothing_is_told_with_the_nearest(words, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(words)


def test_without_a_command_there_is_help(capsys):
    cli.main([])
    printed = capsys.readouterr().out
    assert all(f"apportion {name}" in printed for name in cli.COMMANDS)


def test_a_command_says_which_extra_it_needs(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(
        SystemExit, match=r"this command needs trl: pip install 'apportion\[train\]'"
    ):
        cli.main(["train", "--help"])


def test_the_command_starts_without_loading_what_it_does_not_need():
    code = "import sys\nfrom recipes.cli import main\nmain(['recipes'])\n"
    code += "print(json.dumps([n for n in ('numpy', 'torch', 'trl', 'rich') if n in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", "import json\n" + code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout.splitlines()[-1]) == []
