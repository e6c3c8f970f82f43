"""Tiny diffusion pipelines with random weights; no text encoder, no VAE, nothing downloaded.

Every pipeline makes latents of 4 (or 16 packed) channels in a few hundred elements. `embeddings`
gives the keyword arguments that stand for prompts, a function of the prompt's key alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rollouts.prompts import Prompt

SEQUENCE, WIDTH = 3, 16


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    settings = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    return UNet2DConditionModel(**settings | changes)


def ddim(**changes: Any) -> DDIMScheduler:
    """The schedule of Stable Diffusion 1.x."""
    settings = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    return DDIMScheduler(**settings | changes)


def tiny_sd(**scheduler: Any) -> StableDiffusionPipeline:
    """Stable Diffusion, 4 x 8 x 8 latents."""
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def add_tiny_text_encoder(pipeline: StableDiffusionPipeline) -> None:
    """A CLIP text encoder with random weights, which reads letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{letter}</w>" for letter in letters),
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    pipeline.tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    pipeline.text_encoder = CLIPTextModel(config).eval()


def add_tiny_vae(pipeline: Any) -> None:
    """Decodes 8 x 8 latents to 64 x 64 pixels, with random weights."""
    if isinstance(pipeline, QwenImagePipeline):
        pipeline.vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4,
            latents_std=[0.9] * 4,
        )
        return
    pipeline.vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
        shift_factor=0.1,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """SDXL that predicts v and has zero terminal signal-to-noise ratio."""
    unet = tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=ddim(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            steps_offset=0,
        ),
        add_watermarker=False,
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def tiny_flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def tiny_qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "qwen": tiny_qwen_image,
}

RULES = {
    "sd": ("ddim", 1.0),
    "sdxl": ("ddim", 1.0),
    "sd3": ("flow_sde", 0.7),
    "flux": ("constant_sde", 0.3),
    "qwen": ("flow_sde", 0.7),
}
"""A noise rule and level that suits each."""

ENGINE_SETTINGS: dict[str, dict[str, Any]] = {
    "sd": dict(guidance_scale=3.0, height=64, width=64),
    "sdxl": dict(guidance_scale=3.0, height=64, width=64),
    "sd3": dict(guidance_scale=3.0, height=64, width=64),
    "flux": dict(guidance_scale=3.0, height=64, width=64),
    "qwen": dict(height=64, width=64, pipeline_kwargs={"true_cfg_scale": 3.0}),
}
"""Keyword arguments of `DiffusersEngine`. Guidance is a pair of evaluations but for Flux, which
reads it as an input; Qwen-Image evaluates the pair in two calls."""


def tiny_pipeline(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of `PIPELINES` with seeded random weights, in eval mode."""
    torch.manual_seed(seed)
    pipeline = PIPELINES[name]().to(dtype)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    denoiser.eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            # Some layers start at zero, and would hide what stands before them.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return pipeline


def embeddings(
    name: str, *, dtype: torch.dtype = torch.float32
) -> Callable[[Sequence[Prompt]], dict[str, Tensor]]:
    """The `encode` of a pipeline of `PIPELINES`: random numbers that a prompt's key determines."""

    def random(prompt: Prompt, purpose: str, *shape: int) -> Tensor:
        digest = hashlib.blake2b(f"{prompt.key} {purpose}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return torch.randn(*shape, generator=generator).to(dtype)

    def stacked(prompts: Sequence[Prompt], purpose: str, *shape: int) -> Tensor:
        return torch.stack([random(prompt, purpose, *shape) for prompt in prompts])

    def encode(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        columns = {"prompt_embeds": stacked(prompts, "prompt", SEQUENCE, WIDTH)}
        if name in ("sdxl", "sd3", "flux"):
            columns["pooled_prompt_embeds"] = stacked(prompts, "pooled", WIDTH)
        if name != "flux":
            columns["negative_prompt_embeds"] = stacked(prompts, "negative", SEQUENCE, WIDTH)
        if name in ("sdxl", "sd3"):
            columns["negative_pooled_prompt_embeds"] = stacked(prompts, "negative pooled", WIDTH)
        if name == "qwen":
            mask = torch.ones(len(prompts), SEQUENCE, dtype=torch.int64)
            columns |= {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
        return columns

    return encode


def image_prompts(count: int) -> list[Prompt]:
    return [
        Prompt(key=f"prompt-{i}", prompt=f"a picture of {i}", token_ids=(1,), columns={})
        for i in range(count)
    ]
