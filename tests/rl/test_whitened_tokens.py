"""Token advantages of REINFORCE++: by hand, by a slow loop, at its edges, and in a run."""

from dataclasses import replace

import pytest
import torch

from rl.objective.advantages import batch_whitened, batch_whitened_tokens
from tests import tiny

MASK = torch.tensor([[True, True], [True, False]])
PROMPT = torch.tensor([0, 1])


def columns(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_by_hand():
    reward_N = torch.tensor([1.0, 0.0], dtype=torch.float64)
    logprob_NT, reference_NT = (
        columns([-1.0, -2.0], [-0.5, 0.0]),
        columns([-2.0, -2.5], [-0.5, 9.0]),
    )
    # k1 is 1 and .5 in the first row, 0 in the second; returns 1 - 2 * 1.5, 1 - 2 * .5, and 0.
    returns = torch.tensor([-2.0, 0.0, 0.0], dtype=torch.float64)
    expected = (returns - returns.mean()) / returns.std(correction=0)
    found = batch_whitened_tokens(
        reward_N, PROMPT, logprob_NT, reference_NT, MASK, beta=2.0, correction=0, eps=0.0
    )
    assert found[MASK].tolist() == pytest.approx(expected.tolist(), abs=1e-14)
    assert found[1, 1] == 0


@pytest.mark.parametrize("correction", [0, 1])
def test_matches_the_definition_token_by_token(correction):
    generator = torch.Generator().manual_seed(correction)
    reward_N = torch.rand(5, generator=generator, dtype=torch.float64)
    logprob_NT, reference_NT = (
        torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    mask_NT = torch.rand(5, 7, generator=generator) < 0.6
    returns = {}
    for i, t in mask_NT.nonzero().tolist():
        later = sum(
            float(logprob_NT[i, u] - reference_NT[i, u]) for u in range(t, 7) if mask_NT[i, u]
        )
        returns[i, t] = float(reward_N[i]) - 0.3 * later
    values = torch.tensor(list(returns.values()), dtype=torch.float64)
    found = batch_whitened_tokens(
        reward_N,
        torch.arange(5),
        logprob_NT,
        reference_NT,
        mask_NT,
        beta=0.3,
        correction=correction,
        eps=1e-3,
    )
    for (i, t), value in returns.items():
        expected = (value - values.mean()) / (values.std(correction=correction) + 1e-3)
        assert float(found[i, t]) == pytest.approx(float(expected), abs=1e-12)
    assert not found[~mask_NT].any()


def test_without_a_kl_and_with_rows_of_one_length_it_is_the_row_form():
    reward_N = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    zero_NT, mask_NT = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    prompt_N = torch.tensor([0, 0, 1])
    std = {"correction": 0, "eps": 0}
    found = batch_whitened_tokens(reward_N, prompt_N, zero_NT, zero_NT, mask_NT, beta=0.1, **std)
    expected = batch_whitened(reward_N, prompt_N, **std)[:, None].expand(3, 4)
    torch.testing.assert_close(found, expected)


def test_equal_returns_have_no_advantage():
    reward_N, zero_NT = torch.ones(2), torch.zeros(2, 2)
    found = batch_whitened_tokens(reward_N, PROMPT, zero_NT, zero_NT, MASK, beta=1.0)
    assert not found.any() and found.dtype == reward_N.dtype


def test_it_says_what_is_wrong():
    reward_N, zero_NT = torch.ones(2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="beta must be finite and at least 0, got -1"):
        batch_whitened_tokens(reward_N, PROMPT, zero_NT, zero_NT, MASK, beta=-1.0)
    with pytest.raises(ValueError, match=r"must share one shape \(N, T\), got \(2, 2\), \(2, 3\)"):
        batch_whitened_tokens(reward_N, PROMPT, zero_NT, torch.zeros(2, 3), MASK, beta=1.0)
    bad_NT = torch.tensor([[0.0, float("nan")], [0.0, float("nan")]])
    with pytest.raises(ValueError, match="finite where the mask is True, row 0 is not"):
        batch_whitened_tokens(reward_N, PROMPT, bad_NT, zero_NT, MASK, beta=1.0)
    with pytest.raises(ValueError, match="beta=0.5 needs reference_logprob_NT, got None"):
        batch_whitened_tokens(reward_N, PROMPT, zero_NT, None, MASK, beta=0.5)


def test_without_a_kl_long_rows_count_by_their_tokens_in_mean_and_std():
    # verl's masked whitening: the mean over 4 tokens of (1, 0, 0, 0) is 1/4, its unbiased variance 1/4.
    reward_N = torch.tensor([1.0, 0.0], dtype=torch.float64)
    mask_NT = torch.tensor([[True, False, False], [True, True, True]])
    found = batch_whitened_tokens(
        reward_N, PROMPT, torch.zeros(2, 3), None, mask_NT, beta=0.0, eps=0.0
    )
    assert found[mask_NT].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-15)
    rows = batch_whitened(reward_N, PROMPT, eps=0.0)
    assert rows.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-15)


@pytest.mark.slow
def test_a_run_needs_no_reference_without_a_kl(tmp_path):
    settings = {"trainer": "grpo", "advantage": "batch_whitened_tokens", "loss": "gspo"}
    made = tiny.run(tmp_path, reward=tiny.small_digit, max_steps=1, **settings)
    assert made.policy.reference is None and tiny.step_logs(tmp_path)[0]["advantage_abs_mean"] > 0


@pytest.mark.slow
def test_a_run_credits_tokens_apart(tmp_path):
    settings = {"trainer": "grpo", "advantage": "batch_whitened_tokens", "reward_kl": 0.5}
    made = tiny.trainer(tmp_path, reward=tiny.small_digit, **settings)
    seen = []
    loss = made.objective.loss_function

    def watched(logprob_NT, old_NT, advantage, weight_NT, **rest):
        seen.append(advantage)
        return loss(logprob_NT, old_NT, advantage, weight_NT, **rest)

    made.objective = replace(made.objective, loss_function=watched)
    made.train()
    assert seen and all(advantage.ndim == 2 for advantage in seen)
    # From the second step on the policy has left the reference, and tokens of a row differ.
    assert any((part[:, 0] != part[:, 1]).any() for part in seen if part.shape[1] > 1)
