"""A video model, from the noise to rewards of whole clips, pictures and files of full size."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from rl.denoising_trainer import DenoisingTrainer
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.rewards.image import brightness
from tests import tiny_denoising as tiny
from tests.more_pipelines import encoder, make
from tests.tiny import step_logs

torch.set_num_threads(1)

SETTINGS = {
    "guidance_scale": 3.0,
    "height": 64,
    "width": 64,
    "pipeline_kwargs": {"num_frames": 5},
}


@pytest.mark.slow
def test_a_video_model_trains_on_rewards_of_clips_and_of_their_middle_frames(tmp_path):
    around = make("WanPipeline")
    channels = around.transformer.config.in_channels
    around.vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    ).eval()
    seen = []

    def motion(video_NFHWC, prompts, metadata):
        seen.append(video_NFHWC)
        change = np.abs(np.diff(video_NFHWC.astype(float), axis=1)).mean(axis=(1, 2, 3, 4)) / 255
        return [None, *change[1:].tolist()]  # the first of them is left to the other reward

    plan = {"num_steps": 3, "rule": "flow_sde", "level": 0.7}
    settings = SETTINGS | {"plan": plan, "rollouts_per_prompt": 2, "images_every": 1}
    made = DenoisingTrainer(
        around,
        ["brightness", motion],
        tiny.config(tmp_path, max_steps=1, **settings),
        tiny.rows(2),
        engine=DiffusersEngine(around, encode=encoder("WanPipeline"), **SETTINGS),
    )
    made.train()
    (row,) = step_logs(tmp_path)
    (clips,) = seen
    assert clips.shape == (4, 5, 64, 64, 3)
    expected = brightness(clips[:, 2], [""] * 4, [{}] * 4).mean()
    assert row["rewards/brightness/mean"] == pytest.approx(expected)
    assert row["mismatch"] < 1e-3 and row["diversity"] > 0
    whole = sorted((tmp_path / "images" / "train-000001").iterdir())
    assert [path.name for path in whole] == [f"00{p}-0{i}.webp" for p in (0, 1) for i in (0, 1)]
    with Image.open(whole[0]) as clip:
        assert clip.n_frames == 5
