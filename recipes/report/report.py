"""Turn a run folder, or several to compare, into tables, PNGs and one self-contained page.

    apportion report runs/gvm [runs/uniform ...] [--output page.html] [--group-seeds]
    python -m recipes.report.report runs/gvm          # the same, from the repository

A run that is unfinished, or was killed while it wrote a line, is shown as far as it got, with a note.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .image_pictures import samples_of
from .pictures import CAPTIONS, draw
from .run_folder import (
    TOTAL,
    Groups,
    Run,
    change,
    grouped,
    mean_over_tokens,
    named,
    paired,
    read_run,
    rollouts_until,
    seeds_apart,
    sets_of,
    tokens_until,
)
from .task_pictures import before_and_after

if TYPE_CHECKING:
    from rich.console import Console

CSS = """body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:auto;padding:1em}
table{border-collapse:collapse;font-size:.87em;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid #ddd;padding:.3em .7em;text-align:right;vertical-align:top}
th{background:#f5f5f5}th:first-child,td:first-child,.text *{text-align:left}
td{white-space:pre-line}
.text td{white-space:pre-wrap;overflow-wrap:anywhere}img{max-width:100%}div{overflow-x:auto}
.note{background:#fff6dd;padding:.3em .8em}figure{margin:0}figcaption,.small{color:#555}"""

Table = tuple[str, list[dict[str, str]], str]
"""Title, rows of column -> cell, caption."""


def report(
    folders: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    console: Console | None = None,
    group_seeds: bool = False,
) -> Path:
    """Print tables of the runs; write their pictures, and a page that holds everything.

    Args:
        folders: run folders, at least one.
        output: the page. Default: `report.html` in the run folder; for several runs, `comparison.html`
            beside the first. Pictures lie beside the page and begin with its name.
        console: where tables and notes are printed. Default: standard output.
        group_seeds: show runs whose settings differ only by the seed as their mean, with a band from
            least to greatest; the mean has its own row in the tables. The first experiment named is
            the one that others are compared with, paired by seed.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a folder does not exist, is given twice, or holds nothing of a run.
    """
    from rich import box, table
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    runs = [read_run(path, name) for path, name in named(folders)]
    first = runs[0].folder.resolve()
    beside = first / "report.html" if len(runs) == 1 else first.parent / "comparison.html"
    page = beside if output is None else Path(output)
    page.parent.mkdir(parents=True, exist_ok=True)
    groups = grouped(runs, group_seeds=group_seeds)
    tables, pictures = tables_of(runs, groups), {}
    notes = [note for run in runs for note in run.notes] + seeds_apart(groups)
    for label, members in groups.items():
        ends = sorted(run.last_step for run in members)
        if ends[0] < ends[-1]:
            notes.append(
                f"{label}: runs end at steps {ends[0]} to {ends[-1]}; curves go to {ends[0]}, and of "
                "validation on to each run's last"
            )
    samples = {run.name: samples_of(run) for run in runs}
    try:
        pictures = draw(groups, page)
        for run in runs:
            samples[run.name] |= before_and_after(run, page)
    except ModuleNotFoundError as error:
        notes.append(f"no pictures: {error}; pip install 'apportion[recipes]'")
    headlines = headlines_of(groups)
    page.write_text(
        page_of(runs, tables, pictures, samples, headlines, notes, page), encoding="utf-8"
    )

    def shown(title: str, rows: list[dict[str, str]], caption: str) -> table.Table:
        made = table.Table(
            title=title,
            caption=escape(caption),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for i, column in enumerate(rows[0]):
            made.add_column(escape(column), justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            made.add_row(*map(escape, row.values()))
        return made

    for headline in headlines:
        console.print(f"[bold]{escape(headline)}[/]", soft_wrap=True)
    for title, rows, caption in tables:
        # The first that fits: as it is, on its side, and the same of the means over seeds alone.
        means = [row for row in rows if row["run"] in groups] or rows
        forms = [rows, _turned(rows), means, _turned(means)]
        unlimited = console.options.update(max_width=10_000)
        widths = [console.measure(shown("", form, ""), options=unlimited).maximum for form in forms]
        fits = [form for form, w in zip(forms, widths, strict=True) if w <= console.width]
        console.print(shown(title, (fits or [forms[int(np.argmin(widths))]])[0], caption))
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)
    return page


def _turned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """A table on its side: a row for each column, a column for each run."""
    first = next(iter(rows[0]))
    return [
        {"": name} | {row[first]: row[name].replace("\n", " ") for row in rows}
        for name in rows[0]
        if name != first
    ]


def headlines_of(groups: Groups) -> list[str]:
    """One sentence per curve: where validation went, and what that cost."""
    sentences = []
    for label, runs in groups.items():
        parts = []
        for name in sets_of(runs):
            key = f"eval_{name}_pass_rate" if name else "eval_pass_rate"
            ends = _first_to_last(runs, "validation", key, "{:.1%}")
            of_set = f"validation pass rate{f' on {name}' if name else ''} {ends[0]}"
            parts.append(of_set + (f" ({ends[1]})" if ends[1] else ""))
        if not parts:
            ends = _first_to_last(runs, "log", "reward", "{:.3f}")
            parts = [] if ends[0] == "–" else [f"reward {ends[0]}, no validation"]
        steps = np.mean([run.last_step for run in runs])
        drawn = np.mean([rollouts_until(run, np.array([1e18]))[0] for run in runs])
        cost = f"{steps:,.0f} steps, {drawn:,.0f} rollouts"
        known = [tokens_until(run, np.array([1e18])) for run in runs]
        if all(token_S is not None for token_S in known):
            images = any("denoiser_evaluations" in row for run in runs for row in run.log)
            unit = "denoising steps" if images else "tokens"
            cost += f", {np.mean([float(t[0]) for t in known if t is not None]):,.0f} {unit}"
        sentences.append(f"{label}: {'; '.join([*parts, f'after {cost}'])}")
    return sentences


def tables_of(runs: list[Run], groups: Groups) -> list[Table]:
    """Cost, seconds and learning: one row per run, and one with the means per group of seeds."""
    shown = {run.name: [run] for run in runs}
    shown |= {label: members for label, members in groups.items() if len(members) > 1}
    last = {run.name: run.log[-1] if run.log else {} for run in runs}
    phases = dict.fromkeys(n for row in last.values() for n in row if f"{TOTAL}seconds_" in n)
    images = all("denoiser_evaluations" in row for row in last.values())
    unit, greedy = ("denoising steps", "deterministic") if images else ("tokens", "greedy")

    def number(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        mean = np.mean(known) if known else math.nan
        return f"{mean:,.{int(mean % 1 > 0 and mean < 10)}f}" if known else "–"

    def total(name: str, members: list[Run]) -> list[float | None]:
        return [last[run.name].get(f"{TOTAL}{name}") for run in members]

    cost: list[dict[str, str]] = []
    seconds, learning = [], []
    for label, members in shown.items():
        drawn = [float(rollouts_until(run, np.array([1e18]))[0]) for run in members]
        row = {
            "run": label,
            "steps": number(run.last_step for run in members),
            "rollouts generated": number(drawn),
        }
        for name in ("drawn", "trained", "filtered"):
            title = f"{unit} {name.replace('drawn', 'generated')}"
            row[title] = number(total(f"tokens_{name}", members))
        if images:  # a branch is evaluated once until it parts
            title = "denoiser evaluations"
            row[title] = number(last[run.name].get("denoiser_evaluations") for run in members)
        cost.append(row | {"optimizer updates": number(total("updates", members))})
        spent = {p: [last[run.name].get(p) for run in members] for p in phases}
        sums = [sum(v for v in one if v is not None) for one in zip(*spent.values(), strict=True)]
        row = {p.removeprefix(f"{TOTAL}seconds_"): number(values) for p, values in spent.items()}
        seconds.append({"run": label, **row, "sum": number(sums)})
        row = {"run": label, "reward": _first_to_last(members, "log", "reward", "{:.3f}")[0]}
        for data_set in sets_of(runs) or [""]:
            start = f"eval_{data_set}_" if data_set else "eval_"
            for name in ("pass rate", f"{greedy} accuracy"):
                key = start + name.replace(" ", "_")
                title = f"{data_set} {name}".strip()
                row[title] = "\n".join(_first_to_last(members, "validation", key, "{:.1%}"))
        mixed = _first_to_last(members, "log", "groups/mixed_share", "{:.0%}")[0]
        learning.append(row | {"mixed groups": mixed})
    caption = (
        f"Pass rate and {greedy} accuracy on the validation prompts; points: difference ± its standard "
        "error over prompts, of several seeds [least, greatest]. Reward and share of mixed groups: "
        "means over the first and last tenth of the log lines."
    )
    tables = [("Cost", cost, ""), ("Seconds by phase", seconds, "")][: 2 if phases else 1]
    tables.append(("Learning, first → last", learning, caption))
    if differences := _differences(runs, groups):
        tables.append(("Differences, paired by seed", differences, DIFFERENCES))
    return tables


def _differences(runs: list[Run], groups: Groups) -> list[dict[str, str]]:
    """Validation pass rates of each experiment minus those of the first, in hundredths."""
    (first, baseline), *others = groups.items() if groups else [("", [])]
    rows = []
    for label, members in others:
        row = {"run": f"{label} − {first}"}
        for name in sets_of(runs):
            key = f"eval_{name}_pass_rate" if name else "eval_pass_rate"
            found = {
                "end": paired(baseline, members, partial(_ends, name=key)),
                "mean of the curve": paired(
                    baseline, members, partial(_over_equal_tokens, name=key)
                ),
            }
            for what, value in found.items():
                cell = "–"
                if value is not None:
                    mean, error, pairs = value
                    spread = "" if math.isnan(error) else f" ± {100 * error:.1f}"
                    cell = f"{100 * mean:+.1f}{spread} points, {pairs} seed{'s' * (pairs > 1)}"
                row[f"{name} {what}".strip()] = cell
        if any(cell != "–" for column, cell in row.items() if column != "run"):
            rows.append(row)
    return rows


DIFFERENCES = (
    "Validation pass rate minus that of the first run's experiment with the same seed: mean ± standard "
    "error over seeds. End: each run's last validation. Mean of the curve: over the tokens that both "
    "generated."
)


def _ends(a: Run, b: Run, name: str) -> tuple[float | None, float | None]:
    def end(run: Run) -> float | None:
        values = [row[name] for row in run.validation if row.get(name) is not None]
        return float(values[-1]) if values else None

    return end(a), end(b)


def _over_equal_tokens(a: Run, b: Run, name: str) -> tuple[float | None, float | None]:
    ends = [tokens_until(run, np.array([1e18])) for run in (a, b)]
    if ends[0] is None or ends[1] is None:
        return None, None
    until = min(float(ends[0][0]), float(ends[1][0]))
    return mean_over_tokens(a, name, until), mean_over_tokens(b, name, until)


def _first_to_last(members: list[Run], source: str, name: str, form: str) -> tuple[str, str]:
    """First and last value (means over `members`), and their difference in hundredths."""
    found = [c for c in (change(run, source, name) for run in members) if c is not None]
    if not found:
        return "–", ""
    first, last = (float(np.mean([c[i] for c in found])) for i in (0, 1))
    if all(len(getattr(run, source)) < 2 for run in members):
        return form.format(first), ""
    points, error = [100 * (c[1] - c[0]) for c in found], 100 * found[0][2]
    spread = "" if math.isnan(error) else f" ± {error:.1f}"
    if len(members) > 1:
        spread = f" [{min(points):+.1f}, {max(points):+.1f}]"
    return f"{form.format(first)} → {form.format(last)}", f"{np.mean(points):+.1f}{spread} points"


# -- page


def page_of(
    runs: list[Run],
    tables: list[Table],
    pictures: dict[str, Path],
    samples: dict[str, dict[str, Path]],
    headlines: list[str],
    notes: list[str],
    page: Path | None = None,
) -> str:
    """The page as HTML: no scripts, nothing loaded, all text escaped. Headlines first, notes last."""
    title = html.escape(f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared")
    parts = [
        f"<h1>{title}</h1>",
        *(f"<p><strong>{html.escape(text)}</strong></p>" for text in headlines),
    ]
    if notes:
        word = "note" if len(notes) == 1 else "notes"
        parts.append(f'<p class="small"><a href="#notes">{len(notes)} {word}</a> at the end.</p>')
    for name, rows, caption in tables:
        parts += [f"<h2>{name}</h2>", _html(rows), f'<p class="small">{caption}</p>']
    for name, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
        caption = f"<figcaption>{CAPTIONS[name]}</figcaption>"
        parts.append(f"<h2>{name.capitalize()}</h2><figure>{image}{caption}</figure>")
    for run in runs:
        for caption, path in samples[run.name].items():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            image = f'<img alt="samples" src="data:image/png;base64,{data}">'
            title_of = f"{html.escape(run.name)}, {caption}"
            if (whole := path.with_suffix("")).is_dir():  # the picture has thumbnails
                link = html.escape(os.path.relpath(whole, page.parent if page else Path.cwd()))
                title_of += f'; <a href="{link}">in full size</a>'
            parts.append(f"<figure>{image}<figcaption>{title_of}</figcaption></figure>")
    parts.append("<h2>Settings</h2>")
    settings = {run.name: run.about["settings"] for run in runs}
    names = sorted(set().union(*settings.values()))
    values = {n: {run: _text(of.get(n)) for run, of in settings.items()} for n in names}
    differ = [{"setting": n, **of} for n, of in values.items() if len(set(of.values())) > 1]
    if differ:
        parts.append(f"<p>Those that differ:</p>{_html(differ, 'text')}")
    for run in runs:
        pairs = {k: v for k, v in run.about.items() if k != "settings"} | settings[run.name]
        rows = [{"setting": k, "value": _text(v)} for k, v in pairs.items()]
        summary = f"<summary>{html.escape(run.name)}: all {len(rows)}</summary>"
        parts.append(f"<details>{summary}{_html(rows, 'text')}</details>")
    for run in runs:
        if run.completions:
            rows = [{k: _text(v) for k, v in row.items()} for row in run.completions]
            parts.append(f"<h2>Completions of {html.escape(run.name)}</h2>{_html(rows, 'text')}")
    if notes:
        parts.append('<h2 id="notes">Notes</h2>')
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _html(rows: list[dict[str, str]], kind: str = "number") -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    lines = [line(rows[0], "th"), *(line(row.values(), "td") for row in rows)] if rows else []
    return f'<div><table class="{kind}">{"".join(lines)}</table></div>'


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folder of a run: its output_dir")
    parser.add_argument(
        "--output",
        metavar="PAGE.html",
        help="page to write, pictures beside it; default: RUN/report.html, for several runs "
        "comparison.html beside the first",
    )
    parser.add_argument(
        "--group-seeds",
        action="store_true",
        help="show runs whose settings differ by the seed alone as mean and range, and compare "
        "experiments with the first, paired by seed",
    )
    given = parser.parse_args(arguments)
    try:
        report(given.folders, output=given.output, group_seeds=given.group_seeds)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
