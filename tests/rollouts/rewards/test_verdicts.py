"""Verdicts say what the finished reward says, and a failure never becomes a number."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rollouts import check_verdicts
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardError, score
from rollouts.rewards.text import BUILT_IN, load_reward
from rollouts.rewards.verdicts import Verdicts, decided_of, undecided


def decode(ids_N):
    return ["".join(map(chr, ids)) for ids in ids_N]


def ids_of(*texts):
    return [list(map(ord, text)) for text in texts]


def prompts(*texts, **columns):
    return [
        Prompt(key=text, prompt=text, token_ids=(0,), columns=columns | {"answer": text})
        for text in texts
    ]


class Starts:
    """1 where the completion starts with the prompt."""

    __name__ = "starts"

    def __call__(self, completions, prompts, **_):
        return [float(t.startswith(p)) for t, p in zip(completions, prompts, strict=True)]

    def decided(self, prompt, completion_so_far):
        if len(completion_so_far) < len(prompt):
            return None
        return float(completion_so_far.startswith(prompt))


def quiet(completions, **_):
    """2 where there is no "!"; decides at the first "!"."""
    return [2.0 * ("!" not in text) for text in completions]


def no_longer_quiet(prompt, completion_so_far):
    return 0.0 if "!" in completion_so_far else None


quiet.decided = no_longer_quiet


def length(completions, **_):
    return [float(len(text)) for text in completions]


def test_a_reward_declares_verdicts_by_a_method_or_an_attribute():
    assert decided_of(Starts())("ab", "ab?") == 1.0
    assert decided_of(quiet) is no_longer_quiet
    assert decided_of(length) is None
    assert undecided([quiet, length], None) == ["length"]
    assert undecided([quiet, length], [1.0, 0.0]) == []


def test_a_rollout_is_over_when_every_reward_with_a_weight_has_decided():
    asked = Verdicts([Starts(), quiet, length], decode, weights=[1.0, 1.0, 0.0])
    rows = prompts("ab", "ab", "ab", "ab")
    # Both open; the first decided; the second decided; both decided.
    assert asked.over(rows, ids_of("a", "abc", "!", "ab!")) == [False, False, False, True]
    with pytest.raises(RewardError, match="reward length has no `decided`"):
        Verdicts([quiet, length], decode)


def test_rows_that_were_ended_get_their_verdicts_and_the_others_their_rewards():
    functions, weights = [Starts(), quiet, length], [1.0, 0.5, 0.0]
    asked = Verdicts(functions, decode, weights=weights)
    rows, texts = prompts("ab", "ab", "x"), ["ab!", "abc", "!"]
    decided_N = torch.tensor([True, False, True])
    found = asked.score(rows, texts, ids_of(*texts), decided_N)
    assert found.reward_N.tolist() == [1.0, 1.0 + 0.5 * 2.0, 0.0]
    assert found.scored.all() and not found.failed
    assert found.per_function == {
        "starts": [1.0, 1.0, 0.0],
        "quiet": [0.0, 2.0, 0.0],
        "length": [None, 3.0, None],  # only reported, and of finished rollouts alone
    }
    plain = score(functions, rows, texts, ids_of(*texts), weights=weights)
    whole = asked.score(rows, texts, ids_of(*texts), torch.zeros(3, dtype=torch.bool))
    assert whole.per_function == plain.per_function
    assert torch.equal(whole.reward_N, plain.reward_N)
    every = asked.score(rows[:1], texts[:1], ids_of(texts[0]), torch.tensor([True]))
    assert every.reward_N.tolist() == [1.0] and every.per_function["length"] == [None]


class Failing(Starts):
    def __init__(self, value=None, error=None):
        self.value, self.error = value, error

    def decided(self, prompt, completion_so_far):
        if self.error is not None and "?" in completion_so_far:
            raise self.error
        return self.value if "?" in completion_so_far else 0.0


@pytest.mark.parametrize(
    ("value", "error", "reason"),
    [
        (None, KeyError("x"), "starts: decided raised KeyError: 'x'"),
        (None, SystemExit(3), "starts: decided raised SystemExit: 3"),
        (math.nan, None, "starts: decided returned nan"),
        (math.inf, None, "starts: decided returned inf"),
    ],
)
def test_a_verdict_that_fails_ends_the_rollout_and_fails_its_row(value, error, reason):
    asked = Verdicts([Failing(value, error)], decode)
    rows, texts = prompts("ab", "ab"), ["a?", "b"]
    assert asked.over(rows, ids_of(*texts)) == [True, True]
    decided_N = torch.tensor([True, True])
    found = asked.score(rows, texts, ids_of(*texts), decided_N, max_failed_share=0.5)
    assert found.scored.tolist() == [False, True] and found.failed == {0: reason}
    assert found.per_function == {"starts": [None, 0.0]}
    with pytest.raises(RewardError, match="at least 1 of 2 rewards failed.*prompt ab"):
        asked.score(rows, texts, ids_of(*texts), decided_N)


def test_failures_of_both_kinds_count_together():
    def sometimes(completions, **_):
        if any("fail" in text for text in completions):
            raise ValueError("no")
        return [0.0] * len(completions)

    sometimes.decided = Failing(math.nan).decided
    asked = Verdicts([sometimes], decode)
    rows, texts = prompts("a", "b", "c", "d"), ["?", "fail", "x", "y"]
    decided_N = torch.tensor([True, False, False, False])
    found = asked.score(rows, texts, ids_of(*texts), decided_N, max_failed_share=0.5)
    assert sorted(found.failed) == [0, 1] and found.scored.tolist() == [False, False, True, True]
    with pytest.raises(RewardError, match="rewards failed"):
        asked.score(rows, texts, ids_of(*texts), decided_N, max_failed_share=0.25)


def test_a_verdict_that_is_taken_back_or_takes_too_long_fails_its_row():
    asked = Verdicts([quiet], decode)
    found = asked.score(
        prompts("a"), ["x"], ids_of("x"), torch.tensor([True]), max_failed_share=1.0
    )
    assert "and None after" in found.failed[0]

    def endless(completions, **_):
        return [0.0] * len(completions)

    def for_ever(prompt, completion_so_far):
        while True:
            pass

    endless.decided = for_ever
    slow = Verdicts([endless], decode, timeout=0.05)
    assert slow.over(prompts("a"), ids_of("x")) == [True]
    found = slow.score(prompts("a"), ["x"], ids_of("x"), torch.tensor([True]), max_failed_share=1.0)
    assert found.failed == {0: "endless: decided took longer than 0.05 s"}


@pytest.mark.slow
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_row_that_hangs_fails_alone_and_many_fail_the_rest(in_thread):
    def reward(completions, **_):
        return [0.0] * len(completions)

    def hangs(prompt, completion_so_far):
        while "?" in completion_so_far:
            pass
        return 0.0

    reward.decided = hangs
    asked = Verdicts([reward], decode, timeout=0.1)

    def failed(*texts):
        rows, ids, decided_N = prompts(*texts), ids_of(*texts), torch.ones(len(texts)).bool()
        found = asked.score(rows, texts, ids, decided_N, max_failed_share=1.0)
        return {row: reason.partition("decided ")[2][:10] for row, reason in found.failed.items()}

    with ThreadPoolExecutor(1) as pool:
        ask = (lambda *texts: pool.submit(failed, *texts).result()) if in_thread else failed
        assert ask("a", "?", "b", "?", "c") == {1: "took longe", 3: "took longe"}
        late = dict.fromkeys(range(3), "took longe")
        assert ask("?a", "?b", "?c", "d", "e") == late | dict.fromkeys((3, 4), "was not re")


@pytest.mark.parametrize("value", ["1.0", [1.0, 2.0]])
def test_a_verdict_that_is_no_number_breaks_the_contract(value):
    with pytest.raises(RewardError, match=r"starts.decided returned"):
        Verdicts([Failing(value)], decode).over(prompts("ab"), ids_of("?"))


def test_columns_and_tokens_go_to_the_parameters_of_their_names_as_copies():
    seen = []

    def reward(completions, **_):
        return [0.0] * len(completions)

    def decided(prompt, text, numbers, completion_ids):
        seen.append((prompt, text, list(numbers), completion_ids))
        numbers.clear()

    reward.decided = decided
    (row,) = prompts("p", numbers=[1, 2], other=3)
    asked = Verdicts([reward], decode, columns=["numbers", "other", "answer"])
    asked.over([row], ids_of("hi"))
    asked.over([row], ids_of("hi"))
    assert seen == [("p", "hi", [1, 2], [104, 105])] * 2

    reward.decided = lambda prompt, text, **columns: seen.append(columns)
    Verdicts([reward], decode).over([row], ids_of("a"))
    assert seen[-1] == {"numbers": [1, 2], "other": 3, "answer": "p", "completion_ids": [97]}

    reward.decided = lambda prompt, text, number: None
    with pytest.raises(RewardError, match=r"no column 'number' \(nearest: 'numbers'\)"):
        Verdicts([reward], decode, columns=["numbers"])

    async def later(prompt, text):
        return None

    reward.decided = later
    with pytest.raises(RewardError, match="must be an ordinary function"):
        Verdicts([reward], decode)


def test_a_conversation_is_given_as_messages_and_its_completion_as_text():
    seen = []

    def reward(completions, **_):
        return [0.0] * len(completions)

    reward.decided = lambda prompt, text: seen.append((prompt, text))
    chat = [{"role": "user", "content": "2+3="}]
    row = Prompt(key="k", prompt=chat, token_ids=(0,), columns={})
    Verdicts([reward], decode).over([row], ids_of("5"))
    assert seen == [(chat, "5")]


def test_a_character_that_is_not_whole_yet_is_not_shown():
    seen = []

    def reward(completions, **_):
        return [0.0] * len(completions)

    reward.decided = lambda prompt, text: seen.append(text)

    def bytes_of(ids_N):
        return [bytes(ids).decode(errors="replace") for ids in ids_N]

    asked, whole = Verdicts([reward], bytes_of), "5 €".encode()
    for end in range(len(whole) + 1):
        asked.over(prompts("p"), [list(whole[:end])])
    assert seen == ["", "5", "5 ", "5 ", "5 ", "5 €"]


def test_the_check_of_finished_rollouts_names_prompt_cut_and_both_values():
    class Hasty(Starts):
        def decided(self, prompt, completion_so_far):
            return float(completion_so_far.startswith(prompt[:1])) if completion_so_far else None

    rows, texts = prompts("ab"), ["axxxx"]
    good, bad = Verdicts([Starts()], decode), Verdicts([Hasty()], decode)
    result = score([Starts()], rows, texts, ids_of(*texts))
    good.check(rows, ids_of(*texts), result, every=1)
    with pytest.raises(
        RewardError, match="prompt ab, after 2 characters, 'ax', .*gave 1, but the finis"
    ):
        bad.check(rows, ids_of(*texts), result, every=2)
    # The start of a rollout counts towards the text and not towards the questions.
    started = [rows[0].started(tuple(map(ord, "axx")))]
    with pytest.raises(RewardError, match="after 5 characters"):
        bad.check(started, ids_of(*texts), result, every=2)


def test_the_contract_test_cuts_everywhere():
    check_verdicts(Starts(), ["ab", "ab", "b"], ["abc", "xb", ""])
    check_verdicts(quiet, ["p"] * 3, ["a!b", "ab", "!!"])

    def early(completions, answer, **_):
        return [float(t.endswith(a)) for t, a in zip(completions, answer, strict=True)]

    early.decided = lambda prompt, text, answer: 1.0 if text.endswith(answer) else None
    check_verdicts(early, ["2+3="], ["x5"], answer=["5"])
    with pytest.raises(AssertionError, match=r"prompt '2\+3='.*'5x'.*gave 1, .*gets 0, after '5'"):
        check_verdicts(early, ["2+3="] * 2, ["5", "5x"], answer=["5", "5"])
    with pytest.raises(RewardError, match="reward length has no `decided`"):
        check_verdicts(length, ["a"], ["b"])


def test_the_contract_test_says_what_a_reward_that_does_not_apply_did():
    def one(completions, **_):
        return [None] * len(completions)

    one.decided = lambda prompt, text: 0.0
    with pytest.raises(AssertionError, match="does not apply to the finished rollout"):
        check_verdicts(one, ["a"], ["b"])


# -- the verdicts that come with the library


def test_an_exact_match_is_lost_at_the_first_wrong_character():
    reward = BUILT_IN["exact_match"]
    said = ["12", " 12 ", "13", "1 2", "", "12x", "1", "12 x", "two"]
    check_verdicts(reward, ["p"] * 9, said, answer=[["12", "two"]] * 9)
    check_verdicts(reward, ["p"] * 2, ["12", "x"], answer=[None, 12])
    assert reward.decided("p", "13", answer="12") == 0.0
    assert reward.decided("p", " 1", answer="12") is None
    assert reward.decided("p", "12 ", answer="12") is None
    assert reward.decided("p", "12 1", answer="12") == 0.0
    assert reward.decided("p", "a b", answer="a b") is None


def test_a_format_is_lost_with_doubled_swapped_or_empty_tags():
    reward, a, b = BUILT_IN["format_answer"], "<answer>", "</answer>"
    said = [f"{a}1{b}", f"{a}1{b}{a}", f"{b}{a}1", f"{a} {b}", f"{a}{a}", "x", f"x{b}", f"{b}{b}"]
    check_verdicts(reward, ["p"] * len(said), said)
    for text, verdict in ((f"{a}1{b}", None), (f"{a}{a}", 0.0), (f"x{b}", 0.0), (f"{a} {b}", 0.0)):
        assert reward.decided("p", text) == verdict


def test_a_completion_that_is_too_long_stays_too_long():
    reward = load_reward("soft_overlong(max_completion_len=4, soft_punish_cache=2)")
    assert reward.decided("p", "text", completion_ids=[1] * 4) is None
    assert reward.decided("p", "text", completion_ids=[1] * 5) == -1.0
    asked = Verdicts([reward], decode)
    assert asked.over(prompts("p", "p"), ids_of("1234", "12345")) == [False, True]
    with pytest.raises(RewardError, match="read completion_ids: give check_verdicts the tokenizer"):
        check_verdicts(reward, ["p"], ["12345"])


def test_verdicts_are_for_rewards_of_strict_formats_alone():
    deciding = {name for name, reward in BUILT_IN.items() if decided_of(reward) is not None}
    assert deciding == {"countdown", "exact_match", "format_answer", "valid_json"}
