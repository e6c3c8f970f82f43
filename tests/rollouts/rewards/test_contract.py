"""Rewards: the contract, the search for failing rows, and the functions that come along."""

import functools
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from rollouts.prompts import Prompt
from rollouts.rewards import contract as rewards
from rollouts.rewards import text as reward_functions
from rollouts.rewards.contract import RewardError, check_columns, score
from rollouts.rewards.math_worker import MathWorker
from rollouts.rewards.text import (
    BUILT_IN,
    exact_answer,
    exact_match,
    f1,
    final_answer,
    format_answer,
    load_reward,
    math_verify,
    reasoning_gym,
)


def prompt(i, **columns):
    return Prompt(key=f"key{i}", prompt=f"question {i}", token_ids=(i,), columns=columns)


def run(functions, completions, **settings):
    """Score completions of as many prompts, with a column `answer` of a, b, c, ..."""
    prompts = [prompt(i, answer=chr(ord("a") + i % 26)) for i in range(len(completions))]
    functions = functions if isinstance(functions, list) else [functions]
    return score(functions, prompts, completions, [[1]] * len(completions), **settings)


def length(completions, **columns):
    """The number in the completion; raises on "bad", sleeps on "slow"."""
    for text in completions:
        if text == "bad":
            raise KeyError("no such thing")
        if text == "slow":
            time.sleep(30)
    return [float(text) if text else None for text in completions]


# What a reward function sees and may return


def test_a_function_gets_what_trl_gives_it():
    seen = {}

    def spy(**arguments):
        seen.update(arguments)
        return [1.0, 2.0]

    prompts = [prompt(0, answer="x", level=1), prompt(1, answer="y", completion="not passed")]
    score([spy], prompts, ["c0", "c1"], [[5, 6], [7]], shared={"trainer_state": "state"})
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["question 0", "question 1"],
        "completions": ["c0", "c1"],
        "completion_ids": [[5, 6], [7]],
        "answer": ["x", "y"],
        "level": [1, None],
        "trainer_state": "state",
    }


def test_completions_of_conversations_are_messages():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions)
        return [0.0]

    messages = [{"role": "user", "content": "Hi"}]
    asked = Prompt(key="k", prompt=messages, token_ids=(1,), columns={})
    score([spy], [asked], ["Ho"], [[1]])
    assert seen["prompts"] == [messages]
    assert seen["completions"] == [[{"role": "assistant", "content": "Ho"}]]


def test_a_function_of_trl_works_unchanged():
    # The example of TRL's documentation.
    def reward_func(completions, ground_truth, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth, strict=True)]

    asked = Prompt(
        key="k",
        prompt=[{"role": "user", "content": "2+3"}],
        token_ids=(1,),
        columns={"ground_truth": "5"},
    )
    assert score([reward_func], [asked] * 2, ["5", "6"], [[1], [2]]).reward_N.tolist() == [1, 0]


def test_weighted_sum_by_hand_with_none_left_out():
    def first(completions, **columns):
        return [1.0, None, 0.5]

    def second(completions, **columns):
        return [10.0, 20.0, None]

    result = run([first, second], ["x"] * 3, weights=[2.0, 0.1])
    # 2*1 + .1*10,  .1*20,  2*.5
    assert result.reward_N.tolist() == [3.0, 2.0, 1.0]
    assert result.reward_N.dtype == torch.float64
    assert result.per_function == {"first": [1.0, None, 0.5], "second": [10.0, 20.0, None]}
    assert result.scored.tolist() == [True] * 3
    assert result.failed == {}


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.0, True],
        (1.0, 0.0, 1.0),
        np.array([1.0, 0.0, 1.0], dtype=np.float32),
        torch.tensor([1, 0, 1]),
        [torch.tensor(1.0), np.float64(0), np.bool_(True)],
    ],
)
def test_numbers_of_any_kind_are_floats(values):
    result = run(lambda completions, **columns: values, ["x"] * 3)
    assert result.reward_N.tolist() == [1.0, 0.0, 1.0]
    assert all(type(v) is float for v in result.per_function["<lambda>"])


def test_a_function_is_called_once_for_the_whole_batch():
    calls = []

    def counted(completions, **columns):
        calls.append(len(completions))
        return [0.0] * len(completions)

    run(counted, ["x"] * 50)
    assert calls == [50]


def test_no_rows_give_an_empty_result_and_no_call():
    result = run(length, [])
    assert result.reward_N.shape == result.reward_K.shape == result.rows_K.shape == (0,)
    assert result.per_function == {"length": []}


def test_partials_and_objects_have_names():
    class Judge:
        def __call__(self, completions, **columns):
            return [1.0] * len(completions)

    result = run([functools.partial(length, extra=1), Judge()], ["1"])
    assert list(result.per_function) == ["length", "Judge"]


# Failures


def test_a_row_that_raises_stops_the_run_and_is_named():
    message = (
        r"prompt key5, reward function length: raised KeyError: 'no such thing'; "
        r"the completion begins 'bad'"
    )
    with pytest.raises(RewardError, match=message) as error:
        run(length, [*"01234", "bad", *"67", "bad", "9"])
    assert isinstance(error.value.__cause__, KeyError)


def test_failing_rows_stand_apart_within_the_allowed_share():
    result = run(length, [*"01234", "bad", *"67", "bad", "9"], max_failed_share=0.2)
    assert result.failed == dict.fromkeys((5, 8), "length: raised KeyError: 'no such thing'")
    assert result.scored.tolist() == [i not in (5, 8) for i in range(10)]
    assert result.rows_K.tolist() == [0, 1, 2, 3, 4, 6, 7, 9]
    assert result.reward_K.tolist() == [0, 1, 2, 3, 4, 6, 7, 9]
    assert result.per_function["length"] == [0, 1, 2, 3, 4, None, 6, 7, None, 9]


def test_one_failure_more_than_the_share_stops():
    with pytest.raises(RewardError, match=r"at least 2 of 10 .* max_failed_share=0.1"):
        run(length, [*"01234", "bad", *"67", "bad", "9"], max_failed_share=0.1)


def test_the_allowed_share_is_not_lost_to_rounding():
    # 0.29 * 100 is 28.999999999999996, and 29 failures are allowed all the same.
    result = run(length, ["bad"] * 29 + ["1"] * 71, max_failed_share=0.29)
    assert len(result.failed) == 29


def test_the_search_takes_few_calls():
    calls = []

    def counted(completions, **columns):
        calls.append(len(completions))
        return length(completions)

    run(counted, ["1"] * 700 + ["bad"] + ["1"] * 323, max_failed_share=0.01)
    # 1024, then two halves at each of ten levels.
    assert len(calls) == 1 + 2 * 10
    calls.clear()
    with pytest.raises(RewardError, match="key0"):
        run(counted, ["bad"] * 1024)
    # The way down to the first failure; the rest is not looked at.
    assert calls == [1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_fails_the_row(value):
    result = run(lambda completions, **_: [1.0, value], ["x", "y"], max_failed_share=0.5)
    assert result.failed == {1: f"<lambda>: returned {value}"}
    assert result.reward_K.tolist() == [1.0]
    assert result.per_function["<lambda>"] == [1.0, None]
    assert result.reward_N.isfinite().all()


def test_a_row_to_which_nothing_applies_has_no_reward_and_does_not_fail():
    result = run(length, ["1", ""], max_failed_share=0.0)
    assert result.failed == {}
    assert result.unrewarded == [1]
    assert result.scored.tolist() == [True, False]
    assert result.reward_K.tolist() == [1.0]


def test_a_function_without_weight_is_reported_and_does_not_count_as_a_reward():
    def other(completions, **columns):
        return [5.0, 5.0]

    result = run([length, other], ["1", ""], weights=[1.0, 0.0])
    assert result.reward_K.tolist() == [1.0]
    assert result.unrewarded == [1]
    assert result.per_function["other"] == [5.0, 5.0]


def test_a_row_keeps_its_first_reason():
    def other(completions, **columns):
        return [math.nan, 1.0]

    result = run([length, other], ["bad", "1"], max_failed_share=0.5)
    assert result.failed == {0: "length: raised KeyError: 'no such thing'"}


# Time


@pytest.mark.slow
def test_a_slow_row_is_found():
    began = time.monotonic()
    result = run(length, ["1"] * 5 + ["slow", "2", "3"], timeout=0.2, max_failed_share=0.2)
    assert result.failed == {5: "length: took longer than 0.2 s"}
    assert result.reward_K.tolist() == [1] * 5 + [2, 3]
    # (2 + log2 8) * 0.2 s, and some for a busy machine.
    assert time.monotonic() - began < 1.0 + 2.0


@pytest.mark.slow
def test_the_search_for_slow_rows_is_bounded_and_the_rest_fails():
    began = time.monotonic()
    result = run(length, ["slow"] * 8, timeout=0.1, max_failed_share=1.0)
    assert time.monotonic() - began < 0.5 + 2.0
    assert len(result.failed) == 8
    assert result.failed[0] == "length: took longer than 0.1 s"
    assert result.failed[7] == "length: not reached: the calls of this function took 0.5 s together"


def test_a_timeout_leaves_results_and_exceptions_as_they_are():
    result = run(length, ["1", "bad"], timeout=30.0, max_failed_share=0.5)
    assert result.reward_K.tolist() == [1.0]
    assert result.failed == {1: "length: raised KeyError: 'no such thing'"}


# Retries


def flaky(fails, *, remote):
    def judge(completions, **columns):
        judge.calls += 1
        if judge.calls <= fails:
            raise ConnectionError("busy")
        return [1.0] * len(completions)

    judge.calls = 0
    judge.remote = remote
    return judge


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_remote_function_is_retried(timeout):
    judge = flaky(2, remote=True)
    result = run(judge, ["x"] * 4, retries=2, retry_wait=0.001, timeout=timeout)
    assert result.reward_N.tolist() == [1.0] * 4
    assert judge.calls == 3


def test_retries_end():
    with pytest.raises(RewardError, match="raised ConnectionError: busy"):
        run(flaky(3, remote=True), ["x"], retries=2, retry_wait=0.001)


def test_a_local_function_is_not_retried():
    with pytest.raises(RewardError, match="raised ConnectionError: busy"):
        run(flaky(1, remote=False), ["x"], retries=5)


def test_the_wait_between_retries_doubles(monkeypatch):
    waits = []
    monkeypatch.setattr(rewards.time, "sleep", waits.append)
    run(flaky(3, remote=True), ["x"], retries=3, retry_wait=0.5)
    assert waits == [0.5, 1.0, 2.0]


# Functions that break the contract


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **_: [1.0], "returned 1 rewards for 2 completions; expected one per"),
        (lambda completions, **_: torch.zeros(3), "returned 3 rewards for 2 completions"),
        (lambda completions, **_: 1.0, "returned 1.0 of type float; expected a list of 2 numbers"),
        (lambda completions, **_: None, "returned None of type NoneType; expected a list of 2"),
        (lambda completions, **_: "ab", "returned 'ab' of type str; expected a list"),
        (lambda completions, **_: [1.0, "x"], "returned 'x' of type str for row 1; expected a num"),
        (lambda completions, **_: [[1.0], 1.0], r"returned \[1.0\] of type list for row 0"),
        (
            lambda completions, answers, **_: [1.0],
            r"<lambda> needs a column 'answers'; the data set has .*\(nearest: 'answer'\)",
        ),
        (lambda completions: [1.0], r"cannot take the arguments .* end its parameters with \*\*"),
    ],
)
def test_a_broken_contract_stops_whatever_share_may_fail(function, message):
    with pytest.raises(RewardError, match=message):
        run(function, ["x", "y"], max_failed_share=1.0)


def test_a_wrong_row_is_named_by_its_place_in_the_batch():
    def half(completions, **columns):
        if len(completions) > 1:
            raise KeyError
        return ["oops"] if completions == ["y"] else [1.0]

    with pytest.raises(RewardError, match="for row 1; expected a number or None"):
        run(half, ["x", "y"], max_failed_share=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": []}, "at least one reward function is needed"),
        ({"functions": [3]}, "a reward function must be callable, got 3"),
        ({"functions": [length, length]}, "two reward functions are called 'length'"),
        ({"completions": ["1"]}, "must be equally long, got 2, 1 and 2"),
        ({"weights": [1.0, 2.0]}, "weights has 2 entries for 1 reward functions"),
        ({"weights": [math.nan]}, r"weights must be finite, got \[nan\]"),
        ({"timeout": 0.0}, "timeout must be positive or None, got 0.0"),
        ({"max_failed_share": 1.5}, r"max_failed_share must lie in \[0, 1\], got 1.5"),
        ({"retries": -1}, "retries and retry_wait must not be negative, got -1 and 1.0"),
        ({"shared": {"answer": 1}}, r"shared arguments \['answer'\] are also columns"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    arguments = {
        "functions": [length],
        "prompts": [prompt(0, answer="a"), prompt(1, answer="b")],
        "completions": ["1", "2"],
        "completion_ids": [[1], [2]],
    } | settings
    with pytest.raises(ValueError, match=message):
        score(**arguments)


# The functions that come along


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so <answer> 5 </answer> bye", "5"),
        ("<answer>4</answer> no, <answer>5</answer> #### 6", "5"),
        ("<answer>4<answer>5</answer>", "5"),
        ("<answer>5", "<answer>5"),
        ("5</answer>", "5</answer>"),
        ("#### 4\n#### 5 \n", "5"),
        ("Answer: 4 #### 5", "5"),
        ("Answer: 4\nAnswer: 5", "5"),
        ("####\n1 2\n3 4\n", "1 2\n3 4"),
        ("  5 \n", "5"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_exact_match():
    completions = [" 5\n", "5.", "5", "Paris", [{"role": "assistant", "content": "5"}], "5"]
    answers = ["5", "5", 5, ["London", "Paris"], " 5", None]
    assert exact_match(completions, answers, level=[1] * 6) == [1, 0, 1, 1, 1, None]


def test_f1_by_hand():
    completions = [
        "The red house!",  # red house | red house = 1
        "red red car",  # common 1 of 3 and 1 -> 2*1/(3+1)
        "<answer>blue</answer>",  # no word in common
        "x y",  # best of 2*1/(2+1) and 2*1/(2+3)
        "the",  # no words on either side
        "car",
        "car",
    ]
    answers = ["a red house", "red", "red", ["x", "x b c"], "", "the", None]
    assert f1(completions, answers) == [1.0, 0.5, 0.0, pytest.approx(2 / 3), 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        ("<answer>The Eiffel Tower!</answer>", "Eiffel tower", 1.0),
        ("Answer: eiffel, tower", ["Paris", "an Eiffel Tower"], 1.0),
        ("the tower is <answer>Tower Eiffel</answer>", "Eiffel Tower", 0.0),  # the order counts
        ("Eiffel Tower, I think", "Eiffel Tower", 0.0),
        ("<answer></answer>", "the", 1.0),  # no words on either side
        ("<answer>7</answer>", 7, 1.0),
        ("anything", None, None),
    ],
)
def test_exact_answer_compares_by_the_rules_of_squad(completion, gold, expected):
    assert exact_answer([completion], answer=[gold]) == [expected]


def test_format_answer():
    texts = {
        "so <answer>5</answer>": 1.0,
        "<answer>\n5\n6</answer>": 1.0,
        "5": 0.0,
        "<answer> </answer>": 0.0,
        "<answer>5": 0.0,
        "</answer>5<answer>": 0.0,
        "<answer>5</answer><answer>6</answer>": 0.0,
    }
    assert format_answer(list(texts), answer=[None] * 7) == list(texts.values())


@pytest.mark.slow
def test_math_verify_compares_as_mathematics():
    cases = [
        ("#### 0.5", r"\frac{1}{2}", 1.0),
        ("so it is 1/2", "0.5", 1.0),
        (r"Thus \boxed{\frac{2}{4}}. #### Step 4", "0.5", 1.0),
        ("Answer: 1024", "2^{10}", 1.0),
        ("Answer: 2", "2^{10}", 0.0),
        (r"<answer>1 + x^2</answer>", "x^2+1", 1.0),
        ("$1 + x$", "x^2+1", 0.0),
        ("#### 1000", "Tom has 10.\nSo #### 1,000", 1.0),
        ("7 and 72", "A long way to \\boxed{72}", 1.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
        ("72", "", None),
        ("72", None, None),
        ("72", 72, 1.0),
    ]
    completions, answers, expected = zip(*cases, strict=True)
    assert math_verify(list(completions), answer=list(answers)) == list(expected)
    assert math_verify(["1", "2"], answer=[None, "2"], solution=["1", "9"]) == [1.0, 1.0]
    conversation = [[{"role": "assistant", "content": "72"}]]
    assert math_verify(conversation, solution=["72"]) == [1.0]


def test_math_verify_needs_a_reference():
    with pytest.raises(RewardError, match="needs a column 'answer' or 'solution'"):
        run([lambda **c: math_verify(c["completions"])], ["1"])


@pytest.mark.slow
def test_a_number_too_large_to_compute_fails_its_row_alone(monkeypatch):
    worker = MathWorker(seconds=0.5)
    monkeypatch.setattr(reward_functions, "_math_worker", worker)
    texts = ["#### 72", r"\boxed{10^{1000000000}}", "72"]
    prompts = [prompt(i, answer="72") for i in range(3)]
    result = score([math_verify], prompts, texts, [[1]] * 3, max_failed_share=0.5, timeout=60.0)
    assert result.failed == {1: "math_verify: returned nan"}
    assert result.reward_K.tolist() == [1.0, 1.0]
    assert reward_functions.MATH_SECONDS == 5.0


@pytest.mark.slow
def test_a_comparison_that_takes_too_long_is_told_from_a_process_that_broke():
    worker = MathWorker(seconds=0.5)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took longer than 0.5 s"):
        worker.compare(["72"], ["$9^{9^{9}}$"])
    assert time.monotonic() - began < 10  # most of it for starting the process
    assert worker.compare(["72"], ["72"]) is True
    worker._process.kill()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        worker.compare(["72"], ["72"])
    assert worker.compare(["72"], ["71"]) is False
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        MathWorker(seconds=0)


@pytest.mark.slow
def test_the_comparing_process_ends_with_its_parent():
    code = (
        "from rollouts.rewards.math_worker import MathWorker; worker = MathWorker(seconds=5);"
        "worker.compare(['1'], ['1']); print(worker._process.pid)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for _ in range(100):
        if not _is_alive(int(out.stdout)):
            return
        time.sleep(0.05)
    pytest.fail("the process that compares answers outlived its parent by 5 s")


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("as_json", [True, False])
def test_reasoning_gym_asks_the_task(as_json):
    library = pytest.importorskip("reasoning_gym")
    entry = library.create_dataset("chain_sum", size=1, seed=0)[0]
    given = json.dumps(entry) if as_json else entry
    texts = [f"I get <answer>{entry['answer']}</answer>", "#### no"]
    assert reasoning_gym(texts, ["chain_sum"] * 2, [given] * 2) == [1.0, 0.0]


@pytest.mark.slow
def test_reasoning_gym_verifiers_accept_their_answers_after_json():
    library = pytest.importorskip("reasoning_gym")
    # The first compares tuples, which JSON does not have; the others stand for the rest.
    for task in ("arc_agi", "countdown", "simple_equations", "spell_backward"):
        entry = library.create_dataset(task, size=1, seed=0)[0]
        text = f"#### {entry['answer']}"
        assert reasoning_gym([text], [task], [json.dumps(entry)]) == [1.0], task


def test_reasoning_gym_names_a_task_it_does_not_have():
    pytest.importorskip("reasoning_gym")
    prompts = [prompt(0, task="chain_sums", entry="{}")]
    with pytest.raises(RewardError, match="Dataset 'chain_sums' not registered"):
        score([reasoning_gym], prompts, ["5"], [[1]])


@pytest.mark.parametrize(
    ("function", "package"), [(math_verify, "math-verify"), (reasoning_gym, "reasoning-gym")]
)
def test_a_missing_library_is_named(function, package, monkeypatch):
    module = package.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(reward_functions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RewardError, match=f"pip install {package}"):
        function(["1"], answer=["1"], task=["1"], entry=["1"])


@pytest.mark.slow
def test_optional_libraries_are_not_imported_with_the_module():
    code = (
        "import sys, rollouts.rewards.text;"
        "assert not {'math_verify', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Finding a function


def test_every_built_in_is_found_by_its_name():
    for name, function in BUILT_IN.items():
        assert load_reward(name) is function
        assert function.__name__ == name


def test_a_function_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Pair:\n"
        "    left: int\n"
        "def constant(completions, **columns):\n"
        "    return [Pair(3).left for _ in completions]\n"
        "remote_judge = constant\n"
        "limit = 3\n"
    )
    assert run(load_reward(f"{path}:constant"), ["x"]).reward_N.tolist() == [3.0]
    with pytest.raises(
        ValueError, match=r"mine.py has no function 'constan' \(nearest: 'constant'"
    ):
        load_reward(f"{path}:constan")
    with pytest.raises(ValueError, match=r"'limit' in .*mine.py is 3, not a function"):
        load_reward(f"{path}:limit")
    with pytest.raises(ValueError, match=r"no reward file .*mime.py.*\(nearest: 'mine.py'\)"):
        load_reward(f"{tmp_path}/mime.py:constant")
    with pytest.raises(ValueError, match=r"no reward file '/nowhere/mine.py'"):
        load_reward("/nowhere/mine.py:constant")


def test_an_import_that_fails_inside_a_reward_file_is_told_with_the_file(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module\n")
    with pytest.raises(ImportError, match=r"reward file .*broken\.py: .*no_such_module"):
        load_reward(f"{path}:f")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_mach", r"no reward function 'exact_mach' \(nearest: 'exact_match'\): write one of"),
        ("mine.py", "'path/to/file.py:function'"),
        ("package.module:f", "no reward function 'package.module:f'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_a_missing_column_is_said_before_anything_is_generated():
    def needs(completions, solution, **columns):
        return [1.0] * len(completions)

    check_columns([exact_match], [prompt(0, answer="a")])
    with pytest.raises(RewardError, match="needs a column 'solution'.*solutions"):
        check_columns([exact_match, needs], [prompt(0, answer="a", solutions="b")])
