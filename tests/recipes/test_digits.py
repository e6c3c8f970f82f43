"""The digits: pretraining, its cache, embeddings, decoding, and the classifier as a reward."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from recipes.images import digits
from recipes.images.digits import (
    PROMPTS,
    Digits,
    build_pipeline,
    build_scheduler,
    build_unet,
    decode,
    digit_correct,
    digit_probability,
    encode,
    images,
    load,
    pretrain,
    train,
)
from rollouts.prompts import Prompt
from rollouts.rewards.contract import RewardError
from rollouts.rewards.image import load_image_reward, score_images

QUICK = Digits(steps=2, batch_size=8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():  # two threads round differently, and are slower on busy cores
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("digits") / "run", QUICK, quiet=True)


def sample(pipeline, prompts, *, steps=3, seed=0):
    return pipeline(
        **encode(prompts),
        num_inference_steps=steps,
        eta=1.0,
        guidance_scale=1,
        height=digits.SIZE_ARGUMENT,
        width=digits.SIZE_ARGUMENT,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images


# What goes in


@pytest.mark.slow
def test_images_are_the_bundled_ones_scaled_to_minus_one_and_one():
    image_D, digit_D = images()
    assert image_D.shape == (1797, 1, 8, 8) and image_D.dtype == torch.float32
    # x/8 - 1 of levels 0 and 16; the first image, a 0, begins 0 0 5 13.
    assert (image_D.min(), image_D.max()) == (-1, 1)
    assert image_D[0, 0, 0, :4].tolist() == [-1, -1, 5 / 8 - 1, 13 / 8 - 1]
    assert digit_D[:5].tolist() == [0, 1, 2, 3, 4]


def test_embeddings_have_norm_4_and_are_orthogonal():
    embedding = encode(PROMPTS)["prompt_embeds"]
    assert embedding.shape == (10, 1, 16) and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[:, 0] @ embedding[:, 0].T, 16 * torch.eye(10))


def test_embeddings_follow_the_prompts_in_their_order_as_text_or_as_prompt():
    three = Prompt(key="k", prompt="the digit 3", token_ids=(), columns={})
    rows = encode([three, "the digit 0", "the digit 3"])["prompt_embeds"]
    everything = encode(PROMPTS)["prompt_embeds"]
    assert torch.equal(rows, everything[[3, 0, 3]])
    assert encode([])["prompt_embeds"].shape == (0, 1, 16)


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match="no digit prompt 'a three': write one of"):
        encode(["a three"])


def test_decoding_by_hand():
    # (x + 1) / 2 * 255: -1 -> 0, 1 -> 255, 0 -> 127.5 -> 128 (to even), 0.2 -> 153; 3 is cut.
    latent = torch.tensor([-1.0, 1.0, 0.0, 0.2, 3.0, -9.0]).reshape(1, 1, 2, 3)
    image = decode(latent)
    assert image.shape == (1, 2, 3, 1) and image.dtype == np.uint8
    assert image[0, :, :, 0].tolist() == [[0, 255, 128], [153, 255, 0]]


def test_decoding_keeps_rows_and_channels_apart():
    latent = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    image = decode(latent)
    for n, c, h, w in np.ndindex(2, 3, 4, 5):
        assert image[n, h, w, c] == round((latent[n, c, h, w].item() + 1) / 2 * 255)


def test_decoding_inverts_the_scaling_of_the_data():
    image_D, _ = images()
    # Level g of 16 becomes 255 g / 16, rounded.
    level = (image_D[:50].double() + 1) * 8
    np.testing.assert_array_equal(
        decode(image_D[:50])[..., 0], np.rint(level[:, 0].numpy() * 255 / 16)
    )


def test_a_latent_that_is_not_finite_is_refused():
    latent = torch.zeros(3, 1, 8, 8)
    latent[1, 0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match=r"rows \[1\] are not finite"):
        decode(latent)
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\), got \(8, 8\)"):
        decode(torch.zeros(8, 8))


# Model and pipeline


def test_the_denoiser_is_the_one_declared():
    unet = build_unet(seed=0)
    assert sum(p.numel() for p in unet.parameters()) == 248_401
    assert {name: unet.config[name] for name in ("sample_size", "block_out_channels")} == {
        "sample_size": 8,
        "block_out_channels": (16, 32),
    }


def test_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = build_unet(seed=1), build_unet(seed=1), build_unet(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)


def test_the_last_step_draws_noise():
    scheduler = build_scheduler()
    scheduler.set_timesteps(10)
    last = scheduler.timesteps[-1]
    zeros = torch.zeros(1, 1, 8, 8)
    noise = torch.ones(1, 1, 8, 8)
    step = scheduler.step(zeros, last, zeros, eta=1.0, variance_noise=noise).prev_sample
    assert step.abs().min() > 0.005
    assert scheduler.config.clip_sample is False  # a cut makes the step's mean not smooth
    assert isinstance(scheduler, DDIMScheduler) and scheduler.config.beta_schedule == "linear"
    assert (scheduler.betas[0].item(), scheduler.betas[-1].item()) == pytest.approx((1e-4, 0.02))


def test_the_unmodified_pipeline_samples_in_prompt_order():
    pipeline = build_pipeline(build_unet(seed=0))
    assert type(pipeline) is StableDiffusionPipeline
    latent = sample(pipeline, ["the digit 1", "the digit 2"])
    assert latent.shape == (2, 1, 8, 8) and torch.isfinite(latent).all()
    assert torch.equal(latent, sample(pipeline, ["the digit 1", "the digit 2"]))
    swapped = sample(pipeline, ["the digit 2", "the digit 1"])
    assert not torch.equal(latent[0], swapped[0])  # the same noise, another prompt


# Pretraining and its cache


@pytest.mark.slow
def test_training_follows_its_definition():
    # Two steps written out with a plain loop over the rows.
    settings = Digits(seed=3, steps=2, batch_size=4)
    image_D, digit_D = images()
    beta = torch.linspace(1e-4, 0.02, 1000)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    unet, generator = build_unet(seed=3).train(), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 + np.cos(np.pi * step / 2)) / 2
        row = torch.randint(1797, (4,), generator=generator)
        noise = torch.randn((4, 1, 8, 8), generator=generator)
        when = torch.randint(1000, (4,), generator=generator)
        replaced = torch.rand(4, generator=generator) < 0.4
        other = torch.randint(10, (4,), generator=generator)
        noised, prompts = [], []
        for i in range(4):
            share = alpha_bar[when[i]]
            noised.append(share**0.5 * image_D[row[i]] + (1 - share) ** 0.5 * noise[i])
            digit = other[i] if replaced[i] else digit_D[row[i]]
            prompts.append(f"the digit {digit}")
        output = unet(torch.stack(noised), when, encode(prompts)["prompt_embeds"]).sample
        loss = (output - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, expected in zip(train(settings).parameters(), unet.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_captions_are_replaced_only_when_asked_for():
    truthful = train(Digits(steps=1, batch_size=8, replaced_captions=0.0))
    mixed = train(Digits(steps=1, batch_size=8, replaced_captions=1.0))
    pairs = zip(truthful.parameters(), mixed.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_the_folder_is_an_ordinary_diffusers_folder(folder):
    pipeline = load(folder)
    assert type(pipeline) is StableDiffusionPipeline and pipeline.vae is None
    trained = train(QUICK)
    for name, value in trained.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], value)
    assert dict(pipeline.scheduler.config)["set_alpha_to_one"] is False
    assert pipeline.scheduler.config.clip_sample is False
    assert torch.equal(sample(pipeline, PROMPTS), sample(build_pipeline(trained), PROMPTS))
    assert not list(folder.rglob("*.bin"))
    assert json.loads((folder / digits.SETTINGS_FILE).read_text())["steps"] == 2


def test_a_second_call_trains_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(digits, "train", None)
    assert pretrain(folder, QUICK) == folder
    assert "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_other_settings_and_damage_make_it_anew(tmp_path, capsys):
    place = pretrain(tmp_path / "run", Digits(steps=1, batch_size=2), quiet=True)
    first = load(place).unet.state_dict()
    pretrain(place, Digits(steps=1, batch_size=2, seed=1))
    assert "seed was 0, now 1" in capsys.readouterr().err
    second = load(place).unet.state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    (place / "unet" / "config.json").write_text("{}")
    pretrain(place, Digits(steps=1, batch_size=2, seed=1))
    assert "it is damaged" in capsys.readouterr().err
    third = load(place).unet.state_dict()
    assert all(torch.equal(third[name], second[name]) for name in second)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no staging folder left


def test_a_failed_training_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "train", fails)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "run", QUICK, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="is not empty and has no digits.json"):
        pretrain(tmp_path, QUICK, quiet=True)
    assert (tmp_path / "thesis.txt").read_text() == "important"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", -1, "batch_size must be at least 1, got -1"),
        ("learning_rate", float("nan"), "learning_rate must be positive, got nan"),
        ("replaced_captions", 1.5, r"replaced_captions must lie in \[0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tmp_path / "run", Digits(**{name: value}), quiet=True)


# The reward


def real_images(rows):
    image_D, digit_D = images()
    return decode(image_D[rows]), [PROMPTS[digit] for digit in digit_D[rows]]


def test_real_digits_are_rewarded_and_wrong_prompts_are_not():
    image_NHWC, prompts = real_images(slice(1300, 1797))
    reward_N, details = digit_correct(image_NHWC, prompts, [{}] * 497)
    assert reward_N.dtype == np.float64 and set(reward_N) == {0.0, 1.0}
    # The classifier was not fitted to these; it reads .93 of them.
    assert reward_N.mean() == pytest.approx(0.93, abs=0.01)
    wrong = [PROMPTS[(PROMPTS.index(prompt) + 1) % 10] for prompt in prompts]
    assert digit_correct(image_NHWC, wrong, [{}] * 497)[0].mean() < 0.03
    assert [PROMPTS[d] == p for d, p in zip(details["digit"], prompts, strict=True)] == [
        bool(reward) for reward in reward_N
    ]


def test_the_probability_is_the_softmax_of_the_classifier():
    image_NHWC, prompts = real_images(slice(1300, 1310))
    model = digits.classifier()
    for row in range(10):
        logit = model.coef_ @ (image_NHWC[row].ravel() / 127.5 - 1) + model.intercept_
        expected = np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum()
        for prompt in (prompts[row], "the digit 0"):
            alone = digit_probability(image_NHWC[row : row + 1], [prompt], [{}])
            assert alone[0] == pytest.approx(expected[PROMPTS.index(prompt)], abs=1e-12)
    _, details = digit_correct(image_NHWC, prompts, [{}] * 10)
    np.testing.assert_array_equal(
        details["probability"], digit_probability(image_NHWC, prompts, [{}] * 10)
    )


def test_rewards_follow_their_rows():
    image_NHWC, prompts = real_images(slice(1300, 1340))
    order = np.random.default_rng(0).permutation(40)
    before = digit_probability(image_NHWC, prompts, [{}] * 40)
    after = digit_probability(image_NHWC[order], [prompts[i] for i in order], [{}] * 40)
    np.testing.assert_allclose(after, before[order], atol=1e-14, rtol=0)
    assert len(digit_correct(image_NHWC[:0], [], [])[0]) == 0


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match=r"digits are \(N, 8, 8, 1\) uint8, got \(1, 8, 8, 3\)"):
        digit_correct(np.zeros((1, 8, 8, 3), np.uint8), PROMPTS[:1], [{}])
    with pytest.raises(ValueError, match="got 2 images for 1 prompts"):
        digit_probability(np.zeros((2, 8, 8, 1), np.uint8), PROMPTS[:1], [{}])
    with pytest.raises(RewardError, match="prompt 'the digit x', reward function digit_correct"):
        score_images(
            [digit_correct], np.zeros((2, 8, 8, 1), np.uint8), ["the digit 1", "the digit x"]
        )


def test_a_setting_can_name_the_classifier_by_its_file():
    reward = load_image_reward(f"{digits.__file__}:digit_correct")
    image_NHWC, prompts = real_images(slice(0, 5))
    assert reward(image_NHWC, prompts, [{}] * 5)[0].tolist() == [1.0] * 5


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert encode(["the digit 1"])  # needs nothing
    with pytest.raises(ImportError, match=r"need scikit-learn: pip install 'apportion\[recipes\]'"):
        images()


@pytest.mark.slow
def test_the_pretrained_model_has_something_to_learn(tmp_path):
    # 640 samples, standard error .02. Measured: .497 for this seed, .483 and .445 for the next
    # two, so the bounds are more than 4 standard errors away.
    pipeline = load(pretrain(tmp_path / "run", quiet=True))
    prompts = list(PROMPTS) * 64
    image_NHWC = decode(sample(pipeline, prompts, steps=10))
    reward_N, _ = digit_correct(image_NHWC, prompts, [{}] * 640)
    assert 0.38 < reward_N.mean() < 0.6
    assert reward_N.reshape(64, 10).mean(axis=0).min() > 0.2
