import math

import pytest
import torch

from rl.objective.kl import KL_LOSSES, k1_penalty, kl_k2, kl_k3, kl_k3_weighted, kl_loss
from tests.table_policy import TablePolicy

LOSSES = [kl_k2, kl_k3, kl_k3_weighted]
PI = torch.tensor([0.7, 0.3], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.5], dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def gradient(loss, logprob_NT):
    return torch.autograd.grad(loss, logprob_NT)[0]


def batch(seed=0, num_rollouts=6, num_steps=5):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rollouts, num_steps)
    logprob_NT = -torch.rand(shape, dtype=torch.float64, generator=generator) * 3
    other_NT = logprob_NT + torch.randn(shape, dtype=torch.float64, generator=generator) * 0.5
    old_NT = logprob_NT + torch.randn(shape, dtype=torch.float64, generator=generator) * 0.2
    weight_NT = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
    length_N = torch.randint(1, num_steps + 1, (num_rollouts, 1), generator=generator)
    weight_NT = torch.where(torch.arange(num_steps) < length_N, weight_NT, 0.0)
    return [logprob_NT.requires_grad_(), other_NT, weight_NT], old_NT


def call(loss, rows, old_NT, denominator=2.0):
    more = {"old_logprob_NT": old_NT} if loss is kl_k3_weighted else {}
    return loss(*rows, denominator=denominator, **more)


def expected_gradient(loss, logit, reference):
    """d/d logit of the loss, expected over a categorical: its actions as rows, weighed by pi."""
    logprob = logit.log_softmax(0)
    weight_N1 = logprob.detach().exp()[:, None]
    rows = [logprob[:, None], reference.log()[:, None], weight_N1]
    value, _ = call(loss, rows, logprob.detach()[:, None], denominator=1.0)
    return value, torch.autograd.grad(value, logit, retain_graph=True)[0]


def exact(logit, reference):
    """KL(pi || ref), KL(ref || pi) and their gradients by autograd."""
    logprob = logit.log_softmax(0)
    reverse = (logprob.exp() * (logprob - reference.log())).sum()
    forward = (reference * (reference.log() - logprob)).sum()
    return [(kl, torch.autograd.grad(kl, logit, retain_graph=True)[0]) for kl in (reverse, forward)]


def test_golden_values():
    # d = log(.7 / .5) = .336472 and log(.3 / .5) = -.510826; k3 = .5/.7 - 1 + d, .5/.3 - 1 + d.
    d = [0.336472, -0.510826]
    k3 = [0.050758, 0.155841]
    for i in range(2):
        rows = [x.log()[i].reshape(1, 1) for x in (PI, REFERENCE)] + [torch.ones(1, 1)]
        value, statistics = kl_k3(*rows, denominator=1.0)
        assert value.item() == pytest.approx(k3[i], abs=5e-7)
        assert statistics["kl_k1"].item() == pytest.approx(d[i], abs=5e-7)
        assert statistics["kl_k3"].item() == pytest.approx(k3[i], abs=5e-7)
        assert kl_k2(*rows, denominator=2.0)[0].item() == pytest.approx(d[i] ** 2 / 4, abs=5e-7)
        assert k1_penalty(rows[0], rows[1], rows[2] > 0).item() == pytest.approx(d[i], abs=5e-7)


def test_golden_expectations_and_gradients():
    logit = PI.log().requires_grad_()
    value, grad = expected_gradient(kl_k2, logit, REFERENCE)
    assert value.item() == pytest.approx(0.0787662, abs=5e-8)  # biased: the KL is .0822829
    assert grad.tolist() == pytest.approx([0.1779326, -0.1779326], abs=5e-8)
    value, grad = expected_gradient(kl_k3, logit, REFERENCE)
    assert value.item() == pytest.approx(0.0822829, abs=5e-8)
    assert grad.tolist() == pytest.approx([0.2, -0.2], abs=1e-14)
    value, grad = expected_gradient(kl_k3_weighted, logit, REFERENCE)
    assert value.item() == pytest.approx(0.0822829, abs=5e-8)
    assert grad.tolist() == pytest.approx([0.1779326, -0.1779326], abs=5e-8)


@pytest.mark.parametrize("seed", range(10))
def test_each_loss_has_the_gradient_its_docstring_says_on_a_categorical(seed):
    generator = torch.Generator().manual_seed(seed)
    logit = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.randn(5, dtype=torch.float64, generator=generator).softmax(0)
    (reverse, reverse_grad), (_, forward_grad) = exact(logit, reference)
    assert (reverse_grad - forward_grad).abs().max() > 0.01
    close(expected_gradient(kl_k2, logit, reference)[1], reverse_grad)
    value, grad = expected_gradient(kl_k3, logit, reference)
    close(value, reverse)
    close(grad, forward_grad)
    value, grad = expected_gradient(kl_k3_weighted, logit, reference)
    close(value, reverse)
    close(grad, reverse_grad)


def test_k1_as_a_loss_has_expected_gradient_0_and_rho_k1_has_not():
    logit = PI.log().requires_grad_()
    logprob = logit.log_softmax(0)
    pi = logprob.detach().exp()
    k1 = (pi * (logprob - REFERENCE.log())).sum()
    close(torch.autograd.grad(k1, logit, retain_graph=True)[0], torch.zeros(2).double())
    rho = (logprob - logprob.detach()).exp()
    rho_k1 = (pi * rho * (logprob - REFERENCE.log())).sum()
    close(torch.autograd.grad(rho_k1, logit)[0], exact(logit, REFERENCE)[0][1])


@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_k1_off_the_reward_is_the_gradient_of_the_kl_of_whole_rollouts(beta):
    policy = TablePolicy(1, num_steps=3, seed=1)
    reference = TablePolicy(1, num_steps=3, seed=2)
    answer_N = torch.arange(len(policy.answers))
    prompt_N = torch.zeros_like(answer_N)
    logprob_NT = policy.logprob_NT(prompt_N, answer_N)
    reference_NT = reference.logprob_NT(prompt_N, answer_N).detach()
    penalty_N = k1_penalty(logprob_NT, reference_NT, policy.mask_AT)
    assert not penalty_N.requires_grad
    pi_A = policy.probability_PA()[0]
    kl = (pi_A * (pi_A.log() - reference_NT.sum(1))).sum()
    close((pi_A.detach() * penalty_N).sum(), kl.detach())
    by_reward = (-beta * penalty_N * pi_A.detach()) @ policy.score_PAD()[0]
    close(by_reward, -beta * policy.gradient(kl)[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_matches_a_loop(loss, seed):
    rows, old_NT = batch(seed)
    value, statistics = call(loss, rows, old_NT, denominator=7.0)
    total, counts = 0.0, {"kl_tokens": 0.0, "kl_k1": 0.0, "kl_k3": 0.0}
    slope_NT = torch.zeros_like(rows[2])
    for n, t in rows[2].nonzero().tolist():
        d = rows[0][n, t].item() - rows[1][n, t].item()
        rho = math.exp(rows[0][n, t].item() - old_NT[n, t].item())
        k3, w = math.exp(-d) - 1 + d, rows[2][n, t].item() / 7.0
        k, slope = {
            kl_k2: (d * d / 2, d),
            kl_k3: (k3, 1 - math.exp(-d)),
            kl_k3_weighted: (rho * k3, rho * (k3 + 1 - math.exp(-d))),
        }[loss]
        total += w * k
        slope_NT[n, t] = w * slope
        for name, x in (("kl_tokens", 1), ("kl_k1", d), ("kl_k3", k3)):
            counts[name] += x
    assert value.item() == pytest.approx(total, abs=1e-12)
    close(gradient(value, rows[0]), slope_NT)
    for name, x in counts.items():
        assert statistics[name].item() == pytest.approx(x, abs=1e-12)
        assert not statistics[name].requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_at_the_reference_value_and_gradient_are_0(loss):
    rows, _ = batch()
    value, _ = call(loss, [rows[0], rows[0].detach(), rows[2]], rows[0].detach())
    assert value == 0 and (gradient(value, rows[0]) == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_and_padding_and_row_order_change_nothing(loss):
    rows, old_NT = batch()
    whole, statistics = call(loss, rows, old_NT, denominator=3.7)
    parts = [
        call(loss, [x[part] for x in rows], old_NT[part], denominator=3.7)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    close(sum(value for value, _ in parts), whole)
    for name, x in statistics.items():
        close(sum(s[name] for _, s in parts), x)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    wide = [torch.nn.functional.pad(x[order], (0, 3)) for x in (*rows, old_NT)]
    close(call(loss, wide[:3], wide[3], denominator=3.7)[0], whole)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_stands_at_weight_0_reaches_neither_loss_nor_gradient(loss, rubbish, where):
    rows, old_NT = batch()
    clean, expected = call(loss, rows, old_NT)
    dirty = [rows[0].detach(), rows[1], old_NT]
    dirty[where] = torch.where(rows[2] == 0, rubbish, dirty[where])
    dirty[0].requires_grad_()
    value, statistics = call(loss, [*dirty[:2], rows[2]], dirty[2])
    assert value.item() == clean.item()
    close(gradient(value, dirty[0]), gradient(clean, rows[0]), atol=0)
    assert all(statistics[name] == x for name, x in expected.items())
    if where < 2 or loss is kl_k3_weighted:  # and what does count is reported
        dirty[where] = dirty[where].detach().clone()
        dirty[where][0, 0] = rubbish
        assert rows[2][0, 0] > 0
        assert call(loss, [*dirty[:2], rows[2]], dirty[2])[1]["kl_nonfinite"] == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_no_weight_is_0_and_the_dtype_is_float32_at_least(loss):
    rows, old_NT = batch()
    value, statistics = call(loss, [*rows[:2], rows[2] * 0], old_NT)
    assert value == 0 and all(x == 0 for x in statistics.values())
    assert (gradient(value, rows[0]) == 0).all()
    assert call(loss, [rows[0].bfloat16(), *rows[1:]], old_NT)[0].dtype == torch.float32


@pytest.mark.parametrize("loss", [kl_k3, kl_k3_weighted])
def test_a_policy_far_below_the_reference_does_not_overflow(loss):
    logprob_NT = torch.full((1, 1), -200.0, requires_grad=True)
    zero_NT = torch.zeros(1, 1)
    value, statistics = call(loss, [logprob_NT, zero_NT, zero_NT + 1], zero_NT - 200)
    assert value.isfinite() and statistics["kl_k3"].isfinite()
    assert gradient(value, logprob_NT).isfinite().all()


def test_k1_penalty_sums_the_decisions_of_a_row():
    logprob_NT = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, 9.0, math.inf], [1.0, 1, 1]])
    reference_NT = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, 0.0, math.nan], [0.0, 0, 0]])
    mask_NT = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    # .5 - 1;  .5;  no decision.
    assert k1_penalty(logprob_NT, reference_NT, mask_NT).tolist() == [-0.5, 0.5, 0.0]
    assert k1_penalty(logprob_NT, reference_NT, ~mask_NT)[0].isnan()
    half = k1_penalty(logprob_NT.bfloat16(), reference_NT, mask_NT)
    assert half.dtype == torch.float32


def test_k1_as_a_loss_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"k1 cannot be a loss: its expected gradient.*is 0.*reward"
    ):
        kl_loss("k1")
    with pytest.raises(
        ValueError, match=r"one of k2, k3, k3_weighted, got 'k3_weigthed'.*mean 'k3_w"
    ):
        kl_loss("k3_weigthed")
    assert [kl_loss(name) for name in KL_LOSSES] == LOSSES


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_say_what_is_wrong(loss):
    rows, old_NT = batch()
    with pytest.raises(TypeError, match="denominator"):
        loss(*rows, **({"old_logprob_NT": old_NT} if loss is kl_k3_weighted else {}))
    for wrong in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"positive and finite, got {wrong}"):
            call(loss, rows, old_NT, denominator=wrong)
    with pytest.raises(
        ValueError, match=r"reference_logprob_NT must have.*got \(5, 5\) and \(6, 5\)"
    ):
        call(loss, [rows[0], rows[1][1:], rows[2]], old_NT)
    with pytest.raises(ValueError, match=r"weight_NT must have the shape.*got \(6, 4\)"):
        call(loss, [*rows[:2], rows[2][:, 1:]], old_NT)
    if loss is kl_k3_weighted:
        with pytest.raises(ValueError, match=r"old_logprob_NT must have.*got \(6, 4\)"):
            call(loss, rows, old_NT[:, 1:])


def test_k1_penalty_says_what_is_wrong():
    one_NT = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"mask_NT must be bool.*got torch\.float32"):
        k1_penalty(one_NT, one_NT, one_NT)
    with pytest.raises(ValueError, match=r"share one shape.*\(2, 3\), \(1, 3\) and \(2, 3\)"):
        k1_penalty(one_NT, one_NT[1:], one_NT == 0)
