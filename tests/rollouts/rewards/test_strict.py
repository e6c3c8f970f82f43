"""Rewards of strict formats, and their verdicts, by hand and by brute force."""

import itertools
import json

import numpy as np
import pytest

from rollouts import check_verdicts
from rollouts.rewards.strict import countdown, valid_json

GAME = {"numbers": [3, 5, 5], "target": 20}


def plays(*texts):
    return countdown(texts, [GAME["numbers"]] * len(texts), [GAME["target"]] * len(texts))


def test_countdown_by_hand():
    right = [
        "5*5-3-2+2",
        "5 * (5 - 3) + 10",
        "(5*5) - 5",
        "3*5+5",
        " 5+5*3 ",
        "(3)*5+ 05",
        "--5+3*5",
    ]
    assert plays(*right) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    wrong = [
        "",
        "20",
        "3*5",
        "3*5+5+5",
        "35-5",
        "3*5+5=20",
        "3**5",
        "5//5+3",
        "3*(5+5",
        "3 5 5",
        "5/0",
    ]
    assert plays(*wrong) == [0.0] * len(wrong)
    assert countdown(["1/3*9"], [[1, 3, 9]], [3]) == [1.0]  # exact, not in floats
    assert countdown(["1"], [None], [3]) == countdown(["1"], [[1]], [None]) == [None]
    assert plays("(" * 300 + "5" + ")" * 300) == [0.0]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("", None),
        ("3*5", None),
        ("3*3", 0.0),  # used twice
        ("3*5+5*5", 0.0),
        ("4", 0.0),  # not given
        ("3*5+5 ", None),
        ("3*5+51", 0.0),
        ("0", None),
        ("x", 0.0),
        ("3*5+5=", 0.0),
        (" " * 500, None),
        ("(" * 401, 0.0),
    ],
)
def test_countdown_decides_at_the_first_number_that_cannot_be(text, verdict):
    assert countdown.decided("p", text, **GAME) == verdict


def test_a_number_that_may_grow_is_open():
    assert countdown.decided("p", "1", numbers=[12, 3], target=4) is None
    assert countdown.decided("p", "1+", numbers=[12, 3], target=4) == 0.0
    assert countdown.decided("p", "12", numbers=[12, 3], target=4) is None
    assert countdown.decided("p", "12/1", numbers=[12, 3], target=4) == 0.0


def test_verdicts_of_countdown_are_right_at_every_cut_of_all_short_texts():
    # All texts of up to four of these signs: 1555.
    texts = ["".join(text) for n in range(5) for text in itertools.product("35+( 0", repeat=n)]
    columns = {"numbers": [[3, 5]] * len(texts), "target": [8] * len(texts)}
    assert sum(countdown(texts, **columns)) >= 4
    for text, reward in zip(texts, countdown(texts, **columns), strict=True):
        assert countdown.decided("p", text, [3, 5], 8) in (None, reward)
        if reward:  # no beginning of a right answer is given up
            cuts = (text[:end] for end in range(len(text)))
            assert all(countdown.decided("p", cut, [3, 5], 8) is None for cut in cuts)


def values(generator, depth=0):
    kind = generator.integers(7 if depth < 3 else 5)
    if kind < 5:
        plain = [None, True, -1.5e-7, 12, 'a"\\é\n']
        return plain[kind]
    some = [values(generator, depth + 1) for _ in range(generator.integers(4))]
    return some if kind == 5 else {f"k{i}": value for i, value in enumerate(some)}


def test_no_beginning_of_valid_json_is_given_up():
    generator = np.random.default_rng(0)
    for number in range(25):
        text = json.dumps(values(generator), indent=number % 3 or None, ensure_ascii=number % 2 > 0)
        assert valid_json([text]) == [1.0]
        check_verdicts(valid_json, ["p"], [text])
        broken = text[: generator.integers(len(text) + 1)] + "]" + text
        check_verdicts(valid_json, ["p"], [broken])


def test_verdicts_on_json_are_right_at_every_cut_of_all_short_texts():
    good = 0
    for length in range(1, 6):
        for text in map("".join, itertools.product('[]1.-"', repeat=length)):
            (reward,) = valid_json([text])
            good += reward
            assert valid_json.decided("p", text) in (None, reward)
            if reward:
                cuts = (text[:end] for end in range(length))
                assert all(valid_json.decided("p", cut) is None for cut in cuts)
    assert good > 50


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"a" 5', 0.0),
        ('{"a": 5 6', 0.0),
        ("{5", 0.0),
        ("Sure", 0.0),
        ("true false", 0.0),
        ("tru", None),
        ("-", None),
        ("1.", None),
        ('"a', None),
        ('[1, "b"', None),
    ],
)
def test_json_is_lost_where_nothing_can_mend_it(text, verdict):
    assert valid_json.decided("p", text) == verdict
