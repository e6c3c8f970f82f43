"""Further text-to-image and text-to-video pipelines of diffusers, tiny and with random weights.

Each has its denoiser and scheduler alone; what stands for prompts are random embeddings of `SHAPES`.
`recipes/images/PIPELINES.md` lists what came out.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.prx import pipeline_prx as prx
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2 as skyreels_v2
from torch import Tensor

from rollouts.prompts import Prompt

W = 16
"""Width of embeddings."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a pipeline is made and run."""

    make: Callable[[], Any]
    """Its denoiser."""
    shapes: dict[str, tuple[int, ...]]
    """Embeddings of a prompt by argument; of names with "mask" in them, ones."""
    lists: bool = False
    """Whether the embeddings are lists of tensors."""
    rule: str = "flow_sde"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the engine, beside 32 x 32 pixels and guidance 3."""
    parts: dict[str, Any] = field(default_factory=dict)
    """Makers of further components, and other arguments of the pipeline."""
    denoiser: str = "transformer"


PAIR = {"prompt_embeds": (3, W), "negative_prompt_embeds": (3, W)}
MASKED = PAIR | {"prompt_attention_mask": (3,), "negative_prompt_attention_mask": (3,)}


def _pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=W,
        norm_num_groups=2,
    )


def _sana(**changes: Any) -> Any:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=W,
        **changes,
    )


def _flux2(guidance_embeds: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=W,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=W,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def _cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=W,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=3,
        use_rotary_positional_embeddings=True,
    )


CASES: dict[str, Case] = {
    "PixArtSigmaPipeline": Case(
        make=_pixart,
        shapes=MASKED,
        rule="ddim",
        settings={"pipeline_kwargs": {"use_resolution_binning": False}},
    ),
    "PixArtAlphaPipeline": Case(
        make=_pixart,
        shapes=MASKED,
        rule="ddim",
        settings={"pipeline_kwargs": {"use_resolution_binning": False}},
    ),
    "SanaPipeline": Case(
        make=_sana,
        shapes=MASKED,
        settings={"pipeline_kwargs": {"use_resolution_binning": False}},
    ),
    "SanaVideoPipeline": Case(
        make=lambda: diffusers.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=W,
        ),
        shapes=MASKED,
        settings={"pipeline_kwargs": {"use_resolution_binning": False, "frames": 5}},
    ),
    "AuraFlowPipeline": Case(
        make=lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=W,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        shapes=MASKED,
    ),
    "Lumina2Pipeline": Case(
        make=lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(512, 32, 32),
            cap_feat_dim=W,
        ),
        shapes=MASKED,
    ),
    "LuminaPipeline": Case(
        make=lambda: diffusers.LuminaNextDiT2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            cross_attention_dim=W,
        ),
        shapes=MASKED,
    ),
    "CogView4Pipeline": Case(
        make=lambda: diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=W,
            time_embed_dim=8,
            condition_dim=4,
        ),
        shapes=PAIR,
    ),
    "CogView3PlusPipeline": Case(
        make=lambda: diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=W,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
        ),
        shapes=PAIR,
        rule="ddim",
    ),
    "HunyuanDiTPipeline": Case(
        make=lambda: diffusers.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=4,
            hidden_size=16,
            num_layers=2,
            cross_attention_dim=W,
            cross_attention_dim_t5=W,
            pooled_projection_dim=8,
            text_len=3,
            text_len_t5=3,
        ),
        shapes=MASKED | {f"{name}_2": shape for name, shape in MASKED.items()},
        rule="ddim",
        settings={"pipeline_kwargs": {"use_resolution_binning": False}},
        parts={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "Flux2Pipeline": Case(make=lambda: _flux2(True), shapes={"prompt_embeds": (3, W)}),
    "Flux2KleinPipeline": Case(
        make=lambda: _flux2(False),
        shapes=PAIR,
        parts={"vae": _flux2_vae},
    ),
    "ZImagePipeline": Case(
        make=lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=24,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=W,
            axes_dims=[4, 4, 4],
            axes_lens=[64, 32, 32],
        ),
        shapes=PAIR,
        lists=True,
    ),
    "ChromaPipeline": Case(
        make=lambda: diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=W,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        shapes=MASKED,
    ),
    "WanPipeline": Case(make=_wan, shapes=PAIR, settings={"pipeline_kwargs": {"num_frames": 5}}),
    "SkyReelsV2Pipeline": Case(
        make=lambda: diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=W,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        shapes=PAIR,
        settings={"pipeline_kwargs": {"num_frames": 5}},
    ),
    "CogVideoXPipeline": Case(
        make=_cogvideox,
        shapes=PAIR,
        rule="ddim",
        settings={"pipeline_kwargs": {"num_frames": 5}},
    ),
    "LTXPipeline": Case(
        make=lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=W,
        ),
        shapes=MASKED,
        settings={"pipeline_kwargs": {"num_frames": 9}},
    ),
    "MochiPipeline": Case(
        make=lambda: diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=W,
            time_embed_dim=4,
            max_sequence_length=3,
        ),
        shapes=MASKED,
        settings={"pipeline_kwargs": {"num_frames": 7}},
    ),
    "HunyuanVideoPipeline": Case(
        make=lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=W,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        shapes={
            "prompt_embeds": (3, W),
            "pooled_prompt_embeds": (8,),
            "prompt_attention_mask": (3,),
        },
        settings={"pipeline_kwargs": {"num_frames": 5}},
    ),
    "HunyuanImagePipeline": Case(
        make=lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=W,
            text_embed_2_dim=W,
            rope_axes_dim=(4, 4),
        ),
        shapes={
            f"{sign}prompt_embeds{mask}{number}": (3,) if mask else (3, W)
            for sign in ("", "negative_")
            for number in ("", "_2")
            for mask in ("", "_mask")
        },
        settings={"guidance_scale": None},
    ),
    "OvisImagePipeline": Case(
        make=lambda: diffusers.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=W,
            axes_dims_rope=(4, 4, 8),
        ),
        shapes=PAIR,
    ),
    "PRXPipeline": Case(
        make=lambda: diffusers.PRXTransformer2DModel(
            in_channels=4,
            context_in_dim=W,
            hidden_size=16,
            num_heads=2,
            depth=1,
            axes_dim=[4, 4],
        ),
        shapes=MASKED,
        settings={"batch_size": 1, "pipeline_kwargs": {"use_resolution_binning": False}},
    ),
    "LattePipeline": Case(
        make=lambda: diffusers.LatteTransformer3DModel(
            sample_size=4,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=W,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=2,
        ),
        shapes=PAIR,
        rule="ddim",
        settings={"pipeline_kwargs": {"video_length": 2}},
    ),
    "AllegroPipeline": Case(
        make=lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            cross_attention_dim=24,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            caption_channels=W,
        ),
        shapes=MASKED,
        rule="ddim",
        settings={"pipeline_kwargs": {"num_frames": 8}},
    ),
}


def _tokenizer() -> Any:
    """Words of a picture, and a chat template."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *["a", "picture", "of", "0", "1", "2", "dark"]]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=32,
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def _t5() -> Any:
    sizes = dict(vocab_size=32, d_model=W, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


def _umt5() -> Any:
    sizes = dict(vocab_size=32, d_model=W, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))


def _language_model(kind: str, *, width: int = W, causal: bool = False) -> Any:
    """A decoder of transformers whose hidden states are the embeddings."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return getattr(transformers, f"{kind}{'ForCausalLM' if causal else 'Model'}")(config)


ENCODERS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("PixArtSigmaPipeline", "PixArtAlphaPipeline", "ChromaPipeline"), _t5),
    **dict.fromkeys(("CogView3PlusPipeline", "CogVideoXPipeline", "LTXPipeline"), _t5),
    **dict.fromkeys(("MochiPipeline", "LattePipeline", "AllegroPipeline", "PRXPipeline"), _t5),
    **dict.fromkeys(("AuraFlowPipeline", "WanPipeline", "SkyReelsV2Pipeline"), _umt5),
    **dict.fromkeys(
        ("SanaPipeline", "SanaVideoPipeline", "Lumina2Pipeline"), lambda: _language_model("Gemma2")
    ),
    "LuminaPipeline": lambda: _language_model("Gemma"),
    "CogView4Pipeline": lambda: _language_model("Glm"),
    "ZImagePipeline": lambda: _language_model("Qwen3"),
    "OvisImagePipeline": lambda: _language_model("Qwen3"),
    "Flux2KleinPipeline": lambda: _language_model("Qwen3", width=8, causal=True),
}
"""Text encoders with random weights, of the class of the pipeline's own or one that serves as it."""

ENCODING: dict[str, dict[str, Any]] = {
    "CogView3PlusPipeline": {"max_sequence_length": 8},
    "CogVideoXPipeline": {"max_sequence_length": 3},
    "MochiPipeline": {"max_sequence_length": 3},
    "Flux2KleinPipeline": {"text_encoder_out_layers": [1, 2], "max_sequence_length": 16},
    "PRXPipeline": {"skip_text_cleaning": True},
}
"""Arguments that the tiny encoders need."""


def add_encoder(pipeline: Any, *, seed: int = 1) -> dict[str, Any]:
    """Give a pipeline a tokenizer and a text encoder; what `pipeline_kwargs` they need."""
    name = type(pipeline).__name__
    torch.manual_seed(seed)
    pipeline.tokenizer, pipeline.text_encoder = _tokenizer(), ENCODERS[name]().eval()
    given = dict(CASES[name].settings.get("pipeline_kwargs", {}))
    accepted = inspect.signature(type(pipeline).__call__).parameters
    for module in (skyreels_v2, prx):  # clean texts with ftfy, which tests do without
        module.ftfy = SimpleNamespace(fix_text=str)
    if "clean_caption" in accepted:  # takes beautifulsoup
        given["clean_caption"] = False
    return given | ENCODING.get(name, {})


def make(name: str, *, seed: int = 0) -> Any:
    """The pipeline of a case, in eval mode, with seeded random weights none of which is 0."""
    case = CASES[name]
    torch.manual_seed(seed)
    denoiser = case.make().eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if case.rule == "ddim":
        scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    kind = getattr(diffusers, name)
    expected, _ = kind._get_signature_keys(kind)
    absent = dict.fromkeys(expected)
    parts = {name: part() if callable(part) else part for name, part in case.parts.items()}
    return kind(**absent | {case.denoiser: denoiser, "scheduler": scheduler} | parts)


def encoder(name: str) -> Callable[[Sequence[Prompt]], dict[str, Any]]:
    """The `encode` of a case: random numbers that a prompt's key determines."""
    case = CASES[name]

    def one(prompt: Prompt, argument: str, shape: tuple[int, ...]) -> Tensor:
        if "mask" in argument:
            return torch.ones(shape, dtype=torch.bool)
        digest = hashlib.blake2b(f"{prompt.key} {argument}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        length = 2 + digest[0] % 3 if case.lists else shape[0]
        return torch.randn(length, *shape[1:], generator=generator)

    def encode(prompts: Sequence[Prompt]) -> dict[str, Any]:
        found = {
            argument: [one(prompt, argument, shape) for prompt in prompts]
            for argument, shape in case.shapes.items()
        }
        return found if case.lists else {name: torch.stack(rows) for name, rows in found.items()}

    return encode
