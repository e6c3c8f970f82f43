"""Pictures of samples in a run folder, and how unlike each other samples of one prompt are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rollouts.image_shapes import mean_pairwise_distance

if TYPE_CHECKING:
    from rl.roll_out import Scored

LEAST = 32
"""Pixels to which the sides of smaller images are enlarged, by whole factors."""


def save_grid(path: Path, prompts: list[str], scored: Scored, *, most: int = 16) -> None:
    """One row of images for each prompt, in the order of its rollouts, so siblings stand together.

    A line under an image says its reward: from black (the lowest of the picture) to white (the highest).
    The prompts are written beside it, in a text file of the same name.

    Args:
        path: of the PNG; folders are made.
        prompts: a text per prompt.
        scored: rollouts whose `shown_N` are (H, W, C) uint8 images.
        most: images of one prompt, at most.
    """
    prompt_N = scored.rollouts.prompt_N.numpy()
    columns = min(most, max(np.bincount(prompt_N, minlength=1).max(initial=0), 1))
    if not len(prompt_N):
        return
    height, width = scored.shown_N[0].shape[:2]
    scale = max(1, -(-LEAST // min(height, width)))
    tile_h, tile_w, line = height * scale + 6, width * scale + 2, 3
    picture = np.full((len(prompts) * tile_h, columns * tile_w, 3), 96, dtype=np.uint8)
    reward_N = scored.reward_N.numpy()
    low, high = float(reward_N.min()), float(reward_N.max())
    for p in range(len(prompts)):
        for place, row in enumerate(np.flatnonzero(prompt_N == p)[:columns]):
            image = np.asarray(scored.shown_N[row]).repeat(scale, axis=0).repeat(scale, axis=1)
            top, left = p * tile_h, place * tile_w
            picture[top : top + height * scale, left : left + width * scale] = image
            share = 0.0 if high == low else (float(reward_N[row]) - low) / (high - low)
            under = slice(top + height * scale + 1, top + height * scale + 1 + line)
            picture[under, left : left + width * scale] = round(255 * share)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(picture).save(temporary, format="PNG")
    os.replace(temporary, path)
    path.with_suffix(".txt").write_text("".join(f"{prompt}\n" for prompt in prompts))


def diversity(image_NHWC: np.ndarray, prompt_N: np.ndarray) -> float:
    """Mean distance between two samples of one prompt, averaged over prompts with at least two.

        root of the mean over pixels of (x - y)^2,  pixels in [0, 1]

    0 if all samples of each prompt are alike, or no prompt has two.
    """
    means = []
    for p in np.unique(prompt_N):
        of_prompt = image_NHWC[prompt_N == p]
        if len(of_prompt) > 1:
            means.append(mean_pairwise_distance(of_prompt))
    return float(np.mean(means)) if means else 0.0
