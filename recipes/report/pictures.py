"""Pictures of runs: learning, budgets, posterior, groups; curves of several runs overlaid.

Axes: S steps, R runs of one curve, B bins of the pass rate, M prompts of several steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .image_pictures import denoising_figure
from .run_folder import (
    Groups,
    curve_of,
    rollouts_until,
    sets_of,
    smooth,
    tokens_until,
    values_of,
    window_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .run_folder import Run

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
"""Okabe and Ito's colours, told apart by colour-blind readers too."""
SHARES = {"mixed": "#009E73", "all_pass": "#56B4E9", "all_fail": "#D55E00"}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.markersize": 3,
}
CAPTIONS = {
    "learning": "Held-out pass rate and greedy (of images deterministic) accuracy, and training reward "
    "before and after groups without signal leave; against steps, rollouts and tokens (of images "
    "denoising steps) generated. Bands: one standard error of a run's pass rate, "
    "or the range over seeds.",
    "budgets": "Rollouts each prompt gets. Left: over the run. Right: against the pass rate believed "
    "before the step, in the last quarter of the run. Bands: 10–90 % of the prompts.",
    "posterior": "Believed pass rates of all training prompts; the line is their mean.",
    "groups": "Groups with a signal (mixed rewards) and without: rewards equal and positive (all pass), "
    "or equal and not positive (all fail).",
    "details": "Means over the rollouts of a log line; bands: range over seeds.",
    "denoising": "Of diffusion models: rewards and the variety of samples against what generation cost.",
}


def draw(groups: Groups, page: Path) -> dict[str, Path]:
    """Write the pictures that have data as `<page>-<name>.png`; name -> path."""
    import matplotlib

    pictures = {}
    plots = (
        learning_figure,
        budgets_figure,
        posterior_figure,
        groups_figure,
        details_figure,
        denoising_figure,
    )
    for name, plot in zip(CAPTIONS, plots, strict=True):
        path = page.with_name(f"{page.stem}-{name}.png")
        path.unlink(missing_ok=True)  # of an earlier report
        with matplotlib.rc_context(STYLE):
            if (figure := plot(groups)) is not None:
                figure.savefig(path, dpi=150)
                pictures[name] = path
    return pictures


def _colours(groups: Groups) -> dict[str, Any]:
    import matplotlib

    many = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(groups)))
    return dict(zip(groups, PALETTE if len(groups) <= len(PALETTE) else many, strict=False))


def _finish(figure: Figure, groups: Groups, axes: Iterable[Axes], crowded: bool = False) -> Figure:
    """Whole steps on the axes, and below the panels a legend of the runs where there are several."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    for ax in axes:
        ax.set_xlabel("step")
        ticks = MaxNLocator(5 if crowded else 10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        ax.xaxis.set_major_locator(ticks)
    if len(groups) > 1:
        lines = [Line2D([], [], color=c, label=label) for label, c in _colours(groups).items()]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)))
    return figure


def learning_figure(groups: Groups) -> Figure | None:
    """Validation sets and reward (rows) against steps, rollouts and tokens generated (columns)."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    every = [run for runs in groups.values() for run in runs]
    rows = [row for run in every for row in run.validation]
    images = any(name.endswith("deterministic_accuracy") for row in rows for name in row)
    greedy = "deterministic" if images else "greedy"
    panels: dict[tuple[str, str], dict[str, str]] = {}
    for data_set in sets_of(every):
        start = f"eval_{data_set}_" if data_set else "eval_"
        names = {
            f"{start}pass_rate": "pass rate",
            f"{start}{greedy}_accuracy": f"{greedy} accuracy",
        }
        panels["validation", data_set] = names
    panels["log", ""] = {"reward": "before filtering", "reward_trained": "after filtering"}
    found = {
        panel: {
            (label, name): values
            for label, runs in groups.items()
            for name in names
            if (values := _curve(runs, panel[0], name)) is not None
        }
        for panel, names in panels.items()
    }
    found = {panel: curves for panel, curves in found.items() if curves}
    if not found:
        return None
    unit = "denoising steps" if images else "tokens"
    # Against tokens only where every run logged them, so that no curve is missing in a panel.
    costs = {"step": lambda run, step_S: step_S, "rollouts generated": rollouts_until}
    if all(tokens_until(run, np.zeros(1)) is not None for run in every):
        costs[f"{unit} generated"] = tokens_until
    figure = Figure(figsize=(10.5, 0.5 + 3.1 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(costs), squeeze=False, sharex="col", sharey="row")
    for line, ((source, data_set), curves) in zip(axes, found.items(), strict=True):
        names = panels[source, data_set]
        dash: dict[str, Any] = dict(zip(names, ("-", (0, (4, 1.5))), strict=True))
        shade = dict(zip(names, PALETTE if len(groups) == 1 else ["#555555"] * 2, strict=False))
        longest = max(step_RS.shape[1] for step_RS, _ in curves.values())
        window = window_of(longest) if source == "log" else 1
        for (label, name), (step_RS, value_RS) in curves.items():
            runs = groups[label]
            colour = shade[name] if len(groups) == 1 else _colours(groups)[label]
            mean_S = smooth(value_RS.mean(0), window)
            low_S, high_S = smooth(value_RS.min(0), window), smooth(value_RS.max(0), window)
            error = values_of(runs, source, f"{name}_se")
            if len(runs) == 1 and error is not None and len(error[0]) == len(mean_S):
                low_S, high_S = mean_S - error[1][0], mean_S + error[1][0]
            for ax, cost_of in zip(line, costs.values(), strict=True):
                x_S = np.mean([cost_of(r, s) for r, s in zip(runs, step_RS, strict=True)], axis=0)
                if window > 1 and len(groups) == len(runs) == 1:
                    ax.plot(x_S, value_RS[0], color=colour, alpha=0.25, linewidth=0.8)
                ax.fill_between(x_S, low_S, high_S, color=colour, alpha=0.15, linewidth=0)
                marker = "o" if len(x_S) <= 30 else None
                ax.plot(x_S, mean_S, color=colour, linestyle=dash[name], marker=marker)
        lines = [
            Line2D([], [], color=shade[name], linestyle=dash[name], label=text)
            for name, text in names.items()
        ]
        line[-1].legend(handles=lines, loc="center left", bbox_to_anchor=(1.01, 0.5))
        line[0].set_ylabel("reward, mean over rollouts")
        line[0].set_title("training" + (f", mean of {window} log lines" if window > 1 else ""))
        if source == "validation":
            title = "validation" + (f": {data_set}" if data_set else "")
            line[0].set(title=title, ylabel="validation prompts solved")
            line[0].yaxis.set_major_formatter(PercentFormatter(1))
    for ax, what in zip(axes[-1, 1:], list(costs)[1:], strict=True):
        ax.set_xlabel(what)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(5))
    return _finish(figure, groups, axes[-1, :1], crowded=True)


def _curve(runs: list[Run], source: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and values (R, S): validation on to each run's last, training as far as all runs go."""
    if source == "validation":
        return curve_of(runs, source, name)
    found = values_of(runs, source, name)
    return None if found is None else (np.tile(found[0], (len(runs), 1)), found[1])


DETAILS = {
    "kl": "KL to the reference, nats per token",
    "kl_old": "KL of the update, nats per token",
    "entropy": "entropy, nats per token",
    "mismatch": "mismatch to the engine, nats",
    "completions/mean_length": "length, tokens",
    "completions/clipped_ratio": "share cut off for length",
    "clip_ratio/high": "share clipped above",
    "clip_ratio/low": "share clipped below",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "loss": "loss",
}
"""Training metrics that have a panel of their own, where they were logged."""


def details_figure(groups: Groups) -> Figure | None:
    """Each reward by itself, KL, entropy, length, truncation, clipping and the like, against steps."""
    from matplotlib.figure import Figure

    every = [run for runs in groups.values() for run in runs]
    logged = dict.fromkeys(name for run in every for row in run.log for name in row)
    panels = {
        name: f"reward: {name.removeprefix('rewards/').removesuffix('/mean')}"
        for name in logged
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    panels |= {name: title for name, title in DETAILS.items() if name in logged}
    found = {
        name: {
            label: values
            for label, runs in groups.items()
            if (values := values_of(runs, "log", name)) is not None
        }
        for name in panels
    }
    found = {name: curves for name, curves in found.items() if curves}
    if not set(found) - {"loss", "learning_rate"}:
        return None
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(10.5, 0.5 + 2.0 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    for ax, (name, curves) in zip(axes, found.items(), strict=False):
        ax.set_title(panels[name], fontsize=8)
        for label, (step_S, value_RS) in curves.items():
            window = window_of(len(step_S))
            colour = _colours(groups)[label]
            low_S, high_S = smooth(value_RS.min(0), window), smooth(value_RS.max(0), window)
            ax.fill_between(step_S, low_S, high_S, color=colour, alpha=0.15, linewidth=0)
            marker = "o" if len(step_S) == 1 else None
            ax.plot(step_S, smooth(value_RS.mean(0), window), color=colour, marker=marker)
    return _finish(figure, groups, axes[: len(found)], crowded=True)


def budgets_figure(groups: Groups) -> Figure | None:
    """Budgets over the run, and against the pass rate believed before the step; seeds are pooled."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # A step that trained on what waited in the buffer generated nothing and has no budgets.
    rows = {
        label: [row for run in runs for row in run.steps if row["budgets"]]
        for label, runs in groups.items()
    }
    rows = {label: found for label, found in rows.items() if found}
    if not rows:
        return None
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = window_of(max(len({row["step"] for row in found}) for found in rows.values()))
    for label, found in rows.items():
        colour = _colours(groups)[label]
        pooled: dict[int, list[int]] = {}
        for row in found:
            pooled.setdefault(row["step"], []).extend(row["budgets"])
        step_S = sorted(pooled)
        parts = [np.array(pooled[step]) for step in step_S]
        _spread(left, step_S, parts, colour, alone=len(rows) == 1, window=window)
        if len(rows) == 1:
            ends = np.array([(part.min(), part.max()) for part in parts])
            left.plot(step_S, ends, ":", color=colour, linewidth=0.8, label=["least, most", None])
        late = [row for row in found if row["step"] >= step_S[-max(1, len(step_S) // 4)]]
        budget_M = np.concatenate([row["budgets"] for row in late])
        rate_M = np.concatenate([row["pass_rates_before"] for row in late])
        if len(rows) == 1:
            few = slice(None, None, max(1, len(rate_M) // 3000))
            right.plot(rate_M[few], budget_M[few], ".", color="#777777", alpha=0.25, label="prompt")
        bin_M = np.minimum((10 * rate_M).astype(int), 9)
        bins = sorted(set(bin_M.tolist()))
        middle_B = [rate_M[bin_M == b].mean() for b in bins]
        parts = [budget_M[bin_M == b] for b in bins]
        _spread(right, middle_B, parts, colour, alone=len(rows) == 1, window=1)
    note = f" (band: mean of {window} steps)" if window > 1 else ""
    left.set(title=f"budgets of a step{note}", ylabel="rollouts per prompt")
    right.set(title="last quarter of the run", ylabel="rollouts per prompt", xlim=(-0.02, 1.02))
    right.set_xlabel("pass rate believed before the step")
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax in (left, right):
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(rows) == 1:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return _finish(figure, groups, [left])


def _spread(
    ax: Axes,
    x: Sequence[float],
    parts: list[np.ndarray],
    colour: Any,
    *,
    alone: bool,
    window: int,
) -> None:
    """Mean and 10-90 % band of each part; the band is edged where others overlap it."""
    edges = np.array([np.percentile(part, (10, 90)) for part in parts]).T
    low, high = (smooth(edge, window) for edge in edges)
    mean = [part.mean() for part in parts]
    ax.plot(x, mean, color=colour, marker="o" if len(x) <= 30 else None, label="mean")
    shade = 0.2 if alone else 0.07
    ax.fill_between(x, low, high, color=colour, alpha=shade, linewidth=0, label="10–90 %")
    if not alone:
        ax.plot(x, low, x, high, color=colour, linewidth=0.8)


def _panels(groups: Groups, labels: Iterable[str]) -> tuple[Figure, list[Axes]]:
    """A panel per curve, at most three in a row."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    titles = list(labels)
    columns = min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(10.5, 0.7 + 2.8 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for ax in axes[len(titles) :]:
        ax.set_visible(False)
    for ax, title in zip(axes, titles, strict=False):
        ax.set(title=title, ylim=(0, 1))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(figure, {}, axes[: len(titles)], crowded=columns > 1)
    return figure, axes[: len(titles)]


def posterior_figure(groups: Groups) -> Figure | None:
    """Heatmap of believed pass rates over steps, one panel per curve."""
    from matplotlib.ticker import PercentFormatter

    shares = {}
    for label, runs in groups.items():
        if (found := values_of(runs, "steps", "posterior_histogram")) is not None:
            count_SB = found[1].sum(0)
            shares[label] = found[0], count_SB.T / count_SB.sum(1)
    if not shares:
        return None
    figure, axes = _panels(groups, shares)
    # Before anything is known all prompts share a bin; the scale is that of what comes after.
    most = np.quantile(np.concatenate([share_BS.ravel() for _, share_BS in shares.values()]), 0.98)
    for ax, (step_S, share_BS) in zip(axes, shares.values(), strict=True):
        edge_B = np.linspace(0, 1, len(share_BS) + 1)
        edge_S = np.concatenate([[step_S[0] - 1], step_S]) + 0.5
        image = ax.pcolormesh(edge_S, edge_B, share_BS, vmin=0, vmax=most)
        mean_S = (edge_B[:-1] + edge_B[1:]) / 2 @ share_BS
        ax.plot(step_S, mean_S, color="black", linewidth=3)
        ax.plot(step_S, mean_S, color="white")
        ax.grid(False)
    axes[0].set_ylabel("believed pass rate")
    bar = figure.colorbar(image, ax=axes, extend="max", format=PercentFormatter(1))
    bar.set_label("share of training prompts")
    return figure


def groups_figure(groups: Groups) -> Figure | None:
    """Shares of mixed, all-pass and all-fail groups, stacked, one panel per curve."""
    stacks = {}
    for label, runs in groups.items():
        found = [values_of(runs, "log", f"groups/{name}_share") for name in SHARES]
        if None not in found:
            stacks[label] = [(f[0], f[1].mean(0)) for f in found if f is not None]
    if not stacks:
        return None
    figure, axes = _panels(groups, stacks)
    for ax, curves in zip(axes, stacks.values(), strict=True):
        step_S, window = curves[0][0].astype(float), window_of(len(curves[0][0]))
        share_CS = np.array([smooth(value_S, window) for _, value_S in curves])
        if len(step_S) == 1:  # a point has no area
            step_S, share_CS = step_S + np.array([-0.5, 0.5]), share_CS.repeat(2, axis=1)
        labels = [name.replace("_", " ") for name in SHARES]
        ax.stackplot(step_S, share_CS, colors=list(SHARES.values()), labels=labels)
        ax.set_xlim(step_S[0], step_S[-1])
        if window > 1:
            ax.set_xlabel(f"step (mean of {window} log lines)")
    axes[0].set_ylabel("share of the step's groups")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    return figure
