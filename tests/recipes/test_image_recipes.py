"""The YAMLs of recipes/images: every key is known, every setting fits the others."""

from pathlib import Path

import pytest
from trl import ModelConfig

from recipes.arguments import RecipeArguments
from recipes.config import parse, peek
from recipes.diffusion import ATTENTION, lora_config
from rl.config.diffusion import DenoisingConfig

IMAGES = Path(__file__).resolve().parents[2] / "recipes" / "images"
RECIPES = sorted(IMAGES.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(IMAGES)))
def test_a_recipe_parses_and_its_plan_holds_to_the_end(path, tmp_path):
    words = [
        "--config",
        str(path),
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    assert peek("policy", words) == "diffusion"
    recipe, config, model = parse((RecipeArguments, DenoisingConfig, ModelConfig), words)
    for step in (0, config.max_steps // 2, config.max_steps - 1):
        plan = config.step_plan(step)
        assert plan.leaves_per_root == config.leaves_per_branch
        assert plan.trained
    if recipe.task is None:
        for name in (recipe.dataset_name, recipe.validation_name):
            assert (IMAGES.parents[1] / name).is_file()
        named = model.lora_target_modules or ATTENTION
        assert set(lora_config(model).target_modules) == set(named)


def test_there_is_a_recipe_for_every_method():
    names = {str(path.relative_to(IMAGES).with_suffix("")) for path in RECIPES}
    assert {"ddpo", "branch", "b2_released", "b2_within_branch", "vade_branch"} <= names
    assert sum(name.startswith("peers/") for name in names) == 9


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--policy", "diffusion"], "diffusion"),
        (["--policy=diffusion", "--seed", "1"], "diffusion"),
        (["--seed", "1"], None),
        (["--policy"], None),
        (["--config", "nowhere.yaml"], None),
    ],
)
def test_one_setting_is_read_before_the_others(words, found):
    assert peek("policy", words) == found


def test_the_command_line_wins_over_the_file():
    config = str(IMAGES / "ddpo.yaml")
    assert peek("policy", ["--config", config, "--policy", "language"]) == "language"
