from dataclasses import replace

import pytest
import torch

from rollouts.batch import Rollouts, TokenRollouts, concatenate


def three(**changes):
    return Rollouts(
        **{
            "prompt_N": torch.tensor([0, 0, 1]),
            "mask_NT": torch.tensor([[True, True], [True, False], [True, True]]),
            "logprob_NT": torch.tensor([[-0.1, -0.7], [-2.3, 0.0], [-0.4, -0.2]]),
            "version": 12,
        }
        | changes
    )


def two_of_tokens(**changes):
    """Of prompt 1 and prompt 0 of two; lengths 3 and 1."""
    return TokenRollouts(
        **{
            "prompt_N": torch.tensor([1, 0]),
            "mask_NT": torch.tensor([[True, True, True], [True, False, False]]),
            "logprob_NT": torch.tensor([[-0.1, -0.7, -0.2], [-2.3, 0.0, 0.0]]),
            "version": 12,
            "token_NT": torch.tensor([[5, 6, 7], [2, 0, 0]]),
            "truncated_N": torch.tensor([True, False]),
            "seed_N": torch.tensor([11, 12]),
            "prompt_ids": ((4, 8), (9,)),
        }
        | changes
    )


def test_take_keeps_every_column_in_step():
    batch = three(reward_N=torch.tensor([1.0, 0.0, 0.5])).take(torch.tensor([2, 0, 2]))
    assert batch.prompt_N.tolist() == [1, 0, 1]
    assert batch.reward_N.tolist() == [0.5, 1.0, 0.5]
    torch.testing.assert_close(batch.logprob_NT[0], torch.tensor([-0.4, -0.2]))
    assert batch.version == 12


def test_take_moves_tokens_and_shares_the_prompts():
    batch = two_of_tokens()
    taken = batch.take(torch.tensor([1]))
    assert isinstance(taken, TokenRollouts)
    assert taken.token_NT.tolist() == [[2, 0, 0]]
    assert taken.truncated_N.tolist() == [False]
    assert taken.seed_N.tolist() == [12]
    assert taken.advantage_N is None
    assert taken.prompt_ids is batch.prompt_ids


def test_taking_nothing_leaves_a_batch_without_rows():
    empty = two_of_tokens().take(torch.tensor([], dtype=torch.int64))
    assert len(empty) == 0
    assert empty.token_NT.shape == (0, 3)


def test_length_counts_the_decisions_not_the_columns():
    assert three().length_N.tolist() == [2, 1, 2]
    hole = torch.tensor([[True, False], [True, False], [True, True]])  # tool output in row 0
    assert three(mask_NT=hole, logprob_NT=-hole.float()).length_N.tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_to_moves_every_column(device):
    moved = two_of_tokens(reward_N=torch.zeros(2)).to(device)
    for name in ("prompt_N", "mask_NT", "logprob_NT", "token_NT", "truncated_N", "reward_N"):
        assert getattr(moved, name).device.type == device
    assert moved.token_NT.tolist() == [[5, 6, 7], [2, 0, 0]]
    assert moved.prompt_ids == ((4, 8), (9,))


def test_misaligned_columns_are_refused():
    with pytest.raises(ValueError, match=r"reward_N has shape \(2,\), expected \(3,\)"):
        three(reward_N=torch.zeros(2))
    with pytest.raises(ValueError, match=r"logprob_NT has shape \(3, 1\), expected \(3, 2\)"):
        three(logprob_NT=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"token_NT has shape \(2, 2\), expected \(2, 3\)"):
        two_of_tokens(token_NT=torch.zeros(2, 2, dtype=torch.int64))


def test_a_logprob_under_the_mask_is_refused():
    with pytest.raises(ValueError, match="must be 0 wherever mask_NT is False"):
        three(logprob_NT=torch.full((3, 2), -0.5))


def test_a_logprob_that_is_not_finite_is_refused_with_its_row():
    logprob_NT = three().logprob_NT.clone()
    logprob_NT[2, 0] = -torch.inf
    with pytest.raises(ValueError, match=r"must be finite, but rows \[2\] are not"):
        three(logprob_NT=logprob_NT)


def test_columns_of_the_wrong_type_are_refused():
    with pytest.raises(ValueError, match=r"mask_NT must be bool of shape \(N, T\)"):
        three(mask_NT=torch.ones(3, 2))
    with pytest.raises(ValueError, match="prompt_N must be int64, got torch.float32"):
        three(prompt_N=torch.zeros(3))
    with pytest.raises(ValueError, match="seed_N must be torch.int64, got torch.float32"):
        two_of_tokens(seed_N=torch.zeros(2))


def test_a_prompt_that_is_not_in_the_list_is_refused():
    with pytest.raises(ValueError, match="must index the 2 prompts of prompt_ids.* from 0 to 2"):
        two_of_tokens(prompt_N=torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="from -1 to 0"):
        two_of_tokens(prompt_N=torch.tensor([-1, 0]))


def test_concatenate_pads_the_shorter_batch():
    short = three()  # T = 2
    wide = Rollouts(
        prompt_N=torch.tensor([1]),
        mask_NT=torch.tensor([[True, True, True]]),
        logprob_NT=torch.tensor([[-1.0, -2.0, -3.0]]),
        version=12,
    )
    joined = concatenate([short, wide])
    assert joined.mask_NT.tolist() == [
        [True, True, False],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert joined.logprob_NT[:, 2].tolist() == [0.0, 0.0, 0.0, -3.0]
    assert joined.prompt_N.tolist() == [0, 0, 1, 1]


def test_concatenate_is_undone_by_take():
    batch = two_of_tokens(reward_N=torch.tensor([1.0, 0.0], dtype=torch.float64))
    joined = concatenate([batch, batch.take(torch.tensor([1]))])
    again = joined.take(torch.arange(2))
    assert joined.token_NT.tolist() == [[5, 6, 7], [2, 0, 0], [2, 0, 0]]
    assert again.token_NT.tolist() == batch.token_NT.tolist()
    assert again.reward_N.dtype == torch.float64
    assert joined.prompt_ids == batch.prompt_ids


def test_concatenate_chains_different_prompts_at_their_offsets():
    first, second = two_of_tokens(), two_of_tokens(prompt_ids=((1,), (2, 3)))
    joined = concatenate([first, second], offsets=[0, 2])
    assert joined.prompt_N.tolist() == [1, 0, 3, 2]
    assert joined.prompt_ids == ((4, 8), (9,), (1,), (2, 3))


def test_concatenate_writes_the_pad_token_asked_for():
    batch = two_of_tokens()
    short = replace(
        batch.take(torch.tensor([1])),
        mask_NT=torch.ones(1, 1, dtype=torch.bool),
        logprob_NT=torch.zeros(1, 1),
        token_NT=torch.tensor([[2]]),
    )
    assert concatenate([batch, short], pad_id=42).token_NT[2].tolist() == [2, 42, 42]


def test_batches_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        concatenate([])
    with pytest.raises(ValueError, match=r"must be of one version, got \[12, 13\]"):
        concatenate([three(), three(version=13)])
    with pytest.raises(
        ValueError, match=r"must be of one class, got \['Rollouts', 'TokenRollouts'"
    ):
        concatenate([three(), two_of_tokens()])
    with pytest.raises(ValueError, match="reward_N is set in some batches and None in others"):
        concatenate([three(), three(reward_N=torch.zeros(3))])
    with pytest.raises(ValueError, match="different prompts need offsets"):
        concatenate([two_of_tokens(), two_of_tokens(prompt_ids=((1,), (2,)))])
    with pytest.raises(ValueError, match="offsets has 1 entries for 2 batches"):
        concatenate([three(), three()], offsets=[0])
    with pytest.raises(ValueError, match=r"running totals.* got \[0, 3\] for lists of \[2, 2\]"):
        concatenate([two_of_tokens(), two_of_tokens()], offsets=[0, 3])
