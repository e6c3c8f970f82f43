"""What the README shows works as it is pasted: its Python blocks run, its command lines parse."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def commands():
    """Command lines of the indented blocks, with lines that end in a backslash joined."""
    text = TEXT.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if "recipes/train.py" in line]


def test_there_is_something_to_try():
    assert len(BLOCKS) == 2 and len(commands()) >= 5


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_python_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # In the place of the warm start, which takes minutes, a model that knows nothing; two steps of it.
    folder = tmp_path / "runs" / "arithmetic-warm-start"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    block = BLOCKS[number].replace("max_steps=100", "max_steps=2, max_completion_length=8")
    exec(compile(block, f"README block {number}", "exec"), {"__name__": "readme"})
    if "RolloutTrainer" in block:
        assert len(tiny.lines(tmp_path / "runs" / "mine")) == 2


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_line_names_files_and_settings_that_exist(words):
    from trl import ModelConfig

    from recipes.arguments import RecipeArguments
    from recipes.config import parse, peek
    from rl.config.diffusion import DenoisingConfig
    from rl.config.settings import RolloutConfig

    at = words.index("recipes/train.py")
    for launch in (words[:at], words[at:]):
        for name, value in pairwise(launch):
            if name in ("--config", "--config_file") and value != "RUN.yaml":
                assert (ROOT / value).is_file(), value
    recipe = ROOT / "recipes" / "arithmetic" / "grpo.yaml"
    given = [str(recipe) if word == "RUN.yaml" else word for word in words[at + 1 :]]
    given = [str(ROOT / word) if word.startswith("recipes/") else word for word in given]
    config = DenoisingConfig if peek("policy", given) == "diffusion" else RolloutConfig
    parse((RecipeArguments, config, ModelConfig), [*given, "--use_cpu", "true"])
