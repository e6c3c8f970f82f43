"""Choose which rows go through the model together.

Rows of like length share a micro-batch, because every row is padded to the longest: prompts to the
longest prompt on the left, completions to the longest completion on the right. How
rows are split never changes an update, only its time and memory: losses state their denominator.

Axes: K rows to train on, B rows of one micro-batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def by_rows(length_K: Tensor, rows: int) -> list[Tensor]:
    """Micro-batches of `rows` rows, longest completions first; the last may have fewer.

    The longest go first so that memory peaks at once rather than after a while.

    Args:
        length_K: (K,) integers, columns each completion takes.
        rows: at least 1.

    Returns:
        (B,) int64 indices into `length_K`, each row once; rows of one length keep their order. No
        micro-batch without rows.

    Raises:
        ValueError: if `rows` is below 1 or a length is negative.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    _check(length_K, "length_K")
    order_K = length_K.argsort(descending=True, stable=True)
    return list(order_K.split(rows)) if len(order_K) else []


def by_prompts(prompt_K: Tensor, length_K: Tensor, rows: int) -> list[Tensor]:
    """As many micro-batches as `by_rows` makes, with rows of one prompt beside each other.

    For packed rows (`shared_prompts`), which are padded to the longest group. Prompts with the most
    completion tokens come first. A prompt's rows are split where a micro-batch is full.

    Args:
        prompt_K: (K,) integers, the prompt of each row.
        length_K, rows: as `by_rows`.
    """
    by_rows(length_K, rows)  # checks both
    groups = _groups(prompt_K, length_K)
    lengths = length_K.tolist()
    groups.sort(key=lambda group: -sum(lengths[row] for row in group))
    order = [row for group in groups for row in group]
    return list(torch.tensor(order, dtype=torch.int64).split(rows)) if order else []


def by_tokens_of_prompts(
    prompt_K: Tensor, prompt_length_K: Tensor, length_K: Tensor, budget: int
) -> list[Tensor]:
    """Micro-batches of as many packed rows as `budget` tokens hold, padding included.

        G (max prompt length + max sum of completion lengths) <= budget

    A packed row is one prompt and its rollouts. A group too long for the budget is split, longest
    rollouts first, into packed rows that fit; a rollout longer than the budget stands alone.

    Args:
        prompt_K: (K,) integers, the prompt of each row.
        prompt_length_K, length_K, budget: as `by_tokens`.

    Returns:
        As `by_tokens`: (B,) int64 indices, each row once.

    Raises:
        ValueError: as `by_tokens`.
    """
    by_tokens(prompt_length_K, length_K, budget)  # checks all three
    prompt_lengths, lengths = prompt_length_K.tolist(), length_K.tolist()
    packed: list[list[int]] = []
    for group in _groups(prompt_K, length_K):
        room = 0
        for i, row in enumerate(reversed(group)):
            if i == 0 or lengths[row] > room:
                packed.append([])
                room = budget - prompt_lengths[row]
            packed[-1].append(row)
            room -= lengths[row]
    prompts = [prompt_lengths[rows[0]] for rows in packed]
    sums = [sum(lengths[row] for row in rows) for rows in packed]
    order = sorted(range(len(packed)), key=lambda i: -prompts[i] - sums[i])
    micro = _filled(order, prompts, sums, budget)
    return [torch.tensor([row for i in part.tolist() for row in packed[i]]) for part in micro]


def _groups(prompt_K: Tensor, length_K: Tensor) -> list[list[int]]:
    """The rows of each prompt, by length, shortest first; prompts in the order they first appear."""
    if prompt_K.shape != length_K.shape:
        raise ValueError(
            f"prompt_K and length_K must be equally long, got {len(prompt_K)} and {len(length_K)}"
        )
    rows_of: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_K.tolist()):
        rows_of.setdefault(prompt, []).append(row)
    lengths = length_K.tolist()
    return [sorted(rows, key=lambda row: lengths[row]) for rows in rows_of.values()]


def by_tokens(prompt_length_K: Tensor, length_K: Tensor, budget: int) -> list[Tensor]:
    """Micro-batches of as many rows as `budget` tokens hold, padding included.

        B (max prompt length + max completion length) <= budget

    so that memory is what is bounded, whatever the lengths: many short rows together, few long
    ones. A row longer than the budget stands alone. Rows are sorted and taken greedily, which for
    prompts of one length gives the fewest micro-batches possible: sorted by the sum, by completion
    then prompt, or by prompt then completion, whichever order gives the fewest micro-batches, of
    these the one that pads least, the first in a tie.

    Project default, not from a paper; a budget of tokens in the place of rows is also what fairseq
    (`max_tokens`) and verl (`use_dynamic_bsz`) offer.

    Args:
        prompt_length_K: (K,) integers, tokens of each prompt.
        length_K: (K,) integers, columns each completion takes: `logprobs.ends(mask_NT)`, tool
            output in between included.
        budget: tokens of a micro-batch, at least 1.

    Returns:
        (B,) int64 indices into `length_K`, each row once, longest first. No micro-batch without
        rows.

    Raises:
        ValueError: if the budget is below 1, shapes differ or a length is negative.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    _check(prompt_length_K, "prompt_length_K")
    _check(length_K, "length_K")
    if prompt_length_K.shape != length_K.shape:
        raise ValueError(
            f"prompt_length_K and length_K must be equally long, got {len(prompt_length_K)} "
            f"and {len(length_K)}"
        )
    prompts, lengths = prompt_length_K.tolist(), length_K.tolist()
    orders = (
        lambda k: prompts[k] + lengths[k],
        lambda k: (lengths[k], prompts[k]),
        lambda k: (prompts[k], lengths[k]),
    )
    splits = [
        _filled(sorted(range(len(lengths)), key=order, reverse=True), prompts, lengths, budget)
        for order in orders
    ]
    best = min(
        splits, key=lambda micro: (len(micro), padded_tokens(prompt_length_K, length_K, micro))
    )
    return sorted(best, key=lambda row_B: -int((prompt_length_K + length_K)[row_B].max()))


def padded_tokens(prompt_length_K: Tensor, length_K: Tensor, micro: Sequence[Tensor]) -> int:
    """Tokens that go through the model, padding included: the sum of B x widest over `micro`."""
    return sum(
        len(row_B) * int(prompt_length_K[row_B].max() + length_K[row_B].max()) for row_B in micro
    )


def padding_share(prompt_length_K: Tensor, length_K: Tensor, micro: Sequence[Tensor]) -> float:
    """Share of the tokens that go through the model which are padding, in [0, 1).

    Args:
        prompt_length_K, length_K: as `by_tokens`.
        micro: micro-batches of them, all rows or some; 0.0 without any token.
    """
    total = padded_tokens(prompt_length_K, length_K, micro)
    real = sum(int((prompt_length_K + length_K)[row_B].sum()) for row_B in micro)
    return 1 - real / total if total else 0.0


def _filled(
    order: Sequence[int], prompts: Sequence[int], lengths: Sequence[int], budget: int
) -> list[Tensor]:
    """`order`, cut wherever one more row would exceed the budget."""
    micro: list[list[int]] = []
    prompt = length = 0
    for row in order:
        prompt, length = max(prompt, prompts[row]), max(length, lengths[row])
        if not micro or (len(micro[-1]) + 1) * (prompt + length) > budget:
            micro.append([])
            prompt, length = prompts[row], lengths[row]
        micro[-1].append(row)
    return [torch.tensor(rows, dtype=torch.int64) for rows in micro]


def _check(length_K: Tensor, name: str) -> None:
    if length_K.ndim != 1 or length_K.is_floating_point():
        raise ValueError(
            f"{name} must be integers (K,), got {length_K.dtype} {tuple(length_K.shape)}"
        )
    if (length_K < 0).any():
        raise ValueError(f"{name} must not be negative, got {int(length_K.min())}")
