"""What `recipes/train.py` says to a user whose command cannot work, in the words of that command."""

import json
import os
from pathlib import Path

import datasets
import pytest
import yaml
from trl import ModelConfig

from recipes import devices, train
from recipes.arguments import TASKS, RecipeArguments
from recipes.config import ConfigError, parse, peek
from recipes.language import load_tokenizer, prepare
from recipes.train import EXPECTED, main
from rl.config.language import RolloutConfig
from rollouts.rewards.text import check_reward_name, load_reward
from samplers.refill import RefillError
from tests import tiny

MATH = Path(__file__).resolve().parents[2] / "recipes" / "math"


@pytest.fixture
def model_folder(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"{x}{d}=", "answer": d} for x in "ab" for d in tiny.DIGITS]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(*arguments):
    """Rows, held-out rows and rewards of a command line."""
    words = [*arguments, "--use_cpu", "true", "--report_to", "none", "--output_dir", "unused"]
    return prepare(*parse((RecipeArguments, RolloutConfig, ModelConfig), words))


# The recipe for any model and prompts


def test_the_math_recipe_takes_rows_of_prompt_and_answer(prompts, model_folder):
    rows, validation, rewards = prepared(
        *("--config", str(MATH / "gvm_raft.yaml"), "--dataset_name", prompts),
        *("--model_name_or_path", model_folder, "--validation_size", "3"),
    )
    assert (len(rows), len(validation), rewards) == (13, 3, ["math_verify"])
    assert rows[0]["prompt"] == [{"role": "user", "content": "a0="}]


def test_the_command_of_the_math_readme_brings_its_template(tmp_path, model_folder):
    command = (MATH / "README.md").read_text().split("apportion train")[1].split("\n\n")[0]
    template = command.split('--prompt_template "')[1].split('"')[0]
    assert "openai/gsm8k" in command and "{question}" in template
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "What is 3 + 4?", "answer": "#### 7"}) + "\n")
    rows, _, _ = prepared(
        *("--config", str(MATH / "gvm_raft.yaml"), "--dataset_name", str(path)),
        *("--answer_column", "answer", "--prompt_template", template),
        *("--model_name_or_path", model_folder, "--validation_size", "0"),
    )
    assert rows[0]["prompt"][0]["content"] == template.replace("{question}", "What is 3 + 4?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt_template", "{question}!"], "'question'.*prompt_template, if given, must name"),
        (["--prompt_column", "question"], "'question'.*prompt_column must name one of these"),
        (["--answer_column", "solution"], "'solution'.*answer_column must name one of these"),
        (["--dataset_limit", "0"], "^dataset_limit must be at least 1 or None, got 0"),
        (["--validation_size", "16"], "^validation_size must be .*got 16 of 16 .*write 15 or less"),
        (["--validation_size", "-1"], "^validation_size must be at least 0"),
    ],
)
def test_data_that_does_not_fit_is_told_by_the_names_of_settings(
    prompts, model_folder, words, message
):
    given = ["--dataset_name", prompts, "--model_name_or_path", model_folder, "--rewards", "length"]
    with pytest.raises(ValueError, match=message):
        prepared(*given, *words)


@pytest.mark.parametrize(("other", "expected"), [("here/set", "main"), ("here/other", None)])
def test_a_validation_split_is_of_the_same_configuration(
    monkeypatch, model_folder, other, expected
):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [{"prompt": split}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared(
        *("--dataset_name", "here/set", "--dataset_config", "main", "--validation_name", other),
        *("--model_name_or_path", model_folder, "--rewards", "length"),
    )
    assert asked == [("here/set", "main", "train"), (other, expected, "test")]


# The command line


def test_a_config_file_after_an_equals_sign(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"task": "arithmetic", "dataset_limit": 7}))
    (found,) = parse((RecipeArguments,), [f"--config={path}"])
    assert found.dataset_limit == 7
    assert peek("task", [f"--config={path}"]) == "arithmetic"
    with pytest.raises(ConfigError, match="rum.yaml does not exist.*'run.yaml'"):
        parse((RecipeArguments,), [f"--config={tmp_path / 'rum.yaml'}"])


@pytest.mark.parametrize("given", ["foo", "[1]", "7"])
def test_task_settings_that_are_no_mapping(given):
    with pytest.raises(ConfigError, match=r"task_settings must be a mapping.*JSON such as .*, got"):
        main(["--task", "arithmetic", "--task_settings", given, "--output_dir", "unused"])


def test_a_task_of_images_wants_its_policy(tmp_path):
    assert "digits" in TASKS["diffusion"]
    path = tmp_path / "run.yaml"
    path.write_text("task: digits\nplan: {num_steps: 2}\n")
    for words in (["--task", "digits"], [f"--config={path}"]):
        with pytest.raises(ConfigError, match="'digits' trains a diffusion model: write policy: d"):
            main(words)


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("policy", ["language", "diffusion"])
def test_quantised_weights_are_refused_and_not_ignored(name, policy):
    plan = ["--plan", '{"num_steps": 2, "rule": "ddim", "level": 1.0}']
    words = ["--policy", policy, f"--{name}", "true", "--output_dir", "unused", "--use_cpu", "true"]
    with pytest.raises(ConfigError, match=f"{name} is not supported"):
        main([*words, *(plan if policy == "diffusion" else [])])


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "runs/a/final"])
def test_a_model_folder_that_is_not_there(prompts, name):
    words = ["--dataset_name", prompts, "--rewards", "length", "--output_dir", "unused"]
    with pytest.raises(ConfigError, match=f"model_name_or_path='{name}': no such folder; write"):
        main([*words, "--model_name_or_path", name, "--use_cpu", "true"])


def test_a_chat_template_that_is_not_there(model_folder):
    recipe = RecipeArguments(chat_template="chat.jinja")
    with pytest.raises(
        ConfigError, match="chat_template must be a file .*'chat.jinja', which does"
    ):
        load_tokenizer(recipe, ModelConfig(model_name_or_path=model_folder))


# What is known before anything is prepared or loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rewards", "exact_mach"), "no reward function 'exact_mach' .nearest: 'exact_match'"),
        (("--rewards", "nowhere.py:f"), "no reward file 'nowhere.py'"),
        (("--reward_weights", "1", "2", "--rewards", "f1"), "reward_weights has 2 entries for 1"),
        (("--dtype", "nope"), "--dtype: invalid choice: 'nope'"),
        (("--num_threads", "-1"), "num_threads must be at least 1, got -1"),
        (("--num_threads", "0"), "num_threads must be at least 1, got 0"),
        (("--validation_size", "-1"), "validation_size must be at least 0"),
        (("--dataset_limit", "0"), "dataset_limit must be at least 1"),
        (("--dataset_name", "x.jsonl"), "task 'arithmetic' brings its data, so dataset_name"),
        (("--system_prompt", "Be brief"), "task 'arithmetic' brings its data, so system_prompt"),
        (("--max_steps", "-1", "--num_train_epochs", "inf"), "num_train_epochs must be finite"),
    ],
)
def test_what_is_wrong_is_told_before_the_warm_start(tmp_path, words, message):
    settings = json.dumps({"folder": str(tmp_path / "warm"), "train": 2})
    run = (
        "--task",
        "arithmetic",
        "--task_settings",
        settings,
        "--output_dir",
        str(tmp_path / "run"),
    )
    with pytest.raises(EXPECTED, match=message):
        main([*run, "--use_cpu", "true", "--report_to", "none", *words])
    assert not (tmp_path / "warm").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task_settings", '{"a": 1}'), "task_settings=.* needs task"),
        (("--validation_split", "dev"), "validation_split needs validation_name"),
        (("--validation_name", "v.jsonl", "--validation_size", "3"), "write one of them"),
        (
            ("--policy", "diffusion", "--plan", "{}", "--system_prompt", "x"),
            "plan|system_prompt has no",
        ),
    ],
)
def test_settings_of_recipes_that_contradict_each_other_are_refused(words, message, prompts):
    more = (
        "--dataset_name",
        prompts,
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--output_dir",
        "no",
    )
    with pytest.raises(EXPECTED, match=message):
        main([*more, *words])


def test_rows_are_checked_before_the_model_is_loaded(tmp_path, model_folder):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a", "b", "a")))
    words = ["--model_name_or_path", model_folder, "--dataset_name", str(path), "--rewards", "f1"]
    words += ["--validation_size", "0", "--use_cpu", "true", "--report_to", "none"]
    words += ["--output_dir", str(tmp_path / "run"), "--report", "false"]
    # The folder holds a tokenizer alone, so that loading a model from it would fail otherwise.
    with pytest.raises(ValueError, match="rows 0 and 2 have the same prompt"):
        main(words)
    with pytest.raises(
        ValueError, match="prompts_per_step=32 exceeds the 2 prompts of the training"
    ):
        main([*words, "--duplicates", "drop"])


def test_a_reward_file_is_read_and_not_run_to_see_what_it_defines(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "from math import sqrt as root\nraise SystemExit\ndef good(**_): ...\nother = 1\n"
    )
    for name in ("good", "other", "root"):
        check_reward_name(f"{path}:{name}", [])
    with pytest.raises(ValueError, match="has no function 'goood' .nearest: 'good'"):
        check_reward_name(f"{path}:goood", [])
    path.write_text("def broken(:\n")
    with pytest.raises(ValueError, match="rewards.py is not Python: "):
        check_reward_name(f"{path}:broken", [])


def test_a_package_that_a_reward_file_lacks_is_told_with_the_file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("import nosuch\ndef good(**_): ...\n")
    with pytest.raises(ImportError, match=r"reward file .*rewards.py: No module named 'nosuch'"):
        load_reward(f"{path}:good")


def test_errors_of_refills_and_missing_packages_end_a_run_with_a_message_alone():
    assert RefillError in EXPECTED and ImportError in EXPECTED


def test_a_library_that_a_task_or_a_policy_lacks_is_told_with_its_extra(monkeypatch, tmp_path):
    run = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"]
    monkeypatch.setitem(TASKS["language"], "arithmetic", "nosuch.task")
    with pytest.raises(ConfigError, match=r"'arithmetic' needs nosuch: .*apportion\[recipes\]'"):
        main(["--task", "arithmetic", *run])
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"diffusion needs diffusers: .*apportion\[diffusion\]'"):
        main(["--policy", "diffusion", *run])


# Threads and GPUs


def test_threads_follow_what_the_process_may_use_and_what_was_asked(monkeypatch):
    for name in [n for n in os.environ if n.startswith("ACCELERATE_") or n == "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert devices.available_cpus() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert devices._asked_threads() == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert devices._asked_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # a launcher, which sets 1 by itself
    assert devices._asked_threads() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert devices._asked_threads() is None


def test_a_lone_process_uses_one_gpu_and_says_how_to_use_all(tmp_path, capsys):
    config = RolloutConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    devices.use_one_gpu(config)
    assert config.n_gpu <= 1 and not capsys.readouterr().err
    config._n_gpu = 4  # as transformers sets it where it sees four
    devices.use_one_gpu(config)
    assert config.n_gpu == 1
    assert "--num_processes 4 -m recipes.train" in capsys.readouterr().err
