import itertools
import math

import pytest
import torch

from rl.objective import sequence_losses
from rl.objective.advantages import leave_one_out
from rl.objective.losses import cispo, clipped_surrogate, sapo
from rl.objective.sequence_losses import gspo, gspo_token, rloo, vespo
from rl.objective.weights import token_weight
from tests.table_policy import TablePolicy, expected_loss_gradient

LOSSES = [gspo, gspo_token, rloo, vespo]
CLIPPED = [gspo, gspo_token, rloo]
CLIPS = {"epsilon_low": 0.05, "epsilon_high": 0.05}
NONE = {"epsilon_low": math.inf, "epsilon_high": math.inf}


def settings(loss, **changes):
    """Clips that bind in `batch`, for the losses that have them."""
    return ({} if loss is vespo else CLIPS) | changes


def batch(seed=0, num_rollouts=6, num_steps=5):
    """Rows with a hole (tool output) and a ragged tail; weights constant within rows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rollouts, num_steps)
    logprob_NT = -torch.rand(shape, dtype=torch.float64, generator=generator) * 3
    old_NT = logprob_NT + torch.randn(shape, dtype=torch.float64, generator=generator) * 0.2
    advantage_N = torch.randn(num_rollouts, dtype=torch.float64, generator=generator)
    length_N = torch.randint(1, num_steps + 1, (num_rollouts, 1), generator=generator)
    mask_NT = torch.arange(num_steps) < length_N
    mask_NT[:, 1] = False
    weight_N1 = torch.rand(num_rollouts, 1, dtype=torch.float64, generator=generator) + 0.1
    weight_NT = torch.where(mask_NT, weight_N1, 0.0)
    return [logprob_NT.requires_grad_(), old_NT, advantage_N, weight_NT], mask_NT


def gradient(loss, logprob_NT):
    return torch.autograd.grad(loss, logprob_NT)[0]


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def by_loop(loss, rows, mask_NT, denominator):
    """Loss, gradient and counts from the definitions, one row at a time, in plain Python."""
    logprob_NT, old_NT, advantage_N, weight_NT = (x.tolist() for x in rows)
    total, slope_NT = 0.0, torch.zeros_like(rows[3])
    counts = {"tokens": 0.0, "ratio": 0.0, "low": 0.0, "high": 0.0, "phi": 0.0}
    for i, a in enumerate(advantage_N):
        steps = [t for t in range(mask_NT.shape[1]) if mask_NT[i, t]]
        if not any(weight_NT[i]):
            continue
        logs = [logprob_NT[i][t] - old_NT[i][t] for t in steps]
        ratio = math.exp(sum(logs) / (len(logs) if loss in (gspo, gspo_token) else 1))
        low, high = a < 0 and ratio < 0.95, a > 0 and ratio > 1.05
        k, lam = (2, 3) if a >= 0 else (3, 2)
        phi = math.exp(lam) * ratio**k * math.exp(-lam * ratio)
        summed = sum(weight_NT[i][t] for t in steps)
        for t in steps:
            w = weight_NT[i][t] / denominator
            if loss is vespo:
                total -= w * phi * a * logprob_NT[i][t]
                slope_NT[i, t] = -w * phi * a
            else:
                total -= w * min(ratio * a, min(max(ratio, 0.95), 1.05) * a)
                if not low and not high and loss is gspo_token:
                    slope_NT[i, t] = -w * a * ratio
                elif not low and not high:
                    share = 1 / len(steps) if loss is gspo else 1
                    slope_NT[i, t] = -summed / denominator * a * ratio * share
            if weight_NT[i][t]:
                for name, x in [("tokens", 1), ("ratio", ratio), ("low", low), ("high", high)]:
                    counts[name] += x
                counts["phi"] += phi
    return total, slope_NT, counts


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(6))
def test_matches_a_loop(loss, seed):
    rows, mask_NT = batch(seed)
    if loss in (gspo_token, vespo):  # weights that drop decisions of a row
        rows[3] = rows[3] * (torch.arange(5) != seed % 5)
    rows[3][2] = 0.0
    value, statistics = loss(*rows, denominator=7.0, mask_NT=mask_NT, **settings(loss))
    expected, slope_NT, counts = by_loop(loss, rows, mask_NT, 7.0)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    close(gradient(value, rows[0]), slope_NT)
    assert slope_NT.abs().max() > 1e-3
    for name in ("tokens", "ratio"):
        assert statistics[name].item() == pytest.approx(counts[name], abs=1e-12)
    for name in ("low", "high"):
        expected = 0 if loss is vespo else counts[name]
        assert statistics[f"clipped_{name}"].item() == expected
    if loss is vespo:
        assert statistics["phi"].item() == pytest.approx(counts["phi"], abs=1e-12)
    assert not any(x.requires_grad for x in statistics.values())


def test_the_clips_of_the_loop_bind_on_both_sides():
    found = {"low": 0, "high": 0, "none": 0}
    for seed in range(6):
        rows, mask_NT = batch(seed)
        _, _, counts = by_loop(gspo, rows, mask_NT, 7.0)
        for name in ("low", "high"):
            found[name] += counts[name]
        found["none"] += counts["tokens"] - counts["low"] - counts["high"]
    assert min(found.values()) > 5


def one_row(log_ratios, advantage, loss, **changes):
    """Value and gradient of one row of weight 1 / L."""
    logprob_NT = torch.tensor([log_ratios], dtype=torch.float64, requires_grad=True)
    value, statistics = loss(
        logprob_NT,
        torch.zeros_like(logprob_NT),
        torch.tensor([advantage], dtype=torch.float64),
        torch.full_like(logprob_NT, 1 / len(log_ratios)).detach(),
        denominator=1.0,
        mask_NT=torch.ones(1, len(log_ratios), dtype=torch.bool),
        **changes,
    )
    return value.item(), gradient(value, logprob_NT)[0].tolist(), statistics


def test_golden_ratios_of_a_row():
    # Log-ratios .2 and -.1: mean .05, sum .1.
    for loss, ratio in ((gspo, 1.051271), (gspo_token, 1.051271), (rloo, 1.105171)):
        value, grad, statistics = one_row([0.2, -0.1], 1.0, loss, **NONE)
        assert value == pytest.approx(-ratio, abs=5e-7)
        assert statistics["ratio"].item() / 2 == pytest.approx(ratio, abs=5e-7)
        share = 1 if loss is rloo else 1 / 2
        assert grad == pytest.approx([-ratio * share] * 2, abs=5e-7)
        assert one_row([0.2, -0.1], 1.0, loss, **CLIPS)[0] == pytest.approx(-1.05, abs=1e-12)
        assert one_row([0.2, -0.1], 1.0, loss, **CLIPS)[1] == [0.0, 0.0]


@pytest.mark.parametrize(("ratio", "phi"), [(1.0, 1.0), (1.5, 0.502043), (0.5, 1.120422)])
def test_golden_values_of_phi(ratio, phi):
    logs = [math.log(ratio) + 0.3, -0.3]
    value, grad, statistics = one_row(logs, 1.0, vespo)
    assert statistics["phi"].item() / 2 == pytest.approx(phi, abs=5e-7)
    assert grad == pytest.approx([-phi / 2] * 2, abs=5e-7)
    assert value == pytest.approx(-phi * sum(logs) / 2, abs=5e-7)
    # The negative pair: k = 3, lambda = 2.
    negative = math.exp(2) * ratio**3 * math.exp(-2 * ratio)
    assert one_row(logs, -1.0, vespo)[1] == pytest.approx([negative / 2] * 2, abs=1e-12)


def test_phi_is_largest_at_power_over_decay():
    phis = {v: one_row([math.log(v)], 1.0, vespo)[2]["phi"].item() for v in (0.6, 2 / 3, 0.72)}
    assert max(phis, key=phis.get) == 2 / 3


def test_dual_clip_caps_a_row():
    value, grad, statistics = one_row([2.0, 2.0], -1.0, gspo, dual_clip=3.0)
    assert (value, grad) == (pytest.approx(3.0), [0.0, 0.0])
    assert statistics["clipped_dual"] == 2
    assert one_row([2.0, 2.0], -1.0, gspo_token, dual_clip=3.0)[:2] == (value, grad)
    assert one_row([2.0, 2.0], -1.0, gspo)[0] == pytest.approx(math.exp(2))


def test_gspo_is_gspo_token_where_weights_are_constant_within_rows():
    rows, mask_NT = batch()
    for changes in (CLIPS, NONE, {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "dual_clip": 1.1}):
        one, counts = gspo(*rows, denominator=2.0, mask_NT=mask_NT, **changes)
        other, others = gspo_token(*rows, denominator=2.0, mask_NT=mask_NT, **changes)
        close(one, other, atol=1e-14)
        close(gradient(one, rows[0]), gradient(other, rows[0]), atol=1e-14)
        for name, total in counts.items():
            close(others[name], total)


def test_a_dropped_token_keeps_the_ratio_whole_and_gets_no_gradient():
    rows, mask_NT = batch(3)
    assert mask_NT[:, 0].all() and mask_NT.sum(1).max() > 1
    rows[3] = rows[3] * (torch.arange(5) > 0)
    value, statistics = gspo_token(*rows, denominator=1.0, mask_NT=mask_NT, **NONE)
    grads = gradient(value, rows[0])
    assert (grads[:, 0] == 0).all() and (grads[rows[3] > 0] != 0).all()
    log_ratio_NT = torch.where(mask_NT, rows[0] - rows[1], 0.0)
    ratio_N1 = (log_ratio_NT.sum(1, keepdim=True) / mask_NT.sum(1, keepdim=True)).exp()
    close(statistics["ratio"], (ratio_N1 * (rows[3] > 0)).sum())
    # Negative control: leaving the token out of the outer sum only, it still moves the ratio.
    naive = -(rows[3] * ratio_N1 * rows[2][:, None]).sum()
    close(naive, value)
    several_N = (rows[3] > 0).any(1)
    assert (gradient(naive, rows[0])[several_N, 0] != 0).all() and several_N.any()


@pytest.mark.parametrize("loss", [gspo, rloo])
def test_weights_and_advantages_that_vary_within_a_row_are_refused(loss):
    rows, mask_NT = batch(3)
    row = int(mask_NT.sum(1).argmax())
    varied = rows[3].clone()
    varied[row, 0] = 0.0
    with pytest.raises(
        ValueError, match=rf"weights must be constant.*got 0 to .* in row {row}.*use gspo_token"
    ):
        loss(*rows[:3], varied, denominator=1.0, mask_NT=mask_NT)
    advantage_NT = rows[2][:, None] + torch.arange(5)
    with pytest.raises(ValueError, match="advantages must be constant within a row"):
        loss(*rows[:2], advantage_NT, rows[3], denominator=1.0, mask_NT=mask_NT)
    same_NT = rows[2][:, None].expand(6, 5)
    one, _ = loss(*rows, denominator=1.0, mask_NT=mask_NT)
    other, _ = loss(*rows[:2], same_NT, rows[3], denominator=1.0, mask_NT=mask_NT)
    assert one.item() == other.item()


@pytest.mark.parametrize("loss", [gspo_token, vespo])
def test_advantages_may_vary_within_a_row(loss):
    rows, mask_NT = batch()
    advantage_NT = rows[2][:, None].expand(6, 5).clone()
    whole, _ = loss(*rows, denominator=1.0, mask_NT=mask_NT)
    same, _ = loss(*rows[:2], advantage_NT, rows[3], denominator=1.0, mask_NT=mask_NT)
    assert whole.item() == same.item()
    advantage_NT[:, 0] *= 2
    double_NT = rows[3] * torch.where(torch.arange(5) == 0, 2.0, 1.0)
    actual, _ = loss(*rows[:2], advantage_NT, rows[3], denominator=1.0, mask_NT=mask_NT)
    expected, _ = loss(*rows[:3], double_NT, denominator=1.0, mask_NT=mask_NT)
    close(actual, expected, atol=1e-14)


def test_on_policy_all_losses_have_one_gradient_at_equal_weight_and_denominator():
    rows, mask_NT = batch()
    rows[1] = rows[0].detach()
    expected = -rows[3] * rows[2][:, None] / 3.0
    token = [clipped_surrogate, sapo, lambda *a, **k: cispo(*a, ratio_cap=5.0, **k)]
    for loss in token:
        close(gradient(loss(*rows, denominator=3.0)[0], rows[0]), expected, atol=1e-14)
    for loss in (gspo, gspo_token, vespo):
        value, _ = loss(*rows, denominator=3.0, mask_NT=mask_NT)
        close(gradient(value, rows[0]), expected, atol=1e-14)
    # A product of ratios has the sum of the scores: weights w / L there are weights w here.
    shared = [*rows[:3], rows[3] / mask_NT.sum(1, keepdim=True)]
    value, _ = rloo(*shared, denominator=3.0, mask_NT=mask_NT)
    close(gradient(value, rows[0]), expected, atol=1e-14)


@pytest.mark.parametrize("loss", CLIPPED)
def test_without_clips_it_is_the_plain_policy_gradient_of_the_ratio(loss):
    rows, mask_NT = batch()
    log_ratio_NT = torch.where(mask_NT, rows[0] - rows[1], 0.0)
    length_N = mask_NT.sum(1)
    log_N = log_ratio_NT.sum(1) / (1 if loss is rloo else length_N)
    plain = -(rows[3].sum(1) * rows[2] * log_N.exp()).sum() / 2.0
    value, statistics = loss(*rows, denominator=2.0, mask_NT=mask_NT, **NONE)
    close(value, plain)
    close(gradient(value, rows[0]), gradient(plain, rows[0]))
    assert statistics["clipped_low"] == statistics["clipped_high"] == 0


def three_rows(weight):
    """The golden batch: A = (1, -1, 3), lengths (2, 4, 1), every ratio 1."""
    length_N = torch.tensor([2, 4, 1])
    mask_NT = torch.arange(4) < length_N[:, None]
    weight_NT = mask_NT / (length_N[:, None] if weight == "row_mean" else 1)
    logprob_NT = torch.zeros(3, 4).double()
    return (logprob_NT, logprob_NT, torch.tensor([1.0, -1, 3]).double(), weight_NT), mask_NT


@pytest.mark.parametrize("loss", CLIPPED)
def test_golden_losses_of_three_rows(loss):
    rows, mask_NT = three_rows("row_mean")
    value, _ = loss(*rows, denominator=3.0, mask_NT=mask_NT)
    assert value.item() == pytest.approx(-1.0, abs=1e-14)  # -(1 - 1 + 3)/3
    # LUSPO: GSPO's surrogate, the row's weight at every decision, over rows: -(2 - 4 + 3)/3.
    rows, mask_NT = three_rows("luspo")
    value, _ = loss(*rows, denominator=3.0, mask_NT=mask_NT)
    assert value.item() == pytest.approx(-1 / 3, abs=1e-14)


def test_a_denominator_of_the_micro_batchs_own_would_depend_on_the_split():
    rows, mask_NT = three_rows("dapo")

    def own_tokens(part):
        tokens = float(mask_NT[part].sum())
        return clipped_surrogate(*(x[part] for x in rows), denominator=tokens)[0].item()

    halves = (own_tokens(slice(0, 2)) + own_tokens(slice(2, 3))) / 2
    assert halves == pytest.approx(-4 / 3, abs=1e-14)
    assert own_tokens(slice(0, 3)) == pytest.approx(-1 / 7, abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss):
    rows, mask_NT = batch()
    whole, statistics = loss(*rows, denominator=3.7, mask_NT=mask_NT, **settings(loss))
    whole_NT = gradient(whole, rows[0])
    for cuts in ([0, 1, 4, 6], [0, 3, 6], range(7)):
        parts = []
        for a, b in itertools.pairwise(cuts):
            part = [x[a:b] for x in rows]
            parts.append(loss(*part, denominator=3.7, mask_NT=mask_NT[a:b], **settings(loss)))
        total = sum(value for value, _ in parts)
        close(total, whole)
        close(gradient(total, rows[0]), whole_NT)
        for name, x in statistics.items():
            close(sum(s[name] for _, s in parts), x)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_row_order_and_rows_without_weight_change_nothing(loss):
    rows, mask_NT = batch()
    whole, statistics = loss(*rows, denominator=2.0, mask_NT=mask_NT, **settings(loss))
    order = torch.tensor([3, 0, 5, 1, 4, 2, 2])
    logprob_NT, old_NT, advantage_N, weight_NT = (x[order] for x in rows)
    weight_NT[6] = 0.0
    pad = torch.nn.functional.pad
    value, counts = loss(
        pad(logprob_NT, (0, 3)),
        pad(old_NT, (0, 3)),
        advantage_N,
        pad(weight_NT, (0, 3)),
        denominator=2.0,
        mask_NT=pad(mask_NT[order], (0, 3)),
        **settings(loss),
    )
    close(value, whole)
    for name, x in statistics.items():
        close(counts[name], x)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_stands_off_the_mask_or_in_a_row_without_weight_reaches_nothing(loss, rubbish, where):
    rows, mask_NT = batch()
    rows[3][4] = 0.0
    clean, expected = loss(*rows, denominator=2.0, mask_NT=mask_NT, **settings(loss))
    dirty = [rows[0].detach().clone(), rows[1], rows[2][:, None].expand(6, 5), rows[3]]
    dirty[where] = torch.where(rows[3] == 0, rubbish, dirty[where])
    dirty[0].requires_grad_()
    value, statistics = loss(*dirty, denominator=2.0, mask_NT=mask_NT, **settings(loss))
    assert value.item() == clean.item()
    close(gradient(value, dirty[0]), gradient(clean, rows[0]), atol=0)
    for name, x in expected.items():
        assert statistics[name] == x, name


@pytest.mark.parametrize("loss", [gspo_token, vespo])
def test_a_nonfinite_logprob_of_a_dropped_token_is_reported_because_the_ratio_needs_it(loss):
    rows, mask_NT = batch(3)
    row = int(mask_NT.sum(1).argmax())
    rows[3][row, 0] = 0.0
    assert loss(*rows, denominator=1.0, mask_NT=mask_NT)[1]["nonfinite"] == 0
    rows[1][row, 0] = math.nan
    assert loss(*rows, denominator=1.0, mask_NT=mask_NT)[1]["nonfinite"] == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_without_weight_or_without_steps_is_0(loss):
    rows, mask_NT = batch()
    value, statistics = loss(*rows[:3], rows[3] * 0, denominator=2.0, mask_NT=mask_NT)
    assert value == 0 and all(x == 0 for x in statistics.values())
    assert (gradient(value, rows[0]) == 0).all()
    empty = [x[:, :0] if x.ndim == 2 else x for x in rows]
    assert loss(*empty, denominator=2.0, mask_NT=mask_NT[:, :0])[0] == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_runaway_ratio_does_not_overflow(loss, sign):
    logprob_NT = torch.zeros(1, 4, requires_grad=True)
    value, statistics = loss(
        logprob_NT,
        torch.full((1, 4), -100.0 * sign),
        torch.ones(1),
        torch.ones(1, 4),
        denominator=1.0,
        mask_NT=torch.ones(1, 4, dtype=torch.bool),
    )
    assert value.isfinite() and all(x.isfinite() for x in statistics.values())
    assert (gradient(value, logprob_NT).abs() < 1e-8).all()  # e^-20 = 2e-9


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_float32_at_least(loss):
    rows, mask_NT = batch()
    half = rows[0].detach().bfloat16()
    value, _ = loss(half, *rows[1:], denominator=2.0, mask_NT=mask_NT, **settings(loss))
    assert value.dtype == torch.float32
    exact, _ = loss(half.double(), *rows[1:], denominator=2.0, mask_NT=mask_NT, **settings(loss))
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


# Expected gradients of the whole pipeline, by enumeration over a policy that is a table.

POLICY = TablePolicy(2, seed=2)
REWARD_PA = (torch.arange(2)[:, None] + torch.arange(len(POLICY.answers))).remainder(3) == 1


@pytest.mark.parametrize("budget", [(2, 2), (2, 4), (4, 3)])
def test_rloo_by_leave_one_out_is_the_gradient_of_the_pass_rate_whatever_the_budget(budget):
    def product(*args, **keywords):
        return rloo(*args, mask_NT=args[3] != 0, **keywords)

    reward_PA = REWARD_PA.double()
    exact = POLICY.gradient(POLICY.pass_rate_P(reward_PA).sum()) / 2
    run = {"advantage": leave_one_out, "kind": "row_mean"}
    close(expected_loss_gradient(POLICY, reward_PA, budget, **run, loss=product), exact)
    # Negative control: with token ratios the same weights turn the gradient.
    token = expected_loss_gradient(POLICY, reward_PA, budget, **run)
    assert (token - exact).abs().max() > 1e-3


def test_luspo_weighs_a_row_by_its_length():
    # On-policy gspo has w A / L per token under row_mean; with w at every decision, w A.
    rows, mask_NT = batch()
    rows[1] = rows[0].detach()
    weight_N = rows[3].amax(1)
    grads = []
    for weight_NT in (
        token_weight("row_mean", weight_N, mask_NT, max_completion_length=5),
        torch.where(mask_NT, weight_N[:, None], 0.0),
    ):
        value, _ = gspo(*rows[:3], weight_NT, denominator=6.0, mask_NT=mask_NT)
        grads.append(gradient(value, rows[0]))
    close(grads[1], grads[0] * mask_NT.sum(1, keepdim=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_say_what_is_wrong(loss):
    rows, mask_NT = batch()
    with pytest.raises(TypeError, match="denominator"):
        loss(*rows, mask_NT=mask_NT)
    with pytest.raises(TypeError, match="mask_NT"):
        loss(*rows, denominator=1.0)
    for wrong in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"positive and finite, got {wrong}"):
            loss(*rows, denominator=wrong, mask_NT=mask_NT)
    with pytest.raises(ValueError, match=r"got \(6, 5\), \(5, 5\), \(6, 5\) and \(6,\)"):
        loss(rows[0], rows[1][1:], *rows[2:], denominator=1.0, mask_NT=mask_NT)
    with pytest.raises(ValueError, match=r"bool of shape \(6, 5\), got torch\.float64 of shape"):
        loss(*rows, denominator=1.0, mask_NT=mask_NT.double())
    with pytest.raises(ValueError, match=r"got torch\.bool of shape \(6, 4\)"):
        loss(*rows, denominator=1.0, mask_NT=mask_NT[:, 1:])
    narrow_NT = mask_NT.clone()
    narrow_NT[2, 0] = False
    with pytest.raises(ValueError, match="mask_NT must hold every decision.*row 2, step 0"):
        loss(*rows, denominator=1.0, mask_NT=narrow_NT)


@pytest.mark.parametrize("loss", CLIPPED)
def test_clips_out_of_range_are_refused(loss):
    rows, mask_NT = batch()
    with pytest.raises(ValueError, match=r"epsilon_high must be at least 0, got -1 and"):
        loss(*rows, denominator=1.0, mask_NT=mask_NT, epsilon_low=-1)


def test_other_settings_out_of_range_are_refused():
    rows, mask_NT = batch()
    with pytest.raises(ValueError, match="dual_clip must be above 1, got 1"):
        gspo(*rows, denominator=1.0, mask_NT=mask_NT, dual_clip=1)
    with pytest.raises(ValueError, match=r"decay_negative above 0, got 3\.0 and 0"):
        vespo(*rows, denominator=1.0, mask_NT=mask_NT, decay_negative=0)
    with pytest.raises(ValueError, match=r"power_positive must be at least 0 .*, got -1 and 3\.0"):
        vespo(*rows, denominator=1.0, mask_NT=mask_NT, power_positive=-1)


def test_the_module_has_no_loss_that_these_tests_leave_out():
    public = {
        name
        for name, value in vars(sequence_losses).items()
        if callable(value) and getattr(value, "__module__", "") == "rl.objective.sequence_losses"
    }
    assert {n for n in public if not n.startswith("_")} == {loss.__name__ for loss in LOSSES}
