"""YAML and command line to dataclasses, with errors that say what to write instead.

Parsing is TRL's `TrlParser`. Before it runs, keys are checked against the fields (the name here of a
setting of another trainer, or the nearest name, is suggested) and YAML values against their types,
because YAML reads `1e-5` as text and `yes` as a bool. A key that begins with a dot holds what other
keys of the file take by anchor (`.common: &common {...}`, then `<<: *common`), and is no setting. With
`base: other.yaml` a file takes all that it does not say itself from another.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from rl.config.declared import elsewhere
from rl.config.diffusion_settings import DiffusionSettings
from rl.config.own import nearest
from rl.config.settings import LanguageSettings

from .other_names import other_name
from .shown import config_text, help_text
from .where import recipe_file

ALSO_BOOLEAN = ("scale_rewards",)
"""Settings of text for which YAML may say true or false, as TRL's does."""

BASE = "base"
"""Key of the file that a file is based on."""

BELONGING = {
    "dataset_name": ("validation_name",),
    "rewards": ("success_above",),
}
"""Settings of a file that fit its own value of another one, and no other value."""


class ConfigError(ValueError):
    """A setting that does not exist or has the wrong type; the message says which and where."""


def parse(classes: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Instances of `classes` from `--config file.yaml` and `--name value` overrides.

    Args:
        classes: the dataclasses, their field names distinct.
        arguments: the command line. Default: this process's.

    Raises:
        ConfigError: for an unknown or repeated key or a value of the wrong type.
        SystemExit: after `--help`, `--help_all` or `--print_config` has shown the settings.
    """
    arguments = _words(arguments)
    for word in ("--help_all", "--help", "-h"):
        if word in arguments:
            print(help_text(classes, everything=word == "--help_all"))
            raise SystemExit(0)
    printed = "--print_config" in arguments
    arguments = [word for word in arguments if word != "--print_config"]
    hints = {
        name: hint
        for cls in classes
        for name, hint in typing.get_type_hints(cls).items()
        if name in {f.name for f in dataclasses.fields(cls)}
    }
    settings: dict[str, Any] = {}
    files: dict[str, Path] = {}
    if arguments.count("--config") > 1:
        raise ConfigError(
            "--config stands twice: one file holds the settings, arguments override it"
        )
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ConfigError("--config needs a YAML file after it")
        settings, files = _read_files(recipe_file(arguments[position]), hints)
        del arguments[position - 1 : position + 1]
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        name = argument[2:].split("=")[0].replace("-", "_")
        if name not in hints and name.removeprefix("no_") not in hints:
            raise ConfigError(f"unknown argument {argument}{_hint(name, hints)}")
    parser = _Parser(list(classes))  # type: ignore[arg-type]
    _drop_what_belongs_to_others(settings, arguments)
    for name, value in settings.pop("env", {}).items():
        os.environ[name] = str(value)
    parser.set_defaults_with_config(**settings)
    made = parser.parse_args_into_dataclasses(args=arguments)
    if printed:
        given = {name.removeprefix("no_") for name in _given(arguments)}
        print(
            config_text(
                made,
                lambda name: (
                    "command line" if name in given else str(files[name]) if name in files else None
                ),
            )
        )
        raise SystemExit(0)
    return made


def _drop_what_belongs_to_others(settings: dict[str, Any], arguments: Sequence[str]) -> None:
    """Leave out of a file's settings what fits another value only, and tell it.

    A recipe's validation prompts are those of its own data set, with its columns, and its
    `success_above` is in the unit of its own rewards; beside others from the command line they would
    validate on the wrong prompts, or have every rollout pass.
    """
    given = _given(arguments)
    for name, dependents in BELONGING.items():
        if name not in given or name not in settings or given[name] == _as_words(settings[name]):
            continue
        for dependent in dependents:
            if dependent in settings and dependent not in given:
                warnings.warn(
                    f"{dependent}: {settings.pop(dependent)} of the file goes with {name}: "
                    f"{' '.join(_as_words(settings[name]))} and is not used with --{name} "
                    f"{' '.join(given[name])}; write --{dependent} to say your own",
                    stacklevel=3,
                )


def _given(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Words after each `--name` of a command line."""
    found: dict[str, list[str]] = {}
    name = None
    for word in arguments:
        if word.startswith("--") and word != "--":
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif name is not None:
            found[name].append(word)
    return found


def _as_words(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _hint(name: str, known: Any) -> str:
    """What to write instead of an unknown name."""
    kind = DiffusionSettings if "plan" in known else LanguageSettings
    if "selector" in known and (where := elsewhere(kind, name)):
        return f": {where}"
    answer = other_name(name)
    return f".{nearest(name, known)}" if answer is None else f": {answer}"


class _Parser(TrlParser):
    """Reports a value that cannot be parsed without listing every setting."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def peek(name: str, arguments: Sequence[str] | None = None) -> str | None:
    """One text setting before the others are parsed, from the command line or the YAML file."""
    words = _words(arguments)
    for i, word in enumerate(words):
        if word == f"--{name}":
            return words[i + 1] if i + 1 < len(words) else None
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    if "--config" in words[:-1]:
        path: Path | None = recipe_file(words[words.index("--config") + 1])
        seen: list[Path] = []
        while path is not None and path.is_file() and path.resolve() not in seen:
            seen.append(path.resolve())
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
                return None  # `parse` says what is wrong
            if not isinstance(settings, dict):
                return None
            if name in settings:
                return settings[name]
            base = settings.get(BASE)
            path = _base_of(path, base) if isinstance(base, str) else None
    return None


def _base_of(path: Path, base: str) -> Path:
    """The file that `base` names: one beside the file that says it, else a recipe of that name."""
    beside, recipe = path.parent / base, recipe_file(base)
    return recipe if recipe.is_file() and not beside.is_file() else beside


def _words(arguments: Sequence[str] | None) -> list[str]:
    """The command line, with `--config=file` as two words: TrlParser knows it in no other form."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parts = [w.split("=", 1) if w.startswith("--config=") else [w] for w in words]
    return [word for part in parts for word in part]


def _read_files(path: Path, hints: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The settings of a file and of the files that it is based on, and which file each is of.

    `base: other.yaml` names a file from the folder of the one that has it, and `base: arithmetic/grpo`
    a recipe. What a file says goes before what its base says. What fits the base's own data or rewards
    alone is not taken beside others.

    Raises:
        ConfigError: if a file is based on itself.
    """
    settings: dict[str, Any] = {}
    files: dict[str, Path] = {}
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise ConfigError(f"config file {path} is based on itself, by base of {seen[-1]}")
        seen.append(following.resolve())
        read = _read_file(following, hints)
        base = read.pop(BASE, None)
        for name, dependents in BELONGING.items():
            if name in settings and name in read and settings[name] != read[name]:
                read = {n: value for n, value in read.items() if n not in dependents}
        for name, value in read.items():
            if name not in settings:
                settings[name], files[name] = value, following
        following = None if base is None else _base_of(following, base)
    return settings, files


def _read_file(path: Path, hints: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, each known and of the right type; `env` is a mapping."""
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist.{nearest(path.name, beside)}")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_NoRepeats)
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 ({error.reason}): save it so") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"config file {path} must be a mapping of settings, got {settings!r}")
    settings = {n: v for n, v in settings.items() if not (isinstance(n, str) and n[:1] == ".")}
    for name, value in settings.items():
        if name == BASE:
            if not isinstance(value, str):
                raise ConfigError(f"{path}: base must be the name of another YAML, got {value!r}")
            continue
        if name == "env":
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{path}: env must be a mapping of names to values, got {value!r}"
                )
            continue
        if name not in hints:
            raise ConfigError(f"{path}: unknown key {name!r}{_hint(str(name), hints)}")
        if name in ALSO_BOOLEAN and isinstance(value, bool):
            continue
        if not _fits(value, hints[name]):
            raise ConfigError(
                f"{path}: {name} must be {_spell(hints[name])}, got {value!r} "
                f"({type(value).__name__})"
            )
    return settings


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

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Before merge keys (`<<`) are filled in: a key may well stand in what is merged, too.
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise ConfigError(
                    f"key {key.value!r} stands twice ({key.start_mark})".replace("\n", " ")
                )
            seen.add((key.tag, key.value))
        return node
