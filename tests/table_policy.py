"""A policy that is a table, small enough for every expectation over it to be summed exactly.

Prompt p answers with up to T tokens; token t is drawn from softmax(logit_PTV[p, t]), whatever came
before, and token 0 ends the answer. All probabilities, scores and expected gradients can then be
written down by running through all answers, and through all groups of n answers.

Axes: P prompts, T decision steps, V tokens, A answers, U universes (possible outcomes of a draw of
n rollouts), N rollouts of all universes together.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from rl.objective import losses
from rl.objective import weights as step_weights

END = 0


class TablePolicy:
    """The policy; `logit_PTV` is its only parameter, float64, and requires a gradient."""

    def __init__(self, num_prompts: int, num_steps: int = 2, vocabulary: int = 3, *, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, num_steps, vocabulary)
        self.logit_PTV = torch.randn(shape, dtype=torch.float64, generator=generator)
        self.logit_PTV.requires_grad_()
        rows = []
        for length in range(1, num_steps + 1):
            for head in itertools.product(range(1, vocabulary), repeat=length - 1):
                # An answer shorter than T must end by the token that ends it; a full one may.
                last = range(vocabulary) if length == num_steps else [END]
                rows += [(*head, token) for token in last]
        self.answers = rows
        self.token_AT = torch.tensor([row + (0,) * (num_steps - len(row)) for row in rows])
        self.mask_AT = torch.tensor([[t < len(row) for t in range(num_steps)] for row in rows])

    @property
    def num_prompts(self) -> int:
        return self.logit_PTV.shape[0]

    @property
    def max_length(self) -> int:
        return self.logit_PTV.shape[1]

    def logprob_NT(self, prompt_N: Tensor, answer_N: Tensor) -> Tensor:
        """Log-probability of every token of the given answers, with gradient; 0 off the mask."""
        logprob_NTV = self.logit_PTV.log_softmax(-1)[prompt_N]
        chosen_NT = logprob_NTV.gather(2, self.token_AT[answer_N, :, None])[..., 0]
        return torch.where(self.mask_AT[answer_N], chosen_NT, 0.0)

    def probability_PA(self) -> Tensor:
        """Probability of every answer to every prompt, with gradient."""
        num_answers = len(self.answers)
        prompt_N = torch.arange(self.num_prompts).repeat_interleave(num_answers)
        answer_N = torch.arange(num_answers).repeat(self.num_prompts)
        total_N = self.logprob_NT(prompt_N, answer_N).sum(1)
        return total_N.exp().reshape(self.num_prompts, num_answers)

    def gradient(self, scalar: Tensor) -> Tensor:
        """d scalar / d logit_PTV, flat per prompt: (P, T * V)."""
        (grad,) = torch.autograd.grad(scalar, self.logit_PTV)
        return grad.flatten(1)

    def score_PAD(self) -> Tensor:
        """grad log p of every answer with respect to its own prompt's logits: (P, A, T * V)."""
        score = torch.zeros(self.num_prompts, len(self.answers), self.logit_PTV[0].numel())
        score = score.double()
        for p in range(self.num_prompts):
            for a in range(len(self.answers)):
                logp = self.logprob_NT(torch.tensor([p]), torch.tensor([a])).sum()
                score[p, a] = self.gradient(logp)[p]
        return score

    def pass_rate_P(self, reward_PA: Tensor) -> Tensor:
        """E[reward] of every prompt, with gradient."""
        return (self.probability_PA() * reward_PA).sum(1)


@dataclass(frozen=True)
class Universes:
    """Every outcome of drawing n answers to one prompt, as rows that lie one after the other."""

    universe_N: Tensor
    answer_N: Tensor
    slot_N: Tensor
    probability_U: Tensor


def universes(probability_A: Tensor, num_rollouts: int) -> Universes:
    """All A^n groups of n independent answers, with their probabilities (no gradient)."""
    probability_A = probability_A.detach()
    index = torch.cartesian_prod(*[torch.arange(len(probability_A))] * num_rollouts)
    answer_UN = index.reshape(-1, num_rollouts)
    num_universes = len(answer_UN)
    return Universes(
        universe_N=torch.arange(num_universes).repeat_interleave(num_rollouts),
        answer_N=answer_UN.flatten(),
        slot_N=torch.arange(num_rollouts).repeat(num_universes),
        probability_U=probability_A[answer_UN].prod(1),
    )


def expected_loss_gradient(
    policy: TablePolicy,
    reward_PA: Tensor,
    budget,
    *,
    advantage,
    objective: str = "mean",
    kind: str = "token_sum",
    pass_rate_P: Tensor | None = None,
    loss=losses.clipped_surrogate,
) -> Tensor:
    """Expected gradient of the whole pipeline over all outcomes, by enumeration: (P, T * V).

    rewards -> advantage -> objective weight -> token weight -> loss -> autograd, with the library's
    functions. Every universe of a prompt is a group of its own in one large batch, and its rows are
    multiplied by the universe's probability; prompts are independent and their gradients do not
    mix, so one prompt at a time is enough. The sign is that of ascent.
    """
    gradient_PD = torch.zeros_like(policy.logit_PTV.detach()).flatten(1)
    for p, (probability_A, num_rollouts) in enumerate(
        zip(policy.probability_PA(), budget, strict=True)
    ):
        u = universes(probability_A, int(num_rollouts))
        gradient_PD += group_gradient(
            policy,
            p,
            reward_PA[p],
            u.universe_N,
            u.answer_N,
            u.probability_U[u.universe_N],
            advantage=advantage,
            objective=objective,
            kind=kind,
            pass_rate_P=pass_rate_P,
            loss=loss,
            denominator=float(sum(budget) if objective == "flat" else policy.num_prompts),
        )
    return gradient_PD


def group_gradient(
    policy: TablePolicy,
    prompt: int,
    reward_A: Tensor,
    group_N: Tensor,
    answer_N: Tensor,
    scale_N: Tensor,
    *,
    advantage,
    objective: str = "mean",
    kind: str = "token_sum",
    pass_rate_P: Tensor | None = None,
    loss=losses.clipped_surrogate,
    denominator: float,
) -> Tensor:
    """Gradient of the pipeline over groups of answers to one prompt, each row times `scale_N`."""
    reward_N = reward_A[answer_N]
    mask_NT = policy.mask_AT[answer_N]
    _, group_N = group_N.unique(return_inverse=True)
    num_groups = int(group_N.max()) + 1
    weight_N = step_weights.objective_weight(
        objective,
        reward_N,
        group_N,
        num_prompts=num_groups,
        pass_rate_P=None if pass_rate_P is None else pass_rate_P[prompt].expand(num_groups),
        floor=1e-9,
    )
    weight_NT = step_weights.token_weight(
        kind, weight_N * scale_N, mask_NT, max_completion_length=policy.max_length
    )
    if kind == "token_sum":
        weight_NT = weight_NT * policy.max_length  # undo the constant: the score itself
    logprob_NT = policy.logprob_NT(torch.full_like(answer_N, prompt), answer_N)
    value, _ = loss(
        logprob_NT,
        logprob_NT.detach(),
        advantage(reward_N, group_N),
        weight_NT,
        denominator=denominator,
    )
    return -policy.gradient(value)
