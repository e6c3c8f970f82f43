"""One step of training of every recipe of recipes/images/peers, on tiny models of random weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, PNDMScheduler

from recipes import diffusion
from recipes.train import main
from tests.tiny_pipelines import add_tiny_vae, embeddings, tiny_pipeline

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


def test_every_peer_recipe_says_what_a_success_is():
    assert len(PEERS) == 9
    for path in PEERS:
        recipe = yaml.safe_load(path.read_text())
        # jpeg_compressibility is minus the size in kB.
        assert recipe["rewards"] == ["jpeg_compressibility"] and recipe["success_above"] < 0
