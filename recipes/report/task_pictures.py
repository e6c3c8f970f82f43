"""Pictures of what a task's validation completions do: the first validation above the last.

A task has pictures if its folder has a module `pictures` with `picture(ax, prompt, completion)`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_folder import Run, validation_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = {"maze": "..maze.pictures"}
"""Task -> the module with its `picture`."""

COLUMNS = 7
"""Prompts in a picture, evenly spread over those that were written down."""


def before_and_after(run: Run, page: Path) -> dict[str, Path]:
    """Caption -> picture, `<page>-<run>-paths.png`; empty for a run without such a task or tables."""
    task = str((run.about.get("recipe") or {}).get("task"))
    tables = validation_tables(run) if task in PICTURES else []
    if not tables:
        return {}
    path = page.with_name(f"{page.stem}-{run.name.replace('/', '-')}-paths.png")
    _figure(tables, import_module(PICTURES[task], __package__).picture).savefig(path, dpi=150)
    steps = " and ".join(str(rows[0]["step"]) for rows in tables)
    caption = f"greedy completions of held-out prompts, steps {steps}, one row for each validation"
    return {caption: path}


def _figure(tables: list[list[dict[str, Any]]], picture: Any) -> Figure:
    from matplotlib.figure import Figure

    keys = [row["prompt_key"] for row in tables[0]]
    places = min(COLUMNS, len(keys))
    chosen = [keys[int((i + 0.5) * len(keys) / places)] for i in range(places)]
    figure = Figure(figsize=(1.6 * places, 1.75 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), places, squeeze=False)
    for line, rows in zip(axes, tables, strict=True):
        by_key = {row["prompt_key"]: row for row in rows}
        for ax, key in zip(line, chosen, strict=True):
            if key not in by_key:  # its reward could not be had
                ax.axis("off")
                continue
            picture(ax, by_key[key]["prompt"], by_key[key]["completion"])
            ax.set_title(f"reward {by_key[key]['reward']:g}", fontsize=8, loc="center")
    return figure
