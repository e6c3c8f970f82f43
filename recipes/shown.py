"""What is shown of settings: `--help`, `--help_all` and `--print_config`."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from transformers import TrainingArguments

from rl.config.declare import plain
from rl.config.declared import choices_of, declared, needs_of, takes_own
from rl.config.inherited import TRAINER
from rl.config.methods import LOSSES, METHODS, PRESETS
from rl.config.settings import STAGES

WIDTH = 92
OF_MODELS = (
    *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft", "lora_r"),
    *("lora_alpha", "lora_target_modules"),
)
"""Settings of TRL's `ModelConfig` that a run often needs."""


def help_text(classes: Sequence[type], *, everything: bool = False) -> str:
    """The settings of a run with their choices, defaults and meaning, in the order of a training step.

    Args:
        classes: the dataclasses that a command line is read into.
        everything: with what each method does, and with the settings of libraries that a run rarely
            needs.
    """
    parts = ["settings, each a key of the YAML file (--config FILE) or an argument --NAME VALUE:"]
    seen: set[str] = set()
    left_out = 0
    for cls in classes:
        fields = [field for field in dataclasses.fields(cls) if field.name not in seen]
        seen |= {field.name for field in fields}
        if issubclass(cls, TrainingArguments):
            parts += _by_stage(cls, fields, everything=everything)
            rare = [f for f in fields if declared(f).stage == TRAINER]
            left_out += 0 if everything else len(rare)
            continue
        if not everything and not _is_ours(cls):
            shown = [field for field in fields if field.name in OF_MODELS]
            left_out, fields = left_out + len(fields) - len(shown), shown
        title = (cls.__doc__ or "").strip().splitlines()[0] if _is_ours(cls) else "The model."
        parts += ["", f"-- {title[0].lower()}{title[1:].rstrip('.')}", ""]
        parts += [_entry(field) for field in fields]
    if left_out:
        parts += [
            "",
            f"--help_all shows {left_out} more, of transformers and TRL, and what each method does.",
            "--print_config shows what a run would use, and where each value comes from.",
        ]
    return "\n".join(parts)


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in ("trl", "transformers")


def _by_stage(cls: type, fields: Sequence[dataclasses.Field], *, everything: bool) -> list[str]:
    parts = []
    for stage in (*STAGES, TRAINER) if everything else STAGES:
        of_stage = [field for field in fields if declared(field).stage == stage]
        if of_stage:
            parts += ["", f"-- {stage}", ""]
            parts += [_declared_entry(cls, field, everything=everything) for field in of_stage]
    return parts


def _declared_entry(cls: type, field: dataclasses.Field, *, everything: bool) -> str:
    """One setting: name, default, help, choices and what it acts with."""
    more, known = [], declared(field)
    choices = choices_of(cls, field)
    if choices:
        own = " or path/to/file.py:function" if takes_own(cls, field) else ""
        more.append(f"One of: {', '.join(choices)}{own}.")
    if known.never:
        more.append(f"No effect: {known.never}.")
    elif known.only is not None:
        more.append(f"Acts with {needs_of(cls, field.name, known.only)}.")
    lines = [_entry(field, " ".join(more))]
    if everything and field.name in METHODS:
        methods = METHODS[field.name]
        lines += [_wrapped(f"{n}: {methods[n].help}", 8) for n in choices if n in methods]
    return "\n".join(lines)


def _entry(field: dataclasses.Field, more: str = "") -> str:
    """One setting: name, default, and its help, shortened to its first sentences."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    known = "" if default is dataclasses.MISSING or default is None else f" ({plain(default)})"
    help_ = " ".join(str(field.metadata.get("help", "")).split())
    help_ = help_ if len(help_) <= 320 else help_[:317].rsplit(" ", 1)[0] + " ..."
    return "\n".join([f"  --{field.name}{known}", *(_wrapped(t, 6) for t in (help_, more) if t)])


def _wrapped(text: str, indent: int) -> str:
    space = " " * indent
    return "\n".join(
        textwrap.wrap(
            text, width=WIDTH, initial_indent=space, subsequent_indent=f"{space}  "[:indent]
        )
    )


def config_text(instances: Sequence[Any], source_of: Callable[[str], str | None]) -> str:
    """The settings of a run as YAML, each with where its value comes from.

    Settings of libraries that nobody gave are left out.

    Args:
        instances: what `parse` returns.
        source_of: name -> where a value that was given comes from; None: it was not given.
    """
    lines, seen = [], set[str]()
    for made in instances:
        is_run = isinstance(made, TrainingArguments)
        for field in dataclasses.fields(made):
            if field.name in seen or field.name.startswith("_"):
                continue
            seen.add(field.name)
            value, source = plain(getattr(made, field.name)), source_of(field.name)
            theirs = declared(field).stage == TRAINER if is_run else not _is_ours(type(made))
            if source is None and theirs:
                continue
            if source is None:
                source = _filled_in(made, field, value)
            lines.append((f"{field.name}: {_yaml(value)}", source))
    width = min(max(len(line) for line, _ in lines), 60)
    return "\n".join(f"{line:{width}}  # {source}" for line, source in lines)


def _filled_in(made: Any, field: dataclasses.Field, value: Any) -> str:
    """Where a value that nobody gave comes from."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if value == plain(default):
        return "default"
    for stage, methods in (("loss", LOSSES), ("trainer", PRESETS)):
        method: Any = methods.get(getattr(made, stage, ""))  # type: ignore[attr-defined]
        if method is not None and method.defaults.get(field.name, None) == value:
            return f"{stage}: {method.name}"
    return "from other settings"


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        value = dict(value)
    try:
        return (
            yaml.safe_dump(value, default_flow_style=True, width=10**6)
            .removesuffix("\n...\n")
            .strip()
        )
    except yaml.YAMLError:
        return repr(str(value))
