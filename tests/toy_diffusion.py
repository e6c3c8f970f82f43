"""Eight Gaussians in the plane: the smallest diffusion model that learns, as a diffusers pipeline.

Data are points around eight centres on a circle of radius 2, with std 0.15 in each coordinate; the
reward is 1 within 0.1 of the centre (2, 0). Latents are (2, 1, 1), a point as an image of one pixel.

Axes: N points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from rollouts.rewards.image_shapes import within_radius

RADIUS, STD, TARGET, REACH = 2.0, 0.15, (2.0, 0.0), 0.1

PROMPT = "a point near (2, 0)"

LIMIT = 8.0
"""Coordinates are cut here where points become images of two bytes a coordinate."""


def eight_gaussians(count: int, generator: torch.Generator) -> Tensor:
    """(N, 2, 1, 1) points of the data."""
    angle_N = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centre = RADIUS * torch.stack([angle_N.cos(), angle_N.sin()], dim=1)
    return (centre + STD * torch.randn(count, 2, generator=generator))[:, :, None, None]


class PointDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The noise in a point: an MLP of three hidden layers that reads the point and the time."""

    @register_to_config
    def __init__(self, width: int = 128, num_frequencies: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 2 * num_frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        """(N, 2, 1, 1) noise; `timestep` in 0..999, one number or one for each row."""
        frequency = torch.logspace(0, 2, self.config.num_frequencies, device=sample.device)
        time_N = torch.as_tensor(timestep, device=sample.device).expand(len(sample)) / 1000
        angle = time_N[:, None].to(sample.dtype) * frequency.to(sample.dtype)
        features = torch.cat([sample.flatten(1), angle.sin(), angle.cos()], dim=1)
        return self.layers(features)[:, :, None, None]


class PointPipeline(DiffusionPipeline):
    """The least that a pipeline of diffusers does: noise, a loop over timesteps, an output."""

    vae = "points are written as images below"
    """Not None: the engine asks the pipeline itself to decode."""

    def __init__(self, unet: PointDenoiser, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int = 20,
        eta: float = 1.0,
        latents: Tensor | None = None,
        generator: Sequence[torch.Generator] | None = None,
        output_type: str = "latent",
        return_dict: bool = True,
    ) -> Any:
        if latents is None:
            assert generator is not None
            rows = [torch.randn(2, 1, 1, generator=one) for one in generator]
            latents = torch.stack(rows).to(self._execution_device)
        x: Any = latents
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        for timestep in self.scheduler.timesteps:
            output = self.unet(x, timestep)
            x = self.scheduler.step(output, timestep, x, eta=eta, return_dict=False)[0]
        if output_type != "latent":
            x = as_bytes(x)
        return (x,) if not return_dict else {"images": x}


def as_bytes(x: Tensor) -> np.ndarray:
    """(N, 2, 2, 1): each coordinate a row of a high and a low byte over 255.

    In steps of 2 LIMIT / 65535 from -LIMIT; the images of a decoder, before they become uint8.
    """
    share = (x.flatten(1).double().cpu().clamp(-LIMIT, LIMIT) / LIMIT + 1) / 2
    number = (share * 65535).round().long()
    return (torch.stack([number // 256, number % 256], dim=2)[..., None] / 255).numpy()


def points_of(image_NHWC: np.ndarray) -> np.ndarray:
    """(N, 2) points behind uint8 images of `as_bytes`; off by 1.3e-4 at most."""
    byte = image_NHWC.reshape(-1, 2, 2).astype(np.float64)
    return ((byte[..., 0] * 256 + byte[..., 1]) / 65535 * 2 - 1) * LIMIT


def near_target(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> np.ndarray:
    """1 where the point lies within 0.1 of (2, 0), else 0."""
    return within_radius(points_of(image_NHWC), centre=TARGET, radius=REACH)


def point_pipeline(*, seed: int = 0) -> PointPipeline:
    """The pipeline with untrained weights, 37,762 of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = PointDenoiser()
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = PointPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pretrained(*, steps: int = 4000, seed: int = 0) -> PointPipeline:
    """The pipeline after supervised training on the noise of noised points."""
    pipeline = point_pipeline(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        x = eight_gaussians(256, generator)
        noise = torch.randn(x.shape, generator=generator)
        when = torch.randint(1000, (len(x),), generator=generator)
        noised = pipeline.scheduler.add_noise(x, noise, when)
        loss = nn.functional.mse_loss(pipeline.unet(noised, when), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    pipeline.unet.eval()
    return pipeline
