"""Settings files: unknown keys, wrong types, overrides."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig

from recipes.arguments import RecipeArguments
from recipes.config import ConfigError, parse, peek
from recipes.other_names import FORMER, OTHERS, TRANSFORMERS, TRL, other_name
from recipes.shown import help_text
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "names", [TRL, TRANSFORMERS, OTHERS, FORMER], ids=["TRL", "older", "others", "former"]
)
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


KINDS = [RolloutConfig, DenoisingConfig]


def shown(text):
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize("kind", KINDS)
def test_help_all_lists_every_setting_once_and_help_those_that_a_run_needs(kind):
    classes = (RecipeArguments, kind, ModelConfig)
    everything, some = help_text(classes, everything=True), help_text(classes)
    names = {f.name for cls in classes for f in fields(cls)}
    assert sorted(shown(everything)) == sorted(f"--{name}" for name in names)
    assert {*shown(some)} < {*shown(everything)}
    own = {f.name for f in fields(kind)} - {f.name for f in fields(TrainingArguments)}
    assert {f"--{name}" for name in own} <= {*shown(some)}
    assert max(map(len, everything.splitlines())) < 100


def test_help_goes_along_a_training_step_and_ends_with_where_the_rest_is():
    text = help_text((RecipeArguments, RolloutConfig, ModelConfig))
    order = ["--task", "--selector", "--allocator", "--stopping", "--temperature", "--advantage"]
    places = [text.index(f"  {name}") for name in (*order, "--loss", "--learning_rate")]
    assert places == sorted(places)
    assert "--adam_epsilon" in text and "--ddp_backend" not in text and "--help_all shows" in text


def test_help_shows_choices_from_the_records_and_what_a_setting_acts_with():
    text = " ".join(help_text((RolloutConfig,)).split())
    assert (
        "One of: uniform, vade, mopps, posterior_mean, band, static_band, diverse or path" in text
    )
    assert "One of: transformers, vllm." in text
    assert "Acts with selector: band or static_band." in text
    everything = " ".join(help_text((RolloutConfig,), everything=True).split())
    assert "knapsack_posterior: The same, on average over the posterior." in everything


# A file that is based on another


def based(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return parse((Settings,), ["--config", str(tmp_path / "run.yaml")])[0]


def test_a_file_takes_from_its_base_what_it_does_not_say(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "low.yaml").write_text("pilot: 1\nverbose: true\nprompts_per_step: 2")
    found = based(
        tmp_path,
        run="base: mid.yaml\nprompts_per_step: 9",
        mid="base: deep/low.yaml\npilot: 5\nprompts_per_step: 8",
    )
    assert found == Settings(prompts_per_step=9, pilot=5, verbose=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run": "base: run.yaml"}, "run.yaml is based on itself"),
        ({"run": "base: a.yaml", "a": "base: run.yaml"}, "run.yaml is based on itself"),
        ({"run": "base: aa.yaml", "a": "{}"}, "aa.yaml does not exist.*'a.yaml'"),
        ({"run": "base: 3"}, "base must be the name of another YAML, got 3"),
        ({"run": "base: a.yaml", "a": "pilots: 1"}, "a.yaml: unknown key 'pilots'"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        based(tmp_path, **files)


def test_what_fits_the_bases_own_rewards_is_not_taken_beside_others(tmp_path):
    @dataclass
    class Rewarded:
        rewards: list[str] = field(default_factory=list)
        success_above: float | None = None

    (tmp_path / "base.yaml").write_text("rewards: [a]\nsuccess_above: 3.0")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nrewards: [b]")
    found = parse((Rewarded,), ["--config", str(tmp_path / "run.yaml")])[0]
    assert found == Rewarded(rewards=["b"])


def test_peek_sees_what_a_base_says(tmp_path):
    (tmp_path / "base.yaml").write_text("policy: diffusion\ntask: x")
    (tmp_path / "run.yaml").write_text("base: base.yaml\ntask: y")
    words = ["--config", str(tmp_path / "run.yaml")]
    assert (peek("policy", words), peek("task", words), peek("none", words)) == (
        *("diffusion", "y"),
        None,
    )


@pytest.mark.slow
def test_the_arithmetic_recipes_share_what_their_base_says():
    folder = Path(__file__).resolve().parents[2] / "recipes" / "arithmetic"
    for path in folder.glob("[!_]*.yaml"):
        words = ["--config", str(path), "--use_cpu", "true", "--report_to", "none"]
        _, made, _ = parse((RecipeArguments, RolloutConfig, ModelConfig), words)
        shape = (90, 64) if path.stem == "fast" else (100, 32)
        assert (made.max_steps, made.prompts_per_step) == shape
        assert (made.learning_rate, made.adam_beta2) == (3e-4, 0.95)
        assert made.max_completion_length == 40
        assert made.length_weight == (
            "token_mean" if path.stem in ("dapo", "hapo") else "token_sum"
        )


# What a run would use


def test_print_config_says_each_value_and_where_it_comes_from_and_ends(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("temperature: 0.9\nprompts_per_step: 4")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nprompts_per_step: 6\nloss: dapo")
    words = ["--config", str(tmp_path / "run.yaml"), "--use_cpu", "true", "--print_config"]
    words += ["--output_dir", str(tmp_path / "runs"), "--trainer", "grpo", "--report_to", "none"]
    with pytest.raises(SystemExit) as ended:
        parse((RecipeArguments, RolloutConfig, ModelConfig), words)
    assert not ended.value.code and not (tmp_path / "runs").exists()
    text = capsys.readouterr().out
    source = {line.split(":")[0]: line.split("  # ")[1] for line in text.splitlines()}
    assert source["temperature"] == str(tmp_path / "base.yaml")
    assert source["prompts_per_step"] == str(tmp_path / "run.yaml")
    assert source["trainer"] == source["use_cpu"] == "command line"
    assert source["epsilon_high"] == "loss: dapo" and source["advantage"] == "trainer: grpo"
    assert source["top_p"] == "default" and source["budget_min"] == "from other settings"
    again = yaml.safe_load(text)
    assert (again["temperature"], again["epsilon_high"], again["loss"]) == (0.9, 0.28, "dapo")
    # What is printed is a file of settings that gives the same run.
    path = tmp_path / "again.yaml"
    path.write_text(text)
    classes = (RecipeArguments, RolloutConfig, ModelConfig)
    first = parse(classes, [word for word in words if word != "--print_config"])
    assert parse(classes, ["--config", str(path)])[1].to_dict() == first[1].to_dict()


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
