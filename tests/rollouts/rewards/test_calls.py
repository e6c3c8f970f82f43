"""How reward functions are called: what interrupts them, what they may change, await, log and return."""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from rollouts.prompts import Prompt
from rollouts.rewards import calls as reward_calls
from rollouts.rewards.calls import event_loop, numbers_of
from rollouts.rewards.contract import RewardError, check_columns, score


def prompt(i, **columns):
    return Prompt(key=f"key{i}", prompt=f"question {i}", token_ids=(i,), columns=columns)


def run(functions, completions, **settings):
    functions = functions if isinstance(functions, list) else [functions]
    prompts = [prompt(i) for i in range(len(completions))]
    return score(functions, prompts, completions, [[1]] * len(completions), **settings)


def ones(completions, **columns):
    return [1.0] * len(completions)


def at_bad(what):
    """1 for every row, after `what` has been done if one of them is "bad"."""

    def reward(completions, **columns):
        if "bad" in completions:
            what()
        return ones(completions)

    return reward


# Time


@pytest.mark.slow
@pytest.mark.parametrize(
    "holds",
    [
        lambda: re.fullmatch(r"(\d+)*x", "1" * 40),  # backtracks for years
        lambda: 9**9**9,
        lambda: str(10**400_000_000),
        lambda: time.sleep(60),
        lambda: threading.Event().wait(),
        lambda: subprocess.run(["sleep", "60"], check=True),
    ],
    ids=["regex", "power", "digits", "sleep", "lock", "subprocess"],
)
def test_a_call_that_holds_the_interpreter_is_interrupted(holds):
    result = run(at_bad(holds), ["good", "bad"], timeout=0.3, max_failed_share=0.5)
    assert result.failed == {1: "reward: took longer than 0.3 s"}
    assert result.reward_K.tolist() == [1.0]


@pytest.mark.slow
def test_an_interruption_that_is_swallowed_is_no_result():
    def swallows():
        with contextlib.suppress(BaseException):  # as a bare `except:` does
            time.sleep(60)

    result = run(at_bad(swallows), ["good", "bad"], timeout=0.3, max_failed_share=0.5)
    assert result.failed == {1: "reward: took longer than 0.3 s"}


@pytest.mark.slow
def test_an_endless_loop_that_swallows_every_interruption_but_one_ends():
    def stubborn():
        for _ in range(3):
            try:
                while True:
                    pass
            except BaseException:
                continue

    result = run(at_bad(stubborn), ["bad"], timeout=0.1, max_failed_share=1.0)
    assert result.failed == {0: "reward: took longer than 0.1 s"}


@pytest.mark.slow
def test_quick_calls_are_not_disturbed_afterwards():
    for _ in range(20):
        run(at_bad(lambda: time.sleep(0.05)), ["bad"], timeout=0.05, max_failed_share=1.0)
    time.sleep(0.6)  # a signal that was on its way would come now
    assert run(ones, ["x"], timeout=0.5).reward_K.tolist() == [1.0]


def test_alarms_of_the_function_itself_work():
    import signal

    def own_alarm():
        def handler(*_):
            raise ValueError("own alarm")

        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            time.sleep(60)
        finally:
            signal.signal(signal.SIGALRM, before)

    result = run(at_bad(own_alarm), ["bad"], timeout=30.0, max_failed_share=1.0)
    assert result.failed == {0: "reward: raised ValueError: own alarm"}


@pytest.mark.slow
def test_from_another_thread_a_slow_call_is_left_behind():
    found = []

    def work():
        found.append(
            run(at_bad(lambda: time.sleep(60)), ["bad", "x"], timeout=0.2, max_failed_share=1.0)
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].failed == {0: "reward: took longer than 0.2 s"}


@pytest.mark.slow
def test_code_that_cannot_be_interrupted_is_killed_with_a_message():
    code = """
        import rollouts.rewards.watchdog
        from rollouts.prompts import Prompt
        from rollouts.rewards.contract import score
        rollouts.rewards.watchdog.KILL_SECONDS = 0.6
        def holds(completions, **_):
            sum(range(10**15))
        prompt = Prompt(key="k", prompt="p", token_ids=(1,), columns={})
        score([holds], [prompt], ["x"], [[1]], timeout=0.2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -9
    assert "reward function 'holds' took longer than 0.2 s and did not let itself be" in done.stderr
    assert "isolated = True" in done.stderr


# Exits


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (lambda: sys.exit(3), "SystemExit: 3"),
        (lambda: exec("raise SystemExit"), "SystemExit: "),
        (lambda: os._exit(0), "SystemExit: os._exit(0)"),
        (lambda: (_ for _ in ()).throw(GeneratorExit), "GeneratorExit: "),
        (lambda: (_ for _ in ()).throw(asyncio.CancelledError()), "CancelledError: "),
    ],
)
def test_what_would_end_the_run_fails_the_row(leave, said, timeout):
    result = run(at_bad(leave), ["x", "bad"], timeout=timeout, max_failed_share=0.5)
    assert result.failed == {1: f"reward: raised {said}"}
    with pytest.raises(RewardError, match="prompt key1, reward function reward: raised"):
        run(at_bad(leave), ["x", "bad"], timeout=timeout)


def test_child_processes_of_a_reward_still_exit():
    def forks():
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    assert run(at_bad(forks), ["bad"], timeout=30.0).reward_K.tolist() == [1.0]
    assert os._exit.__module__ == "posix"


@pytest.mark.slow
def test_a_process_that_ends_within_a_call_is_told():
    code = """
        import os
        from rollouts.prompts import Prompt
        from rollouts.rewards.contract import score
        def ends(completions, **_):
            os.kill(os.getpid(), 9)
        score([ends], [Prompt(key="k", prompt="p", token_ids=(1,), columns={})], ["x"], [[1]], timeout=5)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "ended within a call of reward function 'ends'" in done.stderr


def test_somebody_who_stops_the_run_stops_it():
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(at_bad(stopped), ["bad"], timeout=5.0, max_failed_share=1.0)


# A process of its own


def isolated(what):
    function = at_bad(what)
    function.isolated = True
    return function


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda: sum(range(10**15)), "took longer than 0.5 s"),
        (lambda: os._exit(0), "the process of the call ended with status 0"),
        (lambda: os.kill(os.getpid(), 9), "the process of the call was ended by signal 9"),
        (lambda: sys.exit(2), "raised SystemExit: 2"),
        (lambda: {}["x"], "raised KeyError: 'x'"),
    ],
)
def test_an_isolated_function_can_be_killed_alone(what, reason):
    result = run(isolated(what), ["x", "bad"], timeout=0.5, max_failed_share=0.5)
    assert result.failed == {1: f"reward: {reason}"}
    assert result.reward_K.tolist() == [1.0]


def test_what_is_marked_stays_so_in_a_partial():
    def ends(completions, level, **columns):
        os._exit(3)

    ends.isolated = True
    result = run(functools.partial(ends, level=1), ["x"], max_failed_share=1.0)
    assert result.failed == {0: "ends: the process of the call ended with status 3"}


def test_an_isolated_function_logs_and_breaks_its_contract_as_others():
    def logs(completions, log_extra, log_metric, **columns):
        log_extra("seen", [text.upper() for text in completions])
        log_metric("rows", len(completions))
        return ones(completions)

    logs.isolated = True
    result = run(logs, ["a", "b"])
    assert (result.columns, result.metrics) == ({"seen": ["A", "B"]}, {"rows": [2.0]})

    def short(completions, **columns):
        return [1.0]

    short.isolated = True
    with pytest.raises(RewardError, match="returned 1 rewards for 2 completions"):
        run(short, ["a", "b"], max_failed_share=1.0)


# Arguments of its own for every call


def test_functions_may_change_what_they_are_given():
    messages = [{"role": "user", "content": "Hi"}]
    columns = {"tests": ["a", "b"], "info": {"deep": [1, {"x": [2]}]}, "array": np.ones(2)}
    asked = Prompt(key="k", prompt=messages, token_ids=(1,), columns=columns)
    before = copy.deepcopy((messages, columns["tests"], columns["info"]))
    seen = []

    def first(prompts, completions, completion_ids, tests, info, array, **_):
        for i in range(len(prompts)):
            seen.append((len(prompts[i]), len(tests[i]), info[i], array[i].sum()))
            prompts[i].append(completions[i][0])
            prompts[i][0]["content"] = completions[i][0]["content"] = "changed"
            tests[i].pop()
            info[i]["deep"][1]["x"].clear()
            array[i][:] = 0
            completion_ids[i].clear()
        prompts.clear()
        return [1.0] * len(completions)

    def second(**arguments):
        return first(**arguments)

    second.__name__ = "second"
    for _ in range(2):
        score([first, second], [asked] * 2, ["c", "d"], [[1], [2]])
    assert (messages, columns["tests"], columns["info"]) == before
    assert columns["array"].sum() == 2
    assert [row[:2] + row[3:] for row in seen] == [(1, 2, 2.0)] * 8


def test_a_search_for_failing_rows_starts_from_fresh_columns():
    def uses_up(completions, tests, **_):
        for text, column in zip(completions, tests, strict=True):
            column.pop()  # raises if another call has used it up
            if text == "bad":
                raise KeyError
        return ones(completions)

    prompts = [prompt(i, tests=["only"]) for i in range(8)]
    texts = ["x"] * 5 + ["bad"] + ["x"] * 2
    result = score([uses_up], prompts, texts, [[1]] * 8, max_failed_share=0.2)
    assert list(result.failed) == [5]


def test_a_column_that_cannot_be_copied_is_shared_with_a_warning():
    lock = threading.Lock()

    def same(completions, lock, **_):
        return [float(each is not None) for each in lock]

    with pytest.warns(
        UserWarning, match="column 'lock' holds lock objects, which cannot be copied"
    ):
        score([same], [prompt(0, lock=lock)], ["x"], [[1]])


# Asynchronous functions


@pytest.mark.slow
def test_asynchronous_functions_wait_together_in_one_loop():
    loops, order = [], []

    async def slow(completions, **_):
        loops.append(asyncio.get_running_loop())
        order.append("slow begins")
        await asyncio.sleep(0.2)
        order.append("slow ends")
        return [1.0] * len(completions)

    class Quick:
        async def __call__(self, completions, **_):
            loops.append(asyncio.get_running_loop())
            await asyncio.sleep(0.05)
            order.append("quick ends")
            return [2.0] * len(completions)

    partial = functools.partial(slow)
    partial.__name__ = "partial"
    for _ in range(2):
        result = run([slow, ones, Quick(), partial], ["x"] * 3)
    assert result.reward_N.tolist() == [5.0] * 3
    assert list(result.per_function) == ["slow", "ones", "Quick", "partial"]
    assert len(set(loops)) == 1  # also of the second call: clients belong to a loop
    assert order[:5] == ["slow begins", "slow begins", "quick ends", "slow ends", "slow ends"]


@pytest.mark.slow
def test_a_failing_row_of_an_asynchronous_function_is_found():
    async def judge(completions, log_extra, **_):
        if "bad" in completions:
            raise ConnectionError("busy")
        if "slow" in completions:
            await asyncio.sleep(60)
        if "exit" in completions:
            sys.exit(1)
        log_extra("said", completions)
        return [1.0] * len(completions)

    result = run(judge, ["a", "bad", "c", "slow", "exit", "f"], timeout=0.3, max_failed_share=0.5)
    assert result.failed == {
        1: "judge: raised ConnectionError: busy",
        3: "judge: took longer than 0.3 s",
        4: "judge: raised SystemExit: 1",
    }
    assert result.columns == {"said": ["a", None, "c", None, None, "f"]}
    assert run(judge, ["a"], timeout=5.0).reward_K.tolist() == [1.0]


@pytest.mark.slow
def test_of_several_failing_asynchronous_functions_the_first_is_named():
    async def late(completions, **_):
        await asyncio.sleep(0.2)
        raise KeyError("late")

    async def early(completions, **_):
        raise KeyError("early")

    for _ in range(2):
        with pytest.raises(RewardError, match="function late: raised KeyError: 'late'"):
            run([late, early], ["x"])


@pytest.mark.slow
def test_an_asynchronous_function_that_blocks_the_loop_fails_and_the_next_has_another():
    async def blocks(completions, **_):
        time.sleep(1000)

    result = run(blocks, ["x"], timeout=0.2, max_failed_share=1.0)
    assert "blocked" in result.failed[0]

    async def fine(completions, **_):
        return [1.0]

    assert run(fine, ["x"], timeout=5.0).reward_K.tolist() == [1.0]


def test_a_remote_asynchronous_function_is_retried():
    calls = []

    async def judge(completions, **_):
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError
        return [1.0] * len(completions)

    judge.remote = True
    assert run(judge, ["x"] * 2, retries=2, retry_wait=0.001).reward_K.tolist() == [1.0, 1.0]
    assert len(calls) == 3


def test_an_ordinary_function_may_return_something_to_await():
    async def later(completions, **_):
        return [3.0] * len(completions)

    assert run(lambda **columns: later(**columns), ["x"]).reward_K.tolist() == [3.0]
    assert event_loop().is_alive()


def test_asynchronous_generators_and_isolated_coroutines_are_refused():
    async def yields(completions, **_):
        yield 1.0

    async def lonely(completions, **_):
        return [1.0]

    lonely.isolated = True
    with pytest.raises(RewardError, match="yields is an asynchronous generator; return a list"):
        run(yields, ["x"])
    with pytest.raises(ValueError, match="lonely is asynchronous and isolated"):
        run(lonely, ["x"])


# What TRL gives besides columns


def test_only_functions_that_take_them_get_state_and_logs():
    seen = {}

    def plain(prompts, completions, completion_ids):
        return [0.0]

    def asks(prompts, completions, completion_ids, trainer_state, log_metric):
        seen.update(step=trainer_state)
        log_metric("length", torch.tensor(3))
        return [0.0]

    result = run([plain, asks], ["x"], shared={"trainer_state": 7})
    assert seen == {"step": 7}
    assert result.metrics == {"length": [3.0]}
    check_columns([plain, asks], [prompt(0)])
    with pytest.raises(RewardError, match="asks needs a column 'trainer_state'"):
        run([asks], ["x"])


def test_what_is_logged_is_plain():
    def logs(completions, log_extra, **_):
        log_extra("tensor", torch.ones(2))
        log_extra("objects", [{"a": 1}, None])
        return ones(completions)

    assert run(logs, ["a", "b"]).columns == {"tensor": [1.0, 1.0], "objects": ["{'a': 1}", None]}


def test_columns_are_logged_at_once_or_in_parts_one_value_per_row():
    def parts(completions, log_extra, **_):
        for text in completions:
            log_extra("upper", [text.upper()])
        return ones(completions)

    def again(completions, log_extra, **_):
        log_extra("upper", completions)
        return ones(completions)

    def short(completions, log_extra, **_):
        log_extra("upper", ["one"])
        return ones(completions)

    columns = run([parts, again], ["a", "b"]).columns
    assert columns == {"upper": ["A", "B"], "upper (again)": ["a", "b"]}
    with pytest.raises(RewardError, match="short gave log_extra 1 values of 'upper' for 2 comp"):
        run([short], ["a", "b"], max_failed_share=1.0)


@pytest.mark.parametrize("name", ["completion", "completion_ids"])
def test_a_column_that_rewards_do_not_get_is_told(name):
    with pytest.warns(UserWarning, match=f"column '{name}' is not given to reward functions"):
        check_columns([ones], [prompt(0, **{name: 1})])


@pytest.mark.parametrize("name", ["trainer_state", "log_extra", "log_metric"])
def test_a_column_that_would_hide_an_argument_is_refused(name):
    with pytest.raises(ValueError, match=f"column '{name}' has the name of an argument"):
        check_columns([ones], [prompt(0, **{name: 1})])


# Numbers


class Odd:
    """A number that cannot be had."""

    def __init__(self, error):
        self.error = error

    def item(self):
        raise self.error

    def __repr__(self):
        raise ValueError("no text either")


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ([True, np.bool_(False), np.float16(0.5)], [1.0, 0.0, 0.5]),
        ([Decimal("0.5"), Fraction(1, 4), None], [0.5, 0.25, None]),
        (np.array([[1.0], [2.0], [3.0]]), [1.0, 2.0, 3.0]),
        (torch.ones(3, 1, dtype=torch.bfloat16, requires_grad=True), [1.0, 1.0, 1.0]),
        ([torch.tensor([2.0]), torch.tensor(3), np.array([4])], [2.0, 3.0, 4.0]),
        ((value for value in (1, 2, None)), [1.0, 2.0, None]),
        (map(float, "123"), [1.0, 2.0, 3.0]),
        (range(3), [0.0, 1.0, 2.0]),
        (np.array([1.0, None, 2], dtype=object), [1.0, None, 2.0]),
    ],
)
def test_what_is_a_number_in_other_libraries_is_one(given, values):
    assert numbers_of(given, "f", range(3)) == (values, {})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (10**400, "which is no float .OverflowError"),
        (-(10**5000), "which is no float .OverflowError"),
        (Fraction(10**400), "which is no float .OverflowError"),
        (Decimal("sNaN"), "which is no float .ValueError"),
        (Decimal("1e999"), "returned inf"),
        (np.longdouble("1e4000"), "returned inf"),
        (torch.empty((), device="meta"), "which is no float .*meta"),
        (Odd(ZeroDivisionError("x")), "which is no float .ZeroDivisionError: x"),
    ],
    ids=["int", "int without text", "fraction", "snan", "decimal", "longdouble", "meta", "odd"],
)
def test_a_value_that_is_no_float_fails_its_row(value, reason):
    values, failed = numbers_of([1.0, value], "f", range(2))
    assert values == [1.0, None]
    assert re.search(reason, failed[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.empty(2, device="meta"), "type Tensor, which cannot be read .NotImplementedError"),
        (torch.ones(2).to_sparse(), "type Tensor, which cannot be read"),
        (torch.ones(2, 2), "returned .* of type list for row 0; expected a number or None"),
        ({"a": 1.0, "b": 2.0}, "of type dict; expected a list of 2 numbers or None"),
        ({1.0, 2.0}, "of type set; expected a list"),
        (["1.0", "0.5"], "returned '1.0' of type str for row 0; expected a number or None"),
        ([1j, 2j], "returned 1j of type complex for row 0"),
        ([torch.ones(2), torch.ones(2)], "of type Tensor for row 0"),
        (iter(lambda: 1.0, 2.0), "returned 3 rewards for 2 completions"),
        (torch.tensor(1.0), r"returned tensor\(1.\) of type Tensor; expected a list"),
        ([torch.ones(1), torch.ones(2)], "of type Tensor for row 1"),
    ],
)
def test_anything_else_is_told_and_never_a_traceback(given, message):
    with pytest.raises(RewardError, match=message):
        numbers_of(given, "f", range(2))


def test_an_iterator_that_raises_is_searched_like_a_function_that_does():
    def lazily(completions, **_):
        for text in completions:
            if text == "bad":
                raise KeyError("lazy")
            yield 1.0

    result = run(lazily, ["x", "bad", "y"], max_failed_share=0.5)
    assert result.failed == {1: "lazily: raised KeyError: 'lazy'"}


def test_a_sum_that_is_too_large_fails_its_row():
    def large(completions, **_):
        return [1e308, 1.0]

    def larger(completions, **_):
        return [1.5e308, 1.0]

    result = run([large, larger], ["x", "y"], max_failed_share=0.5)
    assert list(result.failed) == [0]
    assert "large/larger: the weighted sum of" in result.failed[0]
    assert result.reward_K.tolist() == [2.0]


def test_an_image_reward_keeps_its_marks():
    from rollouts.rewards.image import score_images

    def ends(image_NHWC, prompts, metadata):
        if "bad" in prompts:
            os._exit(3)
        return np.ones(len(prompts))

    ends.isolated = True
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    result, _ = score_images([ends], images, ["good", "bad"], max_failed_share=0.5)
    assert result.failed == {1: "ends: the process of the call ended with status 3"}
    assert result.reward_K.tolist() == [1.0]


@pytest.mark.parametrize(
    "reply",
    [
        b"cos\nsystem\n(S'exit 1'\ntR.",  # what unpickling would run
        b"[]",
        b'["called", {"value_K": [1.0], "failed": {}, "columns": {}, "metrics": {}}]',  # of 2 rows
        b'["called", {"value_K": [1.0, NaN], "failed": {}, "columns": {}, "metrics": {}}]',
        b'["called", {"value_K": ["x", 1], "failed": {}, "columns": {}, "metrics": {}}]',
        b'["called", 3]',
        b"[" * 100_000,
    ],
)
def test_what_an_isolated_function_writes_is_data_and_is_looked_through(reply):
    answer = reward_calls._answer(reply, num_rows=2)
    assert str(answer) == "the process of the call did not write the rewards of its rows"


def test_an_answer_of_an_isolated_function_comes_back_as_it_was():
    called = reward_calls.Called([1 / 3, None], {1: "bad"}, {"a": ["\ud800", 1]}, {"m": [2.0]})
    reply = json.dumps(("called", dataclasses.asdict(called))).encode()
    assert reward_calls._answer(reply, num_rows=2) == called
