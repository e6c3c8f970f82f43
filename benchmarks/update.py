"""Measure time and memory of an update as ratios to TRL's GRPOTrainer on the same rows.

    python benchmarks/update.py                  # about three minutes; writes results/update.json
    python benchmarks/update.py --quick          # one small case, nothing written
    python benchmarks/update.py --device cuda    # larger cases; writes results/update_cuda.json

An update is what stands between recorded rows (prompts, completions, advantages, old log-probs) and
the gradient of the DAPO loss, a token mean over all rows: micro-batches, forward, loss, backward.
No generation and no optimizer step. Arms:

    trl            `GRPOTrainer.training_step`, its generation replaced by the recorded rows
    rows, plain    ours: micro-batches of as many rows as TRL's, longest first; `completion_logprobs`
    rows, fused    the same with `fused_logprobs`
    rows, fused and entropies    the same with `fused_statistics`, as TRL has entropies in its loss
    tokens, plain  micro-batches of as many padded tokens as TRL's hold; `completion_logprobs`
    tokens, fused  the same with `fused_logprobs`
    shared, plain  siblings in one micro-batch behind one copy of their prompt; `completion_logprobs`
    shared, fused  the same with `fused_logprobs`
    auto, plain    what `share_prompts: auto` makes of the rows of `rows, plain`

Both models come out of `accelerate.prepare`; bfloat16 means its autocast over float32 weights. TRL
runs as released: its fused head, its entropies, its batches padded to the longest row of all. Its
head has Triton kernels on CUDA that score completions only; on a CPU it scores every position, in
plain torch like ours, so ratios on a CPU say nothing about CUDA.

Each arm's loss and gradient must agree with TRL's before anything is timed: relative error at most
1e-4 in float32, in bfloat16 a stated multiple of what rounding does to TRL's own gradient (its
bfloat16 against its float32).

Rounds go through all arms in turn, since other work may share the machine: the figure to read is
`ratio_median`, TRL's seconds over the arm's, over neighbouring runs. On a CPU seconds are those the
processor spent on this process, which other work changes less. Peak memory is what an update
allocates above what stood before it: of torch's allocator as its profiler records each allocation
on a CPU (resident memory would add what the C library keeps of freed chunks: with
MALLOC_MMAP_THRESHOLD_=262144, so that it keeps none, the two agree to 13 MiB), and
`max_memory_allocated` on CUDA. Gradients are part of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from torch import Tensor, nn

from benchmarks import summaries
from rl.logprobs.from_hidden import fused_logprobs, fused_statistics, refusal
from rl.logprobs.from_logits import completion_logprobs, ends
from rl.logprobs.micro_batches import by_prompts, by_rows, by_tokens
from rl.logprobs.scorer import Scorer
from rl.logprobs.shared_prompts import cost, packed_layout
from rl.objective.losses import clipped_surrogate
from rollouts.batch import TokenRollouts

PAD, EOS = 0, 1
CASES: dict[str, dict[str, Any]] = {
    # name -> vocabulary, width, layers, completions' lengths; rollouts of a prompt, if not 4, and sizes
    "wide, even": {"vocabulary": 32768, "width": 64, "layers": 2, "ragged": False},
    "wide, ragged": {"vocabulary": 32768, "width": 64, "layers": 2, "ragged": True},
    "small, even": {"vocabulary": 1024, "width": 128, "layers": 4, "ragged": False},
    "small, ragged": {"vocabulary": 1024, "width": 128, "layers": 4, "ragged": True},
    "long prompts, even": {"vocabulary": 1024, "width": 128, "layers": 4, "ragged": False}
    | {"group": 8, "sizes": (32, 8, 256, 64)},
    "long prompts, ragged": {"vocabulary": 1024, "width": 128, "layers": 4, "ragged": True}
    | {"group": 8, "sizes": (32, 8, 256, 64)},
    # As the arithmetic recipe's: 42 % of the tokens are of prompts.
    "short prompts, even": {"vocabulary": 64, "width": 128, "layers": 4, "ragged": False}
    | {"group": 8, "sizes": (128, 64, 20, 28)},
    "short prompts, ragged": {"vocabulary": 64, "width": 128, "layers": 4, "ragged": True}
    | {"group": 8, "sizes": (128, 64, 20, 100)},
}
CUDA_CASES: dict[str, dict[str, Any]] = {
    "0.6B, even": {"vocabulary": 151936, "width": 1024, "layers": 28, "ragged": False},
    "0.6B, ragged": {"vocabulary": 151936, "width": 1024, "layers": 28, "ragged": True},
}
QUICK_CASES: dict[str, dict[str, Any]] = {
    "tiny, ragged": {"vocabulary": 256, "width": 32, "layers": 1, "ragged": True},
}
QUICK_SIZES = (4, 2, 8, 32)
SIZES = {"cpu": (16, 4, 32, 128), "cuda": (64, 8, 128, 1024)}
"""Rows, rows of a micro-batch, tokens of a prompt, tokens of the longest completion."""
TOLERANCE = 1e-4
ROUNDING = 2.0
"""In bfloat16: how many times the error of TRL's own bfloat16 gradient an arm may be off."""
ARMS = ("trl", "rows, plain", "rows, fused", "rows, fused and entropies")
ARMS += ("tokens, plain", "tokens, fused", "shared, plain", "shared, fused", "auto, plain")


def build_model(case: dict[str, Any]) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=case["vocabulary"],
        hidden_size=case["width"],
        intermediate_size=3 * case["width"],
        num_hidden_layers=case["layers"],
        num_attention_heads=max(1, case["width"] // 64),
        num_key_value_heads=max(1, case["width"] // 128),
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config)


def build_rows(case: dict[str, Any], sizes: tuple[int, int, int, int]) -> TokenRollouts:
    """Random prompts of one length and completions; ragged lengths are nearly exponential."""
    num, _, prompt_length, longest = sizes
    generator = torch.Generator().manual_seed(1)
    length_N = torch.full((num,), longest)
    if case["ragged"]:
        drawn_N = torch.empty(num).exponential_(4 / longest, generator=generator).long() + 4
        length_N = drawn_N.clamp(max=longest)
        length_N[0] = longest
    mask_NT = torch.arange(longest) < length_N[:, None]
    draw = partial(torch.randint, 2, case["vocabulary"], generator=generator)
    group = case.get("group", 4)
    num_prompts = num // group
    return TokenRollouts(
        prompt_N=torch.arange(num_prompts).repeat_interleave(group),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(mask_NT.shape),
        version=0,
        advantage_N=torch.randn(num, generator=generator),
        token_NT=torch.where(mask_NT, draw((num, longest)), PAD),
        truncated_N=torch.zeros(num, dtype=torch.bool),
        seed_N=torch.arange(num),
        prompt_ids=tuple(map(tuple, draw((num_prompts, prompt_length)).tolist())),
    )


def build_trainer(
    model: nn.Module, case: dict, sizes: tuple, precision: str, device: str, folder: str
) -> Any:
    """TRL's trainer on `model`, prepared as its own training loop does."""
    import tokenizers
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    rows, micro, _, longest = sizes
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, case["vocabulary"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        num_generations=case.get("group", 4),
        max_completion_length=longest,
        loss_type="dapo",
        beta=0.0,
        temperature=1.0,
        bf16=precision == "bfloat16",
        activation_checkpointing=False,
        use_cpu=device == "cpu",
        report_to="none",
        save_strategy="no",
        log_level="error",
    )
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        config,
        Dataset.from_list([{"prompt": "w2"}] * rows),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = rows // micro
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    return trainer


def trl_update(trainer: Any, rollouts: TokenRollouts) -> float:
    """All micro-batches of one generation batch through `training_step`; the loss."""
    prompt_NS = torch.tensor([rollouts.prompt_ids[p] for p in rollouts.prompt_N.tolist()])
    device = trainer.accelerator.device
    recorded = {
        "prompt_ids": prompt_NS.to(device),
        "prompt_mask": torch.ones_like(prompt_NS).to(device),
        "completion_ids": rollouts.token_NT.to(device),
        "completion_mask": rollouts.mask_NT.long().to(device),
        "advantages": rollouts.advantage_N.to(device),
        "old_per_token_logps": rollouts.logprob_NT.to(device),
        "num_items_in_batch": rollouts.mask_NT.sum().to(device),
    }
    trainer._generate_and_score_completions = lambda _: dict(recorded)
    trainer._step, trainer._buffered_inputs = 0, None
    total = torch.zeros((), device=device)
    for _ in range(trainer.args.gradient_accumulation_steps):
        total += trainer.training_step(trainer.model_wrapped, {}, None)
    return total.item()


def our_update(
    model: nn.Module,
    accelerator: Any,
    rollouts: TokenRollouts,
    *,
    split: Callable[[TokenRollouts], list[Tensor]],
    logprobs: Callable[..., Tensor],
) -> float:
    """The micro-batches of `rl.step.update` on one process; the loss."""
    denominator = float(rollouts.mask_NT.sum())
    total = torch.zeros((), device=accelerator.device)
    for rows in split(rollouts):
        part = rollouts.take(rows).to(accelerator.device)
        logprob_NT = logprobs(model, part, temperature=1.0, pad_id=PAD)
        loss, _ = clipped_surrogate(
            logprob_NT,
            part.logprob_NT,
            part.advantage_N,
            part.mask_NT.float(),
            denominator=denominator,
        )
        accelerator.backward(loss)
        total += loss.detach()
    return total.item()


def shared(
    score: Callable[..., Tensor], model: nn.Module, rows: TokenRollouts, **settings: Any
) -> Tensor:
    """Log-probabilities from packed rows, whatever they cost."""
    return score(model, rows, layout=packed_layout(model, rows, PAD), **settings)


def forwarded_tokens(split: str, scorer: Scorer, rows: TokenRollouts) -> int:
    """Tokens of a micro-batch that go through the model."""
    found = cost(rows, scorer.width or 1)
    packs = split == "shared" or (split == "auto" and found.packed < found.separate)
    return found.packed_tokens if packs else found.separate_tokens


def prompt_lengths(rollouts: TokenRollouts) -> Tensor:
    return torch.tensor([len(rollouts.prompt_ids[p]) for p in rollouts.prompt_N.tolist()])


def arms(
    case: dict, sizes: tuple, precision: str, device: str, folder: str
) -> tuple[dict, dict, dict]:
    """Name -> (its update, its model), name -> tokens it forwards, split -> its micro-batches."""
    rows, micro, prompt_length, longest = sizes
    base, rollouts = build_model(case), build_rows(case, sizes)
    trainer = build_trainer(copy.deepcopy(base), case, sizes, precision, device, folder)
    accelerator = trainer.accelerator
    ours = accelerator.prepare(copy.deepcopy(base).to(accelerator.device)).train()
    reason = refusal(ours)
    assert reason is None, reason

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        old_NT = completion_logprobs(
            base.to(accelerator.device), rollouts.to(accelerator.device), pad_id=PAD
        ).cpu()
    old_NT = old_NT + 0.1 * torch.randn(old_NT.shape, generator=generator)
    rollouts = replace(rollouts, logprob_NT=torch.where(rollouts.mask_NT, old_NT, 0.0))
    end_N, prompt_N = ends(rollouts.mask_NT), prompt_lengths(rollouts)
    scorer = Scorer(temperature=1.0, pad_id=PAD, fused=False, share_prompts="auto")
    scorer.width = case["width"]  # as `fidelity.settle` finds it
    together, apart = by_prompts(rollouts.prompt_N, end_N, micro), by_rows(end_N, micro)
    splits = {
        "rows": apart,
        "shared": together,
        "auto": min(
            (together, apart),
            key=lambda split: sum(scorer.cost(rollouts.take(row_B)) for row_B in split),
        ),
        "tokens": by_tokens(prompt_N, end_N, micro * (prompt_length + longest)),
    }
    scores: dict[str, Callable[..., Tensor]] = {
        "plain": completion_logprobs,
        "fused": fused_logprobs,
        "fused and entropies": lambda *args, **settings: fused_statistics(*args, **settings)[0],
    }
    updates = {"trl": (partial(trl_update, trainer, rollouts), trainer.model)}
    forwarded = {"trl": rows * (prompt_length + longest)}
    for name in ARMS[1:]:
        split, kind = name.split(", ")
        score = scores[kind]
        if split == "shared":
            score = partial(shared, score)
        elif split == "auto":
            score = lambda model, rows, **_: scorer.logprobs(model, rows)  # noqa: E731
        update = partial(
            our_update,
            ours,
            accelerator,
            rollouts,
            split=lambda _, micro=splits[split]: micro,
            logprobs=score,
        )
        updates[name] = (update, ours)
        parts = [rollouts.take(row_B) for row_B in splits[split]]
        forwarded[name] = sum(forwarded_tokens(split, scorer, part) for part in parts)
    return updates, forwarded, {name: len(micro) for name, micro in splits.items()}


def gradient(model: nn.Module) -> Tensor:
    """All gradients as one float64 vector on the CPU, which leaves the model without any."""
    parts = [p.grad.detach().double().flatten().cpu() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def timed(update: Callable[[], float], model: nn.Module, device: str) -> float:
    model.zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.process_time
    wait()
    start = clock()
    update()
    wait()
    return clock() - start


def peak_bytes(update: Callable[[], float], model: nn.Module, device: str) -> int:
    """The most that was allocated at once during the update, above what stood before it."""
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        update()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        update()
    return peak_of(profile)


def peak_of(profile: torch.profiler.profile) -> int:
    """Largest running sum of the bytes a profile saw allocated and freed, in order of time."""
    sizes = []

    def walk(events: list) -> None:
        for event in events:
            kind, fields = event.typed
            if kind == torch._C._profiler._EventType.Allocation:
                sizes.append((event.start_time_ns, fields.alloc_size))
            walk(event.children)

    walk(profile.profiler.kineto_results.experimental_event_tree())
    total = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        total += size
        peak = max(peak, total)
    return peak


def measure(
    name: str, case: dict, sizes: tuple, *, precision: str, rounds: int, device: str, folder: str
) -> dict[str, Any]:
    exact = None
    if precision == "bfloat16":  # what float32 gives, without autocast
        exact = torch.load(Path(folder) / f"{name}.pt")
    updates, forwarded, micro = arms(case, sizes, precision, device, folder)
    losses, errors, theirs = {}, {}, torch.empty(0)
    for arm, (update, model) in updates.items():  # also warms up
        losses[arm] = update()
        found = gradient(model)
        if arm == "trl":
            theirs = found
            rounding = apart(theirs, exact) if exact is not None else 0.0
        # In bfloat16 every arm is compared with the float32 gradient, as TRL's is.
        errors[arm] = apart(found, theirs if exact is None else exact)
    if exact is None:
        torch.save(theirs, Path(folder) / f"{name}.pt")
    allowed = TOLERANCE if exact is None else ROUNDING * rounding
    for arm in updates:
        assert errors[arm] <= allowed, f"{name}, {arm}: gradient off by {errors[arm]:.1e}"
        loss_off = abs(losses[arm] - losses["trl"])
        limit = allowed * max(abs(losses["trl"]), 0.1)
        assert loss_off <= limit, f"{name}, {arm}: loss {losses[arm]} against {losses['trl']}"

    seconds: dict[str, list[float]] = {arm: [] for arm in updates}
    for _ in range(rounds):
        for arm, (update, model) in updates.items():
            seconds[arm].append(timed(update, model, device))
    peaks = {arm: peak_bytes(update, model, device) for arm, (update, model) in updates.items()}
    rows = []
    for arm in updates:
        ratios = [t / s for t, s in zip(seconds["trl"], seconds[arm], strict=True)]
        rows.append(
            {
                "arm": arm,
                "seconds_best": round(min(seconds[arm]), 4),
                "seconds_median": round(statistics.median(seconds[arm]), 4),
                "ratio_median": round(statistics.median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "peak_mib": round(peaks[arm] / 2**20, 1),
                "peak_ratio": round(peaks["trl"] / peaks[arm], 2),
                "micro_batches": micro.get(arm.split(",")[0], sizes[0] // sizes[1]),
                "forwarded_tokens": forwarded[arm],
                "gradient_error": float(f"{errors[arm]:.2g}"),
            }
        )
    return {"case": name, "precision": precision, "arms": rows}


def child(arguments: argparse.Namespace) -> None:
    """All cases in one precision, which a process cannot change; one JSON line each."""
    cases = CUDA_CASES if arguments.device == "cuda" else CASES
    sizes = SIZES[arguments.device]
    if arguments.quick:
        cases, sizes = QUICK_CASES, QUICK_SIZES
    for name, case in cases.items():
        if arguments.only not in name:
            continue
        result = measure(
            name,
            case,
            case.get("sizes", sizes),
            precision=arguments.precision,
            rounds=2 if arguments.quick else arguments.rounds,
            device=arguments.device,
            folder=arguments.folder,
        )
        print(json.dumps(result), flush=True)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case | precision | arm | seconds (best) | TRL's time / this | peak MiB | TRL's peak / this |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["arms"]:
            spread = f"{row['ratio_median']} ({row['ratio_min']}-{row['ratio_max']})"
            lines.append(
                f"| {result['case']} | {result['precision']} | {row['arm']} | {row['seconds_best']} "
                f"| {spread} | {row['peak_mib']} | {row['peak_ratio']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case, nothing written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.precision:
        child(arguments)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float32", "bfloat16"):
            command = [sys.executable, __file__, "--precision", precision, "--folder", folder]
            command += ["--device", arguments.device, "--rounds", str(arguments.rounds)]
            command += ["--threads", str(arguments.threads), *(["--quick"] * arguments.quick)]
            command += ["--only", arguments.only]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = [line for line in done.stdout.splitlines() if line.startswith('{"case"')]
            results += [json.loads(line) for line in found]
    print(table(results))
    if arguments.quick:
        return
    import accelerate
    import transformers
    import trl

    report = {
        "command": "python benchmarks/update.py "
        f"--device {arguments.device} --rounds {arguments.rounds} --threads {arguments.threads}"
        + (f" --only '{arguments.only}'" if arguments.only else ""),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "accelerate": accelerate.__version__,
        "sizes": dict(
            zip(
                ("rows", "micro_batch_rows", "prompt_tokens", "longest_completion"),
                SIZES[arguments.device],
                strict=True,
            )
        ),
        "cases": CUDA_CASES if arguments.device == "cuda" else CASES,
        "results": results,
    }
    name = "update_cuda.json" if arguments.device == "cuda" else "update.json"
    output = arguments.output or Path(__file__).parent / "results" / name
    summaries.write(output, report)


if __name__ == "__main__":
    main()
