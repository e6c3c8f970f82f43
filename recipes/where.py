"""Find the files of this package: recipes by their names, and prompts that a recipe names.

In the repository the package is the folder `recipes/`; installed it is `apportion_recipes`, anywhere.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NAMES = ("recipes", "apportion_recipes")
NO_RECIPES = ("accelerate",)
"""Folders whose YAMLs are no recipes."""


def package_file(path: str | Path) -> Path:
    """`path`, or if there is nothing and it begins with `recipes/`, the file of this package.

    So `recipes/images/prompts/animals.jsonl` in a recipe is found from any working directory.
    """
    given = Path(path).expanduser()
    if given.exists() or given.parts[:1] not in [(name,) for name in NAMES]:
        return given
    inside = PACKAGE.joinpath(*given.parts[1:])
    return inside if inside.exists() else given


def recipe_file(name: str | Path) -> Path:
    """The YAML file of a path, or of a recipe's name such as `arithmetic/everything`.

    A file of one's own goes before a recipe of that name. A name without a file is returned as it is.
    """
    found = package_file(name)
    if found.is_file() or found.is_absolute():
        return found
    for inside in (PACKAGE / f"{name}.yaml", PACKAGE / name):
        if inside.is_file():
            return inside
    return found


def recipes() -> dict[str, str]:
    """Name -> first line of every recipe, in order of names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.yaml")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        lines = path.read_text(encoding="utf-8").splitlines()
        if name.split("/")[0] not in NO_RECIPES and lines and not path.name.startswith("_"):
            found[name] = lines[0].removeprefix("#").strip()
    return found
