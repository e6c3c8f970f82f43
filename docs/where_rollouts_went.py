"""Draw where the rollouts of two runs went: by the share of their group that passed, used or wasted.

    python docs/where_rollouts_went.py UNIFORM_RUN OTHER_RUN PICTURE.png

A run is a folder with `steps.jsonl`, of rewards 0 and 1. A group is the rollouts of one prompt in one
step. It is used if some of them passed and some failed; a group that is all alike has no gradient, so
its rollouts are wasted. Axes: G groups of all steps.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

USED, WASTED = "#009E73", "#D55E00"


def groups_of(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """(budget_G, passed_G, number of steps) of a run folder."""
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    budget_G = np.array([budget for step in steps for budget in step["budgets"]])
    passed_G = np.array([passed for step in steps for passed in step["reward_sums"]])
    return budget_G, passed_G, len(steps)


def rollouts_by_share(folder: Path) -> np.ndarray:
    """Rollouts a step, on average, of groups of which no rollout passed, an eighth, ..., all.

    A mixed group counts at the nearest eighth that is neither none nor all.
    """
    budget_G, passed_G, num_steps = groups_of(folder)
    mixed_G = (passed_G > 0) & (passed_G < budget_G)
    share_G = passed_G / np.maximum(budget_G, 1)
    bin_G = np.where(mixed_G, np.clip(np.round(share_G * 8), 1, 7), share_G * 8).astype(int)
    return np.bincount(bin_G, weights=budget_G, minlength=9) / num_steps


def draw(folders: list[Path], titles: list[str]) -> Figure:
    """One panel per run, with the share that was wasted in its title."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots(1, len(folders), sharey=True)
    for ax, folder, title in zip(axes, folders, titles, strict=True):
        rollouts_B = rollouts_by_share(folder)
        wasted = (rollouts_B[0] + rollouts_B[-1]) / rollouts_B.sum()
        colours = [WASTED, *[USED] * 7, WASTED]
        ax.bar(range(9), rollouts_B, color=colours, width=0.85)
        ax.set_title(
            f"{title}\n{rollouts_B.sum():.0f} rollouts a step, {wasted:.0%} wasted",
            loc="left",
            fontsize=10,
        )
        ax.set_xticks(range(9), ["none", *[f"{n}/8" for n in range(1, 8)], "all"], fontsize=8)
        ax.set_xlabel("share of the prompt's rollouts that passed")
        ax.spines[["top", "right"]].set_visible(False)
        print(f"{title}: {rollouts_B.sum():.1f} rollouts a step, {wasted:.1%} wasted")
    axes[0].set_ylabel("rollouts a step")
    handles = [
        axes[0].bar(0, 0, color=colour, label=label)
        for colour, label in (
            (USED, "used: some passed and some failed"),
            (WASTED, "wasted: all alike, no gradient"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    *runs, picture = map(Path, sys.argv[1:])
    draw(runs, ["Uniform (GRPO)", "Apportion"]).savefig(picture, dpi=110)
