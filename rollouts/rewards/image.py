"""Image rewards without model weights, and how a setting names one.

An image reward is

    fn(image_NHWC, prompts, metadata) -> reward_N    or    (reward_N, details)

with `image_NHWC` uint8 of 1 (grey) or 3 (RGB) channels, one prompt string and one dict of columns per
row, float64 rewards in row order, and details a dict of arrays of N. It is deterministic, keeps
nothing between calls, and a row's reward does not depend on the other rows. What it cannot judge
it raises on; a row that it does not apply to gets None, as from a reward of texts. It may be async.

A video model's samples come as (N, F, H, W, C). The rewards here, which are of images, score the
middle frame, F // 2, and say nothing of motion.

Axes: N images, F frames of a video, H rows of pixels, W columns, C channels.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from rollouts.prompts import Prompt
from rollouts.rewards.calls import is_marked
from rollouts.rewards.contract import RewardError, RewardResult, nearest, score
from rollouts.rewards.image_shapes import (
    COLOURS,
    count,
    named_colour,
    of_one_frame,
    region,
    relation,
    shape,
    shape_match,
)
from rollouts.rewards.text import load_reward

Metadata = Mapping[str, Any]
Scores = np.ndarray | tuple[np.ndarray, Mapping[str, np.ndarray]]
ImageReward = Callable[[np.ndarray, Sequence[str], Sequence[Metadata]], Scores]
"""`fn(image_NHWC, prompts, metadata) -> reward_N` or `(reward_N, details)`."""


# How large the image is when written down. Maximised, these drive to noise; minimised, to flatness.


@of_one_frame
def jpeg_incompressibility(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Size of the image as a JPEG of quality 95, in kB (1000 bytes).

    (Black et al., 2023, arXiv:2305.13301, DDPO.) An 8 x 8 image is nearly all header; use
    `zlib_size` there. The bytes are those of the JPEG library that Pillow was built with.
    """
    return np.array([_jpeg_bytes(image) / 1000 for image in image_NHWC], dtype=np.float64)


@of_one_frame
def jpeg_compressibility(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Minus `jpeg_incompressibility`."""
    return -jpeg_incompressibility(image_NHWC, prompts, metadata)


@of_one_frame
def zlib_size(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Bytes of the zlib-compressed pixels (level 9) per byte of pixels; works on tiny images.

    Project default, not from a paper. More than 1 where nothing can be compressed.
    """
    return np.array(
        [len(zlib.compress(image.tobytes(), 9)) / image.size for image in image_NHWC],
        dtype=np.float64,
    )


@of_one_frame
def grey_entropy(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Entropy of the histogram of grey levels, in bits.

        H = - sum over the 256 levels g of  p_g log2 p_g,   p_g = share of pixels of level g

    A flat image has 0, one that uses every level equally 8. Grey is rounded to whole levels.
    """
    level_NHW = np.rint(_grey(image_NHWC) * 255).astype(np.int64)
    entropy_N = np.zeros(len(level_NHW))
    for row, level_HW in enumerate(level_NHW):
        number = np.bincount(level_HW.ravel())
        share = number[number > 0] / level_HW.size
        entropy_N[row] = abs((share * np.log2(share)).sum())  # abs: a flat image gives -0.0
    return entropy_N


# Moments. Dense and smooth, in [0, 1] unless said.


@of_one_frame
def brightness(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Mean grey level: 0 black, 1 white."""
    return _grey(image_NHWC).mean(axis=(1, 2))


@of_one_frame
def contrast(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Twice the population standard deviation of the grey levels: 0 flat, 1 half black, half white."""
    return 2 * _grey(image_NHWC).std(axis=(1, 2))


@of_one_frame
def saturation(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Mean over pixels of (max - min) / max of the channels, as in HSV; a black pixel has 0."""
    rgb = _rgb(image_NHWC, "saturation")
    most, least = rgb.max(axis=-1), rgb.min(axis=-1)
    return ((most - least) / np.where(most > 0, most, 1)).mean(axis=(1, 2))


@of_one_frame
def colourfulness(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """How colourful the image is, by the spread and the mean of its two opponent channels.

        rg = R - G,   yb = (R + G) / 2 - B
        sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

    with channels in [0, 1] and population standard deviations. (Hasler and Suesstrunk, 2003, who
    have channels in [0, 255].) A grey image has 0.
    """
    rgb = _rgb(image_NHWC, "colourfulness")
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    opponents = (red - green, (red + green) / 2 - blue)
    spread = sum(channel.var(axis=(1, 2)) for channel in opponents)
    centre = sum(channel.mean(axis=(1, 2)) ** 2 for channel in opponents)
    return np.sqrt(spread) + 0.3 * np.sqrt(centre)


@of_one_frame
def symmetry(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Minus the mean squared difference from the mirror image, left and right swapped.

        - mean over pixels and channels of (x - flip(x))^2,   x in [0, 1]

    0 is a symmetric image, -1 the opposite. Every flat image has 0 too.
    """
    x = _unit(image_NHWC)
    return -np.square(x - x[:, :, ::-1]).mean(axis=(1, 2, 3))


@of_one_frame
def sharpness(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Population variance of the Laplacian of the grey levels; falls when a policy learns to blur.

        L = up + down + left + right - 4 centre,   at the (H - 2) (W - 2) inner pixels

    Grey levels in [0, 1]; between 0 and 16.

    Raises:
        ValueError: for images without inner pixels.
    """
    grey = _grey(image_NHWC)
    if min(grey.shape[1:]) < 3:
        raise ValueError(f"sharpness needs images of 3 x 3 pixels or more, got {grey.shape[1:]}")
    inner = grey[:, 1:-1, 1:-1]
    ring = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (ring - 4 * inner).var(axis=(1, 2))


# Colour, by the prompt.


@of_one_frame
def colour_target(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Minus the distance of the mean colour from the one that the row asks for, in [-1, 0].

        - mean over R, G, B of |mean over pixels - target|,   channels in [0, 1]

    The target is the row's column `colour`, a name in `COLOURS` or three numbers in [0, 255], and
    otherwise the one colour that the prompt names.
    """
    mean_NC = _rgb(image_NHWC, "colour_target").mean(axis=(1, 2))
    pairs = zip(prompts, metadata, strict=True)
    target_NC = np.array([named_colour(prompt, row) for prompt, row in pairs]).reshape(-1, 3) / 255
    return -np.abs(mean_NC - target_NC).mean(axis=1)


@of_one_frame
def colour_share(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> np.ndarray:
    """Share of pixels that are nearer to the asked colour than to any other of `COLOURS`.

    Nearest by Euclidean distance in RGB, ties to the colour that comes first in `COLOURS`. The asked
    colour is a name: the row's column `colour`, or the one colour that the prompt names.
    """
    rgb = _rgb(image_NHWC, "colour_share") * 255
    colours: list[tuple[int, ...]] = list(COLOURS.values())
    known = np.array(colours, dtype=np.float64)
    nearest_NHW = np.square(rgb[..., None, :] - known).sum(axis=-1).argmin(axis=-1)
    share_N = np.zeros(len(rgb))
    for i, (prompt, row) in enumerate(zip(prompts, metadata, strict=True)):
        target = named_colour(prompt, row)
        if target not in colours:
            raise ValueError(f"colour_share needs one of {list(COLOURS)}, got {target}")
        share_N[i] = (nearest_NHW[i] == colours.index(target)).mean()
    return share_N


IMAGE_REWARDS: dict[str, ImageReward] = {
    function.__name__: function
    for function in (
        jpeg_compressibility,
        jpeg_incompressibility,
        zlib_size,
        grey_entropy,
        brightness,
        contrast,
        saturation,
        colourfulness,
        symmetry,
        sharpness,
        colour_target,
        colour_share,
        shape,
        shape_match,
        relation,
        count,
        region,
    )
}
"""The image rewards that a configuration names."""


def load_image_reward(
    spec: str, *, more: Mapping[str, Callable[[], ImageReward]] | None = None
) -> ImageReward:
    """The image reward that a configuration asks for.

    Args:
        spec: a name in `IMAGE_REWARDS` or in `more`, or "path/to/file.py:function".
        more: further names, each with what makes its reward when asked, so that weights are read
            only then; `rollouts.rewards.image_models.MODEL_REWARDS` is such a table.

    Raises:
        ValueError: no such name, file or function (with the nearest there is), or not callable.
            What goes wrong inside the file is raised as it is.
    """
    more = more or {}
    if both := sorted(more.keys() & IMAGE_REWARDS.keys()):
        raise ValueError(f"image rewards {both} are already there: give yours other names")
    if spec in IMAGE_REWARDS:
        return IMAGE_REWARDS[spec]
    if spec in more:
        return more[spec]()
    path, colon, _ = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        names = [*IMAGE_REWARDS, *more]
        raise ValueError(
            f"no image reward {spec!r}{nearest(spec, names)}: write one of {sorted(names)}, or "
            f"'path/to/file.py:function'"
        )
    return cast(ImageReward, load_reward(spec))


# Scoring a batch.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """One image on its way through `score`, which names it in messages."""

    image: np.ndarray

    def __repr__(self) -> str:
        kind = "a video" if self.image.ndim == 4 else "an image"
        return f"{kind} of {' x '.join(map(str, self.image.shape))}, mean {self.image.mean():.1f}"


def score_images(
    functions: Sequence[ImageReward],
    image_NHWC: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Metadata] | None = None,
    *,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> tuple[RewardResult, dict[str, dict[str, np.ndarray]]]:
    """Reward every image; a failure stops the run, or is counted, but is never a number.

        reward_i = sum of w_f r_fi over the functions f

    The same search for failing rows, timeout, retries and share of allowed failures as for texts:
    `rollouts.rewards.contract.score`. Several rewards have several scales; normalise each and add
    *advantages* where that matters, from `per_function` of the result.

    Args:
        functions: image rewards; their names are their keys in the result.
        image_NHWC: (N, H, W, C) uint8 with 1 or 3 channels, or videos (N, F, H, W, C).
        prompts: N strings.
        metadata: N dicts of the rows' other columns; None gives each an empty one.
        weights: one per function; None weights each 1. A function of weight 0 is only reported.
        **settings: `timeout`, `max_failed_share`, `retries` and `retry_wait` of `score`.

    Returns:
        The rewards, and function name -> detail name -> (N,) array. A detail of rows that failed is
        NaN; one that was not given in every call is left out.

    Raises:
        RewardError: too many rows failed; names the first failing prompt, the function and reason.
            Or a function returned something else than N numbers or None.
        ValueError: images, prompts and metadata that do not fit together.
    """
    check_images(image_NHWC, videos=True)
    metadata = [{}] * len(prompts) if metadata is None else metadata
    if not len(image_NHWC) == len(prompts) == len(metadata):
        raise ValueError(
            f"images, prompts and metadata must be equally many, got {len(image_NHWC)}, "
            f"{len(prompts)} and {len(metadata)}"
        )
    details: dict[str, dict[str, np.ndarray]] = {}
    rows = [
        Prompt(key=repr(text), prompt=text, token_ids=(), columns={"metadata": row, "row": i})
        for i, (text, row) in enumerate(zip(prompts, metadata, strict=True))
    ]
    result = score(
        [_as_text_reward(function, len(rows), details) for function in functions],
        rows,
        [_Shown(image=image) for image in image_NHWC],  # type: ignore[misc]
        [()] * len(rows),
        weights=weights,
        **settings,
    )
    return result, details


def _as_text_reward(
    function: ImageReward, num_rows: int, details: dict[str, dict[str, np.ndarray]]
) -> Callable[..., Any]:
    """The image reward with the arguments that `rollouts.rewards.contract.score` gives."""
    name = getattr(function, "__name__", type(function).__name__)

    def reward(
        prompts: list[str],
        completions: list[_Shown],
        metadata: list[Metadata],
        row: list[int],
        **_: Any,
    ) -> list[float | None]:
        given = function(np.stack([shown.image for shown in completions]), prompts, metadata)
        if inspect.isawaitable(given):
            given = asyncio.run(_awaited(given))
        has_details = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)
        rewards, found = given if has_details else (given, {})
        values = _values(rewards, name, len(prompts))
        for key, value in found.items():
            value = np.asarray(value)
            if value.shape != (len(prompts),):
                raise RewardError(
                    f"image reward {name} returned a detail {key!r} of shape {value.shape} for "
                    f"{len(prompts)} images; expected one number per image"
                )
            column = details.setdefault(name, {}).setdefault(key, np.full(num_rows, np.nan))
            column[row] = value
        return values

    reward.__name__ = name
    for mark in ("remote", "isolated", "untimed"):  # details of an isolated one are lost
        setattr(reward, mark, is_marked(function, mark))
    return reward


def _values(rewards: Any, name: str, num_rows: int) -> list[float | None]:
    """One number or None per row, of what an image reward returned."""
    reward_N = np.asarray(rewards.detach().cpu() if isinstance(rewards, torch.Tensor) else rewards)
    known = [value is not None for value in reward_N.flat]
    plain = reward_N.dtype.kind in "fiub"
    if reward_N.dtype == object and reward_N.shape == (num_rows,) and not all(known):
        plain = np.asarray([0.0, *(v for v in reward_N if v is not None)]).dtype.kind in "fiub"
    if reward_N.shape != (num_rows,) or not plain:
        raise RewardError(
            f"image reward {name} returned an array of shape {reward_N.shape} and type "
            f"{reward_N.dtype} for {num_rows} images; expected one number per image, or None"
        )
    return [None if value is None else float(value) for value in reward_N.tolist()]


async def _awaited(given: Any) -> Any:
    return await given


# Images as numbers.


def check_images(image_NHWC: np.ndarray, *, videos: bool = False) -> None:
    """Raise ValueError unless these are uint8 images (N, H, W, C) of 1 or 3 channels.

    With `videos` they may be (N, F, H, W, C) as well.
    """
    kind = f"{getattr(image_NHWC, 'shape', None)} {getattr(image_NHWC, 'dtype', type(image_NHWC))}"
    if not isinstance(image_NHWC, np.ndarray) or image_NHWC.dtype != np.uint8:
        raise ValueError(f"images must be a NumPy array of uint8, got {kind}")
    num_axes = (4, 5) if videos else (4,)
    if image_NHWC.ndim not in num_axes or image_NHWC.shape[-1] not in (1, 3):
        or_videos = ", or videos (N, F, H, W, C)," if videos else ""
        raise ValueError(f"images must be (N, H, W, C){or_videos} with C 1 or 3, got {kind}")
    if 0 in image_NHWC.shape[1:]:
        raise ValueError(f"images must be (N, H, W, C) and not empty, got {kind}")


def _unit(image_NHWC: np.ndarray) -> np.ndarray:
    check_images(image_NHWC)
    return image_NHWC.astype(np.float64) / 255


def _grey(image_NHWC: np.ndarray) -> np.ndarray:
    """(N, H, W) in [0, 1]: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), or the one channel."""
    unit = _unit(image_NHWC)
    return unit[..., 0] if unit.shape[3] == 1 else unit @ np.array([0.299, 0.587, 0.114])


def _rgb(image_NHWC: np.ndarray, name: str) -> np.ndarray:
    unit = _unit(image_NHWC)
    if unit.shape[3] != 3:
        raise ValueError(f"{name} needs images of 3 channels, got {unit.shape[3]}")
    return unit


def _jpeg_bytes(image_HWC: np.ndarray) -> int:
    check_images(image_HWC[None])
    buffer = io.BytesIO()
    picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)
    picture.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
