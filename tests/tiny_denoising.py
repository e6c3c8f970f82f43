"""A denoiser of a few thousand weights on 8 x 8 grey images, and runs of the trainer on it.

The pipeline is diffusers' own StableDiffusionPipeline without VAE, text encoder and tokenizer: its
latents are the pixels, and random numbers that a prompt's key determines stand for the prompts.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from rl.config.diffusion import DenoisingConfig
from rl.denoising_trainer import DenoisingTrainer
from rollouts.batch import DenoisingRollouts
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.step_plan import StepPlan
from tests.tiny import collect, prepare  # noqa: F401 -- for both kinds
from tests.tiny_pipelines import ddim, embeddings, image_prompts, tiny_unet

gc.freeze()  # every run collects garbage, and would take 0.4 s to go through diffusers' classes

CHAIN: dict[str, Any] = {"num_steps": 4, "rule": "ddim", "level": 1.0}
BRANCHED: dict[str, Any] = CHAIN | {"branch": {"at": [1], "children": 3}}
"""Three samples a root, which share the states up to the second edge; edges 0 to 2 are trained."""

ENGINE: dict[str, Any] = {"guidance_scale": 1.0, "height": 64, "width": 64}


def pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """64,361 weights, none of which is 0, so that each has a gradient."""
    torch.manual_seed(seed)
    made = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=tiny_unet(in_channels=1, out_channels=1),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for weight in made.unet.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return made.to(dtype)


def engine(around: StableDiffusionPipeline, **settings: Any) -> DiffusersEngine:
    encode = embeddings("sd", dtype=around.unet.dtype)
    return DiffusersEngine(around, encode=encode, **(ENGINE | settings))


def rows(count: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"picture {i}"} for i in range(count)]


def config(folder: str | Path, **settings: Any) -> DenoisingConfig:
    defaults: dict[str, Any] = ENGINE | {
        "plan": BRANCHED,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "prompts_per_step": 2,
        "rollouts_per_prompt": 6,
        "allocator": "uniform",
        "per_device_train_batch_size": 8,
        "generation_batch_size": 16,
        "eval_rollouts_per_prompt": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        "log_level": "error",
    }
    return DenoisingConfig(output_dir=str(folder), **(defaults | settings))


def trainer(
    folder: str | Path, *, reward: Any = "brightness", data: Any = None, **settings: Any
) -> DenoisingTrainer:
    others = {
        name: settings.pop(name)
        for name in ("eval_dataset", "peft_config", "planner", "callbacks")
        if name in settings
    }
    around = settings.pop("pipeline", None) or pipeline()
    made = config(folder, **settings)
    sizes = {"guidance_scale": made.guidance_scale, "batch_size": made.generation_batch_size}
    return DenoisingTrainer(
        around,
        reward,
        made,
        rows() if data is None else data,
        engine=engine(around, **sizes),
        **others,
    )


def run(folder: str | Path, *, resume: Any = None, **settings: Any) -> DenoisingTrainer:
    """A trainer that has trained."""
    made = trainer(folder, **settings)
    made.train(resume_from_checkpoint=resume)
    return made


def bright(image_NHWC: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    """1 where more than half of the pixels are brighter than half, else 0."""
    return ((image_NHWC > 127).mean(axis=(1, 2, 3)) > 0.5).astype(np.float64)


def start(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights every run begins with."""
    return {name: w.clone() for name, w in pipeline(dtype=dtype).unet.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether weights are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest between two weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def drawn(
    around: StableDiffusionPipeline | None = None,
    *,
    budgets: tuple[int, ...] = (6, 3),
    plan: StepPlan | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[DiffusersEngine, DenoisingRollouts]:
    """An engine, and rollouts of prompt 0 from two roots and of prompt 1 from one, as `BRANCHED`."""
    made = engine(around or pipeline(dtype=dtype))
    plan = plan or config("unused").step_plan(0)
    prompts, seeds = image_prompts(len(budgets)), range(sum(budgets))
    return made, made.generate(prompts, list(budgets), seeds_N=seeds, params=plan)
