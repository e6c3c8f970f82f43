"""The losses and advantages equal TRL's own code on one batch."""

import types

import pytest
import torch

from rl.advantages import grpo
from rl.losses import clipped_surrogate
from rl.step_weights import denominator, objective_weight, token_weight

pytestmark = pytest.mark.slow  # importing trl takes seven seconds


class OneProcess:
    """What TRL's loss asks of accelerate, where there is one process."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, value, reduction):
        return value

    gather = gather_for_metrics = staticmethod(lambda value: value)


class Metrics(dict):
    def __missing__(self, name):
        return self.setdefault(name, [])


def trl_loss(loss_type, logprob_NT, old_NT, advantage_N, mask_NT, *, high, delta):
    """`GRPOTrainer._compute_loss` itself, over recorded log-probabilities instead of a model."""
    from trl import GRPOTrainer

    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            logprob_NT,
            torch.zeros_like(logprob_NT),
            None,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=high,
        max_completion_length=8,
        args=types.SimpleNamespace(delta=delta, steps_per_generation=1),
        use_vllm=False,
        model=torch.nn.Identity().train(),
        current_gradient_accumulation_steps=1,
        accelerator=OneProcess(),
        _entropy_bonus_enabled=False,
        _metrics={"train": Metrics()},
    )
    mask_NT = mask_NT.long()
    inputs = {
        "prompt_ids": torch.zeros(len(mask_NT), 1).long(),
        "prompt_mask": torch.ones(len(mask_NT), 1).long(),
        "completion_ids": torch.zeros_like(mask_NT),
        "completion_mask": mask_NT,
        "advantages": advantage_N,
        "old_per_token_logps": old_NT,
        "num_items_in_batch": mask_NT.sum(),
    }
    loss = GRPOTrainer._compute_loss(fake, None, inputs)
    return loss, {name: values[-1] for name, values in fake._metrics["train"].items()}


def batch():
    generator = torch.Generator().manual_seed(0)
    logprob_NT = -torch.rand(6, 5, dtype=torch.float64, generator=generator) * 3
    old_NT = logprob_NT + torch.randn(6, 5, dtype=torch.float64, generator=generator) * 0.4
    length_N = torch.tensor([5, 1, 3, 4, 2, 5])
    mask_NT = torch.arange(5) < length_N[:, None]
    reward_N = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.2], dtype=torch.float64)
    prompt_N = torch.tensor([0, 0, 0, 1, 1, 1])
    advantage_N = grpo(reward_N, prompt_N, correction=1, eps=1e-4)
    return logprob_NT.requires_grad_(), old_NT, advantage_N, mask_NT, reward_N, prompt_N


@pytest.mark.parametrize(
    ("loss_type", "kind"),
    [("grpo", "row_mean"), ("dapo", "token_mean"), ("dr_grpo", "token_sum")],
)
@pytest.mark.parametrize("high", [0.2, 0.28])
def test_loss_gradient_and_clip_counts_equal_trls(loss_type, kind, high):
    logprob_NT, old_NT, advantage_N, mask_NT, reward_N, prompt_N = batch()
    row_weight_N = objective_weight("flat", reward_N, prompt_N, num_prompts=2)
    total = denominator(
        "flat",
        kind,
        num_prompts=2,
        num_rollouts=6,
        row_weight_N=row_weight_N,
        length_N=mask_NT.sum(1),
    )
    loss, statistics = clipped_surrogate(
        logprob_NT,
        old_NT,
        advantage_N,
        token_weight(kind, row_weight_N, mask_NT, max_completion_length=8),
        denominator=total,
        epsilon_high=high,
    )
    theirs, metrics = trl_loss(
        loss_type, logprob_NT, old_NT, advantage_N, mask_NT, high=high, delta=None
    )
    torch.testing.assert_close(loss, theirs, atol=1e-12, rtol=0)
    ours = torch.autograd.grad(loss, logprob_NT)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, logprob_NT)[0], atol=1e-12, rtol=0)
    assert ours.abs().max() > 1e-3
    for side in ("low", "high"):
        share = (statistics[f"clipped_{side}"] / statistics["tokens"]).item()
        assert share == pytest.approx(metrics[f"clip_ratio/{side}_mean"], abs=1e-6)
        assert share > 0


def test_trls_delta_is_the_dual_clip():
    # TRL caps rho at delta before the minimum, which caps the loss of A < 0 at delta |A|.
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch()
    with torch.no_grad():
        old_NT = logprob_NT - 2 * torch.rand(
            6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
    weight_NT = mask_NT.double()
    loss, statistics = clipped_surrogate(
        logprob_NT, old_NT, advantage_N, weight_NT, denominator=20.0, dual_clip=3.0
    )
    theirs, _ = trl_loss("dapo", logprob_NT, old_NT, advantage_N, mask_NT, high=0.2, delta=3.0)
    assert statistics["clipped_dual"] > 0
    torch.testing.assert_close(loss, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logprob_NT)[0],
        torch.autograd.grad(theirs, logprob_NT)[0],
        atol=1e-12,
        rtol=0,
    )
