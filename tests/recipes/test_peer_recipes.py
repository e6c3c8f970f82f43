"""One step of training of every recipe of recipes/images/peers, on tiny models of random weights."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, PNDMScheduler
from trl import ModelConfig

from recipes import diffusion
from recipes.arguments import RecipeArguments
from recipes.config import parse
from recipes.data import load_data
from recipes.train import main
from rl.config.diffusion import DenoisingConfig
from rl.objective.denoising_weights import kl_factor
from tests.tiny_pipelines import add_tiny_vae, embeddings, tiny_pipeline

pytestmark = pytest.mark.slow  # whole runs

PEERS = sorted(
    (Path(__file__).resolve().parents[2] / "recipes" / "images" / "peers").glob("*.yaml")
)

MODELS = {"stable-diffusion-v1-4": "sd", "stable-diffusion-3.5-medium": "sd3", "FLUX.1-dev": "flux"}
"""Tiny stand-ins for the models the recipes name."""

SMALLER = {
    "height": 64,
    "width": 64,
    "prompts_per_step": 2,
    "max_steps": 1,
    "dataset_limit": 4,
    "generation_batch_size": 48,
    "per_device_train_batch_size": 16,
    "eval_strategy": "no",
    "save_strategy": "no",
    "images_every": 0,
    "report": "false",
    "report_to": "none",
    "use_cpu": "true",
    "bf16": "false",
    "dtype": "float32",
    "num_threads": 1,
}
"""The plan, the rewards and what a success is stay the recipe's."""


@pytest.mark.slow
@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.stem)
def test_a_peer_recipe_trains(path, tmp_path, monkeypatch):
    recipe = yaml.safe_load(path.read_text())
    name = MODELS[recipe["model_name_or_path"].split("/")[1]]
    pipeline = tiny_pipeline(name)
    add_tiny_vae(pipeline)
    if name == "sd":
        config = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
        pipeline.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: {})
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pipeline)
    prepare = diffusion.prepare
    monkeypatch.setattr(
        diffusion, "prepare", lambda *given: replace(prepare(*given), encode=embeddings(name))
    )

    branch = recipe["plan"].get("branch", {"at": [], "children": 1})
    splits = len(branch["at"]) if isinstance(branch["at"], list) else 1
    leaves = branch["children"] ** splits
    settings = SMALLER | {"rollouts_per_prompt": leaves if leaves > 6 else 2 * leaves}
    settings |= {"output_dir": tmp_path / "run", "config": path}
    trained = recipe["plan"].get("trained", {})
    if trained.get("schedule") == "backward_progressive":  # a stage for each step of the whole run
        stages = {"trained": trained | {"stages": recipe["max_steps"]}}
        settings["plan"] = json.dumps(recipe["plan"] | stages)
    trainer = main([str(word) for name, value in settings.items() for word in (f"--{name}", value)])

    (row,) = [row for row in trainer.state.log_history if "mismatch" in row]
    assert row["reward"] < 0  # minus kB
    assert row["mismatch"] < 1e-3
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    adapters = [w for n, w in trainer.model.named_parameters() if "lora_B" in n]
    assert any(weight.any() for weight in adapters), "nothing was learnt"
    assert torch.get_num_threads() == 1


def test_a_peer_recipe_has_nothing_that_fits_its_own_reward_only():
    assert len(PEERS) == 9
    for path in PEERS:
        recipe = yaml.safe_load(path.read_text())
        assert recipe["rewards"] == ["jpeg_compressibility"] and "success_above" not in recipe


def test_a_peer_recipe_asks_for_no_more_prompts_than_its_data_have():
    for path in PEERS:
        recipe = yaml.safe_load(path.read_text())
        rows = (path.parents[3] / recipe["dataset_name"]).read_text().splitlines()
        assert recipe["prompts_per_step"] <= len(rows), path.name


def settings_of(name, *words):
    folder = Path(__file__).resolve().parents[2] / "recipes" / "images" / "peers"
    given = ["--config", str(folder / f"{name}.yaml"), "--use_cpu", "true", "--bf16", "false"]
    return parse((RecipeArguments, DenoisingConfig, ModelConfig), [*given, *words])[:2]


def test_flow_grpos_kl_is_in_the_unit_of_its_beta(tmp_path):
    """At 512 x 512 pixels a latent of Stable Diffusion 3.5 has 16 x 64 x 64 elements."""
    _, config = settings_of("flow_grpo", "--output_dir", str(tmp_path))
    levels = torch.tensor([[0.1, 0.9, 0.2, 0.8]])
    factor = kl_factor(config.kl_reduction, levels, elements=16 * 64 * 64)
    assert config.beta * factor.item() == pytest.approx(0.04 * 0.1 / 65536)


def test_mix_grpo_begins_again_shifts_and_shares_its_start(tmp_path):
    _, config = settings_of("mix_grpo", "--output_dir", str(tmp_path), "--max_steps", "700")
    assert config.shift == 3 and config.shared_start_noise
    windows = [config.step_plan(step).trained for step in range(0, 700, 25)]
    assert windows[:2] == [(0, 1, 2, 3), (1, 2, 3, 4)]
    assert windows[22:24] == [(22,), (0, 1, 2, 3)]


@pytest.mark.parametrize("count", [3, 40, 400])
def test_ones_own_prompts_are_not_validated_on_the_recipes(tmp_path, count):
    own = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{n} cats", "count": n} for n in range(count)]
    own.write_text("\n".join(map(json.dumps, rows)))
    words = ["--dataset_name", str(own), "--output_dir", str(tmp_path)]
    with pytest.warns(UserWarning, match="validation_name: recipes/.* goes with dataset_name: rec"):
        recipe, config = settings_of("flow_grpo", *words)
    training, validation = load_data(recipe, seed=config.seed, id_column=config.id_column)
    assert recipe.validation_name is None
    keys = [{row["count"] for row in part} for part in (training, validation)]
    held_out = {3: 3, 40: 8, 400: 128}[count]
    assert len(keys[1]) == held_out and (count == 3 or not keys[0] & keys[1])


def test_ones_own_validation_prompts_and_line_stay(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = ["--dataset_name", "mine.jsonl", "--validation_name", "held-out.jsonl"]
        recipe, _ = settings_of("flow_grpo", *words, "--output_dir", str(tmp_path))
        assert recipe.validation_name == "held-out.jsonl"
        same = ["--dataset_name=recipes/images/prompts/relations.jsonl"]
        recipe, _ = settings_of("flow_grpo", *same, "--output_dir", str(tmp_path))
        assert recipe.validation_name.endswith("relations_held_out.jsonl")
