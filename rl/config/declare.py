"""How a setting is declared: default, help, stage, choices, what it decides and beside what it acts.

`setting(...)` is a dataclass field whose help text carries a `Declaration`, so that any parser of
dataclasses reads the field as it is. `--help`, the checks, the warning of settings without effect and
what a resumed run refuses are all read from declarations. `rl/config/inherited.py` has those of the
fields that come from transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, replace
from typing import Any

ROLLOUTS = "rollouts"
"""Decides which rollouts are made, what is remembered of them or what a checkpoint holds: a resumed run
must share it."""

TRAINING = "training"
"""Decides what is learned from them or what is measured: with another value it is another run."""

LENGTH = "length"
"""Decides how long a run is: with a larger value, or none, it goes on as the same run."""

PATIENCE = "patience"
"""Decides what ends a run early: with another value it goes on as the same run."""

NOTHING = "nothing"
"""Changes paths, logs, speed or memory, and no rollout and no update."""

DECIDES = (ROLLOUTS, TRAINING, LENGTH, PATIENCE, NOTHING)

MethodOf = Callable[[Any, str], Any]
"""`method_of(config, stage)`: the record of the method that is named there."""


@dataclass(frozen=True)
class Only:
    """The condition under which a setting acts."""

    when: Callable[[Any, MethodOf], bool]
    """Of the settings and of `method_of`: whether it acts."""
    needs: str
    """What to write for it to act, naming the other setting."""
    unset: tuple[Any, ...] = ()
    """Values that count as not given, beside the default."""


OWN = Only(lambda *_: True, "")
"""Acts with the methods whose records name it among their settings, and with no others."""

OWN_ONE = replace(OWN, unset=(1,))


def is_(name: str, *values: Any) -> Only:
    """Acts while setting `name` has one of these values."""
    words = " or ".join(map(str, values))
    return Only(lambda c, _: plain(getattr(c, name)) in values, f"{name}: {words}")


def on(name: str, needs: str) -> Only:
    """Acts while setting `name` is on: neither None nor 0 nor False nor "none"."""
    return Only(lambda c, _: getattr(c, name) not in (None, 0, False, "none"), needs)


def plain(value: Any) -> Any:
    """A value of an enumeration as the text that it stands for."""
    return getattr(value, "value", value)


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is known of a setting besides its type, default and help."""

    stage: str
    """The stage of the pipeline it belongs to, as `--help` groups settings."""
    decides: str
    """One of `DECIDES`."""
    choices: tuple[str, ...] = ()
    """Values it may have; empty: any, or the names of methods of the stage that it names."""
    only: Only | None = None
    """When it acts; None: always."""
    never: str = ""
    """Why it does nothing here, if that is so."""


class Help(str):
    """A help text that carries its setting's declaration."""

    __slots__ = ("declared",)
    declared: Declaration


def setting(
    default: Any,
    help: str,
    *,
    stage: str,
    decides: str,
    choices: tuple[str, ...] = (),
    only: Only | None = None,
) -> Any:
    """A field of settings.

    Args:
        default: its default.
        help: what it means, in plain sentences.
        stage: the stage it belongs to.
        decides: one of `DECIDES`.
        choices: the values it may have, where these are names. A setting that names a method has none
            here: its choices are the records in `rl/config/methods.py`.
        only: when it acts. None: always. `OWN`: with the methods whose records name it.

    Raises:
        ValueError: if `decides` is none of `DECIDES`.
    """
    if decides not in DECIDES:
        raise ValueError(f"decides must be one of {', '.join(DECIDES)}, got {decides!r}")
    text = Help(help)
    text.declared = Declaration(stage=stage, decides=decides, choices=tuple(choices), only=only)
    return field(default=default, metadata={"help": text})


def declared_here(each: Field) -> Declaration | None:
    """The declaration of a field of ours; None for a field of transformers that is as it was there."""
    return getattr(each.metadata.get("help"), "declared", None)
