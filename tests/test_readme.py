"""What the README, the pages of docs/ and those of the recipes show works as it is pasted.

Blocks of Python run in the order of their page, in a folder with a model in the place of the
warm start; a block whose first line names a file (`# my_rules.py`) is first written to it. Command lines
are parsed: their files and settings exist. Links lead to files.
"""

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "recipes").rglob("*.md"))]
SHORT = "max_steps=2, max_completion_length=8, use_cpu=True"
TRAINING = ("recipes/train.py", "apportion_recipes.train")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands_of(page):
    """Command lines of the indented blocks, with lines that end in a backslash joined."""
    text = re.sub(r"```.*?```", "", page.read_text().replace("\\\n", " "), flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    in_tables = re.findall(r"`((?:accelerate launch|apportion train) [^`]*--config [^`]+)`", text)
    found = [shlex.split(line, comments=True) for line in [*lines, *in_tables] if balanced(line)]
    return [words for words in found if settings_of(words) is not None and "..." not in words]


def balanced(line):
    """Whether shlex can read it; lines of Python and of output are no commands."""
    return line.count('"') % 2 == 0 and line.count("'") % 2 == 0


def settings_of(words):
    """The arguments of a run that a command line starts; None if it starts none."""
    if words[:2] == ["apportion", "train"]:
        return words[2:]
    if words[:2] == ["accelerate", "launch"]:
        at = next((i for i, word in enumerate(words) if word in TRAINING), None)
        return None if at is None else words[at + 1 :]
    return None


WITH_BLOCKS = [page for page in PAGES if blocks_of(page)]
COMMANDS = [
    pytest.param(page, words, id=f"{name_of(page)}: {' '.join(words)}")
    for page in LINKED
    for words in commands_of(page)
]


def write_files(page, folder):
    """Write the blocks of a page that name a file."""
    for block in blocks_of(page):
        if found := re.match(r"# (\w+\.py)\n", block):
            (folder / found.group(1)).write_text(block)


def test_there_is_something_to_try():
    assert len(WITH_BLOCKS) >= 3 and len(COMMANDS) >= 8


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # In the place of the warm start, which takes minutes, a model that knows nothing; two steps of it.
    folder = tmp_path / "runs" / "arithmetic-warm-start"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    write_files(page, tmp_path)
    for number, block in enumerate(blocks_of(page)):
        if "RolloutTrainer(" in block:
            block = re.sub(r"max_completion_length=\d+,?", "", block)
            block = block.replace("max_steps=100", SHORT)
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), {"__name__": "page"})
        if "RolloutTrainer(" in block:
            assert len(tiny.lines(tmp_path / "runs" / "mine")) == 2
    for name in [n for n in sys.modules if (tmp_path / f"{n}.py").is_file()]:
        del sys.modules[name]


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_a_command_line_names_files_and_settings_that_exist(page, words, tmp_path, monkeypatch):
    from trl import ModelConfig

    from recipes.arguments import RecipeArguments
    from recipes.config import parse, peek
    from recipes.where import recipe_file
    from rl import DenoisingConfig, RolloutConfig

    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for name, value in pairwise(words):
        if name == "--config_file":
            assert (ROOT / value).is_file(), value
        if name == "--config" and value != "RUN.yaml":
            assert recipe_file(value).is_file(), value
    recipe = ROOT / "recipes" / "arithmetic" / "grpo.yaml"
    given = [str(recipe) if word == "RUN.yaml" else word for word in settings_of(words)]
    given = [str(ROOT / word) if word.startswith("recipes/") else word for word in given]
    config = DenoisingConfig if peek("policy", given) == "diffusion" else RolloutConfig
    parse((RecipeArguments, config, ModelConfig), [*given, "--use_cpu", "true"])


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [
        link for link in links if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_files_that_a_page_names_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    rooms = "samplers|rollouts|rl|recipes|tests|benchmarks|examples|docs"
    named = re.findall(rf"`((?:{rooms})/[\w/.-]+\.\w+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_short_names_of_files_in_the_table_of_papers_exist():
    missing, folder = [], ""
    for name in re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "papers.md").read_text()):
        folder = name.rpartition("/")[0] or folder
        if not (ROOT / folder / name.rpartition("/")[2]).is_file():
            missing.append(name)
    assert missing == []
