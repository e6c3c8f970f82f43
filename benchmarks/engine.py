"""Measure tokens per second of TransformersEngine as a ratio to `model.generate`.

    python -m benchmarks.engine [--quick] [--rounds 5] [--threads 1] [--device cpu]

A 5M-parameter Qwen3 with random weights, prompts of 32 tokens, 8 rollouts per prompt, at most 64
new tokens, temperature 1. "even": no end-of-sequence token, so every rollout has 64 tokens.
"ragged": 46 of 1024 tokens end a rollout, so lengths are nearly geometric with mean 21. Only useful
tokens count, those up to the end of their rollout. `generate` does not report log-probabilities;
the engine does. Rounds alternate between the two, since other work may share the machine: the
figure to read is `ratio_median`, over ratios of neighbouring runs. The best rounds and their ratio
stand beside it. Nothing here is asserted.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import summaries
from rollouts.engines.contract import Prompt, SamplingParams
from rollouts.engines.transformers import TransformersEngine

VOCABULARY, PROMPT_LENGTH, COMPLETION_LENGTH, ROLLOUTS_PER_PROMPT = 1024, 32, 64, 8
PAD = 0
NUM_ENDS = 46


def build_model(dtype: torch.dtype, device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=PAD,
    )
    return Qwen3ForCausalLM(config).to(device=device, dtype=dtype).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD} | {f"w{i}": i for i in range(1, VOCABULARY)}
    model = tokenizers.models.WordLevel(words, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="<pad>", eos_token=None
    )


def by_generate(model, prompts, ends) -> tuple[int, float]:
    """Useful tokens and seconds."""
    ids = torch.tensor([p.token_ids for p in prompts], device=model.device)
    ids = ids.repeat_interleave(ROLLOUTS_PER_PROMPT, dim=0)
    start = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=COMPLETION_LENGTH,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends or None,
        pad_token_id=PAD,
    )
    completion = output[:, ids.shape[1] :].cpu()
    seconds = time.perf_counter() - start
    ended = torch.isin(completion, torch.tensor(ends, dtype=torch.int64))
    # Tokens before the first end, and that end.
    length = torch.where(ended.any(1), ended.int().argmax(1) + 1, completion.shape[1])
    return int(length.sum()), seconds


def by_engine(engine, prompts, ends, round_number) -> tuple[int, float]:
    """Useful tokens and seconds."""
    engine.model.generation_config.eos_token_id = ends or None
    num_rollouts = len(prompts) * ROLLOUTS_PER_PROMPT
    seeds = torch.arange(num_rollouts) + round_number * num_rollouts
    start = time.perf_counter()
    rollouts = engine.generate(
        prompts,
        [ROLLOUTS_PER_PROMPT] * len(prompts),
        seeds_N=seeds,
        params=SamplingParams(max_completion_length=COMPLETION_LENGTH),
    )
    seconds = time.perf_counter() - start
    return int(rollouts.length_N.sum()), seconds


def measure(lengths: str, batch: int, dtype: torch.dtype, rounds: int, device: str) -> dict:
    model = build_model(dtype, device)
    engine = TransformersEngine(model, build_tokenizer(), max_batch_rows=batch)
    ends = list(range(VOCABULARY - NUM_ENDS, VOCABULARY)) if lengths == "ragged" else []
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        1,
        VOCABULARY - NUM_ENDS,
        (batch // ROLLOUTS_PER_PROMPT, PROMPT_LENGTH),
        generator=generator,
    )
    prompts = [
        Prompt(key=str(i), prompt="", token_ids=tuple(row), columns={})
        for i, row in enumerate(ids.tolist())
    ]
    runs: dict[str, list[float]] = {"generate": [], "engine": []}
    for round_number in range(rounds + 1):
        for name in runs:
            if name == "generate":
                tokens, seconds = by_generate(model, prompts, ends)
            else:
                tokens, seconds = by_engine(engine, prompts, ends, round_number)
            if round_number > 0:  # the first round warms up
                runs[name].append(tokens / seconds)
    ratios = [e / g for e, g in zip(runs["engine"], runs["generate"], strict=True)]
    best = {name: max(rates) for name, rates in runs.items()}
    return {
        "lengths": lengths,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "tokens_per_second_best": {name: round(rate) for name, rate in best.items()},
        "ratio_of_best": round(best["engine"] / best["generate"], 2),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of the smallest case, nothing written"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/engine.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    cases = [
        (lengths, batch, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for lengths, batch in (("even", 64), ("even", 256), ("ragged", 256))
    ]
    rounds = arguments.rounds
    if arguments.quick:
        cases, rounds = cases[:1], 2

    results = []
    for lengths, batch, dtype in cases:
        results.append(measure(lengths, batch, dtype, rounds, arguments.device))
        print(json.dumps(results[-1]), flush=True)
    if arguments.quick:
        return
    report = {
        "command": f"python -m benchmarks.engine --rounds {rounds} --threads {arguments.threads}",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in build_model(torch.float32, "cpu").parameters()),
        "results": results,
    }
    summaries.write(arguments.output, report)


if __name__ == "__main__":
    main()
