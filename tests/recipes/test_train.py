"""`recipes/train.py` on a user's own model folder, prompts and rewards."""

import json
from pathlib import Path

import pytest

from recipes.config import ConfigError
from recipes.train import main
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs

CHAT = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model_folder, tmp_path):
    """A command line for a two-step run on a JSONL file, as a user would write it."""
    data = tmp_path / "prompts.jsonl"
    rows = [{"question": f"{x}{d}", "solution": d} for x in "abc" for d in tiny.DIGITS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = tmp_path / "mine.py"
    reward.write_text(
        "def right(prompts, completions, answer, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [float(a in text) for text, a in zip(texts, answer)]\n"
    )
    settings = {
        "model_name_or_path": model_folder,
        "dataset_name": data,
        "prompt_column": "question",
        "answer_column": "solution",
        "validation_size": 6,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "prompts_per_step": 4,
        "rollouts_per_prompt": 4,
        "max_completion_length": 4,
        "per_device_train_batch_size": 8,
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_threads": 1,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [*words, "--rewards", f"{reward}:right"]


def steps(tmp_path):
    return [
        json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    ]


def test_a_jsonl_of_word_problems_and_a_model_folder(arguments, tmp_path, capsys):
    at = arguments.index("--prompt_column")
    del arguments[at : at + 2]
    trainer = main([*arguments, "--prompt_template", "{question}="])
    assert len(trainer.prompts) == 18 and len(trainer.eval_prompts) == 6
    assert {p.prompt[-1] for p in trainer.prompts} == {"="}
    assert [sum(step["budgets"]) for step in steps(tmp_path)] == [16, 16]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert "pass rate" in capsys.readouterr().out


def test_conversational_prompts_go_through_the_chat_template(arguments, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT)
    chat = ["--conversational", "true", "--chat_template", str(template), "--report", "false"]
    trainer = main([*arguments, *chat])
    prompt = trainer.prompts[0]
    assert prompt.is_conversational
    assert tiny.tokenizer().decode(prompt.token_ids).replace(" ", "").endswith("=")


def test_several_rewards_are_weighted(arguments, tmp_path):
    extra = ["--reward_weights", "0.75", "0.25", "--report", "false"]
    trainer = main([*arguments, "exact_match", *extra])
    logged = trainer.state.log_history[0]
    names = {name for name in logged if name.startswith("rewards/")}
    kinds = ("mean", "std")
    assert names == {
        f"rewards/{name}/{kind}" for name in ("right", "exact_match") for kind in kinds
    }
    right, exact = (logged[f"rewards/{name}/mean"] for name in ("right", "exact_match"))
    assert logged["reward"] == pytest.approx(0.75 * right + 0.25 * exact)


def test_lora_trains_an_adapter(arguments, tmp_path):
    lora = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    trainer = main([*arguments, *lora, "--report", "false"])
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset_name", "promts.jsonl"], "no file or folder 'promts.jsonl'"),
        (["--rewards", "exact_mach"], "'exact_mach'.*exact_match"),
        (["--task", "arithmetics"], "task must be one of arithmetic, maze, got 'arithmetics'"),
        (["--learning_rat", "1"], "unknown argument --learning_rat.*learning_rate"),
        (["--prompts_per_step", "40"], "prompts_per_step=40 exceeds the 18 prompts"),
        (["--max_prompt_length", "1"], "max_prompt_length"),
    ],
)
def test_what_is_wrong_is_said_before_training(arguments, tmp_path, change, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        main([*arguments, *change])
    assert not (tmp_path / "run" / "steps.jsonl").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("--model_name_or_path", "write model_name_or_path"),
        ("--dataset_name", "write task, or dataset_name"),
        ("--rewards", "write rewards"),
    ],
)
def test_what_is_missing_is_named(arguments, missing, message):
    at = arguments.index(missing)
    with pytest.raises(ConfigError, match=message):
        main(arguments[:at] + arguments[at + 2 :])


def test_help_says_how_to_see_the_settings_of_a_diffusion_run(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--policy diffusion --help" in shown and "--plan" not in shown
    with pytest.raises(SystemExit):
        main(["--policy", "diffusion", "--help"])
    assert "--plan" in capsys.readouterr().out
