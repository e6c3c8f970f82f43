"""Reward models: classifiers of one output."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Qwen3ForSequenceClassification,
)

from rl.policies.loading import load_rewards
from rollouts.prompts import Prompt
from rollouts.rewards.classifier import ClassifierReward
from rollouts.rewards.contract import score
from rollouts.rewards.text import names_model
from tests import tiny


def classifier(num_labels=1):
    torch.manual_seed(1)
    config = tiny.model().config
    config.num_labels = num_labels
    return Qwen3ForSequenceClassification(config)


def saved(folder):
    model = classifier()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model.eval()


def by_hand(model, text):
    """The logit of one text alone, without padding."""
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, 0].item()


PROMPTS, COMPLETIONS = ["a5=", "b7=", "c1="], ["5", "1234567", "70"]


def test_rewards_are_the_logits_of_prompt_and_completion_whatever_the_batch(tmp_path):
    model = saved(tmp_path / "judge")
    expected = [by_hand(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert len(set(expected)) == 3
    for batch_size in (1, 2, 3):
        reward = ClassifierReward.load(str(tmp_path / "judge"), batch_size=batch_size)
        assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert reward.__name__ == "judge"
    assert not reward.model.training
    assert not any(weight.requires_grad for weight in reward.model.parameters())
    assert reward([], []) == []


def test_conversations_go_through_the_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}{{ tail or '' }}"
    )
    reward = ClassifierReward(classifier(), tokenizer, chat_template_kwargs={"tail": "="})
    prompts = [[{"role": "a", "content": "5"}]]
    completions = [[{"role": "b", "content": "7"}]]
    assert reward.texts_of(prompts, completions) == ["a5b7="]
    assert reward(prompts, completions) == pytest.approx([by_hand(reward.model, "a5b7=")], abs=1e-5)


def test_a_row_too_long_for_the_model_fails_alone():
    model = classifier()
    model.config.max_position_embeddings = 8
    reward = ClassifierReward(model, tiny.tokenizer(), name="judge")
    prompts = [Prompt(key=p, prompt=p, token_ids=(1,), columns={}) for p in PROMPTS]
    result = score([reward], prompts, COMPLETIONS, [[1]] * 3, max_failed_share=0.5)
    assert list(result.failed) == [1]
    assert "a text of 10 tokens, and reward model judge reads at most 8" in result.failed[1]


def test_functions_folders_and_modules_are_loaded_side_by_side(tmp_path):
    saved(tmp_path / "judge")
    named, module, function = load_rewards(
        [str(tmp_path / "judge"), classifier(), "exact_match"],
        None,
        [None, tiny.tokenizer(), None],
    )
    assert isinstance(named, ClassifierReward)
    assert isinstance(module, ClassifierReward)
    assert (named.__name__, module.__name__) == ("judge", "Qwen3ForSequenceClassification")
    assert function.__name__ == "exact_match"
    (alone,) = load_rewards(classifier(), None, tiny.tokenizer())
    assert isinstance(alone, ClassifierReward)


def test_what_cannot_be_a_reward_model_is_refused_before_training(tmp_path):
    with pytest.raises(
        ValueError, match="has 2 outputs; a reward is one: load it with num_labels=1"
    ):
        ClassifierReward(classifier(num_labels=2), tiny.tokenizer())
    with pytest.raises(ValueError, match="was not loaded from anywhere; give its tokenizer"):
        ClassifierReward(classifier())
    tiny.model().save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    with pytest.raises(
        ValueError, match=r"no trained score.weight, so its rewards would be random"
    ):
        ClassifierReward.load(str(tmp_path / "policy"))
    with pytest.raises(ValueError, match="no reward model could be loaded from 'nobody/nothing'"):
        load_rewards("nobody/nothing", None)
    with pytest.raises(ValueError, match="has 1 entries for 2 reward functions"):
        load_rewards(["exact_match", "f1"], None, tiny.tokenizer())
    lonely = classifier()
    lonely.save_pretrained(tmp_path / "lonely")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lonely")
    with pytest.raises(ValueError, match="has no vocabulary: its files are missing; give it in"):
        ClassifierReward(loaded)


def test_a_module_whose_output_is_not_one_number_fails():
    class Odd(torch.nn.Module):
        def forward(self, **inputs):
            return SimpleNamespace(logits=torch.zeros(len(inputs["input_ids"]), 3))

    with pytest.raises(ValueError, match=r"reward model Odd gave logits of shape \(3, 3\)"):
        ClassifierReward(Odd(), tiny.tokenizer())(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("spec", "is_model"),
    [
        ("exact_match", False),
        ("exact_mach", False),
        ("mine/rewards.py:judge", False),
        ("mine/rewards.py", False),
        ("owner/name-1.5", True),
        ("a/b/c", False),
        ("tests/rollouts", True),
        ("package.module:f", False),
    ],
)
def test_names_of_models_are_told_from_those_of_functions(spec, is_model):
    assert names_model(spec) is is_model
