"""A language model of a few thousand weights, tasks it can learn in seconds, and a run of the trainer.

The tasks: the completion should begin with the digit that the prompt names (`first_digit`, slow to
learn), or with any small digit (`small_digit`, learnt in ten steps). `python tests/tiny.py FOLDER
[--reward NAME] [--setting value ...]` is a whole run, for tests that launch or kill processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rl import step
from rl.config.language import RolloutConfig
from rl.stages import prepare as prepare_stage
from rl.stages.records import Batch
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


def small_digit(completions: list[str], **_: Any) -> list[float]:
    """1 if the completion begins with a digit below 4, whatever the prompt."""
    return [float(text.replace(" ", "")[:1] in ("0", "1", "2", "3")) for text in completions]


class SmallDigit:
    """`small_digit`, whose first character decides it."""

    __name__ = "decided_digit"

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return small_digit(completions)

    def decided(self, prompt: str, completion_so_far: str) -> float | None:
        text = completion_so_far.replace(" ", "")
        return small_digit([text])[0] if text else None


decided_digit = SmallDigit()


def breaks_on_rank_1(completions: list[str], **_: Any) -> list[float]:
    """Raises on the second process only."""
    if os.environ.get("RANK") == "1":
        raise KeyError("no such verifier")
    return [0.0] * len(completions)


def one_prompt(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    """Mixed for one prompt alone, so that hardly any row of a step carries a gradient."""
    return [
        float(prompt == "a5=" and text.replace(" ", "")[:1] in ("0", "1"))
        for prompt, text in zip(prompts, completions, strict=True)
    ]


REWARDS = {
    function.__name__: function
    for function in (first_digit, small_digit, decided_digit, breaks_on_rank_1, one_prompt)
}


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
        if name in settings and not isinstance(settings[name], str)  # `engine` may be a name
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


def run(folder: str | Path, *, resume: Any = None, **settings: Any) -> Any:
    """A trainer that has trained."""
    made = trainer(folder, **settings)
    made.train(resume_from_checkpoint=resume)
    return made


def collect(made: Any, version: int = 0) -> Batch:
    """The batch of a training step, without an update."""
    return step.collect(made.sampling, made.policy, made.objective, made.ranks, version=version)


def prepare(made: Any, batch: Batch) -> Batch:
    """A batch as its update gets it."""
    return prepare_stage.prepare(
        batch,
        made.objective,
        made.policy,
        made.ranks,
        made.model,
        progress=made.sampling.progress(made.ledger.step or 0),
        ledger=made.ledger,
    )


def parameters(made: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights of a trainer's model."""
    return {name: value.detach().clone() for name, value in made.model.state_dict().items()}


def lines(folder: str | Path, name: str = "steps.jsonl") -> list[dict[str, Any]]:
    """A log of a run folder."""
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def step_logs(folder: str | Path) -> list[dict[str, Any]]:
    """The log lines of training steps, without those of validation and the closing summary."""
    return [row for row in lines(folder, "metrics.jsonl") if "loss" in row]


def main() -> None:
    """Runs from the command line: FOLDER [--reward NAME] [--setting value ...] [--and FOLDER ...].

    Trains on the prompts of `rows("ab")` and validates on those of `rows("c")`. The final weights go
    to FOLDER/final, the ledger beside them.
    """
    torch.set_num_threads(1)
    arguments: list[str] = []
    for word in [*sys.argv[1:], "--and"]:
        if word == "--and":
            _main(*arguments)
            arguments = []
        else:
            arguments.append(word)


def _main(folder: str, *words: str) -> None:
    from recipes.config import parse

    arguments, reward = list(words), first_digit
    if "--reward" in arguments:
        at = arguments.index("--reward")
        reward = REWARDS[arguments[at + 1]]
        del arguments[at : at + 2]
    defaults = config(folder).to_dict()
    names = ("max_steps", "learning_rate", "prompts_per_step", "rollouts_per_prompt", "allocator")
    names += ("max_completion_length", "per_device_train_batch_size", "seed", "disable_tqdm")
    given = [a[2:] for a in arguments if a.startswith("--")]
    base = [x for n in names if n not in given for x in (f"--{n}", str(defaults[n]))]
    base += ["--output_dir", folder, "--report_to", "none", "--bf16", "false"]
    (settings,) = parse((RolloutConfig,), [*base, *arguments])
    made = RolloutTrainer(
        model(), reward, settings, rows("ab"), rows("c"), processing_class=tokenizer()
    )
    made.train()
    print(f"world size {made.args.world_size}", flush=True)
    made.save_model(str(Path(folder) / "final"))
    if made.args.should_save:
        (Path(folder) / "final" / "ledger.json").write_text(json.dumps(made.ledger.totals))


if __name__ == "__main__":
    main()
