"""Image rewards for shapes, relations, counts and places, and measures of how varied images are.

What a row asks for stands in its metadata, or is read from its prompt: one whole word, in lower or
upper case. A prompt that names none, or several, is an error, not a reward of 0.

The *foreground* of an image is what differs from its background by at least `FOREGROUND` levels in
some channel, and the background is the median of the border pixels, channel by channel. Both are a
project default, not from a paper; they suit one or a few things on an even ground. Of a video these
rewards score the middle frame alone.

Axes: N images, H rows of pixels, W columns, C channels.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Metadata = Mapping[str, Any]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "pink": (255, 192, 203),
    "brown": (165, 42, 42),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
}
"""RGB of the colour words, those of CSS."""

SHAPES = {"disc": "disc", "disk": "disc", "circle": "disc", "square": "square", "ring": "ring"}
NUMBERS = {
    word: number
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {str(number): number for number in range(11)}
PLACES = {
    "left": (1 / 6, 1 / 2),
    "right": (5 / 6, 1 / 2),
    "top": (1 / 2, 1 / 6),
    "bottom": (1 / 2, 5 / 6),
    "centre": (1 / 2, 1 / 2),
    "center": (1 / 2, 1 / 2),
}
"""Place word -> (x, y) as shares of width and height, from the upper left corner."""

FOREGROUND = 64
"""Levels of 255 by which a pixel of the foreground differs from the background, in some channel."""
COLOUR_TOLERANCE = 64
"""Levels by which a pixel may miss a colour, in every channel, and still be of it."""
RADIUS = 0.2
"""Of a place: distance from it that counts as there, as a share of width and height."""


Reward = TypeVar("Reward", bound=Callable[..., Any])


def middle_frame(sample_N: np.ndarray) -> np.ndarray:
    """Of videos (N, F, H, W, C) the frames F // 2, (N, H, W, C); images as they are."""
    return sample_N[:, sample_N.shape[1] // 2] if sample_N.ndim == 5 else sample_N


def of_one_frame(reward: Reward) -> Reward:
    """A reward of images, which of videos scores the middle frame and nothing else."""

    @functools.wraps(reward)
    def score(image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Any:
        return reward(middle_frame(np.asarray(image_NHWC)), prompts, metadata)

    return score  # type: ignore[return-value]


def words_of(prompt: str, known: Mapping[str, Any]) -> list[str]:
    """The known words in the prompt, in order; a word within a word does not count."""
    return [word for word in re.findall(r"[a-z0-9]+", prompt.lower()) if word in known]


def named_colour(prompt: str, row: Metadata) -> tuple[int, ...]:
    """RGB of the colour that a row asks for: its column `colour`, or the one its prompt names.

    Raises:
        ValueError: the prompt names none or several, or the column is no colour.
    """
    given = row.get("colour")
    if given is None:
        return COLOURS[_one_word(prompt, {word: word for word in COLOURS}, "colour")]
    if isinstance(given, str):
        if given not in COLOURS:
            raise ValueError(f"unknown colour {given!r} in metadata: write one of {list(COLOURS)}")
        return COLOURS[given]
    channels = tuple(int(channel) for channel in given)
    if len(channels) != 3 or not all(0 <= channel <= 255 for channel in channels):
        raise ValueError(f"colour in metadata must be three numbers in [0, 255], got {given!r}")
    return channels


@of_one_frame
def shape(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Overlap of the foreground with the disc, square or ring that the row asks for, in [0, 1].

        IoU = pixels in both / pixels in either

    The ideal shape has the foreground's centroid and area: a disc of radius sqrt(A / pi), a square
    of side sqrt(A), a ring whose hole has half its radius, R = sqrt(4 A / (3 pi)). A pixel belongs to it
    if its centre does. So neither place nor size counts. Without a foreground it is 0.

    Column `shape`, or the word in the prompt: disc (disk, circle), square, ring.

    Returns:
        (N,) float64, and details `best`, the index among disc, square, ring of the best fit (the
        first of equals), -1 without a foreground.
    """
    fit_N3 = np.array([_fits(image) for image in image_NHWC]).reshape(-1, 3)
    wanted_N = _wanted(prompts, metadata, SHAPES, "shape")
    index_N = np.array([_KINDS.index(kind) for kind in wanted_N], dtype=np.int64)
    best_N = np.where(fit_N3.max(axis=1) > 0, fit_N3.argmax(axis=1), -1)
    return fit_N3[np.arange(len(index_N)), index_N], {"best": best_N}


@of_one_frame
def shape_match(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """1 where the asked shape fits better than the two others, by an IoU of 0.75 or more; else 0."""
    reward_N, details = shape(image_NHWC, prompts, metadata)
    wanted_N = _wanted(prompts, metadata, SHAPES, "shape")
    index_N = np.array([_KINDS.index(kind) for kind in wanted_N], dtype=np.int64)
    return ((details["best"] == index_N) & (reward_N >= 0.75)).astype(np.float64)


@of_one_frame
def relation(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """1 where things of two colours stand as the prompt says, else 0.

    Read from the prompt, for example "a red ball left of a blue cube": two colours in order, and
    "left of", "right of", "above" or "below" (or the column `relation`: (first, relation, second)).
    The centroids of the pixels of each colour (within `COLOUR_TOLERANCE` in every channel) are
    compared: left of is a strictly smaller x, above a strictly smaller y. A colour that the image
    lacks gives 0, for the thing is not there.
    """
    reward_N = np.zeros(len(image_NHWC))
    for i, (image, prompt, row) in enumerate(zip(image_NHWC, prompts, metadata, strict=True)):
        first, word, second = _relation_of(prompt, row)
        if image.shape[2] != 3:
            raise ValueError(f"relation needs images of 3 channels, got {image.shape[2]}")
        here, there = (_centroid(_of_colour(image, COLOURS[name])) for name in (first, second))
        if here is None or there is None:
            continue
        (x0, y0), (x1, y1) = here, there
        reward_N[i] = {"left": x0 < x1, "right": x0 > x1, "above": y0 < y1, "below": y0 > y1}[word]
    return reward_N


@of_one_frame
def count(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """1 where the foreground has as many connected parts as the row asks for, else 0.

    Pixels that touch by a side or a corner are connected (scipy.ndimage.label). Column `count`, or
    the one number in the prompt, zero to ten as a word or in digits.

    Returns:
        (N,) float64, and details `found`, the number of parts.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("the image reward count needs SciPy: pip install scipy") from error
    whole = np.ones((3, 3))
    found_N = np.array(
        [ndimage.label(foreground(image), structure=whole)[1] for image in image_NHWC],
        dtype=np.float64,
    )
    wanted_N = _wanted(prompts, metadata, NUMBERS, "count")
    return (found_N == np.array(wanted_N, dtype=np.float64)).astype(np.float64), {"found": found_N}


@of_one_frame
def region(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """1 where the centroid of the foreground lies at the asked place, else 0.

    Column `region`, (x, y) as shares of width and height from the upper left corner, or the place
    word in the prompt: left, right, top, bottom, centre. At is a distance of at most `RADIUS`, or
    the column `radius`. Without a foreground it is 0.
    """
    reward_N = np.zeros(len(image_NHWC))
    for i, (image, prompt, row) in enumerate(zip(image_NHWC, prompts, metadata, strict=True)):
        given = row.get("region")
        place = _one_word(prompt, PLACES, "place") if given is None else tuple(given)
        radius = float(row.get("radius", RADIUS))
        found = _centroid(foreground(image))
        if found is not None:
            reward_N[i] = within_radius(np.array([found]), centre=place, radius=radius)[0]
    return reward_N


def within_radius(point_NE: np.ndarray, *, centre: Sequence[float], radius: float) -> np.ndarray:
    """1 where a point lies at most `radius` from the centre, else 0; for points of E dimensions.

    Raises:
        ValueError: points, centre and radius that do not fit or are not finite.
    """
    point_NE, centre_E = (
        np.asarray(point_NE, dtype=np.float64),
        np.asarray(centre, dtype=np.float64),
    )
    if point_NE.ndim != 2 or centre_E.shape != point_NE.shape[1:]:
        raise ValueError(f"points {point_NE.shape} and centre {centre_E.shape} do not fit together")
    if not (np.isfinite(point_NE).all() and np.isfinite(centre_E).all() and radius > 0):
        raise ValueError(f"points and centre must be finite and radius positive, got {radius}")
    return (np.square(point_NE - centre_E).sum(axis=1) <= radius**2).astype(np.float64)


# How varied images are: metrics of a batch, not rewards of a row.


def mean_pairwise_distance(image_NHWC: np.ndarray) -> float:
    """Mean over all pairs of images of the root mean square difference of their pixels, in [0, 1].

    Raises:
        ValueError: fewer than two images have no pair.
    """
    if len(image_NHWC) < 2:
        raise ValueError(f"a pairwise distance needs two images or more, got {len(image_NHWC)}")
    flat = torch.from_numpy(image_NHWC.reshape(len(image_NHWC), -1).astype(np.float64) / 255)
    return float(torch.pdist(flat).mean()) / flat.shape[1] ** 0.5


# Parts of images.


def foreground(image_HWC: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that differ from the background; see the module's head."""
    pixels = image_HWC.astype(np.int64)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[1:-1, 1:-1] = False
    background = np.median(pixels[border], axis=0)
    return (np.abs(pixels - background) >= FOREGROUND).any(axis=2)


def _of_colour(image_HWC: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    near = np.abs(image_HWC.astype(np.int64) - np.array(colour)) <= COLOUR_TOLERANCE
    return near.all(axis=2)


def _centroid(mask_HW: np.ndarray) -> tuple[float, float] | None:
    """(x, y) of the mask as shares of width and height; None if it is empty."""
    y, x = mask_HW.nonzero()
    if not len(x):
        return None
    return (x.mean() + 0.5) / mask_HW.shape[1], (y.mean() + 0.5) / mask_HW.shape[0]


_KINDS = ("disc", "square", "ring")


def _fits(image_HWC: np.ndarray) -> list[float]:
    """IoU of the foreground with the ideal disc, square and ring of its centroid and area."""
    mask_HW = foreground(image_HWC)
    area = mask_HW.sum()
    if not area:
        return [0.0] * len(_KINDS)
    y, x = np.indices(mask_HW.shape)
    rows, columns = mask_HW.nonzero()
    down, right = y - rows.mean(), x - columns.mean()
    distance_2 = down**2 + right**2
    outer_2 = 4 * area / (3 * np.pi)
    ideals = (
        distance_2 <= area / np.pi,
        np.maximum(np.abs(down), np.abs(right)) <= area**0.5 / 2,
        (distance_2 <= outer_2) & (distance_2 >= outer_2 / 4),
    )
    return [float((mask_HW & ideal).sum() / (mask_HW | ideal).sum()) for ideal in ideals]


# What a row asks for.


def _wanted(
    prompts: Sequence[str], metadata: Sequence[Metadata], known: Mapping[str, Any], name: str
) -> list[Any]:
    """For each row the meaning of its column `name`, or of the one known word in its prompt."""
    wanted = []
    for prompt, row in zip(prompts, metadata, strict=True):
        given = row.get(name)
        if given is None:
            wanted.append(_one_word(prompt, known, name))
        elif str(given) in known:
            wanted.append(known[str(given)])
        else:
            raise ValueError(f"unknown {name} {given!r} in metadata: write one of {list(known)}")
    return wanted


def _one_word(prompt: str, known: Mapping[str, Any], name: str) -> Any:
    """The meaning of the one known word in the prompt."""
    meanings = list(dict.fromkeys(known[word] for word in words_of(prompt, known)))
    if len(meanings) != 1:
        number = "no" if not meanings else "more than one"
        raise ValueError(
            f"prompt {prompt!r} names {number} {name}: write exactly one of {list(known)}, or give "
            f"the row a column for it"
        )
    return meanings[0]


def _relation_of(prompt: str, row: Metadata) -> tuple[str, str, str]:
    given = row.get("relation")
    if given is None:
        words = re.findall(r"\b(left|right) of\b|\b(above|below)\b", prompt.lower())
        relations = [a or b for a, b in words]
        colours = words_of(prompt, COLOURS)
        if len(relations) != 1 or len(colours) != 2:
            raise ValueError(
                f"prompt {prompt!r} must name two of {list(COLOURS)} and one of 'left of', "
                f"'right of', 'above', 'below'; found {colours} and {relations}"
            )
        given = (colours[0], relations[0], colours[1])
    first, word, second = given
    if word not in ("left", "right", "above", "below") or {first, second} - COLOURS.keys():
        raise ValueError(
            f"relation must be (colour, 'left' | 'right' | 'above' | 'below', colour), got {given!r}"
        )
    return first, word, second
