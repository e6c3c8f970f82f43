import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rollouts.diffusion.sde import RULES, gaussian_kl, gaussian_step, step_logprob, step_noise

torch.set_num_threads(1)

FLOW_RULES = [("flow_sde", 0.7), ("constant_sde", 0.3), ("cps", 0.7)]


def flow(sigma, next_sigma):
    return torch.tensor([1 - sigma, sigma, 1 - next_sigma, next_sigma], dtype=torch.float64)


def preserving(abar, next_abar):
    values = [abar**0.5, (1 - abar) ** 0.5, next_abar**0.5, (1 - next_abar) ** 0.5]
    return torch.tensor(values, dtype=torch.float64)


def one(value):
    return torch.full((1, 1), value, dtype=torch.float64)


def scalar_step(levels, **settings):
    mean, std = gaussian_step(one(0.5), one(1.0), levels, **settings)
    return mean.item(), std.item()


def latents(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Golden values, by hand. Flow: clean = 1 - .5 * .5 = .75, noise = 1 + .5 * .5 = 1.25, alpha' = .6.
@pytest.mark.parametrize(
    ("rule", "level", "mean", "std"),
    [
        # std = .7 sqrt(.5/.5) sqrt(.1); c = .4 - std^2 = .351; .45 + .351 * 1.25
        ("flow_sde", 0.7, 0.88875, 0.221359),
        # std = .3 sqrt(.1); c = .4 - .009 = .391; .45 + .391 * 1.25
        ("constant_sde", 0.3, 0.93875, 0.094868),
        # std = .4 sin(.35 pi); c = .4 cos(.35 pi)
        ("cps", 0.7, 0.676995, 0.356403),
        ("cps", 1.0, 0.45, 0.4),
        # The Euler step: 1 - .1 * .5
        ("flow_sde", 0.0, 0.95, 0.0),
        ("constant_sde", 0.0, 0.95, 0.0),
        ("cps", 0.0, 0.95, 0.0),
    ],
)
def test_flow_steps_by_hand(rule, level, mean, std):
    got = scalar_step(flow(0.5, 0.4), rule=rule, level=level, prediction="flow")
    assert got == pytest.approx((mean, std), abs=1e-6)


@pytest.mark.parametrize(
    ("eta", "mean", "std"),
    # clean = (1 - sqrt(.5) .5) / sqrt(.5); std = eta sqrt(.2/.5) sqrt(1 - .5/.8)
    [(1.0, 0.929501, 0.387298), (0.5, 1.019254, 0.193649), (0.0, 1.041304, 0.0)],
)
def test_ddim_steps_by_hand(eta, mean, std):
    got = scalar_step(preserving(0.5, 0.8), rule="ddim", level=eta, prediction="epsilon")
    assert got == pytest.approx((mean, std), abs=1e-6)


def test_flow_sde_starts_with_the_next_level_where_sigma_is_one():
    # SD3, shift 3: .7 sqrt(1 / (1 - .96)) sqrt(1 - .96) = .7
    std, _ = step_noise(flow(1.0, 0.96), rule="flow_sde", level=0.7)
    assert std.item() == pytest.approx(0.7)


def every_step():
    for rule, level in [*FLOW_RULES, ("ddim", 1.0)]:
        prediction = "epsilon" if rule == "ddim" else "flow"
        levels = preserving(0.5, 0.8) if rule == "ddim" else flow(0.5, 0.4)
        yield rule, dict(rule=rule, level=level, prediction=prediction), levels


@pytest.mark.parametrize(("rule", "settings", "levels"), every_step())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_logprob_is_that_of_torch_distributions(rule, settings, levels, dtype, tolerance):
    x, output = latents(0, 3, 4, 8, 8, dtype=dtype), latents(1, 3, 4, 8, 8, dtype=dtype)
    mean, std_N = gaussian_step(output, x, levels, **settings)
    assert mean.dtype == std_N.dtype == dtype
    x_next = mean + std_N.view(-1, 1, 1, 1) * latents(2, 3, 4, 8, 8, dtype=dtype)
    std = std_N.view(-1, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).sum(1)
    logprob_N = step_logprob(x_next, mean, std_N)
    assert logprob_N.dtype == torch.float64
    torch.testing.assert_close(logprob_N, expected.double(), rtol=tolerance, atol=tolerance)


def test_rows_of_a_table_are_steps_of_their_own():
    x, output = latents(0, 2, 5), latents(1, 2, 5)
    table = torch.stack([flow(0.9, 0.7), flow(0.3, 0.1)])
    settings = dict(rule="flow_sde", level=0.7, prediction="flow")
    mean, std = gaussian_step(output, x, table, **settings)
    for row in range(2):
        alone = gaussian_step(output[row : row + 1], x[row : row + 1], table[row], **settings)
        assert torch.equal(mean[row], alone[0][0])
        assert std[row] == alone[1][0]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_is_the_step_of_diffusers(prediction, eta, set_alpha_to_one):
    scheduler = DDIMScheduler(
        clip_sample=False, set_alpha_to_one=set_alpha_to_one, prediction_type=prediction
    )
    scheduler.set_timesteps(10)
    x, output, z = (latents(seed, 2, 4, 4, 4) for seed in range(3))
    for t in scheduler.timesteps.tolist():
        previous = t - 100
        abar = scheduler.alphas_cumprod[t].item()
        last = scheduler.final_alpha_cumprod
        next_abar = (scheduler.alphas_cumprod[previous] if previous >= 0 else last).item()
        mean, std = gaussian_step(
            output, x, preserving(abar, next_abar), rule="ddim", level=eta, prediction=prediction
        )
        expected = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        # The scheduler computes its coefficients in float32.
        ours = mean + std.view(-1, 1, 1, 1) * z
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


def test_level_zero_is_the_euler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, output = latents(0, 2, 6, dtype=torch.float32), latents(1, 2, 6, dtype=torch.float32)
    for rule, _ in FLOW_RULES:
        for i, t in enumerate(scheduler.timesteps):
            levels = flow(scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item())
            mean, std = gaussian_step(output, x, levels, rule=rule, level=0.0, prediction="flow")
            scheduler._step_index = i
            expected = scheduler.step(output, t, x).prev_sample
            torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
            assert (std == 0).all()


def test_constant_sde_with_the_coefficient_of_flow_sde_is_flow_sde():
    x, output, levels = latents(0, 2, 6), latents(1, 2, 6), flow(0.6, 0.5)
    matched = 0.7 * math.sqrt(0.6 / 0.4)
    ours = gaussian_step(output, x, levels, rule="flow_sde", level=0.7, prediction="flow")
    theirs = gaussian_step(output, x, levels, rule="constant_sde", level=matched, prediction="flow")
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_cps_at_one_is_the_stochastic_sampling_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(10)
    x, output = latents(0, 2, 6, dtype=torch.float32), latents(1, 2, 6, dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        levels = flow(scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item())
        mean, std = gaussian_step(output, x, levels, rule="cps", level=1.0, prediction="flow")
        z = latents(7, 2, 6, dtype=torch.float32)
        scheduler._step_index = i
        generator = torch.Generator().manual_seed(7)
        expected = scheduler.step(output, t, x, generator=generator).prev_sample
        torch.testing.assert_close(mean + std[:, None] * z, expected, rtol=1e-6, atol=1e-6)


def final_std(rule, level, num_steps):
    """Std of the samples of the exact velocity of N(0, .5^2) data, shift 3; all maps are linear."""
    sigma = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    sigma = 3 * sigma / (1 + 2 * sigma)
    variance = 1.0
    for now, after in zip(sigma[:-1].tolist(), sigma[1:].tolist(), strict=True):
        # E[noise - clean | x] of a linear-Gaussian pair, at x = 1.
        velocity = (now - 0.25 * (1 - now)) / (now**2 + 0.25 * (1 - now) ** 2)
        mean, std = gaussian_step(
            one(velocity), one(1.0), flow(now, after), rule=rule, level=level, prediction="flow"
        )
        variance = mean.item() ** 2 * variance + std.item() ** 2
    return variance**0.5


@pytest.mark.parametrize(
    ("rule", "level", "expected"),
    [
        ("flow_sde", 0.0, (0.370, 0.445, 0.493)),
        # The method page prints .495 after 200 steps; computed it is .49659.
        ("flow_sde", 0.7, (0.424, 0.466, 0.4966)),
        ("constant_sde", 0.3, (0.385, 0.450, 0.494)),
        ("cps", 0.7, (0.328, 0.377, 0.415)),
    ],
)
def test_std_of_the_samples_after_10_25_and_200_steps(rule, level, expected):
    got = [final_std(rule, level, num_steps) for num_steps in (10, 25, 200)]
    assert got == pytest.approx(expected, abs=1.5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "level"), FLOW_RULES[:2])
def test_sde_rules_reach_the_data_std_as_one_over_n(rule, level):
    # n times the gap is .8 or less with flow_sde, and tends to 1.3 with constant_sde.
    assert all(n * abs(final_std(rule, level, n) - 0.5) < 1.35 for n in (25, 100, 400, 800))


def test_cps_does_not_reach_the_data_std():
    assert final_std("cps", 0.7, 800) < 0.43


@pytest.mark.parametrize(("rule", "settings", "levels"), every_step())
def test_own_draws_have_the_entropy_and_score_of_a_gaussian(rule, settings, levels):
    draws, size = 20_000, 3
    x, output = latents(0, 1, size).expand(draws, -1), latents(1, 1, size).expand(draws, -1)
    mean, std_N = gaussian_step(output, x, levels, **settings)
    logprob_N = step_logprob(mean + std_N[:, None] * latents(2, draws, size), mean, std_N)
    std = std_N[0].item()
    expected = -size * (0.5 + math.log(std) + 0.5 * math.log(2 * math.pi))
    # logprob has variance D / 2; four standard errors, a false alarm in 16,000 runs.
    assert abs(logprob_N.mean().item() - expected) < 4 * (size / 2 / draws) ** 0.5
    score_ND = latents(2, draws, size) / std
    shifted = mean[:1].clone().requires_grad_()
    x_next = (mean + std_N[:, None] * latents(2, draws, size)).detach()
    step_logprob(x_next, shifted.expand(draws, -1), std_N).sum().backward()
    torch.testing.assert_close(shifted.grad[0], score_ND.sum(0))
    assert (shifted.grad[0].abs() / draws < 4 / std / draws**0.5).all()


@pytest.mark.parametrize(
    ("levels", "settings"),
    [
        (preserving(0.99, 1.0), dict(rule="ddim", level=1.0, prediction="epsilon")),
        (flow(0.3, 0.0), dict(rule="cps", level=0.7, prediction="flow")),
        (flow(0.3, 0.2), dict(rule="flow_sde", level=0.0, prediction="flow")),
    ],
)
def test_a_deterministic_step_has_std_zero_and_no_density(levels, settings):
    mean, std = gaussian_step(latents(0, 2, 3), latents(1, 2, 3), levels, **settings)
    assert mean.isfinite().all()
    assert std.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="no density: a log-probability needs a positive"):
        step_logprob(mean, mean, std)
    with pytest.raises(ValueError, match="no density: a KL divergence needs a positive"):
        gaussian_kl(mean, mean, std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_scored_as_stored(dtype, tmp_path):
    x, output = latents(0, 2, 500).to(dtype), latents(1, 2, 500).to(dtype)
    settings = dict(rule="flow_sde", level=0.7, prediction="flow")
    mean, std = gaussian_step(output, x, flow(0.5, 0.4), **settings)
    assert mean.dtype == std.dtype == torch.float32
    exact, _ = gaussian_step(output.double(), x.double(), flow(0.5, 0.4), **settings)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-6)
    drawn = mean + std[:, None] * latents(2, 2, 500, dtype=torch.float32)
    stored = drawn.to(dtype)
    torch.save({"x": x, "output": output, "x_next": stored}, tmp_path / "step.pt")
    read = torch.load(tmp_path / "step.pt", weights_only=True)
    again = gaussian_step(read["output"], read["x"], flow(0.5, 0.4), **settings)
    assert torch.equal(step_logprob(stored, mean, std), step_logprob(read["x_next"], *again))
    assert not torch.equal(step_logprob(drawn, mean, std), step_logprob(stored, mean, std))


def test_sums_are_float64_whatever_the_latents_are():
    # At D = 16384 float32 would be off by some .001 nats.
    mean, x_next = (latents(seed, 2, 4, 64, 64, dtype=torch.float32) for seed in range(2))
    std = torch.tensor([0.02, 0.3])
    expected = step_logprob(x_next.double(), mean.double(), std)
    torch.testing.assert_close(step_logprob(x_next, mean, std), expected, rtol=1e-14, atol=0)
    ours = gaussian_kl(mean, x_next, std)
    torch.testing.assert_close(
        ours, gaussian_kl(mean.double(), x_next.double(), std), rtol=1e-14, atol=0
    )


def test_kl_is_the_expected_log_ratio_and_the_closed_form():
    mean, other = latents(0, 2, 5), latents(1, 2, 5)
    std = torch.tensor([0.3, 0.8], dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std[:, None]),
        torch.distributions.Normal(other, std[:, None]),
    ).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), expected)
    assert gaussian_kl(mean, mean, std).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("rule", "settings", "levels"), every_step())
def test_kl_is_the_mean_log_ratio_of_own_draws(rule, settings, levels):
    draws, size = 20_000, 3
    x = latents(0, 1, size).expand(draws, -1)
    output, other = (0.5 * latents(seed, 1, size).expand(draws, -1) for seed in (1, 3))
    mean, std_N = gaussian_step(output, x, levels, **settings)
    reference, _ = gaussian_step(other, x, levels, **settings)
    x_next = mean + std_N[:, None] * latents(2, draws, size)
    ratio_N = step_logprob(x_next, mean, std_N) - step_logprob(x_next, reference, std_N)
    kl = gaussian_kl(mean, reference, std_N)[0].item()
    assert kl > 1e-4
    # The log-ratio is kl + (mean - reference) z / std, of variance 2 kl: four standard errors.
    assert abs(ratio_N.mean().item() - kl) < 4 * (2 * kl / draws) ** 0.5


@pytest.mark.parametrize("step", [0.2, 0.1, 0.001])
def test_kl_of_flow_sde_has_the_step_size_as_a_factor(step):
    """Flow-GRPO (2505.05470): |dt| / 2 (g (1 - s) / (2 s) + 1 / g)^2 |v - v_ref|^2, s = sigma."""
    sigma, a, size = 0.6, 0.7, 5
    output, other, x = latents(0, 2, size), latents(1, 2, size), latents(2, 2, size)
    levels, settings = flow(sigma, sigma - step), dict(rule="flow_sde", level=a, prediction="flow")
    (mean, std_N), (reference, _) = (
        gaussian_step(out, x, levels, **settings) for out in (output, other)
    )
    kl_N = gaussian_kl(mean, reference, std_N)
    g = a * (sigma / (1 - sigma)) ** 0.5
    factor = step / 2 * (g * (1 - sigma) / (2 * sigma) + 1 / g) ** 2
    torch.testing.assert_close(kl_N, factor * (output - other).square().sum(1), rtol=1e-9, atol=0)
    # As released, over g^2 alone, it is |dt| times the KL.
    released_N = (mean - reference).square().sum(1) / (2 * g**2)
    torch.testing.assert_close(released_N, step * kl_N, rtol=1e-9, atol=0)


def test_gradients_flow_through_the_output():
    output, x = latents(0, 2, 3).requires_grad_(), latents(1, 2, 3)

    def logprob(out):
        mean, std = gaussian_step(
            out, x, flow(0.5, 0.4), rule="flow_sde", level=0.7, prediction="flow"
        )
        return step_logprob(latents(2, 2, 3), mean, std)

    assert torch.autograd.gradcheck(logprob, output)


def test_wrong_settings_are_named():
    x, levels = latents(0, 2, 3), flow(0.5, 0.4)

    def step(levels=levels, output=x, rule="cps", level=0.5, prediction="flow"):
        return gaussian_step(output, x, levels, rule=rule, level=level, prediction=prediction)

    with pytest.raises(ValueError, match="rule must be one of ddim, flow_sde.*got 'precise'"):
        step(rule="precise")
    with pytest.raises(ValueError, match=r"level of cps must be between 0 and 1, got 1\.5"):
        step(level=1.5)
    with pytest.raises(ValueError, match="level of flow_sde must be finite and at least 0, got -1"):
        step(rule="flow_sde", level=-1)
    with pytest.raises(ValueError, match="prediction must be one of epsilon.*got 'score'"):
        step(prediction="score")
    with pytest.raises(ValueError, match="rule cps is for models that predict flow, got 'epsilon'"):
        step(prediction="epsilon")
    with pytest.raises(ValueError, match="rule ddim is for models that predict epsilon, sample"):
        step(rule="ddim")
    with pytest.raises(ValueError, match=r"run from noise to image.*sigma \[0\.4\]"):
        step(levels=flow(0.4, 0.5)[None])
    with pytest.raises(ValueError, match=r"must end in 4 columns.*got shape \(3,\)"):
        step(levels=levels[:3])
    with pytest.raises(ValueError, match=r"shape \(4,\) or \(2, 4\) for 2 rows, got \(3, 4\)"):
        step(levels=levels.expand(3, 4))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 2\) and \(2, 3\)"):
        step(output=x[:, :2])


def test_every_rule_is_tested():
    assert {rule for rule, *_ in every_step()} == set(RULES)
