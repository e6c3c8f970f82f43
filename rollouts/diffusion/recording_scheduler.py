"""Schedulers that draw, score and record denoising steps inside any pipeline of diffusers.

Every pipeline calls `scheduler.set_timesteps` and `scheduler.step`, so a subclass of its scheduler
turns it into a policy without copying its loop: a pipeline can run a window of its steps, stop before
an action, and be asked again for one model output with its graph. Without a recording attached the
subclasses are exactly their base classes.

Axes: N rows of the pipeline call, T denoising steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from rollouts.diffusion.sde import (
    VARIANCE_PRESERVING,
    gaussian_step,
    require_fitting_rule,
    step_logprob,
    step_noise,
)
from rollouts.step_plan import StepPlan

# Diffusers annotates its schedulers more narrowly than its pipelines use them.
_DDIM: Any = DDIMScheduler
_FlowMatch: Any = FlowMatchEulerDiscreteScheduler

Noise = Callable[[int, torch.Size], Tensor]
"""`noise(step, shape) -> (N, ...)`: standard normal noise of every row of the call, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One denoising step of one pipeline call."""

    step: int
    """Edge 0 .. T-1, counted in the whole chain."""
    x: Tensor
    """(N, ...) the latent the model saw, as stored."""
    output: Tensor | None = None
    """(N, ...) the model output after guidance, with its graph; None unless captured."""
    x_next: Tensor | None = None
    """(N, ...) the next latent, as stored; None if captured."""
    logprob_N: Tensor | None = None
    """(N,) float64, nats; None on deterministic edges."""

    @property
    def last_latent(self) -> Tensor:
        """The latent that the pipeline goes on with."""
        return self.x if self.x_next is None else self.x_next


@dataclass(kw_only=True, slots=True)
class Recording:
    """What one pipeline call shall do, and what it did. Attached for that call only."""

    plan: StepPlan
    window: tuple[int, int]
    """Run the steps first .. last-1 of the chain; none where both are equal."""
    noise: Noise | None = None
    """Draws the noise of stochastic edges; not needed when capturing."""
    capture: bool = False
    """Record the model output of the one step of the window and leave the latent as it is."""
    before_step: Callable[[int], None] | None = None
    """Called with the number of rows of each step, before it."""
    steps: list[Step] = field(default_factory=list)
    levels: Tensor | None = None
    """(T, 4) float64 table of the whole chain, alpha, sigma, alpha', sigma'."""
    timesteps: Tensor | None = None
    """(T,) timesteps of the whole chain."""
    prediction: str = ""
    """What the model predicts, as `gaussian_step` names it."""
    std: tuple[float, ...] = ()
    """(T,) standard deviation of every edge; 0 where it is deterministic."""

    def __post_init__(self) -> None:
        first, last = self.window
        if not 0 <= first <= last <= self.plan.num_steps:
            raise ValueError(f"window must lie in 0..{self.plan.num_steps}, got {first} to {last}")
        if self.capture and last - first != 1:
            raise ValueError(f"only one step can be captured, got a window of {last - first}")

    def begin(self, levels: Tensor, timesteps: Tensor, prediction: str) -> None:
        """Take the scheduler's table and what the model predicts, and check the plan against them.

        Raises:
            ValueError: if the chain has another number of steps than the plan, the rule is not for
                what the model predicts, a step starts from pure noise of which the model predicts the
                noise, or an edge that is split or trained has std 0.
        """
        if len(timesteps) != self.plan.num_steps:
            raise ValueError(
                f"the plan has num_steps={self.plan.num_steps}, but the scheduler made "
                f"{len(timesteps)} timesteps"
            )
        require_fitting_rule(self.plan.rule, prediction)
        blind = (levels[:, 0] == 0).nonzero().flatten().tolist()
        if blind and prediction == "epsilon":
            raise ValueError(
                f"edge {blind[0]} starts from pure noise (alpha 0), where a model that predicts the "
                f"noise (prediction_type epsilon) says nothing about the image; build the scheduler "
                f"with rescale_betas_zero_snr=False, or with the prediction_type of the model"
            )
        self.levels, self.timesteps, self.prediction = levels, timesteps, prediction
        self.std = edge_std(self.plan, levels)
        splits = [edge for edge, children in self.plan.splits if children > 1]
        for name, edges in (("splits", splits), ("trained", self.plan.trained)):
            silent = [edge for edge in edges if self.std[edge] == 0]
            if silent:
                raise ValueError(
                    f"{name} need edges that draw noise, but rule {self.plan.rule} at level "
                    f"{self.plan.level} has std 0 at {silent}: leave them out of {name}"
                )


def edge_std(plan: StepPlan, levels: Tensor) -> tuple[float, ...]:
    """(T,) standard deviation of every edge of a plan; 0 where it draws no noise."""
    std, _ = step_noise(levels, rule=plan.rule, level=plan.level)
    return tuple(s if i in plan.stochastic else 0.0 for i, s in enumerate(std.tolist()))


class _RecordingMixin:
    """What the subclasses share: one inheritance, because pipelines demand a scheduler."""

    recording: Recording | None = None
    """Attached for one pipeline call; None makes the class its base class."""
    timesteps: Tensor
    """What the pipeline goes through; of the base class."""

    def _prediction(self) -> str:
        raise NotImplementedError

    def _levels(self) -> Tensor:
        """The (T, 4) float64 table of the chain that the base `set_timesteps` has just made."""
        raise NotImplementedError

    def _base_step(self, output: Tensor, timestep: Any, x: Tensor, step: int) -> Tensor:
        """The deterministic step of the base class; `step` counts in the whole chain."""
        raise NotImplementedError

    def _start(self) -> None:
        """After the base `set_timesteps`: record the whole table, show the pipeline the window."""
        if self.recording is None:
            return
        self.recording.begin(self._levels(), self.timesteps.clone(), self._prediction())
        # The base class keeps its whole table: suffix sigmas passed to `set_timesteps` instead would
        # be shifted a second time.
        first, last = self.recording.window
        self.timesteps = self.timesteps[first:last]

    def _next(
        self, recording: Recording, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any
    ) -> Tensor:
        """Do and record one step; returns the next latent, or `sample` itself when capturing.

        Settings that a pipeline passes on to `step`, such as its eta, are the plan's affair. Raises
        FloatingPointError if a latent is NaN or infinite.
        """
        output, x = model_output, sample
        step = recording.window[0] + len(recording.steps)
        assert recording.timesteps is not None and recording.levels is not None
        if step >= recording.window[1] or timestep != recording.timesteps[step]:
            raise ValueError(
                f"the pipeline took timestep {timestep} as step {step} of the window "
                f"{recording.window}; only pipelines that take every timestep once and in order can "
                f"be recorded"
            )
        if not recording.steps:
            require_finite(x, f"the latents that enter step {step}")
        elif not torch.equal(recording.steps[-1].last_latent, x):
            raise ValueError(
                f"the pipeline changed the latents between step {step - 1} and step {step}, as "
                f"image-to-image, image-to-video and inpainting pipelines do: its steps are not "
                f"Gaussian actions"
            )
        if recording.before_step is not None:
            recording.before_step(len(x))
        # What is recorded is out of the pipeline's reach: some write into the latents they got.
        recorded_x = recording.steps[-1].last_latent if recording.steps else x.clone()
        if recording.capture:
            recording.steps.append(Step(step=step, x=recorded_x, output=output))
            return x

        logprob_N = None
        if recording.std[step] == 0:
            x_next = self._base_step(output, timestep, x, step)
        elif recording.noise is None:
            raise ValueError(f"step {step} draws noise, but the recording has none")
        else:
            mean, std_N = gaussian_step(
                output,
                x,
                recording.levels[step],
                rule=recording.plan.rule,
                level=recording.plan.level,
                prediction=recording.prediction,
            )
            x_next, logprob_N = draw(mean, std_N, recording.noise(step, mean.shape), dtype=x.dtype)
        require_finite(x_next, f"the latents that step {step} made")
        recording.steps.append(Step(step=step, x=recorded_x, x_next=x_next, logprob_N=logprob_N))
        return x_next.clone()


def require_finite(x: Tensor, what: str) -> None:
    """Raise FloatingPointError if a row of these latents has a NaN or an infinity."""
    finite_N = x.isfinite().flatten(1).all(dim=1)
    if not finite_N.all():
        raise FloatingPointError(
            f"{what} are NaN or infinite in {int((~finite_N).sum())} of {len(x)} rows: the model's "
            f"output overflows, or its weights do; load it with dtype bfloat16 or float32, and lower "
            f"learning_rate or max_grad_norm if it happens while training"
        )


def draw(
    mean: Tensor, std_N: Tensor, noise: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The latents mean + std noise, rounded to `dtype` and then scored.

    In this order, because the rounded latent is the one that is stored and scored again: at the last
    step of Stable Diffusion the ratio would otherwise start at 1 +- 4e-3 in bfloat16.

    Args:
        mean: (N, ...) of `gaussian_step`.
        std_N: (N,), positive.
        noise: (N, ...) standard normal numbers.
        dtype: in which latents are stored.

    Returns:
        (N, ...) latents of that type and their (N,) float64 log-probabilities.
    """
    std = std_N.view(-1, *(1,) * (mean.ndim - 1))
    x_next = (mean + std * noise.to(device=mean.device, dtype=mean.dtype)).to(dtype)
    return x_next, step_logprob(x_next, mean, std_N)


class LogProbDDIMScheduler(_RecordingMixin, _DDIM):
    """`DDIMScheduler` whose steps are Gaussian actions under the rule `ddim`.

    Stochastic edges have eta = `plan.level`, the others, and those on which that leaves no noise, are
    the base step with eta 0. The table is
    that of diffusers: abar after the last step is `final_alpha_cumprod`, whatever the released code
    of DDPO and B2 does there.
    """

    @functools.wraps(_DDIM.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._start()

    @functools.wraps(_DDIM.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        if self.recording is None:
            return super().step(*args, **kwargs)
        x_next = self._next(self.recording, *args, **kwargs)
        # Without the prediction of the clean sample, so that a pipeline that reads it fails.
        if not kwargs.get("return_dict", True):
            return (x_next, None)
        return DDIMSchedulerOutput(prev_sample=x_next, pred_original_sample=None)

    def _prediction(self) -> str:
        return self.config.prediction_type

    def _levels(self) -> Tensor:
        now_T = self.timesteps.cpu()
        if now_T.max() >= self.config.num_train_timesteps:
            raise ValueError(
                f"timestep {now_T.max()} of {len(now_T)} steps is beyond the model's "
                f"{self.config.num_train_timesteps}: timesteps are spaced by "
                f"{self.config.timestep_spacing} with steps_offset={self.config.steps_offset}; take "
                f"fewer steps or another spacing"
            )
        before_T = now_T - self.config.num_train_timesteps // self.num_inference_steps
        abar = self.alphas_cumprod.cpu().double()
        final = self.final_alpha_cumprod.cpu().double()
        next_abar_T = torch.where(before_T >= 0, abar[before_T.clamp(min=0)], final)
        squares = (abar[now_T], 1 - abar[now_T], next_abar_T, 1 - next_abar_T)
        return torch.stack(squares, dim=1).sqrt()

    def _base_step(self, output: Tensor, timestep: Any, x: Tensor, step: int) -> Tensor:
        return super().step(output, timestep, x, eta=0.0, return_dict=False)[0]


class LogProbFlowMatchScheduler(_RecordingMixin, _FlowMatch):
    """`FlowMatchEulerDiscreteScheduler` whose steps are Gaussian actions under a flow rule.

    Deterministic edges, among them stochastic ones of std 0, are the Euler step of the base class.
    """

    @functools.wraps(_FlowMatch.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._start()

    @functools.wraps(_FlowMatch.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        if self.recording is None:
            return super().step(*args, **kwargs)
        if kwargs.get("per_token_timesteps") is not None:
            raise ValueError("steps with a timestep per token cannot be recorded")
        x_next: Any = self._next(self.recording, *args, **kwargs)
        if not kwargs.get("return_dict", True):
            return (x_next,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_next)

    def _prediction(self) -> str:
        return "flow"

    def _levels(self) -> Tensor:
        sigma = self.sigmas.cpu().double()
        now_T, next_T = sigma[:-1], sigma[1:]
        return torch.stack([1 - now_T, now_T, 1 - next_T, next_T], dim=1)

    def _base_step(self, output: Tensor, timestep: Any, x: Tensor, step: int) -> Tensor:
        # Its own count starts at 0 in every call.
        self._step_index = step
        return super().step(output, timestep, x, return_dict=False)[0]


def recording_scheduler(scheduler: Any) -> LogProbDDIMScheduler | LogProbFlowMatchScheduler:
    """A scheduler with the settings of this one that can record.

    Raises:
        ValueError: if its steps are not first-order Gaussian actions: another class of scheduler
            than the two supported, clipping or thresholding of the clean prediction (the mean would
            not be smooth in the model output), its own noise, an inverted table, steps that are
            spaced by linspace, or settings that DDIM drops although they move its noise levels.
    """
    if type(scheduler) in (DDIMScheduler, LogProbDDIMScheduler):
        for name in ("clip_sample", "thresholding"):
            if getattr(scheduler.config, name):
                raise ValueError(
                    f"{name}=True makes the mean of a step non-smooth in the model output; build the "
                    f"scheduler with {name}=False"
                )
        _check_ddim(scheduler.config)
        return LogProbDDIMScheduler.from_config(scheduler.config)
    if type(scheduler) in (FlowMatchEulerDiscreteScheduler, LogProbFlowMatchScheduler):
        reasons = {
            "stochastic_sampling": "adds noise of its own: rule='cps' with level=1 is the same law",
            "invert_sigmas": "runs the table backwards, which no noise rule here covers",
        }
        for name, reason in reasons.items():
            if getattr(scheduler.config, name):
                raise ValueError(f"{name}=True {reason}; build the scheduler with {name}=False")
        ours = LogProbFlowMatchScheduler.from_config(scheduler.config)
        ours.set_shift(scheduler.shift)
        return ours
    raise ValueError(
        f"steps of {type(scheduler).__name__} are not first-order Gaussian actions; give the pipeline "
        f"a DDIMScheduler (variance-preserving models) or a FlowMatchEulerDiscreteScheduler (flow "
        f"models), for instance DDIMScheduler.from_config(pipeline.scheduler.config)"
    )


def _check_ddim(config: Any) -> None:
    """Refuse settings with which DDIM's steps are not those of one chain, or not the model's."""
    if config.prediction_type not in VARIANCE_PRESERVING:
        raise ValueError(
            f"prediction_type={config.prediction_type!r} is not of DDIM; it must be one of "
            f"{', '.join(VARIANCE_PRESERVING)}"
        )
    if config.timestep_spacing == "linspace":
        raise ValueError(
            "timestep_spacing='linspace': DDIM goes down by whole strides, so that no step would end "
            "where the next begins, and the last would go nowhere; build the scheduler with "
            "timestep_spacing='leading' and steps_offset=1 (Stable Diffusion), or 'trailing'"
        )
    # `from_config` keeps settings of the scheduler it was given that DDIMScheduler does not know.
    if config.get("trained_betas") is None and config.get("snr_shift_scale", 1.0) != 1.0:
        raise ValueError(
            f"snr_shift_scale={config['snr_shift_scale']} shifts the noise levels of CogVideoX and "
            f"CogView3-Plus, and DDIMScheduler does not know it: give it trained_betas with the "
            f"levels of the model's own scheduler, as `ddim_of` of rl/policies/pipeline.py does"
        )


def with_shift(scheduler: Any, shift: float) -> Any:
    """A flow-matching scheduler with the settings of this one, but for its shift.

        sigma  <-  shift sigma / (1 + (shift - 1) sigma)

    Above 1 more steps are spent at high noise. The shift is static: a dynamic one, which grows with
    the size of the image, is turned off. (Esser et al., 2024, arXiv:2403.03206, eq. 23; DanceGRPO and
    MixGRPO sample FLUX with shift 3 for its dynamic one, released code.)

    Raises:
        ValueError: if the scheduler is of another class or the shift is not positive and finite.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"shift={shift} is a setting of FlowMatchEulerDiscreteScheduler, and the pipeline has a "
            f"{type(scheduler).__name__}: write no shift"
        )
    if isinstance(shift, bool) or not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    return type(scheduler).from_config(
        scheduler.config, shift=float(shift), use_dynamic_shifting=False
    )
