"""What ending decided rollouts does to the expected gradient, by exact enumeration.

The reward depends on the first two of four tokens, and the first decides it for some answers. Tokens
after the decision have a score of expectation 0 given what was drawn before, so a sum over tokens loses
nothing but variance; a mean over the row's tokens gives those before the decision another weight.
"""

import pytest
import torch

from rl.objective.advantages import grpo, leave_one_out
from tests.table_policy import END, TablePolicy, expected_loss_gradient, group_gradient, universes


def decision(answer):
    """Tokens after which the reward is known: one where the first is 1, else two."""
    return 1 if answer[0] == 1 else 2


def reward_of(answer):
    return 0.0 if answer[0] == 1 else float(len(answer) > 1 and answer[1] != END)


class Ended(TablePolicy):
    """Answers as likely as they are in full, whose rows hold the tokens up to the decision."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.full_AT = self.mask_AT
        ends_A1 = torch.tensor([[decision(answer)] for answer in self.answers])
        self.cut_AT = self.full_AT & (torch.arange(self.max_length) < ends_A1)
        self.mask_AT = self.cut_AT

    def probability_PA(self):
        self.mask_AT = self.full_AT
        probability_PA = super().probability_PA()
        self.mask_AT = self.cut_AT
        return probability_PA


SIZES = {"num_prompts": 2, "num_steps": 4, "vocabulary": 3}


def both(budget, **settings):
    """Expected gradients with whole rollouts and with rollouts that verdicts ended."""
    found = []
    for kind in (TablePolicy, Ended):
        policy = kind(**SIZES, seed=3)
        reward_A = torch.tensor([reward_of(answer) for answer in policy.answers]).double()
        found.append(
            expected_loss_gradient(
                policy, reward_A.expand(policy.num_prompts, -1), budget, **settings
            )
        )
    return found


def test_the_rows_are_shorter_and_their_rewards_the_same():
    policy = Ended(**SIZES)
    length_A = policy.mask_AT.sum(1)
    assert (length_A <= policy.full_AT.sum(1)).all() and length_A.max() == 2
    for answer in policy.answers:
        alike = [
            other
            for other in policy.answers
            if other[: decision(answer)] == answer[: decision(answer)]
        ]
        assert len({reward_of(other) for other in alike}) == 1


@pytest.mark.parametrize(
    ("advantage", "budget"),
    [
        (lambda reward_N, group_N: reward_N, [1, 1]),
        (leave_one_out, [2, 1]),
        (grpo, [2, 2]),
    ],
    ids=["reward", "leave_one_out", "grpo"],
)
def test_a_sum_over_tokens_has_the_same_expected_gradient(advantage, budget):
    whole, ended = both(budget, advantage=advantage, kind="token_sum")
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(ended, whole, atol=1e-12, rtol=0)


def test_a_mean_over_tokens_has_another():
    whole, ended = both([2, 2], advantage=leave_one_out, kind="row_mean")
    assert (ended - whole).abs().max() > 0.1 * whole.abs().max()


def test_the_gradient_of_one_rollout_varies_less():
    def variance(kind):
        policy = kind(**SIZES, seed=3)
        probability_A = policy.probability_PA()[0].detach()
        reward_A = torch.tensor([reward_of(answer) for answer in policy.answers]).double()
        total = torch.zeros(())
        of_all = universes(probability_A, 1)
        for answer, chance in zip(of_all.answer_N, of_all.probability_U, strict=True):
            gradient = group_gradient(
                policy,
                0,
                reward_A,
                torch.zeros(1, dtype=torch.int64),
                answer[None],
                torch.ones(1).double(),
                advantage=lambda reward_N, group_N: reward_N,
                denominator=1.0,
            )
            total = total + chance * gradient.square().sum()
        return float(total)

    # Expectations are the same, so second moments compare variances.
    assert variance(Ended) < 0.9 * variance(TablePolicy)
