"""Save pictures of samples in the run folder, and measure how much samples of one prompt differ."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rl.stages.records import Scored
from rollouts.rewards.image_shapes import mean_pairwise_distance, middle_frame

LEAST, MOST = 32, 256
"""Pixels: sides of smaller images are enlarged to `LEAST`, by whole factors; the longer side of larger
ones is reduced to `MOST`, or as far as it takes for all to fit."""

PIXELS = 8_000_000
"""Of a picture, as far as `LEAST` allows; Pillow refuses to open one of more than 179 million."""

ROWS, FILES = 128, 64
"""Prompts in a picture at most, and samples of it that are written in full size."""


def save_grid(path: Path, prompts: list[str], scored: Scored, *, most: int = 16) -> None:
    """One row of images for each prompt, in the order of its rollouts, so siblings stand together.

    A line under an image says its reward: from black (the lowest of the picture) to white (the highest).
    The prompts are written beside it, in a text file of the same name. Images larger than `MOST`
    pixels are reduced, and of videos the middle frame is shown; the first `FILES` of either lie in
    full size in a folder of the same name, as 003-01.jpg for the second sample of the fourth prompt
    (a video as .webp).

    Args:
        path: of the PNG; folders are made.
        prompts: a text per prompt; the first `ROWS` are shown.
        scored: rollouts whose `shown_N` are (H, W, C) uint8 images, or (F, H, W, C) videos.
        most: images of one prompt, at most.
    """
    prompt_N = scored.rollouts.prompt_N.numpy()
    columns = min(most, max(np.bincount(prompt_N, minlength=1).max(initial=0), 1))
    if not len(prompt_N):
        return
    rows = min(len(prompts), ROWS)
    place_N = {
        row: (p, place)
        for p in range(rows)
        for place, row in enumerate(np.flatnonzero(prompt_N == p)[:columns].tolist())
    }
    size, is_reduced = _tile(scored.shown_N[0].shape[-3:-1], rows * columns)
    tile_h, tile_w, line = size[0] + 6, size[1] + 2, 3
    picture = np.full((rows * tile_h, columns * tile_w, 3), 96, dtype=np.uint8)
    reward_N = scored.reward_N.numpy()
    low, high = float(reward_N.min()), float(reward_N.max())
    for row, (p, place) in place_N.items():
        top, left = p * tile_h, place * tile_w
        picture[top : top + size[0], left : left + size[1]] = _sized(scored.shown_N[row], size)
        share = 0.0 if high == low else (float(reward_N[row]) - low) / (high - low)
        under = slice(top + size[0] + 1, top + size[0] + 1 + line)
        picture[under, left : left + size[1]] = round(255 * share)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(picture).save(temporary, format="PNG")
    os.replace(temporary, path)
    path.with_suffix(".txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    whole = path.with_suffix("")
    shutil.rmtree(whole, ignore_errors=True)  # of a run that was stopped after this step
    if is_reduced or scored.shown_N[0].ndim == 4:
        whole.mkdir()
        for row, (p, place) in list(place_N.items())[:FILES]:
            _save_whole(whole / f"{p:03d}-{place:02d}", scored.shown_N[row])


def _tile(size: tuple[int, ...], count: int) -> tuple[tuple[int, int], bool]:
    """Height and width of one of `count` images in a picture, and whether that is less than theirs."""
    height, width = size
    most = max(LEAST, min(MOST, math.isqrt(PIXELS // count)))
    longest = max(height, width)
    if longest > most:
        return (
            max(1, round(height * most / longest)),
            max(1, round(width * most / longest)),
        ), True
    scale = max(1, min(-(-LEAST // min(height, width)), most // longest))
    return (height * scale, width * scale), False


def _sized(sample: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A sample as an image of this size."""
    image = middle_frame(sample[None])[0]
    if size[0] >= image.shape[0] and size[1] >= image.shape[1]:
        scale = size[0] // image.shape[0]
        return image.repeat(scale, axis=0).repeat(scale, axis=1)
    whole = _pillow(image).convert("RGB")
    return np.asarray(whole.resize(size[::-1], Image.Resampling.LANCZOS, reducing_gap=2.0))


def _save_whole(path: Path, sample: np.ndarray) -> None:
    if sample.ndim == 3:
        _pillow(sample).save(path.with_suffix(".jpg"), quality=95)
        return
    first, *others = map(_pillow, sample)
    first.save(path.with_suffix(".webp"), save_all=True, append_images=others, duration=125)


def _pillow(image_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)


def thinned(shown_N: Sequence[np.ndarray], *, side: int = 64) -> np.ndarray:
    """Samples as one array of every k-th pixel, so that sides have some `side` at most.

    Large images then take no time where all are compared with all.
    """
    k = max(1, max(shown_N[0].shape[-3:-1]) // side)
    return np.stack([np.asarray(sample)[..., ::k, ::k, :] for sample in shown_N])


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
