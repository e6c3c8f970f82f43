"""What is read from declarations: choices, settings without effect, what a resumed run must share."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from rl.config.declare import OWN, Declaration, Only, declared_here
from rl.config.diffusion_settings import DiffusionSettings
from rl.config.inherited import INHERITED
from rl.config.methods import METHODS, OWN_STAGES, method_of
from rl.config.settings import LanguageSettings

K = TypeVar("K")


def declared(setting: Field) -> Declaration:
    """The declaration of a setting.

    Raises:
        KeyError: if it has none: it is new in transformers, and `rl/config/inherited.py` lacks it.
    """
    return declared_here(setting) or INHERITED[setting.name]


def decides(kind: Any, *what: str) -> tuple[str, ...]:
    """The settings of a class, or of its object, that decide one of these, in their order."""
    return tuple(each.name for each in fields(kind) if declared(each).decides in what)


def choices_of(kind: Any, setting: Field) -> tuple[str, ...]:
    """The values that a setting may have in settings of this class; empty: any."""
    given = declared(setting).choices
    if given or setting.name not in METHODS:
        return given
    language = not _is_diffusion(kind)
    methods = METHODS[setting.name].values()
    return tuple(method.name for method in methods if language or not method.language_only)


def takes_own(kind: Any, setting: Field) -> bool:
    """Whether a setting takes `path/to/file.py:function` in settings of this class."""
    return setting.name in OWN_STAGES and not declared(setting).choices


def elsewhere(kind: Any, name: str) -> str:
    """Where a setting exists that settings of this class do not have; empty: nowhere."""
    for other, model in ((LanguageSettings, "language"), (DiffusionSettings, "diffusion")):
        here = kind if isinstance(kind, type) else type(kind)
        if not issubclass(here, other) and name in other.__dataclass_fields__:
            return f"{name} is a setting of {model} models alone (policy: {model})"
    return ""


def says_where(kind: type[K]) -> type[K]:
    """A class of settings that answers for those of the other policy by their names."""
    make = kind.__init__

    @functools.wraps(make)
    def init(self: Any, *values: Any, **settings: Any) -> None:
        for name in settings:
            if name not in kind.__dataclass_fields__ and (where := elsewhere(kind, name)):  # type: ignore[attr-defined]
                raise ValueError(f"{where}: leave it out")
        make(self, *values, **settings)

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


def _is_diffusion(kind: Any) -> bool:
    return issubclass(kind if isinstance(kind, type) else type(kind), DiffusionSettings)


def needs_of(kind: Any, name: str, only: Only) -> str:
    """What to write for a setting to act, in settings of this class."""
    if only.when is not OWN.when:
        return only.needs
    needs = []
    for stage, methods in METHODS.items():
        known = [method.name for method in methods.values() if method.has(name)]
        if known and hasattr(kind, stage):
            needs.append(f"{stage}: {' or '.join(known)}")
    return ", or ".join(needs) or "a function of your own with a parameter of this name"


def acts(config: Any, name: str, only: Only) -> bool:
    """Whether a setting that needs another one acts."""
    if only.when is not OWN.when:
        return only.when(config, method_of)
    stages = [stage for stage in METHODS if hasattr(config, stage)]
    return any(method_of(config, stage).has(name) for stage in stages)


def idle_settings(config: Any) -> dict[str, str]:
    """Settings that were given and do not act -> what they need, or why they never act.

    A value that equals the default counts as not given.
    """
    idle = {}
    for setting in fields(config):
        name, value, known = setting.name, getattr(config, setting.name), declared(setting)
        if (known.only is None and not known.never) or _is_default(setting, value):
            continue
        if known.never:
            idle[name] = known.never
            continue
        assert known.only is not None
        if value not in known.only.unset and not acts(config, name, known.only):
            idle[name] = f"it needs {needs_of(config, name, known.only)}"
    return idle


def warn_of_idle(config: Any) -> None:
    """One warning for each setting of `config` that was given and has no effect, on one process."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name, why in idle_settings(config).items():
        warnings.warn(f"{name}={getattr(config, name)!r} has no effect: {why}", stacklevel=4)


def _is_default(setting: Field, value: Any) -> bool:
    default = setting.default
    if setting.default_factory is not MISSING:
        default = setting.default_factory()
    return default is not MISSING and (value is default or value == default)
