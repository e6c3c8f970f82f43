"""What is another now in a run that goes on (settings, model, data, rewards), and what a run records."""

import functools
import json
import shutil

import pytest
import torch
from peft import LoraConfig

from rl.run import changed_settings, tracking
from rl.run.changed_settings import ChangedRunError, compare
from rl.run.origins import described, origins, versions
from rollouts.prompts import Prompt
from tests import tiny

SETTINGS = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
    "trainer": "grpo",
    "log_level": "warning",
    "prompts_per_step": 2,
    "rollouts_per_prompt": 2,
}
AGAIN = SETTINGS | {"if_run_exists": "resume"}


def other_reward(completions, **_):
    return [float(len(text) % 2) for text in completions]


# -- comparing


def about(**settings):
    return {"settings": settings, "recipe": {"rewards": "a"}, "origins": {"prompts": "7f"}}


def test_differences_are_of_settings_recipe_and_origins():
    now = about(learning_rate=2.0, logging_steps=9, new=1)
    now |= {"recipe": {"rewards": "b", "num_threads": 4}, "origins": {"prompts": "80"}}
    found = compare(about(learning_rate=1.0, logging_steps=1), now, step=3)
    assert found.now == {
        "learning_rate": [1.0, 2.0],
        "rewards": ["a", "b"],
        "prompts": ["7f", "80"],
    }
    assert found.changes == [{"step": 3, "settings": found.now}]


@pytest.mark.parametrize(
    ("name", "old", "new", "is_another"),
    [
        ("max_steps", 3, 5, False),
        ("max_steps", 5, 3, True),
        ("max_generated_tokens", 10, None, False),
        ("max_generated_tokens", None, 10, True),
        ("max_empty_steps", 3, 9, False),
        ("reward_timeout", 60.0, 5.0, False),
        ("learning_rate", 1e-3, 1e-4, True),
        ("temperature", 1.0, 0.9, True),
        ("logging_steps", 1, 5, False),
        ("save_total_limit", 1, None, False),
    ],
)
def test_what_makes_a_run_another(name, old, new, is_another):
    found = compare(about(**{name: old}), about(**{name: new}), step=3)
    if not is_another:
        found.refuse_another_run("here")
        return
    with pytest.raises(ChangedRunError, match=rf"{name} was {old!r}, is {new!r}.*another output_d"):
        found.refuse_another_run("here")


# -- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny.run(folder, reward=tiny.small_digit, **SETTINGS)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def files_of(folder):
    """All that is in a run folder but its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def with_column(value):
    return [row | {"level": value} for row in tiny.rows()]


CHANGES = {
    "a learning rate": ({"learning_rate": 1e-5}, "learning_rate was 0.003, is 1e-05"),
    "a decisive setting": ({"temperature": 0.5}, "temperature was 1.0, is 0.5"),
    "fewer steps": ({"max_steps": 1}, "max_steps was 2, is 1"),
    "a reward": ({"reward": other_reward}, "rewards was .*small_digit.*, is .*other_reward"),
    "a column": ({"data": with_column(3)}, "prompts was '[0-9a-f]{32}', is '[0-9a-f]{32}'"),
    "validation": ({"eval_dataset": [{"prompt": "c=", "answer": "1"}]}, "validation was None, is"),
    "other prompts": ({"data": tiny.rows("ab")}, "prompts was "),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_finished_run_is_not_relabelled(folder, name):
    change, message = CHANGES[name]
    before = files_of(folder)
    with pytest.raises(ChangedRunError, match=f"holds another run: .*{message}"):
        tiny.run(folder, **AGAIN | {"reward": tiny.small_digit} | change)
    assert files_of(folder) == before


@pytest.mark.slow
def test_the_same_command_takes_no_step_and_a_longer_one_goes_on(folder):
    lines = tiny.lines(folder)
    tiny.run(folder, reward=tiny.small_digit, **AGAIN | {"logging_steps": 5})
    assert tiny.lines(folder) == lines
    made = tiny.run(folder, reward=tiny.small_digit, **AGAIN | {"max_steps": 3})
    assert made.state.global_step == 3
    (change,) = json.loads((folder / "run.json").read_text())["changes"]
    assert change == {"step": 2, "settings": {"max_steps": [2, 3]}}


@pytest.mark.slow
def test_a_finished_run_that_is_asked_to_go_on_changed_is_not_relabelled_either(folder):
    before = files_of(folder)
    with pytest.raises(
        ChangedRunError, match=r"ended, at step 2 by max_steps=2.*learning_rate was"
    ):
        tiny.run(folder, reward=tiny.small_digit, resume=True, **SETTINGS, learning_rate=1e-5)
    assert files_of(folder) == before


@pytest.mark.slow
def test_without_a_checkpoint_a_run_is_not_written_over_by_another(tmp_path):
    settings = AGAIN | {"save_strategy": "no", "reward": tiny.small_digit}
    tiny.run(tmp_path, **settings)
    before = files_of(tmp_path)
    with pytest.raises(ChangedRunError, match="learning_rate was"):
        tiny.run(tmp_path, learning_rate=1e-5, **settings)
    assert files_of(tmp_path) == before


@pytest.mark.slow
def test_another_reward_is_told_where_it_is_asked_for_also_without_run_json(folder, caplog):
    changed_settings.logger.propagate = True
    (folder / "run.json").write_bytes(b"\0" * 9)
    tiny.run(folder, reward=other_reward, resume=True, **SETTINGS | {"max_steps": 3})
    (told,) = [r.message for r in caplog.records if "with other settings" in r.message]
    assert "other_reward" in told and "small_digit" in told and "test_changed_runs.py" in told
    text = (folder / "run.json").read_text()
    assert "other_reward" in text and json.loads(text)["changes"][0]["step"] == 2


def test_a_model_that_no_checkpoint_fits_is_refused(folder):
    with torch.random.fork_rng():
        config = tiny.model().config
    config.hidden_size = 16
    other = type(tiny.model())(config)
    with pytest.raises(ValueError, match="weights was"):
        tiny.run(folder, model=other, resume=True, **SETTINGS | {"max_steps": 3})


@pytest.mark.slow
def test_an_adapter_goes_on_only_on_the_weights_it_was_trained_on(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    settings = SETTINGS | {"reward": tiny.small_digit, "peft_config": lora}
    tiny.run(tmp_path, **settings)
    with pytest.raises(ValueError, match="weights_not_saved was"):
        tiny.run(tmp_path, model=tiny.model(seed=1), resume=True, **settings | {"max_steps": 3})
    with pytest.raises(ValueError, match="use_peft was True, is False"):
        tiny.run(tmp_path, resume=True, **settings | {"max_steps": 3, "peft_config": None})
    made = tiny.run(tmp_path, resume=True, **settings | {"max_steps": 3})
    assert made.state.global_step == 3


# -- what a run says of itself


def test_run_json_and_trackers_name_what_a_run_is_made_of(finished):
    about = json.loads((finished / "run.json").read_text())
    assert "small_digit" in about["origins"]["rewards"][0]
    assert "tiny.py" in about["origins"]["rewards"][0]
    assert about["versions"]["torch"]
    assert about["versions"]["apportion"] and about["command"]
    assert not any(name.startswith("run/") for name in about["settings"])


@pytest.mark.slow
def test_trackers_are_told(tmp_path):
    made = tiny.trainer(tmp_path, reward=tiny.small_digit)
    made.recipe = {"task": "arithmetic", "lora_r": 8, "rewards": ["a.py:b"], "task_settings": None}
    made.train()
    told = made.args.to_dict()
    assert told["run/task"] == "arithmetic" and told["run/lora_r"] == 8
    assert "small_digit" in told["run/rewards"] and "torch" in told["run/versions"]
    assert "run/data_fingerprint" in told and "run/task_settings" not in told


def test_secrets_of_the_command_line_are_not_written():
    words = ["train.py", "--hub_token", "abc", "--wandb_api_key=def", "--seed", "3"]
    shown = ["train.py", "--hub_token", "<secret>", "--wandb_api_key=<secret>", "--seed", "3"]
    assert tracking.command_line(words) == shown


def test_a_reward_is_described_by_name_file_and_source(tmp_path):
    from rollouts.rewards.text import load_reward

    path = tmp_path / "mine.py"
    path.write_text(
        "HALF = 2\ndef mine(completions, **_):\n    return [1 / HALF] * len(completions)\n"
    )
    first = described(load_reward(f"{path}:mine"))
    assert first.startswith(f"mine ({path}, ")
    assert described(load_reward(f"{path}:mine")) == first
    path.write_text(path.read_text().replace("HALF = 2", "HALF = 3"))  # not in the function itself
    assert described(load_reward(f"{path}:mine")) != first

    class Judge:
        def __call__(self, completions, **_):
            return [0.0] * len(completions)

    assert described(Judge()) == described(Judge())
    assert described(Judge()).startswith(f"Judge ({__file__}, ")
    low, high = (functools.partial(other_reward, level=level) for level in (1, 2))
    assert described(low) != described(high) and '{"level": 1}' in described(low)
    assert described(len).startswith("len (no file, ")


def prompt(**columns):
    return Prompt(key="k", prompt="1+1=", token_ids=(3, 4), columns=columns)


def test_prompts_are_told_apart_by_what_policy_and_rewards_read():
    def content(one):
        return origins(tiny.model(), [one], [], [], has_reference=False)["prompts"]

    base = content(prompt(answer="2"))
    assert content(prompt(answer="2")) == base
    assert content(prompt(answer="3")) != base
    assert (
        content(Prompt(key="k", prompt="1+1=", token_ids=(3, 5), columns={"answer": "2"})) != base
    )
    assert content(prompt(image=object())) == content(prompt(image=object()))  # no address counts
    assert content(prompt(table={1: 2, "a": 3})) == content(prompt(table={1: 2, "a": 3}))


def test_weights_that_no_checkpoint_holds_are_told_apart():
    def found(seed, has_reference):
        return origins(tiny.model(seed), [], [], [], has_reference=has_reference)

    assert found(0, False)["weights_not_saved"] is None
    assert found(0, True)["weights_not_saved"] == found(0, True)["weights_not_saved"]
    assert found(0, True)["weights_not_saved"] != found(1, True)["weights_not_saved"]
    assert found(0, True)["weights"] == found(1, True)["weights"]


def test_versions_are_those_installed():
    assert versions()["transformers"] and "no-such-library" not in versions()
