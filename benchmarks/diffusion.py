"""Measure images per second of three ways to branch, and the importance ratio before any update.

    python benchmarks/diffusion.py --quick                         # a minute on one CPU thread
    python benchmarks/diffusion.py --device cuda --dtype bfloat16  # larger models
    python benchmarks/diffusion.py --device cuda --dtype float32

Writes results/diffusion_DEVICE_DTYPE.json, with `_quick` at the end for --quick. Two models with
random weights: a UNet of Stable Diffusion's kind under `ddim`, and a transformer of Stable Diffusion
3's kind under `flow_sde`, both with classifier-free guidance. A chain of T steps; one split into k
children at edge t0, halfway. Latents are not decoded. Arms, with denoiser evaluations for k images:

    linear       no split                                          k T
    state copy   the state before the split is copied k times      t0 + k (T - t0)
    action       k draws from one evaluation                       (t0 + 1) + k (T - t0 - 1)

The engine branches at the action only. State copy is therefore emulated: the rollouts of the action
arm, and then the states before the split, k - 1 further copies of each, through `engine.replay` in
batches as full as any other. These are the evaluations that a state copy would have made; what they
return is thrown away. Its time is thus a little above what a loop written for it would need.

Rounds go through all arms in turn, since other work may share the machine: the figure to read is
`speed_median`, images per second over those of `linear`, of neighbouring runs. Beside it stands what
the number of evaluations promises.

`mismatch` scores the rollouts again with unchanged weights, where a ratio should be 1: with all rows,
which forms the batches of the rollout; with half of the roots; with one image alone; and with all
rows and gradients on, there up to the split only. It reports the largest |difference| of summed
log-probabilities in nats, the largest |ratio - 1| that it makes, and the difference over the number
of latent elements, to be read against clips of mean-reduced ratios such as DDPO's 1e-4. Nothing here
is asserted.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from torch import Tensor

from benchmarks import summaries
from rollouts.batch import DenoisingRollouts, concatenate
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.prompts import Prompt
from rollouts.step_plan import StepPlan

ARMS = ("linear", "state copy", "action")
TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large one run is."""

    side: int
    """Of a latent; images would be 8 times as wide."""
    unet_widths: tuple[int, ...]
    transformer_layers: int
    transformer_heads: int
    """Of 64 channels each."""
    text_width: int
    steps: int
    children: int
    images: int
    """Finished images of one run, a multiple of `children`."""
    batch_size: int
    rounds: int


SIZES = {
    "full": Size(
        side=64,
        unet_widths=(192, 384, 768),
        transformer_layers=12,
        transformer_heads=16,
        text_width=768,
        steps=20,
        children=4,
        images=64,
        batch_size=16,
        rounds=5,
    ),
    "quick": Size(
        side=16,
        unet_widths=(32, 64),
        transformer_layers=2,
        transformer_heads=2,
        text_width=64,
        steps=10,
        children=4,
        images=16,
        batch_size=8,
        rounds=3,
    ),
}

# Models.


def unet_pipeline(size: Size) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=size.side,
        block_out_channels=size.unet_widths,
        layers_per_block=2,
        norm_num_groups=16,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(size.unet_widths) - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (len(size.unet_widths) - 1) + ("UpBlock2D",),
        cross_attention_dim=size.text_width,
        attention_head_dim=8,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return diffusers.StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, requires_safety_checker=False, **dict.fromkeys(absent)
    )


def transformer_pipeline(size: Size) -> Any:
    width = 64 * size.transformer_heads
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=size.side,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=size.transformer_layers,
        attention_head_dim=64,
        num_attention_heads=size.transformer_heads,
        caption_projection_dim=width,
        joint_attention_dim=size.text_width,
        pooled_projection_dim=size.text_width,
        pos_embed_max_size=size.side // 2,
    )
    absent = [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        **dict.fromkeys(absent),
    )


MODELS: dict[str, tuple[Callable[[Size], Any], str, float]] = {
    "unet": (unet_pipeline, "ddim", 1.0),
    "sd3": (transformer_pipeline, "flow_sde", 0.7),
}
"""Pipeline, noise rule and level."""


def build_engine(name: str, size: Size, *, device: str, dtype: torch.dtype) -> DiffusersEngine:
    """A pipeline with seeded random weights, none of which is left at zero, behind an engine."""
    torch.manual_seed(0)
    pipeline = MODELS[name][0](size)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    pipeline.to(device, dtype)
    denoiser.eval()

    def encode(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(len(prompts), *shape, generator=generator).to(dtype)  # noqa: E731
        columns = {
            f"{sign}prompt_embeds": draw(TOKENS, size.text_width) for sign in ("", "negative_")
        }
        if name == "sd3":
            for sign in ("", "negative_"):
                columns[f"{sign}pooled_prompt_embeds"] = draw(size.text_width)
        return columns

    pixels = 8 * size.side
    return DiffusersEngine(
        pipeline,
        encode=encode,
        guidance_scale=5.0,
        height=pixels,
        width=pixels,
        batch_size=size.batch_size,
    )


def plan_of(name: str, size: Size, *, branch: bool) -> StepPlan:
    """All edges stochastic; all but the last trained."""
    _, rule, level = MODELS[name]
    edges = tuple(range(size.steps))
    return StepPlan(
        num_steps=size.steps,
        rule=rule,
        level=level,
        stochastic=edges,
        splits=((size.steps // 2, size.children),) if branch else (),
        trained=edges[:-1],
    )


# Speed.


def roll_out(engine: DiffusersEngine, plan: StepPlan, size: Size, seed: int) -> DenoisingRollouts:
    prompt = Prompt(key="p", prompt="", token_ids=(), columns={})
    seeds = torch.arange(size.images) + seed * size.images
    return engine.generate([prompt], [size.images], seeds_N=seeds, params=plan)


def run_arm(
    arm: str, engine: DiffusersEngine, name: str, size: Size, *, seed: int
) -> tuple[float, float]:
    """Seconds of one run, and its evaluations for each image."""
    before = engine.evaluations + engine.replay_evaluations
    plan = plan_of(name, size, branch=arm != "linear")
    synchronize(engine)
    start = time.perf_counter()
    rollouts = roll_out(engine, plan, size, seed)
    synchronize(engine)
    seconds = time.perf_counter() - start
    if arm == "state copy":
        assert plan.first_split is not None
        # Of different trees, because batches of one tree are chained without copying its states.
        others = [replace(rollouts, tree=replace(rollouts.tree)) for _ in range(size.children - 1)]
        copies = concatenate(others)
        start = time.perf_counter()
        with torch.no_grad():
            engine.replay(copies, step=plan.first_split)
        synchronize(engine)
        seconds += time.perf_counter() - start
    spent = engine.evaluations + engine.replay_evaluations - before
    return seconds, spent / size.images


def synchronize(engine: DiffusersEngine) -> None:
    if engine.pipeline.device.type == "cuda":
        torch.cuda.synchronize()


def speeds(engine: DiffusersEngine, name: str, size: Size) -> list[dict[str, Any]]:
    """One row for each arm."""
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    evaluations: dict[str, float] = {}
    for round_number in range(size.rounds + 1):
        for arm in ARMS:
            seconds, evaluations[arm] = run_arm(arm, engine, name, size, seed=round_number)
            if round_number > 0:  # the first round warms up
                rates[arm].append(size.images / seconds)
    rows = []
    for arm in ARMS:
        ratios = [a / b for a, b in zip(rates[arm], rates["linear"], strict=True)]
        rows.append(
            {
                "model": name,
                "arm": arm,
                "evaluations_per_image": evaluations[arm],
                "images_per_second_median": statistics.median(rates[arm]),
                "images_per_second_best": max(rates[arm]),
                "speed_median": statistics.median(ratios),
                "speed_min": min(ratios),
                "speed_max": max(ratios),
                "promised": evaluations["linear"] / evaluations[arm],
            }
        )
    return rows


# Ratios.


def difference(engine: DiffusersEngine, rollouts: DenoisingRollouts, *, gradient: bool) -> float:
    """Largest |new - old| of a trained edge's summed log-probability, in nats, one edge at a time.

    With gradients only the edges up to the split, whose few states are all in memory at once.
    """
    plan = rollouts.tree.plan
    assert plan.first_split is not None
    largest = 0.0
    for step in plan.trained:
        if gradient and step > plan.first_split:
            break
        weight_NT = torch.zeros(rollouts.mask_NT.shape, dtype=torch.float64)
        weight_NT[:, step] = 1.0
        with torch.set_grad_enabled(gradient):
            logprob_NT = engine.logprobs(replace(rollouts, weight_NT=weight_NT))
        apart_N = (logprob_NT[:, step].detach().cpu() - rollouts.logprob_NT[:, step]).abs()
        if not torch.isfinite(apart_N).all():
            raise FloatingPointError(f"log-probabilities of edge {step} are not finite")
        largest = max(largest, float(apart_N.max()))
    return largest


def mismatch(engine: DiffusersEngine, name: str, size: Size) -> list[dict[str, Any]]:
    """One row for each composition of the replayed batches."""
    rollouts = roll_out(engine, plan_of(name, size, branch=True), size, seed=0)
    elements = rollouts.tree.latent_M[0].numel()
    half = torch.arange(size.images // 2 // size.children * size.children)
    cases = {
        "all rows": (rollouts, False),
        "half of the roots": (rollouts.take(half), False),
        "one image": (rollouts.take(torch.tensor([size.images - 1])), False),
        "all rows, gradients on": (rollouts, True),
    }
    rows = []
    for case, (some, gradient) in cases.items():
        found = difference(engine, some, gradient=gradient)
        rows.append(
            {
                "model": name,
                "replayed": case,
                "nats": found,
                "ratio_error": math.expm1(min(found, 700.0)),
                "nats_per_element": found / elements,
            }
        )
    return rows


# The report.


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or os.cpu_count()} logical CPUs"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns under their names, numbers in four digits."""
    cells = [list(rows[0])] + [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quick", action="store_true", help="tiny models, few images")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    diffusers.utils.logging.set_verbosity_error()  # else it advises on loading, for want of a file
    size = SIZES["quick" if given.quick else "full"]

    speed, ratio, parameters = [], [], {}
    for name in MODELS:
        engine = build_engine(name, size, device=given.device, dtype=getattr(torch, given.dtype))
        parameters[name] = sum(weight.numel() for weight in engine.denoiser.parameters())
        speed += speeds(engine, name, size)
        ratio += mismatch(engine, name, size)
        del engine
    print(f"{hardware(given.device)}, {given.dtype}\n")
    print(table(speed), "\n")
    print(table(ratio))

    suffix = "_quick" if given.quick else ""
    name = f"diffusion_{given.device.split(':')[0]}_{given.dtype}{suffix}.json"
    output = given.output or Path(__file__).parent / "results" / name
    report = {
        "command": f"python benchmarks/diffusion.py --device {given.device} --dtype {given.dtype} "
        f"--threads {given.threads}{' --quick' if given.quick else ''}",
        "hardware": hardware(given.device),
        "dtype": given.dtype,
        "threads": given.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "size": asdict(size),
        "parameters": parameters,
        "speed": speed,
        "mismatch": ratio,
    }
    summaries.write(output, report)


if __name__ == "__main__":
    main()
