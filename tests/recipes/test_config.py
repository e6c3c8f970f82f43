"""Settings files: unknown keys, wrong types, overrides."""

import os
from dataclasses import dataclass, field, fields

import pytest
import yaml
from trl import GRPOConfig, ModelConfig

from recipes.arguments import RecipeArguments
from recipes.config import ConfigError, help_text, parse
from recipes.other_names import OTHERS, TRANSFORMERS, TRL, other_name
from rl.config.diffusion import DenoisingConfig
from rl.config.language import RolloutConfig


@dataclass
class Settings:
    learning_rate: float = field(default=1e-6, metadata={"help": "rate"})
    prompts_per_step: int = field(default=4, metadata={"help": "prompts"})
    pilot: int | None = field(default=None, metadata={"help": "pilots"})
    verbose: bool = field(default=False, metadata={"help": "talk"})
    rewards: list[str] = field(default_factory=list, metadata={"help": "names"})


def settings(tmp_path, text, *arguments):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse((Settings,), ["--config", str(path), *arguments])[0]


def test_arguments_win_over_the_file_and_both_over_defaults(tmp_path):
    found = settings(tmp_path, "learning_rate: 0.1\nverbose: true\n", "--learning_rate", "0.5")
    assert found == Settings(learning_rate=0.5, verbose=True)


def test_a_number_yaml_reads_as_text_is_still_a_number(tmp_path):
    assert isinstance(yaml.safe_load("x: 1e-5")["x"], str)  # the trap
    assert settings(tmp_path, "learning_rate: 1e-5").learning_rate == 1e-5


def test_an_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'learning_rat'.*'learning_rate'"):
        settings(tmp_path, "learning_rat: 0.1")


def test_an_unknown_argument_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown argument --prompt_per_step.*prompts_per_step"):
        settings(tmp_path, "{}", "--prompt_per_step", "3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts_per_step: many", "prompts_per_step must be a whole number, got 'many'"),
        ("prompts_per_step: 2.5", "prompts_per_step must be a whole number, got 2.5"),
        ("prompts_per_step: true", "got True"),
        ("pilot: x", "pilot must be a whole number or null, got 'x'"),
        ("verbose: 1", "verbose must be true or false, got 1"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("rewards: exact_match", "rewards must be"),
    ],
)
def test_a_wrong_type_says_the_key_the_value_and_the_type(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, text)


def test_a_key_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'pilot' stands twice"):
        settings(tmp_path, "pilot: 1\npilot: 2")


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "gvm_raft.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"does not exist.*'gvm_raft.yaml'"):
        parse((Settings,), ["--config", str(tmp_path / "gvm_rft.yaml")])


@pytest.mark.parametrize("text", ["- a\n- b", "just text", ": :"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="mapping|not YAML"):
        settings(tmp_path, text)


# One file of settings shares with others


def test_merge_keys_fill_in_what_the_file_does_not_say(tmp_path):
    text = """
.common: &common {learning_rate: 0.1, prompts_per_step: 7}
.more: &more
  <<: *common
  pilot: 3
<<: [*more, {verbose: true}]
prompts_per_step: 9
"""
    found = settings(tmp_path, text)
    assert found == Settings(learning_rate=0.1, prompts_per_step=9, pilot=3, verbose=True)


def test_a_key_twice_is_refused_beside_a_merge_and_inside_one(tmp_path):
    for text in ("<<: {pilot: 1}\npilot: 2\npilot: 3", "<<: {pilot: 1, pilot: 2}"):
        with pytest.raises(ConfigError, match="'pilot' stands twice"):
            settings(tmp_path, text)


def test_what_is_merged_is_checked_like_any_key(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'pilo'.*'pilot'"):
        settings(tmp_path, "<<: {pilo: 1}")


def test_variables_of_the_environment_are_set_from_a_mapping_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("APPORTION_TEST", "0")
    settings(tmp_path, "env: {APPORTION_TEST: 3}")
    assert os.environ["APPORTION_TEST"] == "3"
    with pytest.raises(ConfigError, match="env must be a mapping"):
        settings(tmp_path, "env: [1]")


def test_files_that_no_editor_meant_are_refused_by_name(tmp_path):
    for content in ("learning_rate: 0.1  # caf\xe9".encode("latin-1"), b"a: " + b"[" * 5000):
        (tmp_path / "odd.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"odd.yaml is not (UTF-8|YAML)"):
            parse((Settings,), ["--config", str(tmp_path / "odd.yaml")])


def test_arguments_that_cannot_be_parsed_are_said_without_a_list_of_all_settings():
    with pytest.raises(ConfigError, match="argument --prompts_per_step.*invalid int value: 'many'"):
        parse((Settings,), ["--prompts_per_step", "many"])
    with pytest.raises(ConfigError, match="--config stands twice"):
        parse((Settings,), ["--config", "a.yaml", "--config", "b.yaml"])


# Names of other trainers

OURS = {
    f.name
    for cls in (RecipeArguments, RolloutConfig, DenoisingConfig, ModelConfig)
    for f in fields(cls)
}


def test_every_setting_of_trl_is_one_here_or_is_answered():
    silent = [f.name for f in fields(GRPOConfig) if f.name not in OURS and f.name not in TRL]
    assert not silent


@pytest.mark.parametrize("names", [TRL, TRANSFORMERS, OTHERS], ids=["TRL", "older", "others"])
def test_answers_name_settings_that_exist(names):
    for name, (ours, answer) in names.items():
        assert set(ours) <= OURS, name
        assert all(setting in answer for setting in ours), name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("num_generations", "TRL's num_generations write rollouts_per_prompt"),
        ("use_vllm", "write engine: vllm"),
        ("disable_dropout", "TRL's disable_dropout is not needed: dropout is always off"),
        ("actor_rollout_ref.rollout.n", "OpenRLHF's n write rollouts_per_prompt"),
        ("lr", "write learning_rate"),
    ],
)
def test_a_name_of_another_trainer_is_answered_with_ours(tmp_path, name, told):
    assert told in str(other_name(name))
    path = tmp_path / "theirs.yaml"
    path.write_text(f"{name}: 8\n")
    for words in ((f"--{name}", "8"), (f"--{name}=8",), ("--config", str(path))):
        with pytest.raises(ConfigError, match=told):
            parse((Settings,), words)


def test_help_lists_every_setting_once_under_its_class():
    text = help_text((RecipeArguments, RolloutConfig, DenoisingConfig, ModelConfig))
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert sorted(shown) == sorted(f"--{name}" for name in OURS)
    assert text.index("--num_threads") < text.index("--selector") < text.index("--guidance_scale")
    assert text.index("--guidance_scale") < text.index("--adam_beta1")
    assert max(map(len, text.splitlines())) < 100


def test_what_fits_the_files_own_rewards_only_is_left_out_with_others(tmp_path):
    @dataclass
    class Settings:
        rewards: list[str] = field(default_factory=list)
        success_above: float | None = None

    path = tmp_path / "a.yaml"
    path.write_text("rewards: [first, second]\nsuccess_above: -3\n")

    def given(*words):
        return parse((Settings,), ["--config", str(path), *words])[0]

    assert given().success_above == given("--rewards", "first", "second").success_above == -3
    assert given("--rewards", "third", "--success_above", "0.5").success_above == 0.5
    with pytest.warns(
        UserWarning, match="success_above: -3 of the file goes with rewards: first sec"
    ):
        assert given("--rewards", "third").success_above is None
