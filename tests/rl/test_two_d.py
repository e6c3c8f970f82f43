"""Diffusion in the plane, end to end: from 4 % of the samples near a point to 80 % of them."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rl.config.diffusion import DenoisingConfig
from rl.denoising_trainer import DenoisingTrainer
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.prompts import Prompt
from rollouts.step_plan import StepPlan
from tests import toy_diffusion as toy

pytestmark = pytest.mark.slow  # whole runs

EVERY_EDGE = tuple(range(20))
PLAIN = StepPlan(num_steps=20, rule="ddim", level=1.0, stochastic=EVERY_EDGE)
BRANCHED = StepPlan(
    num_steps=20,
    rule="ddim",
    level=1.0,
    stochastic=EVERY_EDGE,
    splits=((10, 5),),
    trained=EVERY_EDGE,
)


@pytest.fixture(autouse=True, scope="session")
def one_thread():  # two threads round differently, and are twenty times slower on busy cores
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pretrained_weights(one_thread):
    """4000 steps, about 8 s."""
    return toy.pretrained().unet.state_dict()


def engine_of(pipeline, batch_size=512):
    return DiffusersEngine(pipeline, encode=lambda prompts: {}, batch_size=batch_size)


def draw(engine, count, *, plan=PLAIN, seed=0):
    prompt = Prompt(key="p", prompt=toy.PROMPT, token_ids=(), columns={})
    seeds = torch.arange(count) + seed * 1_000_000
    return engine.generate([prompt], [count], seeds_N=seeds, params=plan)


def reward_of(engine, count, *, seed=99):
    """Share of fresh samples near the target."""
    image_NHWC = engine.decode(draw(engine, count, seed=seed))
    return float(toy.near_target(image_NHWC, [toy.PROMPT] * count, [{}] * count).mean())


# What goes in


def test_points_lie_around_eight_centres():
    x = toy.eight_gaussians(40_000, torch.Generator().manual_seed(0))[:, :, 0, 0].double()
    mode_N = (torch.atan2(x[:, 1], x[:, 0]) / (torch.pi / 4)).round().long() % 8
    centre = 2 * torch.stack([(mode_N * torch.pi / 4).cos(), (mode_N * torch.pi / 4).sin()], 1)
    # A count of 5000 has standard error 66, the std of 80,000 numbers 0.0004.
    assert (mode_N.bincount(minlength=8) - 5000).abs().max() < 5 * 66
    assert (x - centre).std() == pytest.approx(0.15, abs=5 * 0.0004)


def test_the_denoiser_has_as_many_weights_as_declared():
    # (2 + 32) 128 + 128, twice 128 128 + 128, 128 2 + 2
    unet = toy.point_pipeline().unet
    assert sum(weight.numel() for weight in unet.parameters()) == 4480 + 2 * 16512 + 258 == 37_762


def test_a_time_for_all_rows_is_that_time_for_each():
    unet = toy.point_pipeline().unet
    x = toy.eight_gaussians(3, torch.Generator().manual_seed(1))
    assert torch.equal(unet(x, torch.tensor(400)), unet(x, torch.tensor([400, 400, 400])))
    assert not torch.equal(unet(x, torch.tensor(400)), unet(x, torch.tensor(401)))


def test_images_by_hand():
    # 0 is the middle, 32767.5 of 65535, to even 32768 = 128 256; -8 and what lies beyond are 0.
    x = torch.tensor([[0.0, -8.0], [8.0, -99.0]])[:, :, None, None]
    byte = np.rint(toy.as_bytes(x) * 255)
    assert byte[..., 0].tolist() == [[[128, 0], [0, 0]], [[255, 255], [0, 0]]]
    back = toy.points_of(byte.astype(np.uint8))
    assert back[1].tolist() == [8, -8] and abs(back[0, 0]) < 1.3e-4


def test_images_say_where_their_points_are():
    engine = engine_of(toy.point_pipeline())
    rollouts = draw(engine, 50)
    x = rollouts.tree.latent_M[rollouts.node_NS[:, -1]].flatten(1).clamp(-8, 8).numpy()
    np.testing.assert_allclose(toy.points_of(engine.decode(rollouts)), x, atol=1.3e-4)


def test_the_reward_is_one_near_the_target_only():
    x = torch.tensor([[2.0, 0.0], [2.09, 0.0], [2.0, -0.11], [-2.0, 0.0], [1.93, 0.07]])
    image_NHWC = np.rint(toy.as_bytes(x[:, :, None, None]) * 255).astype(np.uint8)
    assert toy.near_target(image_NHWC, [""] * 5, [{}] * 5).tolist() == [1, 1, 0, 0, 1]


# The engine


def test_the_engine_runs_it_as_any_pipeline():
    engine = engine_of(toy.point_pipeline())
    rollouts = draw(engine, 20, plan=BRANCHED)
    # Four roots: 11 shared edges each, then 9 edges of five children.
    assert engine.evaluations == 4 * (11 + 5 * 9) == BRANCHED.evaluations(4)
    shared = rollouts.node_NS[:, 10].reshape(4, 5)
    assert (shared == shared[:, :1]).all() and len(rollouts.node_NS[:, 11].unique()) == 20
    assert rollouts.mask_NT.all()


def test_the_ratio_before_any_update_is_exactly_one():
    engine = engine_of(toy.point_pipeline(), batch_size=8)
    rollouts = draw(engine, 20, plan=BRANCHED)
    assert torch.equal(engine.logprobs(rollouts).detach(), rollouts.logprob_NT)


def test_a_gradient_reaches_every_weight():
    pipeline = toy.point_pipeline()
    engine = engine_of(pipeline)
    engine.logprobs(draw(engine, 10, plan=BRANCHED)).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in pipeline.unet.parameters())


# Learning


class StopWhenLearnt(TrainerCallback):
    """Ends the run at 85 % of a step's 450 samples; standard error .017."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs.get("reward", 0.0) >= 0.85:
            control.should_training_stop = True


def learn(folder, weights, seed, *, max_steps=80, reward=toy.near_target):
    """Train and return the trainer; 90 roots of five children from edge 10, two updates a step."""
    pipeline = toy.point_pipeline()
    pipeline.unet.load_state_dict(weights)
    config = DenoisingConfig(
        output_dir=str(folder),
        plan={
            "num_steps": 20,
            "rule": "ddim",
            "level": 1.0,
            "branch": {"at": [10], "children": 5},
            "last_edge": "trained",
        },
        prompts_per_step=1,
        rollouts_per_prompt=450,
        allocator="uniform",
        baseline="prompt",
        credit_scale="batch",
        epsilon=0.2,
        learning_rate=3e-4,
        updates_per_step=2,
        max_steps=max_steps,
        per_device_train_batch_size=512,
        generation_batch_size=512,
        guidance_scale=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=seed,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = DenoisingTrainer(
        pipeline,
        reward,
        config,
        [{"prompt": toy.PROMPT}],
        engine=engine_of(pipeline),
        callbacks=[StopWhenLearnt()],
    )
    trainer.train()
    return trainer


def to_the_right(image_NHWC, prompts, metadata):
    """A dense reward, which untrained samples differ in."""
    return (toy.points_of(image_NHWC)[:, 0] / toy.LIMIT + 1) / 2


def test_a_run_moves_every_weight_and_is_repeated_by_its_seed(tmp_path):
    before = toy.point_pipeline().unet.state_dict()
    settings = {"max_steps": 2, "reward": to_the_right}
    first, same, other = (
        learn(tmp_path / name, before, seed, **settings).model.state_dict()
        for name, seed in (("first", 0), ("same", 0), ("other", 1))
    )
    for name, weight in before.items():
        assert not torch.equal(first[name], weight), name
        assert torch.equal(first[name], same[name]), name
        assert not torch.equal(first[name], other[name]), name


@pytest.mark.slow
def test_pretrained_samples_are_near_the_target_as_often_as_declared(pretrained_weights):
    # Of 4000 samples, standard error .003.
    pipeline = toy.point_pipeline()
    pipeline.unet.load_state_dict(pretrained_weights)
    assert reward_of(engine_of(pipeline), 4000) == pytest.approx(0.04, abs=0.015)


@pytest.mark.slow
def test_two_of_three_seeds_learn_to_reach_the_target(pretrained_weights, tmp_path):
    # Measured: 24 of 24 seeds, stopped after 56 to 68 steps at .817 to .877 of fresh samples, in 16 to
    # 22 s of processor time each on a busy machine. If a seed failed once in 26, two of three would in
    # 0.4 % of platforms; on one platform the outcome is always the same.
    found = []
    for seed in range(3):
        if sum(reward >= 0.8 for reward in found) == 2:
            break  # the third cannot change the outcome
        trainer = learn(tmp_path / str(seed), pretrained_weights, seed)
        assert trainer.state.global_step <= 80
        # Of 1000 samples, standard error .011.
        found.append(reward_of(trainer.policy.engine, 1000))
    assert sum(reward >= 0.8 for reward in found) >= 2, found
