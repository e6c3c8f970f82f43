"""YAML and command line to dataclasses, with errors that say what to write instead.

Parsing is TRL's `TrlParser`. Before it runs, keys are checked against the fields (the nearest name is
suggested) and YAML values against their types, because YAML reads `1e-5` as text and `yes` as a bool.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from rl.arguments import nearest


class ConfigError(ValueError):
    """A setting that does not exist or has the wrong type; the message says which and where."""


def parse(classes: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Instances of `classes` from `--config file.yaml` and `--name value` overrides.

    Args:
        classes: the dataclasses, their field names distinct.
        arguments: the command line. Default: this process's.

    Raises:
        ConfigError: for an unknown or repeated key or a value of the wrong type.
    """
    arguments = _words(arguments)
    hints = {
        name: hint
        for cls in classes
        for name, hint in typing.get_type_hints(cls).items()
        if name in {f.name for f in dataclasses.fields(cls)}
    }
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ConfigError("--config needs a YAML file after it")
        _check_file(Path(arguments[position]), hints)
    for argument in arguments:
        if not argument.startswith("--") or argument in ("--config", "--help"):
            continue
        name = argument[2:].split("=")[0].replace("-", "_").removeprefix("no_")
        if name not in hints:
            raise ConfigError(f"unknown argument {argument}.{nearest(name, hints)}")
    parser = TrlParser(list(classes))  # type: ignore[arg-type]
    return parser.parse_args_and_config(arguments)


def peek(name: str, arguments: Sequence[str] | None = None) -> str | None:
    """One text setting before the others are parsed, from the command line or the YAML file."""
    words = _words(arguments)
    for i, word in enumerate(words):
        if word == f"--{name}":
            return words[i + 1] if i + 1 < len(words) else None
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    if "--config" in words[:-1]:
        path = Path(words[words.index("--config") + 1])
        if path.is_file():
            try:
                settings = yaml.safe_load(path.read_text())
            except yaml.YAMLError:
                return None  # told by `parse`
            return settings.get(name) if isinstance(settings, dict) else None
    return None


def _words(arguments: Sequence[str] | None) -> list[str]:
    """The command line, with `--config=file` as two words: TrlParser knows it in no other form."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parts = [w.split("=", 1) if w.startswith("--config=") else [w] for w in words]
    return [word for part in parts for word in part]


def _check_file(path: Path, hints: dict[str, Any]) -> None:
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist.{nearest(path.name, beside)}")
    try:
        settings = yaml.load(path.read_text(), Loader=_NoRepeats)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"config file {path} must be a mapping of settings, got {settings!r}")
    for name, value in settings.items():
        if name == "env":
            continue
        if name not in hints:
            raise ConfigError(f"{path}: unknown key {name!r}.{nearest(str(name), hints)}")
        if not _fits(value, hints[name]):
            raise ConfigError(
                f"{path}: {name} must be {_spell(hints[name])}, got {value!r} "
                f"({type(value).__name__})"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if hint is type(None):
        return value is None
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return True  # enumerations and the like: the dataclass checks them


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _spell(hint: Any) -> str:
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in inner)
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(hint, "null" if hint is type(None) else str(hint))


class _NoRepeats(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would keep the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=deep)
            if name in seen:
                raise ConfigError(
                    f"key {name!r} stands twice ({key.start_mark})".replace("\n", " ")
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)
