"""Pass rate of a model on the validation mazes of each size.

python -m recipes.maze.by_level runs/maze-warm-start runs/maze-grpo/final
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from .tasks import LEVELS, goal_reached, problems


def pass_rates(
    folder: str, *, validation: int = 28, samples: int = 4, moves: int = 48, seed: int = 0
) -> dict[str, float]:
    """Level -> share of completions at temperature 1 that reach the goal.

    Args:
        folder: of a model.
        validation: mazes of each level, the first of the validation mazes.
        samples: completions of each.
        moves: of a completion, at most.
        seed: of the samples.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    _, rows = problems(0, train=1, validation=validation)
    set_seed(seed)
    rates = {}
    for level in LEVELS:
        prompts = [row["prompt"] for row in rows if row["level"] == level.name]
        prompts = [prompt for prompt in prompts for _ in range(samples)]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                top_k=0,
                max_new_tokens=moves,
            )
        generated = tokens[:, inputs["input_ids"].shape[1] :]
        paths = tokenizer.batch_decode(generated, skip_special_tokens=True)
        rewards = goal_reached(prompts=prompts, completions=paths)
        rates[level.name] = sum(rewards) / len(rewards)
    return rates


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="MODEL", help="folder of a model")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in given.folders:
        rates = pass_rates(folder)
        shown = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        print(f"{folder}: {shown}; mean {sum(rates.values()) / len(rates):.3f}")


if __name__ == "__main__":
    main()
