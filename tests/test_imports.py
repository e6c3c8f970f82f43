"""The packages' import arrows point one way."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("samplers", "rollouts", "rl", "recipes")
MAY_IMPORT = {
    "samplers": {"samplers"},
    "rollouts": {"rollouts"},
    "rl": {"samplers", "rollouts", "rl"},
    "recipes": {"samplers", "rollouts", "rl"},  # itself only by relative imports
}


def imported(path: Path) -> set[str]:
    """Top-level names a file imports, those inside functions included.

    `recipes` is installed under another name, so inside it imports are relative; elsewhere none is.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        if isinstance(node, ast.ImportFrom) and node.level:
            assert path.is_relative_to(ROOT / "recipes"), f"{path}: relative import"
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", OURS)
def test_packages_import_only_what_is_upstream(package):
    assert files(package)
    for path in files(package):
        wrong = (imported(path) & set(OURS)) - MAY_IMPORT[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_samplers_need_numpy_and_the_standard_library_only():
    allowed = {"numpy", "samplers"} | sys.stdlib_module_names
    for path in files("samplers"):
        assert imported(path) <= allowed, path


def test_the_check_sees_an_import_inside_a_function(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from rl.step import collect\n    import torch.nn\n")
    assert imported(path) == {"rl", "torch"}
