"""The prompt lists of the image recipes: their templates, articles, sizes and splits."""

import fnmatch
import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from recipes.data import load_rows
from rollouts.prompts import plain_prompts
from rollouts.rewards.image import load_image_reward
from rollouts.rewards.image_shapes import COLOURS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes/images/prompts"

VOWEL_SOUNDS = {
    *("alpaca", "anchor", "armadillo", "armchair", "easel", "elephant", "hourglass", "ibis"),
    *("igloo", "iguana", "octopus", "ostrich", "otter", "oven", "owl", "umbrella", "urn"),
}
"""Words that take `an`: by sound, so hourglass does and unicycle does not."""

TEMPLATES = {
    "animals": "{a:animal} {activity}",
    "colours": "{colour} {food}",
    "relations": "{a:subject} {predicate} {a:object}",
}
SIZES = {"animals": (45, 90), "colours": (40, 40), "relations": (40, 30)}


def rows(name):
    return load_rows(str(FOLDER / f"{name}.jsonl"))


def both(kind):
    return rows(kind), rows(f"{kind}_held_out")


def together(kind):
    train, held_out = both(kind)
    return train + held_out


def filled(template, row):
    def part(match):
        article, word = match.groups()
        if not article:
            return row[word]
        return ("an " if row[word] in VOWEL_SOUNDS else "a ") + row[word]

    return re.sub(r"\{(a:)?(\w+)\}", part, template)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_prompt_is_its_template_filled_with_its_columns(kind):
    for row in together(kind):
        assert row["prompt"] == filled(TEMPLATES[kind], row)
        assert set(row) == {"prompt", *re.findall(r"(\w+)\}", TEMPLATES[kind])}
        assert row["prompt"] == row["prompt"].strip().lower()


def test_articles_follow_the_sound_and_no_word_is_missing_from_the_list_above():
    # By letter the exceptions would be wrong, and a new word must be looked at.
    words = {row["animal"] for row in together("animals")}
    words |= {row[part] for row in together("relations") for part in ("subject", "object")}
    by_letter = {word for word in words if word[0] in "aeiou"}
    assert VOWEL_SOUNDS - by_letter == {"hourglass"}
    assert by_letter - VOWEL_SOUNDS == {"unicycle"}
    assert words >= VOWEL_SOUNDS


@pytest.mark.parametrize("kind", TEMPLATES)
def test_sizes_and_splits(kind):
    train, held_out = both(kind)
    assert (len(train), len(held_out)) == SIZES[kind]
    prompts = [row["prompt"] for row in train + held_out]
    assert len(set(prompts)) == len(prompts)


def test_animals_are_balanced_and_what_is_held_out_is_new():
    train, held_out = both("animals")
    assert Counter(row["activity"] for row in train) == Counter(
        dict.fromkeys(("painting a fence", "baking bread", "flying a kite"), 15)
    )
    assert set(Counter(row["animal"] for row in train).values()) == {3}
    animals, activities = ({row[part] for row in train} for part in ("animal", "activity"))
    new = Counter((row["animal"] in animals, row["activity"] in activities) for row in held_out)
    # (known animal, known activity): how often.
    assert new == {(True, False): 30, (False, True): 45, (False, False): 15}


def test_colours_are_balanced_on_both_sides_and_held_out_words_are_known():
    train, held_out = both("colours")
    for side in (train, held_out):
        assert set(Counter(row["colour"] for row in side).values()) == {5}
        assert set(Counter(row["food"] for row in side).values()) == {4}
        assert len({row["colour"] for row in side}) == 8
    pairs = {(row["colour"], row["food"]) for row in train + held_out}
    assert len(pairs) == 80


def test_colour_words_are_those_that_the_colour_reward_knows():
    train, held_out = both("colours")
    words = [row["colour"] for row in train + held_out]
    assert set(words) <= set(COLOURS)
    reward = load_image_reward("colour_target")
    image_NHWC = np.stack([np.full((4, 4, 3), COLOURS[word], np.uint8) for word in words])
    prompts = [row["prompt"] for row in train + held_out]
    by_column = reward(image_NHWC, prompts, train + held_out)
    np.testing.assert_allclose(by_column, 0, atol=1e-12)
    # The prompt alone names the same colour and no other.
    np.testing.assert_array_equal(reward(image_NHWC, prompts, [{}] * 80), by_column)


def test_relations_hold_out_predicates_of_known_pairs():
    train, held_out = both("relations")
    pair = lambda row: (row["subject"], row["object"])  # noqa: E731
    assert {pair(row) for row in held_out} == {pair(row) for row in train}
    predicates = {"left of", "right of", "above", "below", "behind"}
    for side in (train, held_out):
        count = Counter(row["predicate"] for row in side)
        assert set(count) == predicates and min(count.values()) >= 5
    assert min(Counter(map(pair, train)).values()) >= 2
    assert all(row["subject"] != row["object"] for row in train + held_out)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_rows_become_prompts_with_keys_of_their_own(kind):
    train, held_out = both(kind)
    prompts, _ = plain_prompts(train + held_out)
    assert len({prompt.key for prompt in prompts}) == len(train) + len(held_out)
    assert dict(prompts[0].columns) == {k: v for k, v in train[0].items() if k != "prompt"}


def test_lines_are_plain_json_with_one_row_each():
    for path in sorted(FOLDER.glob("*.jsonl")):
        text = path.read_text(encoding="ascii")
        assert text.endswith("}\n") and "\n\n" not in text
        assert all(json.dumps(json.loads(line)) == line for line in text.splitlines())


def test_the_package_takes_them_along():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["apportion_recipes"]
    names = [path.name for path in FOLDER.iterdir()]
    assert len(names) == 7
    for name in names:
        assert any(fnmatch.fnmatch(f"images/prompts/{name}", pattern) for pattern in patterns), name
