"""What `DenoisingTrainer` takes: folders, other schedulers, arguments of a LoRA; what it refuses."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from peft import LoraConfig

from rl.denoising_trainer import DenoisingTrainer
from rl.policies.pipeline import ATTENTION, lora_of, place, set_scheduler
from tests import tiny_denoising as tiny
from tests.recipes.test_load_pipeline import save, tiny_checker
from tests.tiny_pipelines import tiny_pipeline

torch.set_num_threads(1)


@pytest.mark.slow
def test_a_folder_is_read_as_recipes_read_it(tmp_path):
    """Without its safety checker, with DDIM for its PNDM, and then trains with attention's LoRA."""
    scheduler = PNDMScheduler(skip_prk_steps=True, beta_start=0.00085, beta_end=0.012)
    save(tmp_path / "model", scheduler=scheduler, checker=tiny_checker())
    made = DenoisingTrainer(
        tmp_path / "model",
        "brightness",
        tiny.config(tmp_path / "run", max_steps=1),
        tiny.rows(),
        peft_config={"r": 2, "lora_dropout": 0.3},
    )
    assert made.pipeline.safety_checker is None
    assert type(made.pipeline.scheduler) is DDIMScheduler
    torch.testing.assert_close(made.pipeline.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    adapted = {n.split(".lora_")[0].rsplit("attn", 1)[1] for n in training(made.model)}
    assert {name.split(".", 1)[1] for name in adapted} == set(ATTENTION)
    made.train()
    assert made.state.log_history[0]["mismatch"] < 1e-3


def training(model):
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def test_the_scheduler_of_a_pipeline_in_memory_is_replaced_too_unless_an_engine_has_it(tmp_path):
    around = tiny.pipeline()
    around.scheduler = PNDMScheduler.from_config(around.scheduler.config, skip_prk_steps=True)
    settings = tiny.config(tmp_path)
    with pytest.raises(ValueError, match="PNDMScheduler"):
        tiny.engine(around)
    set_scheduler(around, "ddim")
    assert type(around.scheduler) is DDIMScheduler
    tiny.engine(around)
    flow = tiny_pipeline("sd3")
    with pytest.raises(ValueError, match="for a flow-matching model write rule: flow_sde"):
        DenoisingTrainer(flow, "brightness", settings, tiny.rows())


def test_an_adapter_without_modules_is_of_the_attention():
    assert lora_of(None) is None
    given = LoraConfig(r=3)
    assert lora_of(given).target_modules == set(ATTENTION) and given.target_modules is None
    assert lora_of({"r": 3, "target_modules": ["to_q"]}).target_modules == {"to_q"}
    named = LoraConfig(target_modules="all-linear")
    assert lora_of(named) is named


def test_a_pipeline_is_moved_to_the_device_of_the_run_unless_it_is_offloaded():
    around = tiny.pipeline()
    place(around, torch.device("meta"))
    assert {weight.device.type for weight in around.unet.parameters()} == {"meta"}
    around = tiny.pipeline()
    around.unet._hf_hook = object()
    place(around, torch.device("meta"))
    assert {weight.device.type for weight in around.unet.parameters()} == {"cpu"}


@pytest.mark.parametrize("rows", ["prompts.jsonl", None])
def test_rows_that_are_a_path_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="train_dataset must be rows with a column 'prompt', got"):
        DenoisingTrainer(tiny.pipeline(), "brightness", tiny.config(tmp_path), rows)


def test_compiling_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile does nothing for a diffusion model"):
        tiny.config(tmp_path, torch_compile=True)
