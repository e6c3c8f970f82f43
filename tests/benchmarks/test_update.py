"""The benchmark of the update measures what it says it measures."""

import torch

from benchmarks.update import CASES, SIZES, apart, build_rows, peak_bytes
from rl.logprobs.from_logits import ends

MIB = 2**20


def test_peak_is_the_most_that_stood_at_once():
    def update():
        one = torch.ones(3 * MIB, dtype=torch.uint8)
        two = torch.ones(4 * MIB, dtype=torch.uint8)
        del one
        three = torch.ones(2 * MIB, dtype=torch.uint8)
        del two, three
        return torch.ones(5 * MIB, dtype=torch.uint8)

    # 3 + 4 at first, then 4 + 2, then 5; what stood before does not count.
    before = torch.ones(20 * MIB, dtype=torch.uint8)
    peak = peak_bytes(update, torch.nn.Identity(), "cpu")
    assert 7 * MIB <= peak < 7.01 * MIB
    assert len(before) == 20 * MIB


def test_memory_given_back_between_two_peaks_is_not_counted_twice():
    def update():
        for _ in range(3):
            torch.ones(6 * MIB, dtype=torch.uint8)

    assert 6 * MIB <= peak_bytes(update, torch.nn.Identity(), "cpu") < 6.01 * MIB


def test_rows_have_the_lengths_their_case_names():
    rows, micro, prompt_length, longest = SIZES["cpu"]
    even = build_rows(CASES["wide, even"], SIZES["cpu"])
    assert (ends(even.mask_NT) == longest).all() and len(even) == rows
    ragged = build_rows(CASES["wide, ragged"], SIZES["cpu"])
    assert ends(ragged.mask_NT).max() == longest
    assert ends(ragged.mask_NT).float().mean() < 0.5 * longest
    assert {len(prompt) for prompt in ragged.prompt_ids} == {prompt_length}
    assert rows % micro == 0


def test_apart_by_hand():
    # (3, 4) against (3, 5): 1 over sqrt(34).
    assert apart(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) - 34**-0.5 < 1e-7
