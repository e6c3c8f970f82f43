"""Settings files: unknown keys, wrong types, overrides."""

from dataclasses import dataclass, field

import pytest
import yaml

from recipes.config import ConfigError, parse


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
