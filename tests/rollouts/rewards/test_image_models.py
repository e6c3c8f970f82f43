"""Rewards with weights, on tiny random CLIPs built here: nothing is downloaded."""

import collections
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from rollouts.rewards import image_models as model_rewards
from rollouts.rewards.contract import RewardError
from rollouts.rewards.image import load_image_reward, score_images
from rollouts.rewards.image_models import (
    MODEL_REWARDS,
    Aesthetic,
    ClipScore,
    HumanPreference,
    ImageRewardScore,
    PickScore,
    build_head,
    read_weights,
)

PROMPTS = ["a red ball", "a blue cube on a red ball", "", "cube", "a ball a cube"]
WORDS = ("<end>", "<start>", "a", "red", "blue", "ball", "cube", "on")
METADATA = [{}] * 5


def tiny_clip(seed=0):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": 8, "max_position_embeddings": 9, "eos_token_id": 0, "bos_token_id": 1}
    config = CLIPConfig(
        text_config=sizes | text | {"num_attention_heads": 2, "pad_token_id": 0},
        vision_config=sizes | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        projection_dim=12,
        initializer_factor=5.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config)


def tiny_processor():
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )
    side = {"height": 16, "width": 16}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side), tokenizer)


@pytest.fixture(scope="module")
def clip():
    return tiny_clip().eval()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def images(number=5, size=16, channels=3):
    shape = (number, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def by_row(clip, processor, image_NHWC, prompts):
    """Cosines from the definition: every row alone, unpadded, its features taken separately."""
    cosines = []
    for image, prompt in zip(image_NHWC, prompts, strict=True):
        inputs = processor(images=Image.fromarray(image), text=prompt, return_tensors="pt")
        with torch.no_grad():
            vision = clip.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
            text = clip.text_model(input_ids=inputs["input_ids"]).pooler_output
            a, b = clip.visual_projection(vision)[0], clip.text_projection(text)[0]
        cosines.append((a @ b / (a.norm() * b.norm())).item())
    return np.array(cosines)


# CLIP score and PickScore


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_clip_score_is_the_cosine_whatever_the_batch(clip, processor, batch_size):
    reward = ClipScore(clip, processor, batch_size=batch_size)
    reward_N = reward(images(), PROMPTS, METADATA)
    assert reward_N.dtype == np.float64
    expected = by_row(clip, processor, images(), PROMPTS)
    np.testing.assert_allclose(reward_N, expected, atol=1e-6, rtol=0)
    assert np.ptp(expected) > 0.05  # they differ by far more than the tolerance


def test_pick_score_is_the_scaled_cosine(clip, processor):
    scaled = PickScore(clip, processor)(images(), PROMPTS, METADATA)
    expected = by_row(clip, processor, images(), PROMPTS) * np.exp(clip.logit_scale.item())
    np.testing.assert_allclose(scaled, expected, atol=2e-5, rtol=0)


def test_scores_follow_their_rows(clip, processor):
    reward, order = ClipScore(clip, processor), [3, 0, 4, 1, 2]
    before = reward(images(), PROMPTS, METADATA)
    after = reward(images()[order], [PROMPTS[i] for i in order], METADATA)
    np.testing.assert_allclose(after, before[order], atol=1e-6, rtol=0)


def test_a_long_prompt_is_cut(clip, processor):
    reward = ClipScore(clip, processor)
    # Nine positions: start, seven words, end.
    long, short = "a red ball on a blue cube on a red ball", "a red ball on a blue cube"
    rewards = reward(np.concatenate([images(1)] * 2), [long, short], [{}] * 2)
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)


def test_grey_images_are_shown_as_rgb_and_no_images_give_nothing(clip, processor):
    reward = ClipScore(clip, processor)
    grey = images(channels=1)
    np.testing.assert_array_equal(
        reward(grey, PROMPTS, METADATA), reward(np.repeat(grey, 3, axis=3), PROMPTS, METADATA)
    )
    assert reward(images(0), [], []).shape == (0,)


def test_a_model_in_training_is_put_to_evaluation_and_gets_no_gradient(processor):
    model = tiny_clip().train()
    ClipScore(model, processor)(images(1), ["a"], [{}])
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_clip_score_is_loaded_from_a_folder(tmp_path, clip, processor):
    clip.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    expected = ClipScore(clip, processor)(images(), PROMPTS, METADATA)
    loaded = ClipScore.load(str(tmp_path / "model"), processor=str(tmp_path / "processor"))
    np.testing.assert_array_equal(loaded(images(), PROMPTS, METADATA), expected)
    scaled = PickScore.load(str(tmp_path / "model"), processor=str(tmp_path / "processor"))
    assert isinstance(scaled, PickScore)


def test_a_folder_of_pickled_weights_is_refused(tmp_path, clip, processor):
    clip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(clip.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        ClipScore.load(str(tmp_path))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda reward: reward(images(), ["a"], [{}]), "got 5 images for 1 prompts"),
        (lambda reward: reward(images() / 255, PROMPTS, METADATA), "array of uint8"),
        (lambda reward: type(reward)(reward.model, None, batch_size=0), "at least 1, got 0"),
    ],
)
def test_misuse_is_refused(clip, processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(ClipScore(clip, processor))


def test_a_score_that_is_no_number_stops_the_run(processor):
    broken = tiny_clip()
    with torch.no_grad():
        broken.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="ClipScore gave nan for row 0"):
        ClipScore(broken, processor)(images(), PROMPTS, METADATA)
    with pytest.raises(RewardError, match="prompt 'a red ball', reward function clip_score"):
        score_images([ClipScore(broken, processor)], images(), PROMPTS)


# Aesthetic


def test_aesthetic_is_the_head_of_the_normalised_embedding(clip, processor):
    head = build_head(12).eval()
    weight = torch.eye(12)
    bias = torch.zeros(12)
    for layer in head:  # the layers as one affine map, since nothing stands between them
        if isinstance(layer, torch.nn.Linear):
            weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    expected = []
    for image in images():
        pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            embedding = clip.visual_projection(clip.vision_model(pixels).pooler_output)[0]
        expected.append((weight @ (embedding / embedding.norm()) + bias).item())
    head.train()  # its dropout must not act
    for batch_size in (2, 32):
        reward = Aesthetic(clip, processor, head, batch_size=batch_size)
        reward_N = reward(images(), PROMPTS, METADATA)
        np.testing.assert_allclose(reward_N, expected, atol=1e-6, rtol=0)
    assert reward_N.dtype == np.float64
    np.testing.assert_array_equal(reward_N, reward(images(), ["x"] * 5, METADATA))


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_the_head_is_read_under_the_names_of_its_repository(tmp_path, clip, processor, name):
    clip.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    head = build_head(12)
    state = {f"layers.{key}": value for key, value in head.state_dict().items()}
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    loaded = Aesthetic.load(tmp_path / name, name=str(tmp_path / "clip"))
    expected = Aesthetic(clip, processor, head)(images(), PROMPTS, METADATA)
    np.testing.assert_array_equal(loaded(images(), PROMPTS, METADATA), expected)


def test_the_published_head_has_the_published_layers():
    shapes = {key: tuple(value.shape) for key, value in build_head(768).state_dict().items()}
    assert shapes["0.weight"] == (1024, 768) and shapes["2.weight"] == (128, 1024)
    assert shapes["4.weight"] == (64, 128) and shapes["6.weight"] == (16, 64)
    assert shapes["7.weight"] == (1, 16) and len(shapes) == 10


# ImageReward and HPSv2: the libraries are not here, so what stands for them has their interface.


class PictureMean:
    """The mean red level plus the length of the prompt."""

    def score(self, prompt, picture):
        return float(np.asarray(picture)[..., 0].mean() + len(prompt))


def test_image_reward_pairs_each_prompt_with_its_image():
    expected = [image[..., 0].mean() + len(p) for image, p in zip(images(), PROMPTS, strict=True)]
    reward_N = ImageRewardScore(PictureMean())(images(), PROMPTS, METADATA)
    assert reward_N.dtype == np.float64
    np.testing.assert_allclose(reward_N, expected, rtol=1e-15)


def test_image_reward_is_loaded_without_unpickling(tmp_path, monkeypatch):
    torch.save({"code": Bomb()}, tmp_path / "model.pt")

    def load(name, device):
        return torch.load(tmp_path / "model.pt", map_location=device, weights_only=False)

    monkeypatch.setitem(sys.modules, "ImageReward", types.SimpleNamespace(load=load))
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with pytest.raises(pickle.UnpicklingError):
        ImageRewardScore.load()
    assert not Bomb.exploded
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in model_rewards.os.environ


class TwoTowers(torch.nn.Module):
    def encode_image(self, pixels):
        return pixels.flatten(1)[:, :4]

    def encode_text(self, tokens):
        return tokens.float()


def test_human_preference_is_the_cosine():
    def preprocess(picture):
        return torch.from_numpy(np.asarray(picture).astype(np.float32))

    def tokenize(texts):
        return torch.tensor([[len(text), 1, 2, 3] for text in texts])

    expected = []
    for image, prompt in zip(images(), PROMPTS, strict=True):
        a, b = image.ravel()[:4].astype(float), np.array([len(prompt), 1, 2, 3.0])
        expected.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for batch_size in (2, 32):
        reward = HumanPreference(TwoTowers(), preprocess, tokenize, batch_size=batch_size)
        reward_N = reward(images(), PROMPTS, METADATA)
        np.testing.assert_allclose(reward_N, expected, atol=1e-12)
    assert reward_N.dtype == np.float64
    with pytest.raises(ValueError, match=r"needs square images, got \(16, 8\)"):
        reward(images()[:, :, :8], PROMPTS, METADATA)


# Reading weights, and what is missing


class Bomb:
    """Unpickling it sets `exploded`."""

    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


def test_weights_are_read_from_both_formats(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(collections.OrderedDict(state), tmp_path / "a.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.pt")
    for name in ("a.safetensors", "a.pth", "b.pt"):
        read = read_weights(tmp_path / name)
        assert list(read) == ["a"] and torch.equal(read["a"], state["a"])


def test_weights_with_code_in_them_are_refused(tmp_path):
    torch.save({"a": Bomb()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt' cannot be read as tensors alone"):
        read_weights(tmp_path / "bad.pt")
    assert not Bomb.exploded
    with pytest.raises(ValueError, match=r"no file of weights .*none.pt'"):
        read_weights(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            ImageRewardScore.load,
            "ImageRewardScore needs the library ImageReward: pip install image-",
        ),
        (
            lambda: HumanPreference.load("weights.pt"),
            "HumanPreference needs the library open_clip: pip install open-clip-torch",
        ),
    ],
)
def test_a_missing_library_says_what_to_install(monkeypatch, load, message):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=message):
        load()


def test_settings_name_the_rewards_that_need_no_file(monkeypatch):
    assert sorted(MODEL_REWARDS) == ["clip_score", "image_reward", "pick_score"]
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ImportError, match="pip install image-reward"):
        load_image_reward("image_reward", more=MODEL_REWARDS)
    with pytest.raises(ValueError, match=r"no image reward 'clipscore' \(nearest: 'clip_score'\)"):
        load_image_reward("clipscore", more=MODEL_REWARDS)
