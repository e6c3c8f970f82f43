"""A tiny conditional diffusion model of scikit-learn's digits, pretrained on partly wrong captions.

    python -m recipes.images.digits --folder runs/digits [--seed 1]

Real images, a prompt-conditional and sparse reward, nothing to download. With true captions the
samples would nearly all show the prompted digit; 40 % of the captions are therefore replaced at
random, so that reinforcement learning has something to find. A folder that was made with the same
settings is left as it is, so a second run costs nothing.

The images stand in for latents: the pipeline is diffusers' own StableDiffusionPipeline without VAE,
text encoder and tokenizer, so it is called with `prompt_embeds=`, `output_type="latent"`,
`height=SIZE_ARGUMENT`, `width=SIZE_ARGUMENT` and `guidance_scale=1`.

Axes: N images, P prompts.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from rl.policies.loading import no_progress_bars
from rl.run.checkpoint import TornCheckpointError, seal, verify
from rollouts.prompts import Prompt

SETTINGS_FILE = "digits.json"
"""What a folder was made with, beside the pipeline's own files."""

PROMPTS = tuple(f"the digit {digit}" for digit in range(10))
"""The only prompts the model knows; the digit is the row of its embedding."""

SIZE_ARGUMENT = 64
"""`height` and `width` of the pipeline call: it divides by 8 where there is no VAE to ask."""

ABSENT = dict.fromkeys(
    ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
)
"""Components of the pipeline that digits do not have; diffusers wants to hear so at loading too."""

CLASSIFIER_IMAGES = 1300
"""Images the classifier is fitted to; the other 497 measure it."""


@dataclass
class Digits:
    """What the pretrained model depends on; another value of any of these makes another model."""

    seed: int = field(default=0, metadata={"help": "Of weights, order, noise and captions."})
    steps: int = field(default=600, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Images of a step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak; falls to 0 as a cosine."})
    replaced_captions: float = field(
        default=0.4, metadata={"help": "Share of captions drawn anew from all ten, each step."}
    )


@dataclass
class Place:
    """Where the command writes, and on how many threads it computes."""

    folder: str = field(metadata={"help": "Folder of the pipeline to make."})
    num_threads: int = field(default=1, metadata={"help": "More than 1 is slower on busy cores."})


def encode(prompts: Sequence[Prompt | str]) -> dict[str, Tensor]:
    """The embeddings of prompts, as keyword arguments of the pipeline.

    Row 1 + d of the Hadamard matrix of order 16 stands for digit d: ten fixed vectors of 16 numbers
    +1 or -1, so of norm 4, each orthogonal to the others.

    Args:
        prompts: P of `PROMPTS`, as strings or as `Prompt`s.

    Returns:
        `prompt_embeds` (P, 1, 16) float32.

    Raises:
        ValueError: for a prompt that is not one of `PROMPTS`.
    """
    texts = [prompt.prompt if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    rows = [1 + digit_of(str(text)) for text in texts]
    order_2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    hadamard = functools.reduce(torch.kron, [order_2] * 4)
    return {"prompt_embeds": hadamard[torch.tensor(rows, dtype=torch.int64)][:, None, :]}


def digit_of(prompt: str) -> int:
    """The digit that a prompt asks for.

    Raises:
        ValueError: for a prompt that is not one of `PROMPTS`.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"no digit prompt {prompt!r}: write one of {list(PROMPTS)}")
    return PROMPTS.index(prompt)


def decode(latent_N: Tensor) -> np.ndarray:
    """Latents as images, for a pipeline without a VAE.

        pixel = round(255 clamp((x + 1) / 2, 0, 1))

    Args:
        latent_N: (N, C, H, W), with -1 black and 1 white; values beyond are cut, as by diffusers'
            own image processor.

    Returns:
        (N, H, W, C) uint8.

    Raises:
        ValueError: if a latent is not finite, because a clamp would make a pixel of it.
    """
    if latent_N.ndim != 4:
        raise ValueError(f"latents must be (N, C, H, W), got {tuple(latent_N.shape)}")
    if not torch.isfinite(latent_N).all():
        bad = (~torch.isfinite(latent_N)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"the latents of rows {bad} are not finite, so they are no images")
    share = ((latent_N.detach().double() + 1) / 2).clamp(0, 1)
    return (255 * share).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def build_unet(*, seed: int) -> UNet2DConditionModel:
    """The untrained denoiser, 248,401 parameters; the state of torch's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=4,
        )


def build_scheduler() -> DDIMScheduler:
    """Linear betas from 1e-4 to 0.02; the last step ends at alpha_0, so its std is not 0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """diffusers' pipeline around the denoiser, without VAE, text encoder and tokenizer."""
    pipeline: Any = StableDiffusionPipeline(
        unet=unet, scheduler=build_scheduler(), requires_safety_checker=False, **ABSENT
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(folder: str | Path) -> StableDiffusionPipeline:
    """The pipeline that `pretrain` put into a folder, in float32, on the CPU."""
    with no_progress_bars():
        pipeline = StableDiffusionPipeline.from_pretrained(
            Path(folder), **ABSENT, use_safetensors=True, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Pretraining.


def pretrain(folder: str | Path, settings: Digits | None = None, *, quiet: bool = False) -> Path:
    """Make the pretrained pipeline, unless `folder` holds it already.

    The folder appears under its name when it is complete. One that was made with other settings, or
    that is damaged, is made anew and replaced at the end.

    Args:
        folder: where the pipeline goes, in diffusers' layout.
        settings: what it depends on; None takes the defaults.
        quiet: no messages.

    Returns:
        The folder.

    Raises:
        ValueError: if the settings are out of range, or the folder holds something else, which is
            not touched.
    """
    folder = Path(folder)
    settings = settings or Digits()
    _check(settings)

    def say(text: str) -> None:
        if not quiet:
            print(f"digits: {text}", file=sys.stderr, flush=True)

    if folder.exists() and any(folder.iterdir()):
        if not (folder / SETTINGS_FILE).is_file():
            raise ValueError(
                f"{folder} is not empty and has no {SETTINGS_FILE}, so it holds no pretrained "
                f"digits; choose another folder or remove it"
            )
        different = _difference(folder, asdict(settings))
        if not different:
            say(f"{folder} is there already")
            return folder
        say(f"{folder} is made anew, because {different}")
    started = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        say(f"{settings.steps} steps of {settings.batch_size} images")
        pipeline: Any = build_pipeline(train(settings))
        pipeline.save_pretrained(staging / "new")
        (staging / "new" / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=1))
        seal(staging / "new")
        if folder.exists():
            os.replace(folder, staging / "old")
        os.replace(staging / "new", folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"{folder} after {time.perf_counter() - started:.0f} s")
    return folder


def train(settings: Digits) -> UNet2DConditionModel:
    """The denoiser after supervised training on the noise of noised digits.

        L = mean |eps - unet(sqrt(abar_t) x + sqrt(1 - abar_t) eps, t, c)|^2

    with t uniform and caption c replaced by one of the ten at random with the declared probability.
    (Ho et al., 2020, arXiv:2006.11239; AdamW and the cosine are a project default.)
    """
    _check(settings)
    image_D, digit_D = images()
    embedding = encode(PROMPTS)["prompt_embeds"]
    scheduler: Any = build_scheduler()  # diffusers' classes hide their methods from type checks
    unet: Any = build_unet(seed=settings.seed)
    unet.train()
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps)
    size = settings.batch_size
    for _ in range(settings.steps):
        row = torch.randint(len(image_D), (size,), generator=generator)
        noise = torch.randn((size, 1, 8, 8), generator=generator)
        time_step = torch.randint(
            scheduler.config.num_train_timesteps, (size,), generator=generator
        )
        replaced = torch.rand(size, generator=generator) < settings.replaced_captions
        other = torch.randint(10, (size,), generator=generator)
        caption = torch.where(replaced, other, digit_D[row])
        noised = scheduler.add_noise(image_D[row], noise, time_step)
        output = unet(noised, time_step, encoder_hidden_states=embedding[caption]).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return unet.eval()


def images() -> tuple[Tensor, Tensor]:
    """The 1797 images (D, 1, 8, 8) float32 in [-1, 1], scaled x/8 - 1, and their digits (D,)."""
    data = _library("datasets").load_digits()
    image_D = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return image_D, torch.tensor(data.target, dtype=torch.int64)


def _check(settings: Digits) -> None:
    for name in ("steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if not settings.learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {settings.learning_rate}")
    if not 0 <= settings.replaced_captions <= 1:
        raise ValueError(f"replaced_captions must lie in [0, 1], got {settings.replaced_captions}")


def _difference(folder: Path, wanted: dict[str, Any]) -> str:
    """Why the folder will not do; empty if it will."""
    try:
        verify(folder)
        found = json.loads((folder / SETTINGS_FILE).read_text())
    except (TornCheckpointError, json.JSONDecodeError) as error:
        return f"it is damaged: {error}"
    changed = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name} was {found.get(name)}, now {wanted.get(name)}" for name in changed)


# The reward.


def digit_correct(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """1 where the classifier reads the prompted digit, else 0; sparse.

    Returns:
        (N,) float64, and the details `digit`, what was read, and `probability` of the prompted one.

    Raises:
        ValueError: images that are not (N, 8, 8, 1) uint8, or a prompt not in `PROMPTS`.
    """
    wanted_N, probability_ND = _read(image_NHWC, prompts)
    digit_N = probability_ND.argmax(axis=1)
    details = {"digit": digit_N, "probability": probability_ND[np.arange(len(wanted_N)), wanted_N]}
    return (digit_N == wanted_N).astype(np.float64), details


def digit_probability(
    image_NHWC: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> np.ndarray:
    """The classifier's probability of the prompted digit, in [0, 1]; dense.

    Returns:
        (N,) float64.

    Raises:
        ValueError: as `digit_correct`.
    """
    wanted_N, probability_ND = _read(image_NHWC, prompts)
    return probability_ND[np.arange(len(wanted_N)), wanted_N]


def _read(image_NHWC: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The prompted digit of each row, and the classifier's probabilities of all ten."""
    if image_NHWC.shape[1:] != (8, 8, 1) or image_NHWC.dtype != np.uint8:
        raise ValueError(
            f"digits are (N, 8, 8, 1) uint8, got {image_NHWC.shape} {image_NHWC.dtype}"
        )
    if len(image_NHWC) != len(prompts):
        raise ValueError(f"got {len(image_NHWC)} images for {len(prompts)} prompts")
    wanted_N = np.array([digit_of(prompt) for prompt in prompts], dtype=np.int64)
    if not len(wanted_N):
        return wanted_N, np.zeros((0, 10))
    features = image_NHWC.reshape(len(image_NHWC), 64) / 127.5 - 1
    return wanted_N, np.asarray(classifier().predict_proba(features), dtype=np.float64)


@functools.cache
def classifier() -> Any:
    """Logistic regression on pixels in [-1, 1], fitted to the first 1300 images.

    The data set is in the order of its writers, so the images left out are mostly by others: a
    shuffled split measures .978 where this one measures .930. Fitted once in a process.
    """
    features, digits = _pixels()
    fit = _library("linear_model").LogisticRegression(max_iter=1000).fit
    return fit(features[:CLASSIFIER_IMAGES], digits[:CLASSIFIER_IMAGES])


def _pixels() -> tuple[np.ndarray, np.ndarray]:
    data = _library("datasets").load_digits()
    return data.data / 8 - 1, data.target


def _library(name: str) -> Any:
    """A module of scikit-learn, which only these recipes need."""
    try:
        import sklearn.datasets
        import sklearn.linear_model
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: pip install 'apportion[recipes]'"
        ) from error
    return getattr(sklearn, name)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and make the pretrained pipeline."""
    from ..config import (
        parse,  # only here: `rewards` may name this file, which is then no package's
    )

    place, settings = parse((Place, Digits), arguments)
    torch.set_num_threads(place.num_threads)
    pretrain(place.folder, settings)


if __name__ == "__main__":
    main()
