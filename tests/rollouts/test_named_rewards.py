"""Rewards by name: those with arguments, classes in files, and texts of any length."""

import time

import pytest

from rollouts.rewards.text import (
    BUILT_IN,
    load_reward,
    math_verify,
    reasoning_gym,
    soft_overlong,
)


def test_soft_overlong_by_hand():
    # max 10, cache 4: free up to 6, then -1/4 per token up to 10, then -1.
    penalty = soft_overlong(10, 4)
    lengths = [0, 6, 7, 8, 10, 11, 50]
    assert penalty([[1] * n for n in lengths]) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("cache", [0, 1, 7, 20])
def test_soft_overlong_is_trls(cache):
    rewards = pytest.importorskip("trl.rewards")
    lengths = [[1] * n for n in range(30)]
    assert soft_overlong(20, cache)(lengths) == rewards.get_soft_overlong_punishment(20, cache)(
        lengths
    )


def test_a_name_may_have_arguments():
    for spec in (
        "soft_overlong(10, 4)",
        " soft_overlong( max_completion_len=10, soft_punish_cache = 4 )",
        "soft_overlong(10, soft_punish_cache=4)",
    ):
        penalty = load_reward(spec)
        assert penalty.__name__ == "soft_overlong"
        assert penalty(completion_ids=[[1] * 8]) == [-0.5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "soft_overlong",
            r"must be written soft_overlong\(max_completion_len=..., soft_punish_cache=",
        ),
        ("soft_overlong(10)", "must be written .* missing a required argument"),
        ("soft_overlong(10, four)", "must be written"),
        ("soft_overlong(10, 4", "must be written"),
        ("soft_overlong(4, 10)", "0 <= soft_punish_cache <= max_completion_len, got max"),
        ("soft_overlong(10, 4.5)", "needs whole numbers"),
        ("soft_overlon(1, 2)", r"nearest: 'soft_overlong'"),
        ("__import__('os').getcwd()", "no reward function"),
    ],
)
def test_wrong_arguments_are_answered_with_the_right_form(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_a_class_in_a_file_becomes_an_object_if_it_needs_nothing(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "class Judge:\n"
        "    def __init__(self, level=2.0):\n"
        "        self.level = level\n"
        "    def __call__(self, completions, **columns):\n"
        "        return [self.level] * len(completions)\n"
        "class Needs(Judge):\n"
        "    def __init__(self, level):\n"
        "        self.level = level\n"
        "class Silent:\n"
        "    pass\n"
        "judge = Needs(3.0)\n"
    )
    assert load_reward(f"{path}:Judge")(completions=["x"]) == [2.0]
    assert load_reward(f"{path}:judge")(completions=["x"]) == [3.0]
    with pytest.raises(
        ValueError, match=r"Needs is a class whose objects need arguments .*'level'.*"
    ):
        load_reward(f"{path}:Needs")
    with pytest.raises(ValueError, match="not a function"):
        load_reward(f"{path}:Silent")


def test_a_file_that_ends_the_program_is_an_error(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import sys\ndef f(**_):\n    return []\nsys.exit()\n")
    with pytest.raises(ValueError, match=r"script.py ends the program \(SystemExit"):
        load_reward(f"{path}:f")


HOSTILE = (
    *(
        "\\boxed{",
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "9",
        " ",
        "{",
        "}",
        "#### ",
        "Answer:",
    ),
    *(
        "$",
        "\\frac{1}{",
        "a ",
        "\n",
        "(",
        "\\boxed{1}",
        "\\(",
        "1+",
        "1,",
        "^{",
        "\\begin{",
        "\\text{",
    ),
    *("1e", "the answer is ", "%", "\\sqrt", "-", "|", "boxed"),
)


@pytest.mark.parametrize("piece", HOSTILE)
def test_built_in_rewards_are_quick_for_texts_that_never_end(piece):
    text = (piece * 200_000)[:200_000]
    for name in ("exact_match", "f1", "format_answer"):
        started = time.process_time()
        BUILT_IN[name](completions=[text], answer=["5"])
        # Linear in the length: 0.1 s would be 500 ns a character. Quadratic would be minutes.
        assert time.process_time() - started < 5.0, name


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["\\(", "\\boxed{", "1+", "$", "{"])
def test_long_texts_are_no_burden_to_the_mathematics(piece):
    pytest.importorskip("math_verify")
    text = (piece * 200_000)[:200_000]
    right = text + " so the answer is \\boxed{5}" + " bye" * 10_000
    # A comparison of more than five seconds would be NaN.
    assert math_verify([text, right, text + " #### 5"], answer=["5"] * 3)[1:] == [1.0, 1.0]
    assert math_verify([text], answer=["7"]) == [0.0]


def test_an_answer_that_a_verifier_cannot_read_is_wrong_and_an_entry_it_cannot_read_fails():
    library = pytest.importorskip("reasoning_gym")
    entry = library.create_dataset("prime_factorization", size=1, seed=0)[0]
    texts = ["no idea", "9" * 5000, str(entry["answer"])]
    assert reasoning_gym(texts, ["prime_factorization"] * 3, [entry] * 3) == [0.0, 0.0, 1.0]
    with pytest.raises(KeyError):
        reasoning_gym(["no idea"], ["prime_factorization"], [{"metadata": {}}])
