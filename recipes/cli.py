"""The command `apportion`: train, report, simulate, and the recipes that come with the package.

From the repository, `python -m recipes.cli` is the same command.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from .where import recipe_file, recipes

HELP = """usage: apportion COMMAND ...

  apportion recipes                      list the recipes, with a line about each
  apportion recipes copy NAME FOLDER     copy a recipe, to change it
  apportion train --config NAME ...      train: a recipe's name or your own YAML, then --setting value
  apportion report RUN [RUN ...]         tables and a page of pictures of runs, side by side
  apportion simulate ...                 where rollouts would go on prompts of given pass rates

`apportion COMMAND --help` says more. On several processes or GPUs:
  accelerate launch -m apportion_recipes.train --config NAME ..."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(HELP)
    elif command in COMMANDS:
        try:
            COMMANDS[command](rest)
        except BrokenPipeError:  # `apportion recipes | head`
            sys.exit(1)
    else:
        close = get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        sys.exit(f"error: no command {command!r}.{hint} Commands: {', '.join(COMMANDS)}")


def train(arguments: Sequence[str]) -> None:
    """`recipes/train.py` in this process."""
    _need(
        "'apportion[train]'",
        "torch",
        "transformers",
        "trl",
        "accelerate",
        "peft",
        "datasets",
        "rich",
    )
    from .train import run

    run(arguments)


def report(arguments: Sequence[str]) -> None:
    """`recipes/report/report.py`."""
    _need("rich", "rich")
    from .report.report import main

    main(arguments)


def simulate(arguments: Sequence[str]) -> None:
    """`recipes/simulate.py`."""
    _need("rich", "rich")
    from .simulate import main

    main(arguments)


def recipes_command(arguments: Sequence[str]) -> None:
    """List the recipes, or copy one.

    Raises:
        SystemExit: with a message, if there is no such recipe, or a file would be overwritten.
    """
    parser = argparse.ArgumentParser(
        prog="apportion recipes", description="List the recipes, or copy one to change it."
    )
    actions = parser.add_subparsers(dest="action", metavar="copy")
    copying = actions.add_parser("copy", help="copy a recipe, with the files it is based on")
    copying.add_argument("name", metavar="NAME", help="such as arithmetic/everything")
    copying.add_argument("folder", metavar="FOLDER", type=Path)
    given = parser.parse_args(arguments)
    if given.action is None:
        known = recipes()
        width = max(map(len, known))
        for name, line in known.items():
            print(f"{name:{width}}  {line}")
        return
    try:
        copied = copy(given.name, given.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, copied)))
    print(f"train with it: apportion train --config {copied[0]}")


def copy(name: str, folder: Path) -> list[Path]:
    """Copy a recipe, and beside it the files that it is based on; what was written, the recipe first.

    Raises:
        ValueError: if there is no such recipe.
        FileExistsError: if a file of that name is there already; nothing is written then.
    """
    if name.removesuffix(".yaml") not in (known := recipes()):
        close = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no recipe {name!r}.{hint} `apportion recipes` lists them")
    sources = [recipe_file(name.removesuffix(".yaml"))]
    for source in sources:  # grows on the way
        based = re.search(r"^base: *([^\s#]+)", source.read_text(encoding="utf-8"), re.MULTILINE)
        if based is not None:
            sources.append(source.parent / based[1].strip("'\""))
    targets = [folder / source.name for source in sources]
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} is there already: remove it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, targets, strict=True):
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return targets


def _need(install: str, *libraries: str) -> None:
    """Exit with what to install, if one of the libraries is missing."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        sys.exit(f"error: this command needs {', '.join(missing)}: pip install {install}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "report": report,
    "simulate": simulate,
    "recipes": recipes_command,
}


if __name__ == "__main__":
    main()
