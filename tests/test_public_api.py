"""The names that the packages export, what importing them loads, and what is said if that cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # whole runs

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "samplers": "Planner BetaPosterior allocation selection stopping downsampling Ledger check_sampler "
    "save_state load_state",
    "rollouts": "Prompt TokenRollouts DenoisingRollouts Rollouts TransformersEngine DiffusersEngine "
    "Engine SamplingParams check_engine check_verdicts",
    "rl": "RolloutTrainer RolloutConfig DenoisingTrainer DenoisingConfig check_advantage check_loss",
}
HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "diffusers")


def python(code: str, *, path: tuple[Path, ...] = (ROOT,), block: tuple[str, ...] = ()) -> str:
    """Standard output of a fresh interpreter; with an error, the last line of its traceback.

    Args:
        path: folders that come first.
        block: packages that are not installed there.
    """
    hidden = "import sys\nfrom importlib.machinery import PathFinder\n" + (
        "find = PathFinder.find_spec\n"
        f"PathFinder.find_spec = lambda name, *rest: None if name in {block!r} else find(name, *rest)\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", hidden + code],  # -P: without the working directory
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.stdout.strip() if not result.returncode else result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "package", ["samplers", "rollouts", pytest.param("rl", marks=pytest.mark.slow)]
)
def test_every_public_name_can_be_imported_and_is_listed(package):
    names = NAMES[package].split()
    code = f"from {package} import {', '.join(names)}\nimport {package}\n"
    code += f"print(sorted({package}.__all__), set({names}) <= set(dir({package})))"
    assert python(code) == f"{sorted(names)} True"


@pytest.mark.parametrize("package", NAMES)
def test_the_name_of_a_package_alone_loads_no_library(package):
    code = f"import {package}\nprint([name for name in {(*HEAVY, 'numpy')} if name in sys.modules])"
    assert python(code) == "[]"


def test_the_samplers_load_numpy_and_nothing_else():
    code = "from samplers import *\n" + (
        "ours = {'samplers', 'numpy', '__main__'} | sys.stdlib_module_names\n"
        "known = set(sys.modules)\n"
        f"print([name for name in {HEAVY} if name in known], 'numpy' in known)"
    )
    assert python(code) == "[] True"


def test_an_unknown_name_is_an_attribute_error():
    for package in NAMES:
        found = python(f"import {package}\n{package}.nothing")
        assert found == f"AttributeError: module '{package}' has no attribute 'nothing'"


@pytest.mark.parametrize(
    ("code", "missing", "message"),
    [
        ("import rl", "torch", "rl needs torch: pip install 'apportion[train]'"),
        (
            "from rl.objective import losses",
            "torch",
            "rl needs torch: pip install 'apportion[train]'",
        ),
        pytest.param(
            "from rl import RolloutTrainer",
            "trl",
            "rl.RolloutTrainer needs trl: pip install 'apportion[train]'",
            marks=pytest.mark.slow,
        ),
        (
            "from rl import DenoisingTrainer",
            "diffusers",
            "rl.DenoisingTrainer needs diffusers: pip install 'apportion[diffusion]'",
        ),
        (
            "from rollouts import TokenRollouts",
            "torch",
            "rollouts.TokenRollouts needs torch: pip install 'apportion[train]'",
        ),
        (
            "from rollouts import DiffusersEngine",
            "diffusers",
            "rollouts.DiffusersEngine needs diffusers: pip install 'apportion[diffusion]'",
        ),
    ],
)
def test_a_library_that_is_missing_is_told_with_the_extra_that_brings_it(code, missing, message):
    assert python(code, block=(missing,)) == f"ImportError: {message}"


@pytest.mark.slow
def test_without_diffusers_language_models_train():
    assert python("from rl import RolloutTrainer\nprint(1)", block=("diffusers",)) == "1"


def test_without_torch_prompts_and_samplers_work():
    assert python("from rollouts import Prompt\nimport samplers\nprint(1)", block=("torch",)) == "1"


# Another distribution's `rollouts`


def install_another(site: Path, *, name: str = "rollouts") -> None:
    """A package `rollouts` and what pip writes down about it."""
    (site / "rollouts").mkdir(parents=True, exist_ok=True)
    (site / "rollouts" / "__init__.py").write_text("'''Roll out features.'''\n")
    about = site / f"{name.replace('-', '_')}-9.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    (about / "RECORD").write_text("rollouts/__init__.py,,\n")


@pytest.mark.parametrize("package", ["samplers", "rl"])
def test_the_package_of_another_distribution_is_told_by_its_name(package, tmp_path):
    install_another(tmp_path, name="feature-rollouts")
    found = python(f"import {package}", path=(tmp_path, ROOT))
    assert found == (
        f"ImportError: import rollouts finds {tmp_path}/rollouts/__init__.py, which belongs to the "
        "distribution 'feature-rollouts' and not to apportion. The two cannot share an environment: "
        "pip uninstall feature-rollouts. To restore the file: pip install --force-reinstall --no-deps "
        "apportion"
    )


def test_a_file_of_ones_own_called_rollouts(tmp_path):
    (tmp_path / "rollouts.py").write_text("x = 1\n")
    found = python("import samplers", path=(tmp_path, ROOT))
    assert found.startswith(
        f"ImportError: import rollouts finds {tmp_path}/rollouts.py, which is not"
    )
    assert "rename that file" in found


def test_a_package_that_lost_its_first_file(tmp_path):
    for name in ("samplers", "rollouts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "rollouts").unlink()
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "prompts.py").touch()
    # No other folder may have a whole package, such as the project's editable install.
    code = "sys.path = [p for p in sys.path if p]\nsys.meta_path = [PathFinder]\nimport samplers"
    code = code.replace("[PathFinder]", "[m for m in sys.meta_path if 'editable' not in repr(m)]")
    found = python(code, path=(tmp_path,))
    assert found.startswith("ImportError: rollouts/__init__.py is missing: removed")
    assert found.endswith("pip install --force-reinstall --no-deps apportion")


def test_a_folder_of_results_called_rollouts_does_no_harm(tmp_path):
    (tmp_path / "rollouts").mkdir()
    assert python("import samplers, rollouts\nprint(rollouts.Prompt)", path=(tmp_path, ROOT))


def test_samplers_alone_work_without_the_other_packages(tmp_path):
    (tmp_path / "samplers").symlink_to(ROOT / "samplers")
    code = "sys.meta_path = [m for m in sys.meta_path if 'editable' not in repr(m)]\n"
    code += "from importlib.util import find_spec\nimport samplers\nprint(find_spec('rollouts'))"
    assert python(code, path=(tmp_path,)) == "None"
