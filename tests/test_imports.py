"""The packages' import arrows point one way, and no import is hidden in a function or a type check."""

import ast
import sys
from collections.abc import Iterator
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
ROOMS = {
    "objective": 0,
    "logprobs": 0,
    "lengths": 0,
    "ranks": 1,
    "config": 1,
    "policies": 2,
    "stages": 3,
    "step": 4,
    "run": 4,
    "trainer": 5,
    "denoising_trainer": 6,
    "adapters": 7,
}
"""Rooms of `rl`: each imports those of a lower number, and itself."""
OPTIONAL_ROOMS = {"adapters"}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def modules_in(tree: ast.AST, *, package: str = "") -> Iterator[str]:
    """Modules, with names imported from them, of every import below a node.

    Relative imports are resolved from `package`, that of the file; without it they are left out.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.level == 0 or package):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join(filter(None, [*(parts if node.level else []), node.module]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> set[str]:
    """Top-level names a file imports, those inside functions included.

    `recipes` is installed under another name, so inside it imports are relative; elsewhere none is.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert path.is_relative_to(ROOT / "recipes"), f"{path}: relative import"
    return {module.split(".")[0] for module in modules_in(tree_of(path))}


def hidden_in(path: Path, package: str) -> set[str]:
    """Modules of a package that a file imports inside a function or under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        is_check = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_check or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= {module for module in modules_in(node) if module.split(".")[0] == package}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph() -> dict[str, set[str]]:
    """Our modules, and which of our modules each imports, hidden imports included."""
    paths = {name_of(path): path for package in OURS for path in files(package)}
    found = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set(modules_in(tree_of(path), package=package)) & paths.keys() - {name}
    return found


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """Modules of one import circle, in order; [] if there is none."""
    done: set[str] = set()

    def walk(name: str, on_the_way: list[str]) -> list[str]:
        if name in on_the_way:
            return [*on_the_way[on_the_way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name]):
            if circle := walk(other, [*on_the_way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(edges) if (circle := walk(name, []))), [])


def room_of(module: str) -> str:
    return module.split(".")[1]


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


def test_no_module_takes_part_in_an_import_circle():
    assert not circle_in(graph())


def test_inside_rl_imports_point_one_way():
    """objective, logprobs <- policies <- stages <- step <- trainer, with config below all of them."""
    edges = {name: others for name, others in graph().items() if name.startswith("rl.")}
    rooms = {room_of(name) for name in edges}
    assert rooms <= ROOMS.keys() and ROOMS.keys() - OPTIONAL_ROOMS <= rooms
    for name, others in edges.items():
        for other in (module for module in others if module.startswith("rl.")):
            here, there = room_of(name), room_of(other)
            assert here == there or ROOMS[there] < ROOMS[here], f"{name} imports {other}"


def test_objective_functions_import_nothing_of_rl_but_each_other():
    for name, others in graph().items():
        if name.startswith("rl.objective"):
            rooms = {room_of(other) for other in others if other.startswith("rl.")}
            assert rooms <= {"objective"}, name


def test_rl_hides_no_import_of_itself():
    lazy = ROOT / "rl" / "__init__.py"  # exports the public names when they are asked for
    paths = [path for path in files("rl") if path != lazy]
    hiding = {str(path.relative_to(ROOT)) for path in paths if hidden_in(path, "rl")}
    assert not hiding, f"{sorted(hiding)} hide imports of rl"


def test_the_checks_see_what_is_hidden_and_what_is_a_circle(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from rl.trainer import RolloutTrainer\n"
        "def f():\n    from rl.step import collect\n    import torch.nn\n"
    )
    assert imported(path) == {"rl", "torch", "typing"}
    assert {"rl.trainer", "rl.step"} <= hidden_in(path, "rl")
    assert hidden_in(path, "rollouts") == set()
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert circle_in(edges) == ["b", "c", "b"] and not circle_in(edges | {"c": set()})
