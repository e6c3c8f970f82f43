"""The wheel, installed somewhere else and used without the source tree: samplers, training, the command.

Nothing is downloaded: it is built by the environment's setuptools and installed without its
dependencies, which the environment has.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("samplers", "rollouts", "rl", "recipes", "pyproject.toml", "setup.py", "README.md")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]

pytestmark = pytest.mark.slow

TINY = {
    "train": 2,
    "validation": 1,
    "warm_start": {"steps": 3, "rows": 200, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
}
SETTINGS = {
    "task_settings": json.dumps(TINY),
    "prompts_per_step": 2,
    "rollouts_per_prompt": 8,
    "max_completion_length": 16,
    "eval_rollouts_per_prompt": 1,
    "max_steps": 2,
    "use_cpu": True,
}
NOISE = ("[transformers]", "torchvision", "accelerator", "callbacks", "cannot be saved", "float32:")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because a build leaves its folders in the source tree."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "runs")
    for name in (*SOURCES, "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-w", str(built)]
    subprocess.run([*PIP, "wheel", *options, str(source)], check=True)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "-t", folder, wheel], check=True)
    # As torchtune's: whatever imports the package by its name in the repository finds this one.
    (folder / "recipes").mkdir()
    (folder / "recipes" / "__init__.py").write_text(
        "raise ImportError('not the recipes you want')\n"
    )
    return folder


def call(*words: object, site: Path, cwd: Path, libraries: bool = True) -> tuple[str, str]:
    """Standard output and error of Python, with the installed wheel before everything else.

    Args:
        libraries: whether the environment's libraries are there; if not, what `site` holds.
    """
    python = [sys.executable, "-P"] if libraries else [sys.executable, "-P", "-S"]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [*python, *map(str, words)],
        env=env | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout, result.stderr


def settings(**more: object) -> list[str]:
    return [w for name, value in (SETTINGS | more).items() for w in (f"--{name}", str(value))]


def test_the_wheel_holds_the_licence_the_recipes_and_no_package_called_recipes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"samplers", "rollouts", "rl", "apportion_recipes"}
    for top in tops:
        assert f"{top}/py.typed" in names
    for path in (ROOT / "recipes").rglob("*"):
        if path.suffix in (".py", ".yaml", ".md", ".jsonl") and "runs" not in path.parts:
            assert f"apportion_recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in names
    for package in ("samplers", "rollouts", "rl"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    (metadata,) = [name for name in names if name.endswith("METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: numpy>=2.0"]
    assert "License-Expression: Apache-2.0" in text
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture
def numpy_alone(site, tmp_path) -> Path:
    """The wheel and NumPy, in a folder without any other library."""
    folder = tmp_path / "site"
    folder.mkdir()
    libraries = Path(np.__file__).parents[1]
    for path in (*site.iterdir(), libraries / "numpy", libraries / "numpy.libs"):
        if path.exists():
            (folder / path.name).symlink_to(path)
    return folder


def test_with_numpy_alone_the_samplers_work_and_the_rest_says_what_it_needs(numpy_alone, tmp_path):
    code = f"""
import sys
from importlib.util import find_spec
from samplers import *
import samplers, numpy
assert samplers.__file__.startswith({str(numpy_alone)!r}), samplers.__file__
assert find_spec("torch") is None and find_spec("rich") is None
posterior = BetaPosterior(4)
keys = list("abcd")
planner = Planner(posterior, selection.UniformSelector(4, seed=0, keys=keys), allocation.uniform,
                  keys=keys, prompts_per_step=2, rollouts_per_step=8)
proposal = planner.propose()
planner.observe(proposal, numpy.ones(8), proposal.prompt_N)
from rollouts import Prompt
for line in ("import rl", "from rollouts import TokenRollouts"):
    try:
        exec(line)
    except ImportError as error:
        print(error)
"""
    printed, _ = call("-c", code, site=numpy_alone, cwd=tmp_path, libraries=False)
    assert printed.splitlines() == [
        "rl needs torch: pip install 'apportion[train]'",
        "rollouts.TokenRollouts needs torch: pip install 'apportion[train]'",
    ]
    command = "-m", "apportion_recipes.cli"
    printed, _ = call(*command, "recipes", site=numpy_alone, cwd=tmp_path, libraries=False)
    assert "arithmetic/everything" in printed


def test_a_wheel_trains_reports_simulates_and_copies_recipes(site, tmp_path):
    apportion = site / "bin" / "apportion"
    code = "import samplers, rollouts, rl, apportion_recipes as r\n"
    code += "print(*(m.__file__ for m in (samplers, rollouts, rl, r)))"
    for file in call("-c", code, site=site, cwd=tmp_path)[0].split():
        assert file.startswith(str(site))

    _, errors = call(
        *(apportion, "train", "--config", "arithmetic/everything"),
        *settings(output_dir="run"),
        site=site,
        cwd=tmp_path,
    )
    assert not [line for line in errors.splitlines() if any(noise in line for noise in NOISE)]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()

    copied, _ = call(
        apportion, "recipes", "copy", "arithmetic/grpo", "mine", site=site, cwd=tmp_path
    )
    assert "apportion train --config mine/grpo.yaml" in copied
    launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    call(
        *("-m", "accelerate.commands.launch", *launch, "--dynamo_backend", "no"),
        *("-m", "apportion_recipes.train", "--config", "mine/grpo.yaml"),
        *settings(output_dir="launched", max_steps=1),
        site=site,
        cwd=tmp_path,
    )
    printed, _ = call(
        apportion, "report", "run", "launched", "--output", "both.html", site=site, cwd=tmp_path
    )
    assert "launched" in printed and (tmp_path / "both.html").is_file()
    printed, _ = call(apportion, "simulate", "--steps", "5", site=site, cwd=tmp_path)
    assert "rollouts per mixed group" in printed


def test_a_recipe_of_the_wheel_finds_its_prompts(site, tmp_path):
    code = (
        "from apportion_recipes.data import load_rows\n"
        "print(len(load_rows('recipes/images/prompts/animals.jsonl')))"
    )
    printed, _ = call("-c", code, site=site, cwd=tmp_path)
    lines = (ROOT / "recipes" / "images" / "prompts" / "animals.jsonl").read_text().splitlines()
    assert int(printed) == len(lines)
