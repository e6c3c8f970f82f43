"""Pictures of samples: which pixel is where, and how unlike samples of one prompt are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rl.run.pictures import diversity, save_grid, thinned
from rl.stages.records import Scored

pytestmark = pytest.mark.slow  # whole runs


def flat(value, *, size=(32, 32), channels=3):
    return np.full((*size, channels), value, dtype=np.uint8)


def scored(images, prompt_N, reward_N):
    return Scored(
        rollouts=SimpleNamespace(
            prompt_N=torch.tensor(prompt_N, dtype=torch.int64),
            reward_N=torch.tensor(reward_N, dtype=torch.float64),
        ),
        shown_N=images,
        reward_by_function={},
        failed=None,
        failures=[],
    )


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_grid_by_hand(tmp_path):
    """Two prompts, three images of 32 x 32: tiles are 38 high and 34 wide, the line 33 pixels down."""
    images = [flat(10), flat(20), flat(30)]
    path = tmp_path / "images" / "grid.png"
    save_grid(path, ["a cat", "a dog"], scored(images, [1, 0, 1], [0.0, 1.0, 0.5]))
    found = picture(path)
    assert found.shape == (2 * 38, 2 * 34, 3)
    assert (found[:32, :32] == 20).all()  # prompt 0 has one image,
    assert (found[:32, 34:] == 96).all()  # and nothing beside it
    assert (found[38:70, :32] == 10).all() and (found[38:70, 34:66] == 30).all()
    assert (found[33:36, :32] == 255).all()  # the highest reward,
    assert (found[71:74, :32] == 0).all()  # the lowest, and one between: round(.5 * 255)
    assert (found[71:74, 34:66] == 128).all()
    assert (found[32] == 96).all() and (found[36:38] == 96).all() and (found[:, 32:34] == 96).all()
    assert path.with_suffix(".txt").read_text() == "a cat\na dog\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["grid.png", "grid.txt"]


@pytest.mark.parametrize(("side", "factor"), [(8, 4), (20, 2), (32, 1), (31, 2), (64, 1)])
def test_small_images_are_enlarged_by_whole_factors(tmp_path, side, factor):
    image = np.arange(side * side, dtype=np.int64).reshape(side, side, 1) % 251
    save_grid(tmp_path / "g.png", ["p"], scored([image.astype(np.uint8)], [0], [1.0]))
    found = picture(tmp_path / "g.png")
    assert found.shape == (side * factor + 6, side * factor + 2, 3)
    inside = found[: side * factor, : side * factor]
    assert (inside[::factor, ::factor] == image).all()  # grey in all three channels
    assert (inside[factor - 1 :: factor, factor - 1 :: factor] == image).all()


def test_images_that_are_not_square_keep_their_sides(tmp_path):
    save_grid(tmp_path / "g.png", ["p"], scored([flat(7, size=(16, 40))], [0], [1.0]))
    found = picture(tmp_path / "g.png")
    assert found.shape == (32 + 6, 80 + 2, 3) and (found[:32, :80] == 7).all()


def test_equal_rewards_have_a_black_line(tmp_path):
    save_grid(tmp_path / "g.png", ["p"], scored([flat(7), flat(8)], [0, 0], [0.3, 0.3]))
    assert (picture(tmp_path / "g.png")[33:36, :32] == 0).all()


def test_only_the_first_images_of_a_prompt_are_shown(tmp_path):
    images = [flat(n) for n in range(5)]
    save_grid(tmp_path / "g.png", ["p"], scored(images, [0] * 5, [1.0] * 5), most=3)
    found = picture(tmp_path / "g.png")
    assert found.shape[1] == 3 * 34 and (found[:32, 68:100] == 2).all()


def test_a_picture_is_replaced_whole(tmp_path):
    for value in (1, 2):
        save_grid(tmp_path / "g.png", ["p"], scored([flat(value)], [0], [1.0]))
    assert picture(tmp_path / "g.png")[0, 0].tolist() == [2, 2, 2]


def test_without_samples_there_is_no_picture(tmp_path):
    save_grid(tmp_path / "g.png", ["p"], scored([], [], []))
    assert not list(tmp_path.iterdir())


def test_diversity_by_hand():
    """Prompt 0: black and white differ by 1, black and black by 0: mean of the three pairs 2/3.

    Prompt 1: 0 and 51, so .2 everywhere. Prompt 2 has one sample and is left out.
    """
    images = np.stack([flat(0), flat(255), flat(0), flat(0), flat(51), flat(9)])
    assert diversity(images[[0, 1, 2]], np.zeros(3, int)) == pytest.approx(2 / 3)
    assert diversity(images, np.array([0, 0, 0, 1, 1, 2])) == pytest.approx((2 / 3 + 0.2) / 2)
    order = np.array([5, 3, 0, 4, 2, 1])
    shuffled = diversity(images[order], np.array([0, 0, 0, 1, 1, 2])[order])
    assert shuffled == pytest.approx((2 / 3 + 0.2) / 2)


def test_diversity_of_like_or_single_samples_is_0():
    assert diversity(np.stack([flat(5), flat(5)]), np.array([0, 0])) == 0
    assert diversity(np.stack([flat(5), flat(9)]), np.array([0, 1])) == 0


# Large samples and videos


def test_large_images_are_thumbnails_beside_files_of_full_size(tmp_path):
    """512 x 1024 become 128 x 256, tiles of 134 x 258; the whole ones lie in the folder of the name."""
    ramp = np.broadcast_to(np.arange(1024) // 4, (512, 1024))[..., None].astype(np.uint8)
    images = [flat(40, size=(512, 1024)), ramp, flat(90, size=(512, 1024))]
    path = tmp_path / "grid.png"
    save_grid(path, ["a", "b"], scored(images, [0, 1, 1], [0.0, 1.0, 0.5]))
    found = picture(path)
    assert found.shape == (2 * 134, 2 * 258, 3)
    assert (found[:128, :256] == 40).all() and (found[134:262, 258:514] == 90).all()
    shown = found[134:262, :256, 0].astype(int)
    assert np.abs(shown - np.arange(256)).max() <= 2  # every fourth column, about
    whole = tmp_path / "grid"
    assert sorted(p.name for p in whole.iterdir()) == ["000-00.jpg", "001-00.jpg", "001-01.jpg"]
    assert np.abs(picture(whole / "001-00.jpg").astype(int) - ramp[..., 0]).max() <= 8
    # A picture that is made again has no files of the one before.
    save_grid(path, ["a"], scored([flat(1, size=(300, 300))], [0], [1.0]))
    assert [p.name for p in whole.iterdir()] == ["000-00.jpg"]
    save_grid(path, ["a"], scored([flat(1)], [0], [1.0]))
    assert not whole.exists()


@pytest.mark.parametrize(("prompts", "each"), [(16, 16), (500, 4), (1, 1)])
def test_a_picture_of_any_run_can_be_opened(tmp_path, monkeypatch, prompts, each):
    monkeypatch.setattr("rl.run.pictures.FILES", 3)
    images = [np.zeros((300, 300, 3), np.uint8)] * (prompts * each)
    prompt_N = np.arange(prompts).repeat(each).tolist()
    save_grid(tmp_path / "g.png", ["p"] * prompts, scored(images, prompt_N, [0.0] * len(images)))
    with Image.open(tmp_path / "g.png") as image:
        assert image.size[0] * image.size[1] < 1.1 * 8_000_000 + 9 * image.size[1] * each
    assert len(list((tmp_path / "g").iterdir())) == min(3, len(images))
    assert len((tmp_path / "g.txt").read_text().splitlines()) == prompts


def test_long_thin_images_keep_a_pixel(tmp_path):
    save_grid(tmp_path / "g.png", ["p"], scored([flat(7, size=(1, 4000))], [0], [1.0]))
    assert picture(tmp_path / "g.png").shape == (1 + 6, 256 + 2, 3)
    save_grid(tmp_path / "h.png", ["p"], scored([flat(7, size=(2, 100))], [0], [1.0]))
    assert picture(tmp_path / "h.png").shape == (4 + 6, 200 + 2, 3)


def test_of_a_video_the_middle_frame_is_shown_and_the_whole_is_beside_it(tmp_path):
    video = np.stack([flat(value) for value in (10, 20, 200)])
    save_grid(tmp_path / "g.png", ["p"], scored([video], [0], [1.0]))
    assert (picture(tmp_path / "g.png")[:32, :32] == 20).all()
    with Image.open(tmp_path / "g" / "000-00.webp") as whole:
        assert whole.n_frames == 3 and whole.size == (32, 32)


def test_samples_are_thinned_before_they_are_compared():
    image = np.arange(256 * 128, dtype=np.int64).reshape(256, 128, 1) % 251
    assert (thinned([image, image]) == image[::4, ::4]).all()
    assert thinned([np.stack([image] * 3)]).shape == (1, 3, 64, 32, 1)
    assert thinned([flat(1)]).shape == (1, 32, 32, 3)
