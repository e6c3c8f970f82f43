"""What users of TRL's GRPOTrainer bring runs: rewards, data, adapters and settings, two steps each."""

import asyncio
import itertools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from rl.trainer import RolloutTrainer
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def by_length(completions, **kwargs):
    """As in TRL's README: any range, here 0 to some 20."""
    return [float(len(text)) for text in completions]


def negative(completions, **kwargs):
    return [-float(len(text)) for text in completions]


def random_numbers(completions, **kwargs):
    generator = torch.Generator().manual_seed(len(completions[0]))
    return torch.randn(len(completions), generator=generator).tolist()


def signs(completions, **kwargs):
    return [1.0 if text[:1] in "0123" else -1.0 for text in completions]


def hundreds(prompts, completions, **kwargs):
    return [100.0 * (text[:1] in "0123") for text in completions]


def some_none(completions, **kwargs):
    return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]


def all_none(completions, **kwargs):
    return [None for _ in completions]


async def awaited(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def with_column(completions, answer, **kwargs):
    return [float(text[:1] == a) for text, a in zip(completions, answer, strict=True)]


def with_state(completions, trainer_state, **kwargs):
    return [len(text) + float(trainer_state.global_step) for text in completions]


def with_logs(completions, log_extra, log_metric, **kwargs):
    log_extra("first", [text[:1] for text in completions])
    log_metric("longest", max(map(len, completions)))
    return [float(len(text)) for text in completions]


def chat_length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


class Judge:
    """A callable object without a name."""

    def __call__(self, completions, **kwargs):
        return [float(len(text)) for text in completions]


def tokenizer(chat=False):
    made = tiny.tokenizer()
    if chat:
        made.chat_template = CHAT
    return made


def reward_model():
    torch.manual_seed(1)
    return Qwen3ForSequenceClassification(
        Qwen3Config(
            vocab_size=14,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_labels=1,
            pad_token_id=0,
        )
    )


def trained(folder, reward=by_length, *, chat=False, data=None, settings=None, **others):
    """Two steps with TRL's shape of a step: equal groups, uniform prompts."""
    defaults = {"trainer": "grpo", "allocator": "uniform", "max_steps": 2, "prompts_per_step": 3}
    config = tiny.config(folder, **(defaults | {"learning_rate": 0.1} | (settings or {})))
    rows = tiny.rows("ab") if data is None else data
    if chat:
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    before = {n: w.clone() for n, w in tiny.model().state_dict().items()}
    model = others.pop("model", None) or tiny.model()
    made = RolloutTrainer(model, reward, config, rows, processing_class=tokenizer(chat), **others)
    made.train()
    assert made.state.global_step == 2
    after = made.model.state_dict()
    made.moved = {n for n in before if n in after and not torch.equal(before[n], after[n].cpu())}
    return made


@pytest.mark.parametrize(
    "reward",
    [
        *(by_length, negative, random_numbers, signs, hundreds, some_none, awaited),
        *(with_column, with_state, with_logs, Judge()),
    ],
    ids=lambda reward: getattr(reward, "__name__", "object"),
)
def test_a_reward_function(reward, tmp_path):
    assert trained(tmp_path, reward).moved


@pytest.mark.parametrize("selector", ["vade", "mopps", "posterior_mean"])
@pytest.mark.parametrize("reward", [by_length, negative, signs], ids=lambda r: r.__name__)
def test_a_reward_of_any_range_with_a_posterior(reward, selector, tmp_path):
    settings = {"selector": selector, "allocator": "neyman", "rollouts_per_prompt": 4}
    assert trained(tmp_path, reward, settings=settings).moved


def test_a_reward_model(tmp_path):
    made = trained(tmp_path, reward_model(), reward_processing_classes=tiny.tokenizer())
    assert made.moved


def test_a_reward_model_from_a_folder(tmp_path):
    reward_model().save_pretrained(tmp_path / "judge")
    tiny.tokenizer().save_pretrained(tmp_path / "judge")
    assert trained(tmp_path / "run", str(tmp_path / "judge")).moved


@pytest.mark.parametrize("weights", [None, [0.7, 0.3]])
def test_several_rewards(weights, tmp_path):
    made = trained(tmp_path, [by_length, with_column], settings={"reward_weights": weights})
    assert made.moved
    logs = tiny.step_logs(tmp_path)[0]
    for name in ("by_length", "with_column"):
        assert f"rewards/{name}/mean" in logs and f"rewards/{name}/std" in logs


@pytest.mark.parametrize("other", [all_none, awaited], ids=lambda r: r.__name__)
def test_rewards_of_different_kinds(other, tmp_path):
    assert trained(tmp_path, [by_length, other]).moved


def test_a_reward_function_beside_a_reward_model(tmp_path):
    tokenizers = [None, tiny.tokenizer()]
    made = trained(tmp_path, [by_length, reward_model()], reward_processing_classes=tokenizers)
    assert made.moved


def test_conversations(tmp_path):
    assert trained(tmp_path, chat_length, chat=True).moved


def test_a_data_set_of_the_library(tmp_path):
    assert trained(tmp_path, with_column, data=Dataset.from_list(tiny.rows("ab"))).moved


def test_rows_without_any_reward_do_not_train_and_are_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("rl.stages.draw.logger.warning", said.append)
    assert not trained(tmp_path, all_none).moved
    assert len(said) == 1 and said[0].startswith("All reward functions returned None")


LOSSES = ["grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo", "gspo", "gspo_token"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss(loss, tmp_path):
    assert trained(tmp_path, settings={"loss": loss}).moved


SETTINGS = [
    {"beta": 0.1},
    {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    {"scale_rewards": "group"},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"scale_rewards": False},
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"num_iterations": 2},
    {"updates_per_step": 2},
    {"mask_truncated_completions": True, "max_completion_length": 8},
    {"top_entropy_quantile": 0.2},
    {"entropy_coef": 0.01},
    {"epsilon": 0.1, "epsilon_high": 0.3},
    {"delta": 2.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01},
    {"repetition_penalty": 1.1},
    {"generation_kwargs": {"repetition_penalty": 1.2}},
    {"importance_correction": "token_truncate"},
    {"gradient_checkpointing": True},
    {"max_prompt_length": 2, "overlong_prompts": "truncate"},
    {"per_device_train_batch_size": 1},
    {"reward_weights": [2.0]},
    {"completions_every": 1},
    {"max_grad_norm": 0.1, "warmup_steps": 1, "lr_scheduler_type": "linear"},
    {"weight_decay": 0.1, "adam_beta1": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s))
def test_a_setting(settings, tmp_path):
    assert trained(tmp_path, settings=settings).moved


@pytest.mark.parametrize(
    "lora",
    [{}, {"lora_dropout": 0.1}, {"target_modules": "all-linear"}, {"use_rslora": True}],
    ids=lambda s: "-".join(s) or "plain",
)
def test_an_adapter(lora, tmp_path):
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora
    )
    made = trained(tmp_path, peft_config=config, settings={"beta": 0.1})
    changed = [name for name, w in made.model.named_parameters() if "lora_B" in name and w.any()]
    assert changed and not made.moved


@pytest.mark.parametrize("named", [False, True])
def test_validation(named, tmp_path):
    held_out = {"easy": tiny.rows("c")[:4], "hard": tiny.rows("c")[4:]}
    made = trained(
        tmp_path,
        [by_length, with_column],
        eval_dataset=held_out if named else tiny.rows("c"),
        settings={"eval_strategy": "steps", "eval_steps": 2},
    )
    logs = {name for row in made.state.log_history for name in row}
    for start in ("eval_easy", "eval_hard") if named else ("eval",):
        assert {f"{start}_reward", f"{start}_pass_rate"} <= logs
        assert {f"{start}_rewards/by_length/mean", f"{start}_rewards/with_column/mean"} <= logs


def test_a_callback_of_transformers(tmp_path):
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, *_, **__):
            self.steps += 1

    counts = Counts()
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
    }
    trained(
        tmp_path,
        eval_dataset=tiny.rows("c"),
        callbacks=[counts, EarlyStoppingCallback(5)],
        settings=settings,
    )
    assert counts.steps == 2


def test_every_loss_is_one_of_those_that_can_be_written():
    from rl.config.methods import LOSSES as KNOWN

    assert set(itertools.chain(LOSSES, ("raft", "raft_pp", "rloo", "hapo"))) == set(KNOWN)
