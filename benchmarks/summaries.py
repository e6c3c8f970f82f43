"""Write the summary of a benchmark as JSON that a person can read and Git can compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIGITS = 5
"""Significant digits of a number: more than any standard error here needs."""


def write(path: Path, summary: dict[str, Any]) -> None:
    """Write `summary`: one line per entry, and one per row of a list or a dict of rows.

    Raw runs do not belong here: scripts leave them beside their run folders, which Git ignores.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [f"{json.dumps(name)}: {_entry(rounded(value))}" for name, value in summary.items()]
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def rounded(value: Any) -> Any:
    """The same with every float rounded to `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _entry(value: Any) -> str:
    """One value, over several lines if it holds rows."""
    if isinstance(value, list) and any(isinstance(row, dict) for row in value):
        return "[\n" + ",\n".join(" " + json.dumps(row) for row in value) + "\n]"
    if isinstance(value, dict) and any(isinstance(row, dict) for row in value.values()):
        rows = (f" {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
        return "{\n" + ",\n".join(rows) + "\n}"
    return json.dumps(value)
