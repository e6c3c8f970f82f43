"""Image rewards without weights: by hand, against definitions, what a prompt asks for, scoring."""

import asyncio
import io
import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rollouts.rewards import image as image_rewards
from rollouts.rewards import image_shapes
from rollouts.rewards.contract import RewardError
from rollouts.rewards.image import IMAGE_REWARDS, load_image_reward, score_images
from rollouts.rewards.image_shapes import (
    foreground,
    mean_pairwise_distance,
    named_colour,
    within_radius,
)

PROMPT_OF = {
    "colour_target": "a red ball",
    "colour_share": "a red ball",
    "shape": "a ring",
    "shape_match": "a ring",
    "relation": "a red ball left of a blue cube",
    "count": "two balls",
    "region": "a ball on the left",
}
"""A prompt that each prompt-conditional reward understands."""


def reward(name, image_NHWC, prompts=None, metadata=None):
    """The rewards alone, details left out."""
    prompts = prompts or [PROMPT_OF.get(name, "anything")] * len(image_NHWC)
    given = IMAGE_REWARDS[name](image_NHWC, prompts, metadata or [{}] * len(image_NHWC))
    return given[0] if isinstance(given, tuple) else given


def noise(number=6, height=12, width=10, channels=3, seed=0):
    shape = (number, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(colour, height=8, width=8):
    return np.broadcast_to(np.array(colour, np.uint8), (1, height, width, len(colour))).copy()


def grey(rows):
    return np.array(rows, np.uint8)[None, :, :, None]


def picture(*blobs, size=32, ground=(0, 0, 0)):
    """One image with rectangles: (colour, top, left, height, width)."""
    image = flat(ground, size, size)
    for colour, top, left, height, width in blobs:
        image[0, top : top + height, left : left + width] = colour
    return image


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


# Every reward


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_every_reward_is_float64_finite_deterministic_and_leaves_the_image_alone(name):
    image = noise()
    before = image.copy()
    first = reward(name, image)
    assert first.dtype == np.float64 and first.shape == (6,) and np.isfinite(first).all()
    np.testing.assert_array_equal(first, reward(name, image))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_no_row_depends_on_the_others(name):
    image = np.concatenate([noise(4, 32, 32), picture((RED, 4, 4, 9, 9), (BLUE, 4, 20, 9, 9))])
    together = reward(name, image)
    alone = np.concatenate([reward(name, image[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, together, atol=1e-15, rtol=1e-14)
    order = np.array([3, 0, 4, 2, 1])
    np.testing.assert_allclose(reward(name, image[order]), together[order], atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_no_images_give_no_rewards(name):
    assert reward(name, noise(0)).shape == (0,)


@pytest.mark.parametrize("name", sorted(IMAGE_REWARDS.keys() - {"saturation", "colourfulness"}))
def test_grey_images_of_one_channel_are_judged_or_refused_by_name(name):
    if name in ("colour_target", "colour_share", "relation"):
        with pytest.raises(ValueError, match=f"{name} needs images of 3 channels, got 1"):
            reward(name, noise(channels=1))
    else:
        assert np.isfinite(reward(name, noise(channels=1))).all()


@pytest.mark.parametrize("name", IMAGE_REWARDS)
def test_every_reward_refuses_images_that_are_not_uint8(name):
    with pytest.raises(ValueError, match="array of uint8"):
        score_images([IMAGE_REWARDS[name]], noise().astype(np.float32), ["a"] * 6)


# Sizes


def test_jpeg_size_is_what_pillow_writes_at_quality_95_in_kilobytes():
    image = noise(1, 64, 64)
    buffer = io.BytesIO()
    Image.fromarray(image[0]).save(buffer, "JPEG", quality=95)
    assert reward("jpeg_incompressibility", image).tolist() == [len(buffer.getvalue()) / 1000]
    assert reward("jpeg_compressibility", image).tolist() == [-len(buffer.getvalue()) / 1000]


@pytest.mark.parametrize("name", ["jpeg_incompressibility", "zlib_size", "grey_entropy"])
def test_noise_is_larger_than_flatness(name):
    assert reward(name, noise(1, 64, 64)) > reward(name, flat((90, 90, 90), 64, 64)) + 0.5


def test_zlib_size_by_the_definition():
    image = noise(1, 8, 8, 1)
    assert reward("zlib_size", image)[0] == len(zlib.compress(bytes(image.ravel()), 9)) / 64
    waves = (127 + 120 * np.sin(np.arange(4096) / 37)).astype(np.uint8).reshape(1, 64, 64, 1)
    least, most = (len(zlib.compress(bytes(waves.ravel()), level)) / 4096 for level in (9, 1))
    assert reward("zlib_size", waves)[0] == least < most
    # 64 zeros: two bytes of header, four of checksum, a few of data.
    assert 6 / 64 < reward("zlib_size", flat((0,)))[0] < 16 / 64


def test_grey_entropy_by_hand():
    # Levels 0, 0, 10, 20: 1/2 * 1 bit + 2 * 1/4 * 2 bits = 1.5 bits.
    assert reward("grey_entropy", grey([[0, 0], [10, 20]]))[0] == pytest.approx(1.5, abs=1e-15)
    assert reward("grey_entropy", flat((7,)))[0] == 0 and not np.signbit(
        reward("grey_entropy", flat((7,)))[0]
    )
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert reward("grey_entropy", every)[0] == pytest.approx(8, abs=1e-12)


# Moments


def test_brightness_and_contrast_by_hand():
    half = grey([[0, 255], [255, 0]])
    assert reward("brightness", half)[0] == 0.5
    assert reward("contrast", half)[0] == 1.0
    assert reward("contrast", flat((200,)))[0] == pytest.approx(0, abs=1e-15)
    # 0.299 R + 0.587 G + 0.114 B
    colours = np.concatenate([flat(RED), flat((0, 255, 0)), flat(BLUE), flat(WHITE)])
    np.testing.assert_allclose(reward("brightness", colours), [0.299, 0.587, 0.114, 1], atol=1e-15)


def test_saturation_by_hand():
    # (max - min) / max: red 1; (200, 100, 150): 100/200; grey and black 0.
    images = np.concatenate([flat(RED), flat((200, 100, 150)), flat((9, 9, 9)), flat((0, 0, 0))])
    np.testing.assert_allclose(reward("saturation", images), [1, 0.5, 0, 0], atol=1e-15)


def test_saturation_is_that_of_the_standard_library():
    import colorsys

    image = noise(2)
    expected = [
        np.mean([colorsys.rgb_to_hsv(*(p / 255))[1] for p in one.reshape(-1, 3)]) for one in image
    ]
    np.testing.assert_allclose(reward("saturation", image), expected, atol=1e-12)


def test_colourfulness_by_hand():
    # Flat red: rg = 1, yb = 1/2, no spread: 0.3 sqrt(1 + 1/4).
    assert reward("colourfulness", flat(RED))[0] == pytest.approx(0.3 * 1.25**0.5, abs=1e-15)
    # Half red, half blue: rg 1, 0 (variance 1/4, mean 1/2); yb 1/2, -1 (variance 9/16, mean -1/4).
    image = flat(RED, 2, 2)
    image[0, :, 1] = BLUE
    expected = (1 / 4 + 9 / 16) ** 0.5 + 0.3 * (1 / 4 + 1 / 16) ** 0.5
    assert reward("colourfulness", image)[0] == pytest.approx(expected, abs=1e-15)
    assert reward("colourfulness", flat((80, 80, 80)))[0] == 0


def test_symmetry_by_hand():
    # Left 0, right 255: every pixel differs by 1 from its mirror. A middle column mirrors itself.
    assert reward("symmetry", grey([[0, 255], [0, 255]]))[0] == -1
    assert reward("symmetry", grey([[0, 7, 255], [0, 9, 255]]))[0] == pytest.approx(-2 / 3)
    assert reward("symmetry", grey([[3, 7, 3], [9, 1, 9]]))[0] == 0
    assert reward("symmetry", grey([[0, 0], [255, 255]]))[0] == 0  # upside down does not count


def test_sharpness_by_a_slow_loop_and_by_hand():
    image = noise(1, 7, 6, 1)
    x = image[0, :, :, 0] / 255
    laplacian = [
        x[h - 1, w] + x[h + 1, w] + x[h, w - 1] + x[h, w + 1] - 4 * x[h, w]
        for h in range(1, 6)
        for w in range(1, 5)
    ]
    assert reward("sharpness", image)[0] == pytest.approx(np.var(laplacian), abs=1e-12)
    # Inner pixels of a chessboard: -4 and 4 in turn, so variance 16.
    board = (np.indices((6, 6)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert reward("sharpness", board[None, :, :, None])[0] == pytest.approx(16)
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1))
    assert reward("sharpness", ramp[None, :, :, None])[0] == pytest.approx(0, abs=1e-20)
    with pytest.raises(ValueError, match=r"3 x 3 pixels or more, got \(2, 9\)"):
        reward("sharpness", noise(1, 2, 9))


def test_sharpness_falls_under_blur():
    image = noise(1, 32, 32, 1)
    blurred = np.asarray(Image.fromarray(image[0, ..., 0]).resize((8, 8)).resize((32, 32)))
    assert reward("sharpness", blurred[None, ..., None]) < reward("sharpness", image) / 10


# Colour


def test_colour_target_by_hand():
    # Blue where red is asked: (1 + 0 + 1) / 3. Half red, half black: (1/2 + 0 + 0) / 3.
    assert reward("colour_target", flat(BLUE))[0] == pytest.approx(-2 / 3, abs=1e-15)
    assert reward("colour_target", flat(RED))[0] == 0
    half = picture((RED, 0, 0, 32, 16))
    assert reward("colour_target", half)[0] == pytest.approx(-1 / 6, abs=1e-15)


def test_colour_target_reads_each_rows_own_prompt_or_column():
    images = np.concatenate([flat(RED)] * 4)
    prompts = ["a Red ball", "a blue ball", "x", "a blue ball"]
    metadata = [{}, {}, {"colour": "red"}, {"colour": [255, 0, 51]}]
    expected = [0, -2 / 3, 0, -0.2 / 3]
    np.testing.assert_allclose(
        reward("colour_target", images, prompts, metadata), expected, atol=1e-15
    )


def test_colour_share_by_hand():
    # A quarter red; dark red (150, 0, 0) is nearer to brown (165, 42, 42) than to red.
    image = picture((RED, 0, 0, 16, 16), ((150, 0, 0), 16, 0, 16, 16))
    prompts = ["red", "brown", "black", "green"]
    shares = reward("colour_share", np.concatenate([image] * 4), prompts)
    assert shares.tolist() == [0.25, 0.25, 0.5, 0]
    with pytest.raises(ValueError, match=r"colour_share needs one of .*, got \(1, 2, 3\)"):
        reward("colour_share", image, ["x"], [{"colour": (1, 2, 3)}])


def test_colour_words_are_whole_words_and_exactly_one():
    assert named_colour("a GREY mouse, grey all over", {}) == (128, 128, 128)
    with pytest.raises(ValueError, match="'the bored painter' names no colour: write exactly one"):
        named_colour("the bored painter", {})
    with pytest.raises(ValueError, match="names more than one colour"):
        named_colour("red and blue", {})
    with pytest.raises(ValueError, match="unknown colour 'mauve' in metadata"):
        named_colour("red", {"colour": "mauve"})
    for wrong in ([1, 2, 300], [1, 2], [-1, 2, 3]):
        with pytest.raises(ValueError, match=r"three numbers in \[0, 255\], got \[-?1, 2"):
            named_colour("red", {"colour": wrong})


# What is where


def test_the_foreground_is_what_differs_from_the_border():
    for ground, blob in [((0, 0, 0), WHITE), (WHITE, (0, 0, 0)), (RED, BLUE)]:
        mask = foreground(picture((blob, 3, 5, 2, 4), size=12, ground=ground)[0])
        assert mask.sum() == 8 and mask[3:5, 5:9].all()
    # 63 levels are not enough, 64 are, in one channel.
    image = picture(((100, 163, 100), 2, 2, 1, 1), ((100, 100, 36), 5, 5, 1, 1), ground=(100,) * 3)
    assert foreground(image[0]).nonzero() == (np.array([5]), np.array([5]))


def drawn(kind, size=64, radius=20.0, centre=(31.5, 31.5)):
    y, x = np.indices((size, size))
    down, right = np.abs(y - centre[1]), np.abs(x - centre[0])
    distance = np.hypot(down, right)
    mask = {
        "disc": distance <= radius,
        "square": np.maximum(down, right) <= radius,
        "ring": (distance <= radius) & (distance >= radius / 2),
    }[kind]
    return np.where(mask, 255, 0).astype(np.uint8)[None, :, :, None]


@pytest.mark.parametrize("kind", ["disc", "square", "ring"])
@pytest.mark.parametrize(("radius", "centre"), [(20.0, (31.5, 31.5)), (12.0, (20.0, 40.0))])
def test_a_drawn_shape_is_recognised_wherever_and_however_large_it_is(kind, radius, centre):
    image = drawn(kind, radius=radius, centre=centre)
    fit = {asked: reward("shape", image, [f"a {asked}"])[0] for asked in ("disc", "square", "ring")}
    assert fit[kind] > 0.93 and max(fit, key=fit.get) == kind
    assert [reward("shape_match", image, [f"a {asked}"])[0] for asked in fit] == [
        float(asked == kind) for asked in fit
    ]


def test_overlap_of_a_square_with_a_disc_is_the_one_of_geometry():
    # Disc of radius 1 and square of the same area, side 2b = sqrt(pi): the four circular segments
    # beyond the sides are acos(b) - b sqrt(1 - b^2) each.
    b = math.pi**0.5 / 2
    outside = 4 * (math.acos(b) - b * (1 - b * b) ** 0.5)
    expected = (math.pi - outside) / (math.pi + outside)
    image = drawn("square", size=512, radius=150.0, centre=(255.5, 255.5))
    assert reward("shape", image, ["a circle"])[0] == pytest.approx(expected, abs=0.005)


def test_shape_of_nothing_is_zero_and_fits_nothing():
    reward_N, details = image_shapes.shape(flat((0,)), ["a disc"], [{}])
    assert reward_N.tolist() == [0] and details["best"].tolist() == [-1]
    assert reward("shape_match", flat((0,)), ["a disc"]).tolist() == [0]


def test_shape_match_asks_for_a_good_fit():
    # One of the three fits a long bar best, but badly.
    bar = picture((WHITE, 14, 2, 3, 28))
    prompts = ["a disc", "a square", "a ring"]
    _, details = image_shapes.shape(bar, ["a disc"], [{}])
    assert details["best"][0] in (0, 1, 2)
    assert reward("shape", np.concatenate([bar] * 3), prompts).max() < 0.5
    assert reward("shape_match", np.concatenate([bar] * 3), prompts).tolist() == [0, 0, 0]


def test_relation_by_hand():
    left = picture((RED, 10, 2, 6, 6), (BLUE, 10, 20, 6, 6))
    above = picture((RED, 2, 10, 6, 6), (BLUE, 20, 10, 6, 6))
    alone = picture((RED, 2, 10, 6, 6))
    words = ["left of", "right of", "above", "below"]
    for image, expected in [(left, [1, 0, 0, 0]), (above, [0, 0, 1, 0]), (alone, [0, 0, 0, 0])]:
        prompts = [f"a red ball {word} a blue cube" for word in words]
        assert reward("relation", np.concatenate([image] * 4), prompts).tolist() == expected
        swapped = [f"a blue ball {word} a red cube" for word in words]
        turned = [expected[i] for i in (1, 0, 3, 2)]
        assert reward("relation", np.concatenate([image] * 4), swapped).tolist() == turned


def test_relation_tolerates_64_levels_and_reads_the_column():
    row = {"relation": ("red", "left", "blue")}
    near = picture(((191, 64, 0), 10, 2, 6, 6), (BLUE, 10, 20, 6, 6))
    far = picture(((190, 64, 0), 10, 2, 6, 6), (BLUE, 10, 20, 6, 6))
    assert reward("relation", np.concatenate([near, far]), ["x", "x"], [row, row]).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("prompt", "row", "message"),
    [
        ("a red ball left of a cube", {}, "must name two of"),
        ("a red ball near a blue cube", {}, r"found \['red', 'blue'\] and \[\]"),
        ("red left of blue above", {}, r"\['left', 'above'\]"),
        ("x", {"relation": ("red", "beside", "blue")}, r"got \('red', 'beside', 'blue'\)"),
        ("x", {"relation": ("red", "left", "mauve")}, "relation must be"),
    ],
)
def test_a_relation_that_cannot_be_read_is_refused(prompt, row, message):
    with pytest.raises(ValueError, match=message):
        reward("relation", flat(RED), [prompt], [row])


def test_count_by_hand():
    # Two squares touching at a corner are one part; the third stands apart.
    image = picture((WHITE, 2, 2, 4, 4), (WHITE, 6, 6, 4, 4), (WHITE, 20, 20, 4, 4))
    reward_N, details = image_shapes.count(
        np.concatenate([image] * 4),
        ["two balls", "3 balls", "2 balls", "x"],
        [{}, {}, {}, {"count": 2}],
    )
    assert reward_N.tolist() == [1, 0, 1, 1] and details["found"].tolist() == [2] * 4
    assert reward("count", flat((0,)), ["zero balls"]).tolist() == [1]
    with pytest.raises(ValueError, match="'many balls' names no count"):
        reward("count", image, ["many balls"])
    with pytest.raises(ValueError, match="unknown count 11 in metadata"):
        reward("count", image, ["x"], [{"count": 11}])


def test_region_by_hand():
    # A 4 x 4 blob at rows 14..17, columns 2..5 of 32: centre (4/32, 16/32).
    image = np.concatenate([picture((WHITE, 14, 2, 4, 4))] * 4)
    places = ["left", "right", "top", "centre"]
    assert reward("region", image, places).tolist() == [1, 0, 0, 0]
    exact = [{"region": (0.125, 0.5), "radius": 1e-9}, {"region": (0.125, 0.6), "radius": 0.099}]
    assert reward("region", image[:2], ["x", "x"], exact).tolist() == [1, 0]
    assert reward("region", flat((0,)), ["centre"]).tolist() == [0]
    with pytest.raises(ValueError, match="names no place"):
        reward("region", image[:1], ["x"])


def test_points_within_a_radius():
    point = np.array([[2.0, 0.1], [2.0, 0.11], [1.9, 0.0], [-2.0, 0.0]])
    assert within_radius(point, centre=(2, 0), radius=0.1001).tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"points \(4, 2\) and centre \(3,\) do not fit"):
        within_radius(point, centre=(0, 0, 0), radius=1)
    with pytest.raises(ValueError, match="finite and radius positive"):
        within_radius(point * np.nan, centre=(0, 0), radius=1)


# Diversity


def test_mean_pairwise_distance_against_a_loop():
    image = noise(5)
    x = image.reshape(5, -1) / 255
    pairs = itertools.combinations(range(5), 2)
    expected = np.mean([np.sqrt(np.mean((x[i] - x[j]) ** 2)) for i, j in pairs])
    assert mean_pairwise_distance(image) == pytest.approx(expected, abs=1e-12)
    assert mean_pairwise_distance(np.concatenate([flat((0,)), flat((255,))])) == 1
    assert mean_pairwise_distance(np.concatenate([image[:1]] * 3)) == 0
    with pytest.raises(ValueError, match="needs two images or more, got 1"):
        mean_pairwise_distance(image[:1])


# Loading and scoring


def test_a_setting_names_a_reward():
    assert load_image_reward("brightness") is image_rewards.brightness
    made = []
    more = {"mine": lambda: made.append(1) or image_rewards.contrast}
    assert load_image_reward("brightness", more=more) and not made
    assert load_image_reward("mine", more=more) is image_rewards.contrast
    with pytest.raises(ValueError, match=r"no image reward 'brightnes' \(nearest: 'brightness'\)"):
        load_image_reward("brightnes")
    with pytest.raises(ValueError, match="no image reward 'f1'"):  # one for texts
        load_image_reward("f1")
    with pytest.raises(ValueError, match=r"image rewards \['count'\] are already there"):
        load_image_reward("count", more={"count": lambda: None})


def test_a_setting_names_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def height(image, prompts, metadata):\n    return image.shape[1] + 0 * image[:, 0, 0, 0]\n"
    )
    assert load_image_reward(f"{path}:height")(noise(2), [], []).tolist() == [12, 12]
    with pytest.raises(ValueError, match=r"no function 'hight' \(nearest: 'height'\)"):
        load_image_reward(f"{path}:hight")


def test_scores_are_weighted_sums_with_details():
    image = np.concatenate([flat((0, 0, 0), 16, 16), picture((WHITE, 2, 2, 4, 4), size=16)])
    functions = [image_rewards.brightness, image_shapes.count]
    result, details = score_images(functions, image, ["one ball"] * 2, weights=[2.0, 10.0])
    # Brightness 0 and 16/256; no part and one part.
    assert result.reward_N.tolist() == pytest.approx([0.0, 2 / 16 + 10], abs=1e-14)
    assert result.per_function["brightness"] == pytest.approx([0, 1 / 16], abs=1e-15)
    assert result.per_function["count"] == [0.0, 1.0]
    assert details["count"]["found"].tolist() == [0, 1] and "brightness" not in details


def test_metadata_and_prompts_stay_with_their_rows():
    seen = []

    def spy(image_NHWC, prompts, metadata):
        seen.extend(zip(image_NHWC[:, 0, 0, 0].tolist(), prompts, metadata, strict=True))
        return np.zeros(len(prompts))

    image = np.concatenate([flat((level,)) for level in range(3)])
    score_images([spy], image, ["a", "b", "c"], [{"x": 0}, {"y": 1}, {}])
    assert seen == [(0, "a", {"x": 0}), (1, "b", {"y": 1}), (2, "c", {})]


def fails_on(level, value=None):
    def fragile(image_NHWC, prompts, metadata):
        reward_N = image_NHWC[:, 0, 0, 0].astype(np.float64)
        if value is None and (reward_N == level).any():
            raise RuntimeError("no face found")
        return np.where(reward_N == level, value or 0, reward_N), {"seen": reward_N}

    return fragile


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "raised RuntimeError: no face found"), (np.nan, "returned nan")]
)
def test_a_failure_names_its_prompt_and_never_becomes_a_number(value, reason):
    image = np.concatenate([flat((level,)) for level in range(5)])
    prompts = [f"prompt {i}" for i in range(5)]
    with pytest.raises(
        RewardError, match=rf"prompt 'prompt 3', reward function fragile: {reason}; .*8 x 8 x 1"
    ):
        score_images([fails_on(3, value)], image, prompts)
    result, details = score_images([fails_on(3, value)], image, prompts, max_failed_share=0.2)
    assert result.scored.tolist() == [True, True, True, False, True]
    assert result.reward_K.tolist() == [0, 1, 2, 4]
    assert details["fragile"]["seen"][[0, 1, 2, 4]].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros((2, 1)), r"an array of shape \(2, 1\) and type float64 for 2 images"),
        (np.zeros(3), r"shape \(3,\)"),
        (["a", "b"], "type <U1 for 2 images"),
        ([0.0, "b"], "type <U\\d+ for 2 images"),
        ([None, "b"], "type object for 2 images"),
        ((np.zeros(2), {"d": np.zeros(3)}), r"a detail 'd' of shape \(3,\) for 2 images"),
    ],
)
def test_anything_but_one_number_per_image_is_refused(returned, message):
    with pytest.raises(RewardError, match=message):
        score_images([lambda *_: returned], noise(2), ["a", "b"])


@pytest.mark.parametrize("returned", [[0.5, None], np.array([0.5, None]), (0.5, None)])
def test_a_reward_that_does_not_apply_to_a_row_gives_none(returned):
    """The row has what the others say, as with rewards of texts."""
    sometimes = lambda *_: returned  # noqa: E731
    result, _ = score_images([sometimes, image_rewards.contrast], noise(2), ["a", "b"])
    contrast_N = reward("contrast", noise(2))
    assert result.reward_N.tolist() == pytest.approx([0.5 + contrast_N[0], contrast_N[1]])
    assert result.per_function["<lambda>"] == [0.5, None]


def test_a_reward_may_be_a_tensor_or_async():
    def of_tensor(image_NHWC, prompts, metadata):
        return torch.tensor([0.25, 0.5], requires_grad=True)

    async def later(image_NHWC, prompts, metadata):
        await asyncio.sleep(0)
        return [1.0, None], {"seen": [3, 4]}

    result, details = score_images([of_tensor, later], noise(2), ["a", "b"])
    assert result.reward_N.tolist() == [1.25, 0.5]
    assert details["later"]["seen"].tolist() == [3, 4]


# Videos


def video(number=2, frames=5):
    return noise(number * frames).reshape(number, frames, 12, 10, 3)


def test_a_reward_of_ones_own_gets_whole_videos():
    def motion(video_NFHWC, prompts, metadata):
        assert video_NFHWC.shape == (2, 5, 12, 10, 3)
        return np.abs(np.diff(video_NFHWC.astype(float), axis=1)).mean(axis=(1, 2, 3, 4)) / 255

    result, _ = score_images([motion], video(), ["a", "b"])
    change = np.diff(video()[1].astype(float), axis=0)
    assert float(result.reward_N[1]) == pytest.approx(np.abs(change).mean() / 255)


@pytest.mark.parametrize("name", IMAGE_REWARDS)
@pytest.mark.parametrize(("frames", "middle"), [(5, 2), (4, 2), (1, 0)])
def test_a_built_in_reward_scores_the_middle_frame(name, frames, middle):
    clips = video(2, frames)
    np.testing.assert_array_equal(reward(name, clips), reward(name, clips[:, middle]))
    result, _ = score_images([IMAGE_REWARDS[name]], clips, [PROMPT_OF.get(name, "anything")] * 2)
    assert result.reward_N.tolist() == reward(name, clips[:, middle]).tolist()


def test_a_failing_video_is_called_one():
    def broken(*_):
        raise ValueError("no")

    with pytest.raises(RewardError, match="begins a video of 5 x 12 x 10 x 3"):
        score_images([broken], video(), ["a", "b"])
    with pytest.raises(ValueError, match=r"or videos \(N, F, H, W, C\), with C 1 or 3, got"):
        score_images([broken], video()[..., 0], ["a", "b"])


def test_misfitting_batches_are_refused():
    with pytest.raises(ValueError, match="must be equally many, got 2, 1 and 1"):
        score_images([image_rewards.brightness], noise(2), ["a"])
    with pytest.raises(ValueError, match="must be equally many, got 1, 1 and 2"):
        score_images([image_rewards.brightness], noise(1), ["a"], [{}, {}])
    with pytest.raises(ValueError, match=r"\(N, H, W, C\), .* with C 1 or 3, got \(2, 12, 10, 4\)"):
        score_images([image_rewards.brightness], noise(2, channels=4), ["a", "b"])
    with pytest.raises(ValueError, match=r"C 1 or 3, got \(12, 10, 3\) uint8"):
        score_images([image_rewards.brightness], noise(1)[0], ["a"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(3, 9), st.integers(3, 9), st.integers(0, 1000))
def test_ranges_hold(number, height, width, seed):
    image = noise(number, height, width, 3, seed)
    for name, low, high in [
        ("brightness", 0, 1),
        ("contrast", 0, 1),
        ("saturation", 0, 1),
        ("symmetry", -1, 0),
        ("sharpness", 0, 16),
        ("grey_entropy", 0, 8),
        ("colour_target", -1, 0),
        ("colour_share", 0, 1),
        ("shape", 0, 1),
    ]:
        assert ((reward(name, image) >= low) & (reward(name, image) <= high)).all(), name
