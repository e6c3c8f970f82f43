from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.logprobs.micro_batches import by_rows, by_tokens, padded_tokens, padding_share


def lists(micro):
    return [row_B.tolist() for row_B in micro]


def test_by_rows_by_hand():
    # Lengths 9 7 7 4 2; the two rows of length 7 keep their order.
    length_K = torch.tensor([7, 2, 9, 7, 4])
    assert lists(by_rows(length_K, 2)) == [[2, 0], [3, 4], [1]]
    assert lists(by_rows(length_K, 9)) == [[2, 0, 3, 4, 1]]
    assert by_rows(length_K[:0], 2) == []


def test_by_tokens_by_hand():
    # Prompts of 2 tokens, so a row takes 12 5 4 4 3 of a budget of 12: alone, then 2 x 5, then
    # 2 x 4; a third row beside the 5 would make 15.
    prompt_K, length_K = torch.full((5,), 2), torch.tensor([2, 3, 10, 2, 1])
    micro = by_tokens(prompt_K, length_K, 12)
    assert lists(micro) == [[2], [1, 0], [3, 4]]
    assert padded_tokens(prompt_K, length_K, micro) == 12 + 10 + 8
    # 28 real tokens of 30.
    assert padding_share(prompt_K, length_K, micro) == pytest.approx(1 - 28 / 30)
    # By rows, two at a time: 2 x 12, 2 x 4, 1 x 3.
    assert padded_tokens(prompt_K, length_K, by_rows(length_K, 2)) == 24 + 8 + 3


def test_prompt_and_completion_are_padded_apart():
    # Together the rows are 9 + 9 wide, so 36 tokens; apart 10 each.
    prompt_K, length_K = torch.tensor([9, 1]), torch.tensor([1, 9])
    both = [torch.tensor([0, 1])]
    assert padded_tokens(prompt_K, length_K, both) == 36
    assert padding_share(prompt_K, length_K, both) == pytest.approx(1 - 20 / 36)
    assert lists(by_tokens(prompt_K, length_K, 35)) == [[0], [1]]
    assert lists(by_tokens(prompt_K, length_K, 36)) == [[0, 1]]


def test_the_order_with_the_fewest_micro_batches_is_taken():
    # Sorted by the sum, rows of long prompts and of long completions alternate, and no two fit;
    # sorted by completion they make two pairs 12 wide.
    prompt_K, length_K = torch.tensor([10, 2, 10, 2]), torch.tensor([2, 10, 1, 9])
    micro = by_tokens(prompt_K, length_K, 24)
    assert sorted(map(sorted, lists(micro))) == [[0, 2], [1, 3]]
    assert padded_tokens(prompt_K, length_K, micro) == 48


def test_a_row_longer_than_the_budget_stands_alone():
    prompt_K, length_K = torch.tensor([1, 1, 1]), torch.tensor([50, 1, 60])
    assert lists(by_tokens(prompt_K, length_K, 8)) == [[2], [0], [1]]


rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), max_size=40)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(rows, st.integers(1, 400))
def test_every_row_once_within_the_budget_and_no_fit_left_out(pairs, budget):
    prompt_K = torch.tensor([p for p, _ in pairs], dtype=torch.int64)
    length_K = torch.tensor([n for _, n in pairs], dtype=torch.int64)
    micro = by_tokens(prompt_K, length_K, budget)
    assert sorted(list(chain(*lists(micro)))) == list(range(len(pairs)))
    for row_B in micro:
        assert row_B.dtype == torch.int64 and len(row_B)
        assert len(row_B) == 1 or padded_tokens(prompt_K, length_K, [row_B]) <= budget
    longest = [int((prompt_K + length_K)[row_B].max()) for row_B in micro]
    assert longest == sorted(longest, reverse=True)
    assert 0 <= padding_share(prompt_K, length_K, micro) < 1
    assert lists(by_tokens(prompt_K, length_K, budget)) == lists(micro)


def fewest(widths, budget):
    """Fewest consecutive micro-batches of sorted rows, by dynamic programming."""
    best = [0]
    for end in range(1, len(widths) + 1):
        starts = [s for s in range(end) if (end - s) * widths[s] <= budget or end - s == 1]
        best.append(1 + min(best[s] for s in starts))
    return best[-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=25), st.integers(1, 300))
def test_prompts_of_one_length_give_the_fewest_micro_batches(lengths, budget):
    length_K, prompt_K = torch.tensor(lengths), torch.full((len(lengths),), 3)
    widths = sorted((n + 3 for n in lengths), reverse=True)
    assert len(by_tokens(prompt_K, length_K, budget)) == fewest(widths, budget)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 12))
def test_by_rows_holds_every_row_once_longest_first(lengths, count):
    micro = by_rows(torch.tensor(lengths, dtype=torch.int64), count)
    order = list(chain(*lists(micro)))
    # Sorting is stable: the row number breaks ties.
    assert order == sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    assert all(len(row_B) == count for row_B in micro[:-1])
    assert not micro or 1 <= len(micro[-1]) <= count


def test_a_budget_pads_less_than_a_row_count_of_equal_memory():
    length_K = torch.empty(256).exponential_(1 / 60, generator=torch.manual_seed(0)).long() + 1
    prompt_K = torch.full_like(length_K, 32)
    count, widest = 8, int(length_K.max()) + 32
    tokens, rows = by_tokens(prompt_K, length_K, count * widest), by_rows(length_K, count)
    assert len(tokens) < len(rows) / 2
    assert max(padded_tokens(prompt_K, length_K, [m]) for m in tokens) <= count * widest


def test_nothing_to_train_on_and_rows_without_tokens():
    none = torch.tensor([], dtype=torch.int64)
    assert by_tokens(none, none, 5) == [] and padding_share(none, none, []) == 0.0
    zero = torch.tensor([0, 0])
    assert lists(by_tokens(zero, zero, 1)) == [[0, 1]]
    assert padding_share(zero, zero, [torch.tensor([0, 1])]) == 0.0


def test_messages():
    length_K = torch.tensor([3, 4])
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        by_rows(length_K, 0)
    with pytest.raises(ValueError, match="length_K must not be negative, got -2"):
        by_rows(torch.tensor([3, -2]), 1)
    with pytest.raises(ValueError, match=r"length_K must be integers \(K,\), got torch.float32"):
        by_rows(torch.tensor([3.0]), 1)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        by_tokens(length_K, length_K, 0)
    with pytest.raises(ValueError, match="equally long, got 1 and 2"):
        by_tokens(length_K[:1], length_K, 5)
