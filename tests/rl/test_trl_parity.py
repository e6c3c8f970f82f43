"""The losses and advantages equal TRL's own code on one batch."""

import types
from typing import Any

import pytest
import torch

from rl.objective.advantages import grpo
from rl.objective.importance import correction
from rl.objective.kl import kl_k3, kl_k3_weighted
from rl.objective.losses import cispo, clipped_surrogate, sapo
from rl.objective.sequence_losses import gspo, rloo, vespo
from rl.objective.token_selection import above_quantile
from rl.objective.weights import denominator, objective_weight, token_weight

pytestmark = pytest.mark.slow  # importing trl takes seven seconds


class OneProcess:
    """What TRL's loss asks of accelerate, where there is one process."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, value, reduction):
        return value

    gather = gather_for_metrics = staticmethod(lambda value: value)
    pad_across_processes = staticmethod(lambda value, **_: value)


class Metrics(dict):
    def __missing__(self, name):
        return self.setdefault(name, [])


def trl_loss(
    loss_type,
    logprob_NT,
    old_NT,
    advantage_N,
    mask_NT,
    *,
    high=0.2,
    low=0.2,
    delta=None,
    level="token",
    beta=0.0,
    reference_NT=None,
    bias_correction=True,
    factor_NT=None,
    entropy_NT=None,
    quantile=1.0,
    entropy_coef=0.0,
):
    """`GRPOTrainer._compute_loss` itself, over recorded log-probabilities instead of a model."""
    from trl import GRPOConfig, GRPOTrainer

    published = GRPOConfig.__dataclass_fields__
    settings = {
        name: field.default
        for name, field in published.items()
        if name.startswith(("sapo_", "vespo_"))
    }
    if entropy_NT is None:
        entropy_NT = torch.zeros_like(logprob_NT)
    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprob_NT, entropy_NT, None),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_high_entropy_mask=lambda *args: GRPOTrainer.get_high_entropy_mask(fake, *args),
        aux_loss_enabled=False,
        top_entropy_quantile=quantile,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        max_completion_length=8,
        args=types.SimpleNamespace(
            delta=delta, steps_per_generation=1, use_bias_correction_kl=bias_correction, **settings
        ),
        use_vllm=factor_NT is not None,
        vllm_importance_sampling_correction=True,
        model=torch.nn.Identity().train(),
        current_gradient_accumulation_steps=1,
        accelerator=OneProcess(),
        _entropy_bonus_enabled=entropy_coef != 0,
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
        "ref_per_token_logps": reference_NT,
        "importance_sampling_ratio": factor_NT,
        "num_items_in_batch": mask_NT.sum(),
    }
    loss = GRPOTrainer._compute_loss(fake, None, inputs)
    return loss, {name: values[-1] for name, values in fake._metrics["train"].items()}


def trl_rloo(logprob_NT, old_NT, advantage_N, mask_NT):
    """`RLOOTrainer._compute_loss` itself."""
    from trl import RLOOTrainer

    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            logprob_NT,
            torch.zeros_like(logprob_NT),
            None,
        ),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=torch.nn.Identity().train(),
        accelerator=OneProcess(),
        _metrics={"train": Metrics()},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask_NT), 1).long(),
        "prompt_mask": torch.ones(len(mask_NT), 1).long(),
        "completion_ids": torch.zeros_like(mask_NT).long(),
        "completion_mask": mask_NT.long(),
        "advantages": advantage_N,
        "old_logps": (old_NT * mask_NT).sum(1),
    }
    loss = RLOOTrainer._compute_loss(fake, None, inputs)
    return loss, {name: values[-1] for name, values in fake._metrics["train"].items()}


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
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


def weights(kind, mask_NT):
    """Weight and denominator of the table in `rl/objective/losses.py`, every row of weight 1."""
    if kind == "row_mean":
        return mask_NT.double() / mask_NT.sum(1, keepdim=True), float(len(mask_NT))
    return mask_NT.double(), float(len(mask_NT) if kind == "row_sum" else mask_NT.sum())


def assert_equal(ours, theirs, logprob_NT, *, atol=1e-12):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
    ours_NT = torch.autograd.grad(ours, logprob_NT)[0]
    theirs_NT = torch.autograd.grad(theirs, logprob_NT)[0]
    torch.testing.assert_close(ours_NT, theirs_NT, atol=atol, rtol=0)
    assert ours_NT.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "kind", "loss"),
    [
        ("cispo", "token_mean", lambda *a, **k: cispo(*a, ratio_cap=1.3, **k)),
        ("sapo", "row_mean", sapo),
    ],
)
def test_token_losses_equal_trls(name, kind, loss):
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch()
    weight_NT, total = weights(kind, mask_NT)
    ours, statistics = loss(logprob_NT, old_NT, advantage_N, weight_NT, denominator=total)
    rows = (logprob_NT, old_NT, advantage_N, mask_NT)
    theirs, metrics = trl_loss(name, *rows, high=1.3)  # TRL's cap of the ratio is epsilon_high
    # TRL's temperature 1.05 of SAPO is a float32 tensor.
    assert_equal(ours, theirs, logprob_NT, atol=1e-12 if name == "cispo" else 1e-7)
    if name == "cispo":
        positive_N = advantage_N > 0
        _, some = loss(*(x[positive_N] for x in (*rows[:3], weight_NT)), denominator=total)
        share = (some["capped"] / statistics["tokens"]).item()
        assert share == pytest.approx(metrics["cispo_clip_ratio"], abs=1e-6) and share > 0


def test_a_cispo_cap_left_at_trls_default_epsilon_scales_the_gradient_down():
    logprob_NT, _, advantage_N, mask_NT, _, _ = batch()
    rows = (logprob_NT, logprob_NT.detach(), advantage_N)
    weight_NT, total = weights("token_mean", mask_NT)
    ours, _ = cispo(*rows, weight_NT, denominator=total, ratio_cap=5.0)
    theirs, _ = trl_loss("cispo", *rows, mask_NT, high=0.2)
    torch.testing.assert_close(
        torch.autograd.grad(theirs, logprob_NT)[0],
        0.2 * torch.autograd.grad(ours, logprob_NT)[0],
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize(("name", "kind"), [("grpo", "row_mean"), ("luspo", "row_sum")])
@pytest.mark.parametrize("delta", [None, 1.15])
@pytest.mark.parametrize("low", [3e-4, 0.05])
def test_gspo_and_luspo_equal_trls(name, kind, delta, low):
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch(seed=1)
    weight_NT, total = weights(kind, mask_NT)
    ours, statistics = gspo(
        logprob_NT,
        old_NT,
        advantage_N,
        weight_NT,
        denominator=total,
        mask_NT=mask_NT,
        epsilon_low=low,
        epsilon_high=0.06,
        dual_clip=delta,
    )
    theirs, metrics = trl_loss(
        *(name, logprob_NT, old_NT, advantage_N, mask_NT),
        low=low,
        high=0.06,
        delta=delta,
        level="sequence",
    )
    assert_equal(ours, theirs, logprob_NT)
    assert statistics["clipped_high"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert (statistics["clipped_dual"] > 0) == (delta is not None)


def test_vespo_equals_trls():
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch(seed=1)
    weight_NT, total = weights("token_mean", mask_NT)
    ours, _ = vespo(
        *(logprob_NT, old_NT, advantage_N, weight_NT), denominator=total, mask_NT=mask_NT
    )
    theirs, metrics = trl_loss("vespo", logprob_NT, old_NT, advantage_N, mask_NT)
    assert_equal(ours, theirs, logprob_NT)
    row_mean_NT, _ = weights("row_mean", mask_NT)
    shares = [
        vespo(
            *(x[n : n + 1] for x in (logprob_NT, old_NT, advantage_N, row_mean_NT)),
            denominator=1.0,
            mask_NT=mask_NT[n : n + 1],
        )[1]
        for n in range(6)
    ]
    mean = sum((s["phi"] / s["tokens"]).item() for s in shares) / 6
    assert mean == pytest.approx(metrics["vespo/phi_seq_mean"], abs=1e-6)


def test_rloo_equals_trls():
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch(seed=1)
    weight_NT, total = weights("row_mean", mask_NT)
    ours, statistics = rloo(
        *(logprob_NT, old_NT, advantage_N, weight_NT), denominator=total, mask_NT=mask_NT
    )
    theirs, metrics = trl_rloo(logprob_NT, old_NT, advantage_N, mask_NT)
    assert_equal(ours, theirs, logprob_NT)
    assert statistics["clipped_low"] > 0 and statistics["clipped_high"] > 0
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("dapo", "token_mean"), ("grpo", "row_mean")])
def test_the_kl_terms_equal_trls(name, kind, bias_correction):
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch()
    generator = torch.Generator().manual_seed(2)
    reference_NT = logprob_NT.detach() + 0.5 * torch.randn(6, 5, generator=generator).double()
    weight_NT, total = weights(kind, mask_NT)
    ours, _ = clipped_surrogate(logprob_NT, old_NT, advantage_N, weight_NT, denominator=total)
    pair = (logprob_NT, reference_NT, weight_NT)
    if bias_correction:
        kl, statistics = kl_k3_weighted(*pair, denominator=total, old_logprob_NT=old_NT)
    else:
        kl, statistics = kl_k3(*pair, denominator=total)
    theirs, metrics = trl_loss(
        *(name, logprob_NT, old_NT, advantage_N, mask_NT),
        beta=0.3,
        reference_NT=reference_NT,
        bias_correction=bias_correction,
    )
    assert_equal(ours + 0.3 * kl, theirs, logprob_NT)
    if not bias_correction:
        mean = (statistics["kl_k3"] / statistics["kl_tokens"]).item()
        assert mean == pytest.approx(metrics["kl"], abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_correction_factors_multiply_the_weights_as_in_trl(level, mode):
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch()
    generator = torch.Generator().manual_seed(3)
    engine_NT = old_NT + 0.3 * torch.randn(6, 5, generator=generator).double()
    factor_NT, statistics = correction(old_NT, engine_NT, mask_NT, level=level, mode=mode, cap=1.2)
    assert statistics["is_above"] > 0
    weight_NT, total = weights("token_mean", mask_NT)
    ours, _ = clipped_surrogate(
        logprob_NT, old_NT, advantage_N, weight_NT * factor_NT, denominator=total
    )
    # TRL's ratio, (N, T) or (N, 1), as its rollouts bring it to the loss.
    difference_NT = (old_NT - engine_NT) * mask_NT
    if level == "sequence":
        difference_NT = difference_NT.sum(1, keepdim=True)
    ratio_NT = difference_NT.exp()
    if mode == "truncate":
        ratio_NT = ratio_NT.clamp(max=1.2)
    else:
        ratio_NT = ratio_NT.masked_fill(ratio_NT > 1.2, 0.0)
    theirs, _ = trl_loss(*("dapo", logprob_NT, old_NT, advantage_N, mask_NT), factor_NT=ratio_NT)
    assert_equal(ours, theirs, logprob_NT)


def weighed(settings, reward_N, prompt_N, mask_NT, truncated_N):
    """What the trainer makes of these rows: their advantages, weights and denominator."""
    from rl.config.language import RolloutConfig
    from rl.stages.objective import objective_of
    from rl.stages.records import Groups
    from rl.stages.weigh import weigh
    from rollouts.batch import TokenRollouts

    num_prompts = int(prompt_N.max()) + 1
    config = RolloutConfig(
        output_dir="unused", report_to="none", use_cpu=True, trainer="grpo", **settings
    )
    ledger: Any = types.SimpleNamespace(account=lambda *_, **__: None)
    unused: Any = None  # no log-probability is missing, and no reward pays for a KL
    rollouts = TokenRollouts(
        prompt_N=prompt_N,
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(mask_NT.shape),
        version=0,
        token_NT=mask_NT.long(),
        truncated_N=truncated_N,
        seed_N=torch.arange(len(prompt_N)),
        prompt_ids=((0,),) * num_prompts,
        reward_N=reward_N,
        success_N=reward_N,
    )
    groups = Groups(
        prompts=[None] * num_prompts,
        rollouts=rollouts,
        a_P=torch.ones(num_prompts).double(),
        b_P=torch.ones(num_prompts).double(),
        weight_P=torch.ones(num_prompts).double(),
    )
    objective = objective_of(config)
    found = weigh(groups, [], objective, unused, unused, progress=0.0, ledger=ledger)
    kept = found.rollouts
    weight_NT = torch.zeros(mask_NT.shape, dtype=torch.float64)
    weight_NT[kept.seed_N] = token_weight(
        config.length_weight, found.weight_K, kept.mask_NT, max_completion_length=8
    )
    advantage_N = torch.zeros(len(prompt_N), dtype=torch.float64)
    advantage_N[kept.seed_N] = kept.advantage_N.double()
    return advantage_N, weight_NT, found.denominator


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    ("name", "level", "settings", "loss"),
    [
        ("grpo", "token", {}, clipped_surrogate),
        ("dapo", "token", {"loss": "dapo"}, clipped_surrogate),
        ("dr_grpo", "token", {"loss": "dr_grpo"}, clipped_surrogate),
        ("cispo", "token", {"loss": "cispo"}, lambda *a, **k: cispo(*a, ratio_cap=1.2, **k)),
        ("grpo", "sequence", {"loss": "gspo"}, gspo),
        ("luspo", "sequence", {"loss": "luspo"}, gspo),
        ("vespo", "token", {"loss": "vespo"}, vespo),
    ],
)
def test_settings_alone_give_trls_gradient_with_truncated_completions_masked_or_not(
    name, level, settings, loss, scale, masked
):
    logprob_NT, old_NT, _, mask_NT, reward_N, prompt_N = batch()
    # Prompt 1 keeps one of its three rows: a mean over survivors would weigh it three times.
    truncated_N = torch.tensor([False, False, False, True, True, False])
    settings = settings | {"scale_rewards": scale, "mask_truncated_completions": masked}
    found = weighed(settings, reward_N, prompt_N, mask_NT, truncated_N)
    advantage_N, weight_NT, total = found
    more = {"mask_NT": mask_NT} if loss in (gspo, vespo) else {}
    clips = {"epsilon_low": 0.2, "epsilon_high": 0.2} if loss in (gspo, clipped_surrogate) else {}
    ours, _ = loss(logprob_NT, old_NT, advantage_N, weight_NT, denominator=total, **more, **clips)
    std_N = {
        "group": torch.stack([reward_N[prompt_N == p].std() for p in (0, 1)])[prompt_N],
        "batch": reward_N.std(),
        "none": torch.tensor(1.0).double() - 1e-4,
    }[scale]
    mean_N = torch.stack([reward_N[prompt_N == p].mean() for p in (0, 1)])[prompt_N]
    theirs_mask_NT = mask_NT & ~truncated_N[:, None] if masked else mask_NT
    theirs, _ = trl_loss(
        *(name, logprob_NT, old_NT, (reward_N - mean_N) / (std_N + 1e-4), theirs_mask_NT),
        level=level,
        high=1.2 if name == "cispo" else 0.2,
    )
    # Without a gradient a row adds a constant to the clipped losses; gradients are what is equal.
    ours_NT = torch.autograd.grad(ours, logprob_NT)[0]
    theirs_NT = torch.autograd.grad(theirs, logprob_NT)[0]
    torch.testing.assert_close(ours_NT, theirs_NT, atol=1e-12, rtol=0)
    assert ours_NT.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kind"), [("grpo", "row_mean"), ("luspo", "row_sum")])
def test_with_ratios_of_sequences_the_kl_has_trls_ratio(name, kind):
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch(seed=1)
    generator = torch.Generator().manual_seed(2)
    reference_NT = logprob_NT.detach() + 0.5 * torch.randn(6, 5, generator=generator).double()
    weight_NT, total = weights(kind, mask_NT)
    rows = (logprob_NT, old_NT, advantage_N)
    clips = {"epsilon_low": 0.2, "epsilon_high": 0.2, "mask_NT": mask_NT}
    ours, _ = gspo(*rows, weight_NT, denominator=total, **clips)
    of_kl = {"denominator": total, "old_logprob_NT": old_NT}
    kl, _ = kl_k3_weighted(logprob_NT, reference_NT, weight_NT, mask_NT=mask_NT, **of_kl)
    settings = {"level": "sequence", "beta": 0.3, "reference_NT": reference_NT}
    theirs, _ = trl_loss(name, *rows, mask_NT, **settings)
    assert_equal(ours + 0.3 * kl, theirs, logprob_NT)
    by_token, _ = kl_k3_weighted(logprob_NT, reference_NT, weight_NT, **of_kl)
    assert (kl - by_token).abs() > 1e-3


@pytest.mark.parametrize("quantile", [1.0, 0.5, 0.2])
@pytest.mark.parametrize(("name", "kind"), [("dapo", "token_mean"), ("grpo", "row_mean")])
def test_the_top_entropy_quantile_and_the_entropy_bonus_equal_trls(name, kind, quantile):
    logprob_NT, old_NT, advantage_N, mask_NT, _, _ = batch()
    generator = torch.Generator().manual_seed(4)
    scale = torch.rand(6, 5, generator=generator).double() + 0.1
    # An entropy with a gradient of its own, beside that of the log-probabilities.
    entropy_NT = scale * logprob_NT.exp()
    reference_NT = logprob_NT.detach() + 0.5 * torch.randn(6, 5, generator=generator).double()
    weight_NT, total = weights(kind, mask_NT)
    kept_NT = above_quantile(entropy_NT, mask_NT, quantile=1 - quantile)
    assert (kept_NT.sum() < mask_NT.sum()) == (quantile < 1)
    rows = (logprob_NT, old_NT, advantage_N)
    ours, _ = clipped_surrogate(*rows, weight_NT * kept_NT, denominator=total)
    kl, _ = kl_k3(logprob_NT, reference_NT, weight_NT, denominator=total)
    bonus = (entropy_NT * kept_NT).sum() / kept_NT.sum()
    theirs, _ = trl_loss(
        *(name, *rows, mask_NT),
        beta=0.3,
        reference_NT=reference_NT,
        bias_correction=False,
        entropy_NT=scale * logprob_NT.exp(),
        quantile=quantile,
        entropy_coef=0.7,
    )
    assert_equal(ours + 0.3 * kl - 0.7 * bonus, theirs, logprob_NT)
