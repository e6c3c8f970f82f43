"""What a diffusion run leaves: pipelines that load again, averages, checkpoints that go on exactly."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from recipes.images.digits import ABSENT
from tests import tiny_denoising as tiny
from tests.tiny import lines, parameters, step_logs
from tests.tiny_denoising import difference, equal, start
from tests.tiny_pipelines import embeddings, image_prompts

pytestmark = pytest.mark.slow  # whole runs

torch.set_num_threads(1)

LORA = dict(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])


def lora():
    return LoraConfig(**LORA)


# Adapters, averages, saving


def images_of(pipeline):
    """Of the three prompts, without noise, as numbers."""
    torch.manual_seed(0)
    latents = torch.randn(3, 1, 8, 8)
    return pipeline(
        **embeddings("sd")(image_prompts(3)),
        latents=latents,
        num_inference_steps=4,
        output_type="latent",
        **tiny.ENGINE,
    ).images


def loaded(folder):
    return StableDiffusionPipeline.from_pretrained(
        folder, **ABSENT, use_safetensors=True, local_files_only=True
    )


def test_a_saved_pipeline_is_loaded_as_any_other(tmp_path):
    made = tiny.run(tmp_path, max_steps=1)
    made.save_model(str(tmp_path / "final"))
    again = loaded(tmp_path / "final")
    assert equal(dict(again.unet.state_dict()), parameters(made))
    torch.testing.assert_close(images_of(again), images_of(made.pipeline), rtol=0, atol=0)


def test_lora_trains_the_adapter_alone_and_saves_a_pipeline_that_has_it(tmp_path):
    settings = {"peft_config": lora(), "learning_rate": 3e-2, "ema_decay": 0.5, "max_steps": 3}
    made = tiny.run(tmp_path, **settings)
    before, after = start(), parameters(made)
    base = {name.replace(".base_layer", ""): w for name, w in after.items() if "lora" not in name}
    assert equal(base, before)
    assert any(w.abs().max() > 1e-3 for name, w in after.items() if "lora_B" in name)

    made.save_model(str(tmp_path / "final"))
    assert equal(parameters(made), after)
    again = loaded(tmp_path / "final")
    assert again.unet.state_dict().keys() == before.keys()
    with made.averaged():
        averaged = images_of(made.pipeline)
    # The adapter is added to the weights, so the sums are in another order.
    torch.testing.assert_close(images_of(again), averaged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(averaged, images_of(made.pipeline), atol=1e-3)
    assert not torch.allclose(averaged, images_of(tiny.pipeline()), atol=1e-3)
    # And by itself, for the pipeline it was trained on.
    other = tiny.pipeline()
    other.load_lora_weights(
        tmp_path / "final" / "lora", weight_name="pytorch_lora_weights.safetensors"
    )
    torch.testing.assert_close(images_of(other), averaged, rtol=1e-5, atol=1e-5)


def average_of(decay, history):
    """diffusers' schedule: the k-th average has decay min(decay, (1 + k) / (10 + k)), k from 0 the
    first takes the weights as they are."""
    average = None
    for k, weights in enumerate(history):
        share = 0.0 if k == 0 else min(decay, (1 + k) / (10 + k))
        average = (
            {name: value.clone() for name, value in weights.items()}
            if average is None
            else {n: share * average[n] + (1 - share) * weights[n] for n in weights}
        )
    return average


def test_the_average_is_what_is_validated_and_saved_not_what_trains(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(parameters(made))

    made = tiny.trainer(
        tmp_path, ema_decay=0.9, max_steps=3, callbacks=[Look()], eval_dataset=tiny.rows()
    )
    made.train()
    expected = average_of(0.9, seen)
    training = parameters(made)
    with made.averaged():
        assert difference(parameters(made), expected) < 1e-6
        average = parameters(made)
    assert equal(parameters(made), training) and difference(average, training) > 1e-4
    made.save_model(str(tmp_path / "final"))
    assert equal(dict(loaded(tmp_path / "final").unet.state_dict()), average)
    assert equal(parameters(made), training)

    found = made.evaluate()
    assert equal(parameters(made), training)
    plain = tiny.trainer(tmp_path / "plain", eval_dataset=tiny.rows())
    plain.model.load_state_dict(average)
    assert plain.evaluate()["eval_reward"] == found["eval_reward"]
    plain.model.load_state_dict(training)
    assert plain.evaluate()["eval_reward"] != found["eval_reward"]


def test_weights_come_back_when_validation_breaks(tmp_path):
    made = tiny.run(tmp_path, ema_decay=0.9, max_steps=3)
    before = parameters(made)
    with pytest.raises(ZeroDivisionError), made.averaged():
        1 / 0  # noqa: B018
    assert equal(parameters(made), before)


# Checkpoints


class StopAt3(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "history", "ema_decay": 0.9, "branch_threshold": 0.2},
        {"peft": True, "beta": 0.1, "allocator": "neyman", "updates_per_step": 2},
    ],
    ids=["history", "lora"],
)
def test_resuming_gives_the_run_that_was_never_stopped(tmp_path, settings):
    settings = dict(settings)
    adapter = settings.pop("peft", False)
    common = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    common |= {"lr_scheduler_type": "cosine"} | settings

    def run(name, **more):
        peft_config = {"peft_config": lora()} if adapter else {}
        return tiny.run(tmp_path / name, **peft_config, **(common | more))

    whole = run("whole")
    run("cut", callbacks=[StopAt3()])  # saved at step 2
    resumed = run("cut", resume=True)
    assert equal(parameters(resumed), parameters(whole))
    assert not equal(parameters(resumed), start())
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert resumed.evaluations == whole.evaluations == 5 * 32
    history = resumed.objective.state_dict()["history"]
    assert history == whole.objective.state_dict()["history"]
    assert (history is None) == adapter
    if not adapter:
        one, other = resumed._average, whole._average
        assert one.optimization_step == other.optimization_step == 5
        pairs = zip(one.shadow_params, other.shadow_params, strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    logs = [step_logs(tmp_path / name) for name in ("cut", "whole")]
    names = [n for n in logs[1][-1] if "seconds" not in n and n != "step_time"]
    assert [[r[n] for n in names] for r in logs[0]] == [[r[n] for n in names] for r in logs[1]]


def test_other_settings_of_the_chain_are_not_resumed(tmp_path):
    tiny.run(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    with pytest.raises(
        ValueError, match="plan was .* so its run cannot be continued|continued exactly"
    ):
        tiny.run(tmp_path, resume=True, plan=tiny.CHAIN, max_steps=3)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"ema_decay": 0.9}, r"ema_decay was 0.0, is 0.9"),
        ({"ema_decay": 0.9}, {"ema_decay": 0.0}, r"ema_decay was 0.9, is 0.0"),
        ({}, {"branch_threshold": 0.2}, r"branch_threshold was None, is 0.2"),
        ({}, {"peft_config": LORA}, r"use_peft was False, is True;"),
        ({"peft_config": LORA}, {"peft_config": None}, r"use_peft was True, is False;"),
        ({"peft_config": LORA}, {"peft_config": LORA | {"r": 3}}, r"lora_r was 2, is 3;"),
        (
            {"peft_config": LORA},
            {"peft_config": LORA | {"lora_alpha": 8}},
            "lora_alpha was 4, is 8;",
        ),
        (
            {"peft_config": LORA},
            {"peft_config": LORA | {"target_modules": ["to_q"]}},
            r"lora_target_modules was \['to_q', 'to_v'\], is \['to_q'\];",
        ),
    ],
    ids=["ema", "no-ema", "threshold", "lora", "no-lora", "rank", "alpha", "modules"],
)
def test_other_settings_of_weights_are_not_resumed(tmp_path, before, after, message):
    def run(**settings):
        given = settings.pop("peft_config", None)
        return tiny.run(
            tmp_path,
            peft_config=given and LoraConfig(**given),
            save_strategy="steps",
            save_steps=1,
            **settings,
        )

    run(max_steps=1, **before)
    with pytest.raises(ValueError, match=f"with other settings, .*: {message}"):
        run(max_steps=2, resume=True, **(before | after))
    assert run(max_steps=2, resume=True, **before).state.global_step == 2


def test_the_best_weights_are_loaded_at_the_end(tmp_path):
    """Everything breaks after the first step, so its checkpoint is the best."""
    made = tiny.trainer(
        tmp_path,
        eval_dataset=tiny.rows(1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        greater_is_better=False,  # so the first, as brightness improves
        max_steps=2,
        learning_rate=3e-3,
    )
    kept = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept[state.global_step] = parameters(made)

    made.add_callback(Look())
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert equal(parameters(made), kept[1]) and not equal(kept[1], kept[2])
