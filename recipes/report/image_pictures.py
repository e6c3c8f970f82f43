"""Pictures of diffusion runs for the report: rewards against evaluations, and samples first and last."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .run_folder import Groups, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def denoising_figure(groups: Groups) -> Figure | None:
    """Reward of training samples, validation and diversity, against evaluations of the denoiser."""
    from matplotlib.figure import Figure

    runs = [
        (label, run)
        for label, members in groups.items()
        for run in members
        if any("eval_denoiser_evaluations" in row for row in run.validation)
    ]
    if not runs:
        return None
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    reward, validation, diversity = figure.subplots(1, 3)
    for number, (label, run) in enumerate(runs):
        colour = f"C{list(groups).index(label) % 10}"
        name = label if label not in [other for other, _ in runs[:number]] else None
        spent = {row["step"]: row.get("denoiser_evaluations") for row in run.log}
        known = [row for row in run.log if spent[row["step"]] is not None and "reward" in row]
        reward.plot(
            [row["denoiser_evaluations"] for row in known],
            [row["reward"] for row in known],
            color=colour,
            label=name,
        )
        x = [row["eval_denoiser_evaluations"] for row in run.validation]
        for key, style in (("eval_pass_rate", "-"), ("eval_deterministic_accuracy", ":")):
            if all(key in row for row in run.validation):
                validation.plot(x, [row[key] for row in run.validation], style, color=colour)
        for key, style in (
            ("eval_sampled_diversity", "-"),
            ("eval_deterministic_diversity", ":"),
        ):
            if all(key in row for row in run.validation):
                diversity.plot(x, [row[key] for row in run.validation], style, color=colour)
    for ax, title in (
        (reward, "reward of training samples"),
        (validation, "validation: with noise (solid), without (dotted)"),
        (diversity, "distance between samples of a prompt"),
    ):
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("evaluations of the denoiser")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    if len(groups) > 1:
        reward.legend(fontsize="small")
    return figure


def samples_of(run: Run) -> dict[str, Path]:
    """Caption -> picture: validation samples before and after, and training samples by branch."""
    folder, found = run.folder / "images", {}
    for kind, what in (("sampled", "with noise"), ("deterministic", "without noise")):
        pictures = sorted(folder.glob(f"{kind}-*.png"))
        for place, path in zip(
            ("first", "last"), pictures[:: max(len(pictures) - 1, 1)], strict=False
        ):
            step = int(path.stem.rsplit("-", 1)[1])
            found[f"{place} validation {what}, step {step}: a row of samples for each prompt"] = (
                path
            )
    trained = sorted(folder.glob("train-*.png"))
    if trained:
        step = int(trained[-1].stem.rsplit("-", 1)[1])
        found[f"training samples of step {step}: a row for each prompt, siblings side by side"] = (
            trained[-1]
        )
    return found
