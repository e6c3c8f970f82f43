"""Every YAML that is shipped for a language model is a valid run; images: test_image_recipes.py."""

from pathlib import Path

import pytest
from trl import ModelConfig

from recipes.arguments import RecipeArguments
from recipes.config import parse
from rl.config.language import RolloutConfig

FILES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*/*.yaml"))
FILES = [p for p in FILES if p.parent.name not in ("accelerate", "images") and p.name[0] != "_"]


def test_there_are_recipes():
    assert {"gvm_raft.yaml", "raft.yaml", "leave_one_out.yaml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_settings_are_known_and_possible(path):
    arguments = ["--config", str(path), "--use_cpu", "true", "--report_to", "none"]
    recipe, config, _ = parse((RecipeArguments, RolloutConfig, ModelConfig), arguments)
    assert recipe.task is not None or recipe.rewards
    assert config.output_dir.startswith("runs/")
    assert config.max_steps > 0
