"""Adapters that a pipeline brings or is given: what trains, what acts, what its own reader reads."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from rl.policies.denoiser import DENOISERS, denoiser_of, load_denoiser, save_lora
from tests import tiny_denoising as tiny
from tests.tiny import parameters
from tests.tiny_pipelines import PIPELINES, add_tiny_text_encoder, tiny_pipeline

pytestmark = pytest.mark.slow  # whole runs

torch.set_num_threads(1)


def lora(**changes):
    return LoraConfig(**(dict(r=2, lora_alpha=8, target_modules=["to_q", "to_v"]) | changes))


def moved(module, by=0.3):
    """The module, its adapters away from doing nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight).to(weight.dtype) * by)
    return module


def output(unet):
    torch.manual_seed(2)
    text = torch.randn(2, 3, unet.config.cross_attention_dim)
    with torch.no_grad():
        return unet(
            torch.randn(2, 1, 8, 8), torch.tensor([3, 9]), encoder_hidden_states=text
        ).sample


def training(module):
    return {name for name, weight in module.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_lora_is_read_by_the_pipelines_own_reader(name, tmp_path):
    """Prefix, weights and alpha: without its alpha of 8 a LoRA of rank 2 would act as one of 2."""
    denoiser, pipeline = load_denoiser(tiny_pipeline(name), None, lora())
    moved(denoiser)
    save_lora(pipeline, denoiser, tmp_path)
    component, _ = denoiser_of(pipeline)
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert stored and all(key.startswith(f"{component}.") for key in stored)

    other = tiny_pipeline(name)
    other.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    (adapter,) = other.get_list_adapters()[component]
    _, again = denoiser_of(other)
    kept = denoiser.state_dict()
    for key, weight in again.state_dict().items():
        assert torch.equal(weight, kept[key.replace(f".{adapter}.", ".default.")])
    for layer in (m for m in again.modules() if hasattr(m, "scaling")):
        assert layer.scaling[adapter] == 4.0


def test_a_pipeline_without_a_reader_has_the_denoisers_own(tmp_path, monkeypatch):
    denoiser, pipeline = load_denoiser(tiny.pipeline(), None, lora())
    moved(denoiser)
    monkeypatch.setattr(type(pipeline), "save_lora_weights", None)
    save_lora(pipeline, denoiser, tmp_path)
    other = tiny.pipeline()
    other.unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(output(other.unet), output(denoiser), rtol=0, atol=0)


@pytest.mark.parametrize("bring", ["add_adapter", "load_lora_weights", "PeftModel"])
def test_an_adapter_that_is_loaded_trains_alone(bring, tmp_path):
    around, own = tiny.pipeline(), {}
    if bring == "PeftModel":
        around.unet = moved(get_peft_model(around.unet, lora()))
    else:
        around.unet.add_adapter(lora(), adapter_name="mine")
        moved(around.unet)
    if bring == "load_lora_weights":
        save_lora(around, around.unet, tmp_path / "brought")
        around = tiny.pipeline()
        around.load_lora_weights(tmp_path / "brought", adapter_name="mine")
    before = output(around.unet)
    made = tiny.trainer(tmp_path / "run", pipeline=around, max_steps=1, learning_rate=1e-2)
    torch.testing.assert_close(output(made.model), before, rtol=0, atol=0)
    assert made.pipeline.unet is made.model and not hasattr(made.model, "base_model")
    own = parameters(made)
    assert training(made.model) and all("lora_" in name for name in training(made.model))
    made.train()
    changed = {name for name, weight in parameters(made).items() if not own[name].equal(weight)}
    assert changed and changed <= training(made.model)

    made.save_model(str(tmp_path / "final"))
    other = tiny.pipeline()
    other.load_lora_weights(
        tmp_path / "final" / "lora", weight_name="pytorch_lora_weights.safetensors"
    )
    torch.testing.assert_close(output(other.unet), output(made.model), rtol=0, atol=0)


def test_an_adapter_in_half_precision_trains_in_float32():
    around = tiny.pipeline(dtype=torch.bfloat16)
    around.unet.add_adapter(lora())
    around.unet.to(torch.bfloat16)
    denoiser, _ = load_denoiser(around, None)
    for name, weight in denoiser.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_a_new_adapter_stands_beside_the_loaded_one_which_still_acts(tmp_path):
    around = tiny.pipeline()
    around.unet.add_adapter(lora(), adapter_name="style")
    moved(around.unet)
    around.set_adapters("style", 0.5)
    styled = output(around.unet)
    with pytest.warns(
        UserWarning, match="adapter 'style' that is loaded into UNet2DCondition.* is"
    ):
        denoiser, _ = load_denoiser(around, None, lora(r=1))
    torch.testing.assert_close(output(denoiser), styled, rtol=1e-5, atol=1e-5)
    assert list(denoiser.peft_config) == ["default"]
    assert {"lora_A" in name or "lora_B" in name for name in training(denoiser)} == {True}
    # And it is the reference, which a loaded adapter of its own is not.
    made = tiny.trainer(tmp_path, pipeline=tiny.pipeline(), peft_config=lora(), beta=0.1)
    with made.policy.engine._adapters_off():
        torch.testing.assert_close(output(made.model), output(tiny.pipeline().unet))


def test_an_adapter_that_is_switched_off_or_fused_does_as_before_beside_a_new_one():
    plain = output(tiny.pipeline().unet)
    for prepare in ("disable_lora", "fuse_lora"):
        around = tiny.pipeline()
        around.unet.add_adapter(lora())
        moved(around.unet)
        getattr(around.unet, prepare)()
        before = output(around.unet)
        told = "is switched off and left out" if prepare == "disable_lora" else "is added to its"
        with pytest.warns(UserWarning, match=told):
            denoiser, _ = load_denoiser(around, None, lora())
        torch.testing.assert_close(output(denoiser), before, rtol=1e-5, atol=1e-5)
        assert torch.allclose(before, plain, atol=1e-5) == (prepare == "disable_lora")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda unet: unet.fuse_lora(), "fused into its weights, .* call unfuse_lora"),
        (lambda unet: unet.disable_lora(), "switched off: call enable_lora"),
        (
            lambda unet: (unet.add_adapter(lora(), "b"), unet.set_adapters(["a", "b"])),
            "has the adapter 'a' and 'b' loaded, and one alone can train: call fuse_lora",
        ),
        (lambda unet: unet.set_adapters("a", 0.5), "a weight other than 1, .* call set_adapters"),
    ],
)
def test_a_loaded_adapter_that_cannot_train_as_it_is_is_refused(prepare, message):
    around = tiny.pipeline()
    around.unet.add_adapter(lora(), adapter_name="a")
    prepare(around.unet)
    with pytest.raises(ValueError, match=message):
        load_denoiser(around, None)


def test_of_two_loaded_adapters_the_one_that_acts_trains(tmp_path):
    around = tiny.pipeline()
    around.unet.add_adapter(lora(use_rslora=True), adapter_name="a")
    around.unet.add_adapter(lora(), adapter_name="b")
    around.unet.set_adapter("a")
    denoiser, _ = load_denoiser(around, None)
    assert training(denoiser) and all(".a." in name for name in training(denoiser))
    save_lora(around, denoiser, tmp_path)
    assert load_file(tmp_path / "pytorch_lora_weights.safetensors")


def test_an_adapter_of_the_text_encoder_is_kept_in_its_weights(tmp_path):
    around = tiny.pipeline()
    torch.manual_seed(5)
    add_tiny_text_encoder(around)
    before = {name: w.clone() for name, w in around.text_encoder.state_dict().items()}
    around.text_encoder.add_adapter(lora(target_modules=["q_proj"]))
    moved(around.text_encoder)
    ids = torch.tensor([[0, 5, 6, 1]])
    with torch.no_grad():
        adapted = around.text_encoder(ids).last_hidden_state
    with pytest.warns(
        UserWarning, match="that is loaded into text_encoder is added to its weights"
    ):
        load_denoiser(around, None)
    with torch.no_grad():
        torch.testing.assert_close(around.text_encoder(ids).last_hidden_state, adapted)
    after = around.text_encoder.state_dict()
    assert after.keys() == before.keys() and not training(around.text_encoder)
    assert {n for n in after if not after[n].equal(before[n])} == {
        n for n in after if n.endswith("q_proj.weight")
    }
    around.text_encoder.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == after.keys()


def test_a_pipeline_without_a_denoiser_is_refused():
    around = tiny.pipeline()
    around.unet = None
    assert DENOISERS == ("unet", "transformer")
    with pytest.raises(ValueError, match="has neither a unet nor a transformer to train"):
        load_denoiser(around, None)
