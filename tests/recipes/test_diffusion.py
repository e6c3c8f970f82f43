"""`recipes/train.py` with `policy: diffusion`: a user's own pipeline and prompts; the digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler

from recipes.config import ConfigError
from recipes.images import probe as probe_module
from recipes.train import main
from tests.tiny_pipelines import add_tiny_text_encoder, add_tiny_vae, tiny_sd

pytestmark = pytest.mark.slow  # whole runs

PLAN = {
    "num_steps": 4,
    "rule": "ddim",
    "level": 1.0,
    "branch": {"at": [1], "children": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole Stable Diffusion of tiny parts, as one finds it on the hub: with another scheduler."""
    pipeline = tiny_sd()
    add_tiny_text_encoder(pipeline)
    add_tiny_vae(pipeline)
    parts = ("text_encoder", "tokenizer", "vae")
    pipeline.register_modules(**{name: getattr(pipeline, name) for name in parts})
    config = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    pipeline.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    target = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(target)
    return target


def words(settings):
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.fixture
def settings(folder, tmp_path):
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"a {colour} circle"} for colour in ("red", "green", "blue", "white")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "policy": "diffusion",
        "model_name_or_path": folder,
        "dataset_name": data,
        "validation_size": 1,
        "rewards": "brightness",
        "plan": json.dumps(PLAN),
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "prompts_per_step": 2,
        "rollouts_per_prompt": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "images_every": 1,
        "num_threads": 1,
        "guidance_scale": 2.0,
        "success_above": 0.5,
    }


def test_a_pipeline_of_ones_own_is_trained_with_an_adapter_and_saved_whole(
    settings, folder, tmp_path, capfd
):
    trainer = main(words(settings | {"use_peft": "true", "lora_r": 2, "report": "false"}))
    assert "PNDMScheduler is replaced by DDIMScheduler" in capfd.readouterr().err
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert trained and all("lora" in name for name in trained)
    pictures = sorted(path.name for path in (tmp_path / "run" / "images").glob("*.png"))
    assert pictures == [
        "deterministic-000002.png",
        "sampled-000002.png",
        "train-000001.png",
        "train-000002.png",
    ]
    saved = DiffusionPipeline.from_pretrained(tmp_path / "run" / "final", use_safetensors=True)
    assert saved.vae is not None and saved.text_encoder is not None
    steps = [row for row in trainer.state.log_history if "mismatch" in row]
    assert len(steps) == 2
    # Two rewards of one prompt differ, so there is something to learn, and both steps had it.
    assert all(row["rows/trained_share"] > 0 for row in steps)
    assert all(row["mismatch"] < 1e-3 for row in steps)
    # (t0 + 1) + k (T - t0 - 1) for each of 4 roots a step.
    assert trainer.evaluations == 2 * 4 * (2 + 2 * 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_in_float32_trains_beside_weights_in_half_precision(settings, dtype):
    given = {"use_peft": "true", "lora_r": 2, "report": "false", "dtype": dtype, "images_every": 0}
    trainer = main(words(settings | given | {"lora_target_modules": "to_q"}))
    for name, weight in trainer.model.named_parameters():
        assert weight.dtype == (torch.float32 if "lora" in name else getattr(torch, dtype))
        assert weight.requires_grad == ("lora" in name)
    steps = [row for row in trainer.state.log_history if "mismatch" in row]
    # Rounded before it is scored: in the rollout's own batches nothing is left of rounding.
    assert all(row["mismatch"] < 0.05 for row in steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "nothing to train on"),
        ({"model_name_or_path": None}, "no model"),
        ({"rewards": None}, "no reward"),
        ({"rewards": "brightnes"}, "brightnes.*brightness"),
        ({"task": "arithmetic"}, "task must be one of digits for a diffusion model"),
        ({"plan": '{"num_steps": 4}'}, "plan needs rule, level"),
        ({"policy": "difusion"}, "policy must be language or diffusion, got 'difusion'"),
        (
            {"refill": "true"},
            "unknown argument --refill: refill is a setting of language models alone",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_told_before_training(settings, changes, message):
    given = {k: v for k, v in (settings | changes).items() if v is not None}
    if given["policy"] == "difusion":
        given = {k: given[k] for k in ("policy", "output_dir")}
    with pytest.raises((ConfigError, ValueError), match=message):
        main(words(given))


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Two steps of the embedded task on a model that was hardly pretrained, with its report."""
    root = tmp_path_factory.mktemp("digits")
    given = {
        "config": Path(__file__).resolve().parents[2] / "recipes" / "images" / "branch.yaml",
        "output_dir": root / "run",
        "max_steps": 2,
        "eval_steps": 2,
        "eval_rollouts_per_prompt": 2,
        "images_every": 2,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "task_settings": json.dumps(
            {"folder": str(root / "model"), "pretraining": {"steps": 2}, "reward": "probability"}
        ),
    }
    return root, given, main(words(given))


def test_the_digits_run_ends_with_a_page_of_pictures(digits_run):
    root, _, trainer = digits_run
    page = (root / "run" / "report.html").read_text()
    for caption in (
        "first validation with noise, step 0",
        "last validation with noise, step 2",
        "last validation without noise, step 2",
        "training samples of step 2",
        "what generation cost",
        "denoising steps generated",
        "deterministic accuracy",
    ):
        assert caption in page
    assert (root / "run" / "report-denoising.png").is_file()
    assert trainer.evaluations == 2 * 750  # 30 roots of 5 + 4 * 5 evaluations
    logged = [row for row in trainer.state.log_history if "denoiser_evaluations" in row]
    assert [row["denoiser_evaluations"] for row in logged] == [750, 1500]


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(digits_run, tmp_path):
    root, given, trainer = digits_run
    half = main(words(given | {"output_dir": tmp_path / "half", "max_steps": 1}))
    assert half.state.global_step == 1
    # A run of two steps that is stopped after the first.
    checkpoint = root / "run" / "checkpoint-1"
    again = main(
        words(
            given
            | {
                "output_dir": tmp_path / "again",
                "resume_from_checkpoint": checkpoint,
                "report": "false",
            }
        )
    )
    for ours, theirs in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert again.evaluations == trainer.evaluations


def test_the_probe_prints_how_much_is_still_open_at_each_step(digits_run, capsys):
    root, given, _ = digits_run
    given = {k: given[k] for k in ("config", "output_dir", "task_settings", "use_cpu")}
    found = probe_module.probe(
        words(given | {"points": "0,8", "children": 2, "branches": 2, "output_dir": root / "probe"})
    )
    assert [point.step for point in found] == [0, 8]
    assert found[0].evaluations == 10 * 2 * (1 + 2 * 9)
    assert found[0].within_share > found[1].within_share
    assert all(point.within_share_se > 0 for point in found)
    shown = capsys.readouterr().out
    assert "within share" in shown and "±" in shown
    with pytest.raises(ConfigError, match="points must be steps such as 0,2,4, got 'x'"):
        probe_module.probe(words(given | {"points": "x"}))


def test_samples_become_pictures_of_the_size_of_their_prompts(digits_run):
    from PIL import Image

    root, _, _ = digits_run
    picture = np.asarray(Image.open(root / "run" / "images" / "train-000002.png"))
    # Ten prompts of twelve samples, 8 x 8 pixels enlarged four times, with margins.
    assert picture.shape == (10 * (32 + 6), 12 * (32 + 2), 3)
    assert len((root / "run" / "images" / "train-000002.txt").read_text().splitlines()) == 10
