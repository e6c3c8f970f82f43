import inspect
import math

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from rollouts.diffusion.recording_scheduler import (
    LogProbDDIMScheduler,
    LogProbFlowMatchScheduler,
    Recording,
    draw,
    recording_scheduler,
)
from rollouts.diffusion.sde import gaussian_step, step_logprob
from rollouts.step_plan import StepPlan

torch.set_num_threads(1)

STEPS = 6


def sd_scheduler(**changes):
    settings = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    settings |= dict(clip_sample=False, set_alpha_to_one=False)
    return DDIMScheduler(**settings | changes)


def sd3_scheduler(**changes):
    return FlowMatchEulerDiscreteScheduler(**dict(shift=3.0) | changes)


SCHEDULERS = {
    "ddim": (sd_scheduler, "ddim", 1.0),
    "ddim v": (lambda: sd_scheduler(prediction_type="v_prediction"), "ddim", 0.6),
    "flow_sde": (sd3_scheduler, "flow_sde", 0.7),
    "constant_sde": (sd3_scheduler, "constant_sde", 0.3),
    "cps": (sd3_scheduler, "cps", 0.7),
}


def plan(rule, level, *, stochastic=None, num_steps=STEPS, **settings):
    edges = tuple(range(num_steps)) if stochastic is None else stochastic
    return StepPlan(num_steps=num_steps, rule=rule, level=level, stochastic=edges, **settings)


def noise(step, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def model(x, t):
    return 0.3 * x + 0.1 * torch.sin(3 * x) + 0.001 * t


def x_0(dtype=torch.float32):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(99)).to(dtype)


def run(scheduler, recording, x, *, num_steps=STEPS):
    """The loop of a pipeline."""
    scheduler.recording = recording
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        output = model(x, t.to(x.dtype)).to(x.dtype)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    scheduler.recording = None
    return x


def record(name, x=None, *, window=(0, STEPS), **settings):
    make, rule, level = SCHEDULERS[name]
    recording = Recording(plan=plan(rule, level, **settings), window=window, noise=noise)
    last = run(recording_scheduler(make()), recording, x_0() if x is None else x)
    return recording, last


@pytest.mark.parametrize("make", [sd_scheduler, sd3_scheduler])
def test_without_a_recording_it_is_the_base_scheduler(make):
    base, ours = make(), recording_scheduler(make())
    base.set_timesteps(STEPS)
    ours.set_timesteps(STEPS)
    assert torch.equal(base.timesteps, ours.timesteps)
    settings = dict(eta=0.7) if make is sd_scheduler else {}
    x = y = x_0()
    for i, t in enumerate(base.timesteps):
        kwargs = settings | dict(generator=torch.Generator().manual_seed(i))
        theirs = base.step(model(x, t), t, x, **kwargs)
        kwargs["generator"] = torch.Generator().manual_seed(i)
        mine = ours.step(model(y, t), t, y, **kwargs)
        assert type(mine) is type(theirs)
        x, y = theirs.prev_sample, mine.prev_sample
        assert torch.equal(x, y)
    for method in ("set_timesteps", "step"):
        assert inspect.signature(getattr(base, method)) == inspect.signature(getattr(ours, method))


def test_flow_settings_of_the_pipeline_are_kept():
    scheduler = sd3_scheduler()
    scheduler.set_shift(5.0)
    ours = recording_scheduler(scheduler)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.2])
    ours.set_timesteps(sigmas=[1.0, 0.5, 0.2])
    assert torch.equal(scheduler.sigmas, ours.sigmas)
    assert type(recording_scheduler(ours)) is LogProbFlowMatchScheduler
    assert type(recording_scheduler(recording_scheduler(sd_scheduler()))) is LogProbDDIMScheduler


def std_of(scheduler, rule, level, num_steps):
    recording = Recording(plan=plan(rule, level, num_steps=num_steps), window=(0, 0))
    run(recording_scheduler(scheduler), recording, x_0(), num_steps=num_steps)
    return recording.std


def test_std_of_stable_diffusion_in_twenty_steps():
    std = std_of(sd_scheduler(), "ddim", 1.0, 20)
    chosen = [std[i] for i in (0, 5, 10, 15, 17, 18, 19)]
    expected = [0.6444, 0.5336, 0.4016, 0.2509, 0.1673, 0.0406, 0.0206]
    assert chosen == pytest.approx(expected, abs=5e-5)
    assert std_of(sd_scheduler(set_alpha_to_one=True), "ddim", 1.0, 20)[-1] == 0


@pytest.mark.parametrize(
    ("rule", "level", "expected"),
    [
        ("flow_sde", 0.7, (0.70, 0.74, 0.54, 0.45, 0.39, 0.35, 0.32, 0.28, 0.23, 0.006)),
        ("constant_sde", 0.3, (0.06, 0.065, 0.07, 0.08, 0.09, 0.10, 0.11, 0.13, 0.16, 0.03)),
        ("cps", 0.7, (0.86, 0.81, 0.76, 0.70, 0.63, 0.54, 0.41, 0.25, 0.008, 0.0)),
    ],
)
def test_std_of_stable_diffusion_3_in_ten_steps(rule, level, expected):
    std = std_of(sd3_scheduler(), rule, level, 10)
    assert std == pytest.approx(expected, abs=6e-3)
    assert std[-1] == pytest.approx(expected[-1], abs=2e-3)


def test_deterministic_edges_are_those_of_the_base_scheduler():
    for name in ("ddim", "ddim v", "cps"):
        make, *_ = SCHEDULERS[name]
        recording, last = record(name, stochastic=())
        base = make()
        base.set_timesteps(STEPS)
        x = x_0()
        for t in base.timesteps:
            x = base.step(model(x, t), t, x).prev_sample
        assert torch.equal(last, x)
        assert [s.logprob_N for s in recording.steps] == [None] * STEPS


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_draw_is_the_kernels(name):
    _, rule, level = SCHEDULERS[name]
    recording, last = record(name, stochastic=(0, 2, 3))
    assert [s.step for s in recording.steps] == list(range(STEPS))
    prediction = {"ddim": "epsilon", "ddim v": "v_prediction"}.get(name, "flow")
    for s in recording.steps:
        t = recording.timesteps[s.step]
        if s.step not in (0, 2, 3):
            assert s.logprob_N is None and recording.std[s.step] == 0
            continue
        settings = dict(rule=rule, level=level, prediction=prediction)
        mean, std = gaussian_step(model(s.x, t), s.x, recording.levels[s.step], **settings)
        assert std[0].item() == pytest.approx(recording.std[s.step])
        torch.testing.assert_close(s.x_next, mean + std[0] * noise(s.step, mean.shape))
        assert torch.equal(s.logprob_N, step_logprob(s.x_next, mean, std))
    assert torch.equal(last, recording.steps[-1].last_latent)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("middle", [0, 1, 3, STEPS])
def test_two_windows_are_the_whole_run(name, middle):
    stochastic = (0, 1, 4)  # edges of both kinds on both sides
    whole, last = record(name, stochastic=stochastic)
    prefix, x = record(name, window=(0, middle), stochastic=stochastic)
    suffix, resumed = record(name, x, window=(middle, STEPS), stochastic=stochastic)
    assert torch.equal(resumed, last)
    steps = [*prefix.steps, *suffix.steps]
    for ours, theirs in zip(steps, whole.steps, strict=True):
        assert ours.step == theirs.step and torch.equal(ours.x_next, theirs.x_next)
    assert torch.equal(prefix.levels, suffix.levels) and len(suffix.timesteps) == STEPS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "flow_sde"])
def test_half_precision_latents_are_scored_as_stored(name, dtype):
    recording, last = record(name, x_0(dtype))
    assert last.dtype == dtype
    _, rule, level = SCHEDULERS[name]
    for s in recording.steps:
        output = model(s.x, recording.timesteps[s.step].to(dtype)).to(dtype)
        prediction = "epsilon" if name == "ddim" else "flow"
        settings = dict(rule=rule, level=level, prediction=prediction)
        mean, std = gaussian_step(output, s.x, recording.levels[s.step], **settings)
        assert torch.equal(s.logprob_N, step_logprob(s.x_next, mean, std))


def test_draw_rounds_before_it_scores():
    mean, std_N = x_0().flatten(1), torch.tensor([0.02, 0.02])
    x_next, logprob_N = draw(mean, std_N, noise(0, mean.shape), dtype=torch.bfloat16)
    assert torch.equal(logprob_N, step_logprob(x_next, mean, std_N))
    unrounded = step_logprob(mean + std_N[:, None] * noise(0, mean.shape), mean, std_N)
    assert not torch.equal(logprob_N, unrounded)


def test_capture_records_the_output_with_its_graph_and_stops():
    weight = torch.tensor(0.3, requires_grad=True)
    for make in (sd_scheduler, sd3_scheduler):
        scheduler = recording_scheduler(make())
        rule = "ddim" if make is sd_scheduler else "cps"
        scheduler.recording = Recording(plan=plan(rule, 1.0), window=(2, 3), capture=True)
        scheduler.set_timesteps(STEPS)
        assert len(scheduler.timesteps) == 1
        output = weight * x_0()
        got = scheduler.step(output, scheduler.timesteps[0], x_0()).prev_sample
        assert torch.equal(got, x_0())
        (step,) = scheduler.recording.steps
        assert step.step == 2 and step.output is output and step.x_next is None


def test_rows_are_announced_before_each_step():
    rows = []
    recording = Recording(
        plan=plan("cps", 0.7), window=(2, 4), noise=noise, before_step=rows.append
    )
    run(recording_scheduler(sd3_scheduler()), recording, x_0())
    assert rows == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "cps"])
def test_an_edge_of_std_zero_is_the_base_schedulers_and_has_no_logprob(name, dtype):
    _, rule, level = SCHEDULERS[name]
    make = sd3_scheduler if name == "cps" else lambda: sd_scheduler(set_alpha_to_one=True)
    recording = Recording(plan=plan(rule, level), window=(0, STEPS), noise=noise)
    last = run(recording_scheduler(make()), recording, x_0(dtype))
    assert recording.std[-1] == 0 and recording.steps[-1].logprob_N is None
    base = make()
    base.set_timesteps(STEPS)
    if name == "cps":
        base._step_index = STEPS - 1  # it counts its own steps
    t, x = base.timesteps[-1], recording.steps[-1].x
    output = model(x, t.to(dtype)).to(dtype)
    assert torch.equal(last, base.step(output, t, x).prev_sample)


@pytest.mark.parametrize("stochastic", [(0, 1, 2), ()])
def test_a_latent_that_is_not_finite_is_named_by_its_step(stochastic):
    scheduler = recording_scheduler(sd3_scheduler())
    scheduler.recording = Recording(
        plan=plan("cps", 0.7, stochastic=stochastic), window=(0, STEPS), noise=noise
    )
    scheduler.set_timesteps(STEPS)
    x = scheduler.step(x_0(), scheduler.timesteps[0], x_0()).prev_sample
    for value in (math.nan, math.inf):
        output = x_0()
        output[1, 2, 3, 4] = value
        with pytest.raises(FloatingPointError, match="step 1 made are NaN.* in 1 of 2 rows.*dtype"):
            scheduler.step(output, scheduler.timesteps[1], x)
    broken = x_0() * math.nan
    scheduler.recording.steps.clear()
    with pytest.raises(FloatingPointError, match="enter step 0 are NaN or infinite in 2 of 2 rows"):
        scheduler.step(x_0(), scheduler.timesteps[0], broken)


@pytest.mark.parametrize("name", ["trained", "splits"])
def test_an_edge_of_std_zero_is_neither_trained_nor_split(name):
    edges = {"trained": (5,), "splits": ((5, 2),)}[name]
    with pytest.raises(ValueError, match=rf"{name} need edges.*rule cps.*has std 0 at \[5\]"):
        record("cps", **{name: edges})


def test_a_chain_of_another_length_is_refused():
    recording = Recording(plan=plan("cps", 0.7), window=(0, 2), noise=noise)
    scheduler = recording_scheduler(sd3_scheduler())
    scheduler.recording = recording
    with pytest.raises(ValueError, match="num_steps=6, but the scheduler made 5 timesteps"):
        scheduler.set_timesteps(5)


def test_pipelines_that_change_the_latents_are_refused():
    scheduler = recording_scheduler(sd3_scheduler())
    scheduler.recording = Recording(plan=plan("cps", 0.7), window=(0, STEPS), noise=noise)
    scheduler.set_timesteps(STEPS)
    x = scheduler.step(x_0(), scheduler.timesteps[0], x_0()).prev_sample
    x[:, :, 0] = 0  # as inpainting does
    with pytest.raises(ValueError, match="changed the latents between step 0 and step 1"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_timesteps_out_of_order_are_refused():
    scheduler = recording_scheduler(sd3_scheduler())
    scheduler.recording = Recording(plan=plan("cps", 0.7), window=(1, 3), noise=noise)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=r"as step 1 of the window \(1, 3\)"):
        scheduler.step(x_0(), scheduler.timesteps[1], x_0())


def test_windows_are_checked():
    with pytest.raises(ValueError, match=r"window must lie in 0\.\.6, got 2 to 7"):
        Recording(plan=plan("cps", 0.7), window=(2, 7))
    with pytest.raises(ValueError, match="only one step can be captured, got a window of 2"):
        Recording(plan=plan("cps", 0.7), window=(2, 4), capture=True)
    scheduler = recording_scheduler(sd3_scheduler())
    with pytest.raises(ValueError, match="step 0 draws noise, but the recording has none"):
        run(scheduler, Recording(plan=plan("cps", 0.7), window=(0, 1)), x_0())


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (PNDMScheduler(), "PNDMScheduler are not first-order Gaussian.*give the pipeline a DDIM"),
        (DPMSolverMultistepScheduler(), "DPMSolverMultistepScheduler are not first-order Gaussian"),
        (sd_scheduler(clip_sample=True), "clip_sample=True makes the mean.*non-smooth"),
        (sd_scheduler(thresholding=True), "thresholding=True makes the mean.*non-smooth"),
        (sd_scheduler(timestep_spacing="linspace"), "timestep_spacing='linspace'.*whole strides"),
        (
            sd_scheduler(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction' is not",
        ),
        (
            DDIMScheduler.from_config(
                CogVideoXDDIMScheduler(snr_shift_scale=4.0).config, clip_sample=False
            ),
            r"snr_shift_scale=4\.0 shifts the noise levels",
        ),
        (sd3_scheduler(stochastic_sampling=True), "stochastic_sampling=True adds noise of its own"),
        (sd3_scheduler(invert_sigmas=True), "invert_sigmas=True runs the table backwards"),
    ],
)
def test_schedulers_that_make_no_gaussian_actions_are_refused(scheduler, reason):
    with pytest.raises(ValueError, match=reason):
        recording_scheduler(scheduler)


def test_a_timestep_per_token_is_refused():
    scheduler = recording_scheduler(sd3_scheduler())
    scheduler.recording = Recording(plan=plan("cps", 0.7), window=(0, STEPS), noise=noise)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="a timestep per token cannot be recorded"):
        scheduler.step(x_0(), scheduler.timesteps[0], x_0(), per_token_timesteps=torch.ones(2, 4))


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_other_spacings_of_a_flow_are_the_schedulers_own(spacing):
    scheduler = sd3_scheduler(**{f"use_{spacing}_sigmas": True})
    recording = Recording(plan=plan("cps", 0.7, stochastic=()), window=(0, STEPS), noise=noise)
    last = run(recording_scheduler(scheduler), recording, x_0())
    scheduler.set_timesteps(STEPS)
    assert torch.equal(recording.levels[:, 1], scheduler.sigmas[:-1].double())
    x = x_0()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    assert torch.equal(last, x)


def test_more_steps_than_the_model_has_levels_for_are_refused():
    scheduler = recording_scheduler(sd_scheduler(num_train_timesteps=6))
    scheduler.recording = Recording(plan=plan("ddim", 1.0), window=(0, 0))
    with pytest.raises(ValueError, match="timestep 6 of 6 steps is beyond the model's 6.*offset=1"):
        scheduler.set_timesteps(STEPS)


def test_a_rule_for_other_models_is_refused_before_a_step():
    scheduler = recording_scheduler(sd3_scheduler())
    scheduler.recording = Recording(plan=plan("ddim", 1.0), window=(0, 0))
    with pytest.raises(ValueError, match="rule ddim is for models that predict .*, got 'flow'"):
        scheduler.set_timesteps(STEPS)
