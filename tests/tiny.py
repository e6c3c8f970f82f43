"""A language model of a few thousand weights, a task it can learn in seconds, and a run of the trainer.

The task: the prompt names a digit, the completion should begin with it. `python tests/tiny.py FOLDER
[--setting value ...]` is a whole training run, for tests that launch or kill processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rl.arguments import RolloutConfig
from rl.trainer import RolloutTrainer

DIGITS = "01234567"


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *DIGITS, "a", "b", "c", "="]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).to(dtype)


def rows(letters: str = "abc") -> list[dict[str, Any]]:
    """Prompts such as 'a5=': the answer is the digit."""
    return [{"prompt": f"{x}{d}=", "answer": d} for x in letters for d in DIGITS]


def first_digit(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 if the completion begins with the answer."""
    pairs = zip(completions, answer, strict=True)
    return [float(text.replace(" ", "").startswith(digit)) for text, digit in pairs]


def config(folder: str | Path, **settings: Any) -> RolloutConfig:
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "learning_rate": 3e-3,
        "prompts_per_step": 6,
        "rollouts_per_prompt": 6,
        "allocator": "gvm",
        "max_completion_length": 5,
        "per_device_train_batch_size": 7,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        "log_level": "error",
    }
    return RolloutConfig(output_dir=str(folder), **(defaults | settings))


def trainer(
    folder: str | Path, *, reward: Any = first_digit, data: Any = None, **settings: Any
) -> Any:
    others = {
        name: settings.pop(name)
        for name in ("eval_dataset", "peft_config", "planner", "callbacks", "engine")
        if name in settings
    }
    policy = settings.pop("model", None) or model()
    return RolloutTrainer(
        policy,
        reward,
        config(folder, **settings),
        rows() if data is None else data,
        processing_class=tokenizer(),
        **others,
    )


def main() -> None:
    """A run from the command line; the final weights go to FOLDER/final."""
    from recipes.config import parse

    torch.set_num_threads(1)
    folder, *arguments = sys.argv[1:]
    defaults = config(folder).to_dict()
    names = ("max_steps", "learning_rate", "prompts_per_step", "rollouts_per_prompt", "allocator")
    names += ("max_completion_length", "per_device_train_batch_size", "seed", "disable_tqdm")
    given = [a[2:] for a in arguments if a.startswith("--")]
    base = [x for n in names if n not in given for x in (f"--{n}", str(defaults[n]))]
    base += ["--output_dir", folder, "--report_to", "none", "--bf16", "false"]
    (settings,) = parse((RolloutConfig,), [*base, *arguments])
    run = RolloutTrainer(model(), first_digit, settings, rows(), processing_class=tokenizer())
    run.train()
    print(f"world size {run.args.world_size}")
    run.save_model(str(Path(folder) / "final"))


if __name__ == "__main__":
    main()
