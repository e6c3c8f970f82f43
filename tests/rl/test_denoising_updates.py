"""The update of diffusion policies: a gradient by hand, micro-batches of any cut, ratios before it."""

import pytest
import torch

from rl.step import mini_batches
from tests import tiny_denoising as tiny
from tests.tiny import lines, parameters, step_logs
from tests.tiny_denoising import difference, start

pytestmark = pytest.mark.slow  # whole runs

torch.set_num_threads(1)


@pytest.mark.parametrize("noise_weight", ["none", "std"])
def test_the_first_update_is_the_policy_gradient_by_hand(tmp_path, noise_weight):
    """Plain SGD, float64: the weights move by -lr times the gradient of

        - 1/2 sum over two prompts of  1/6 sum over samples of  A_n 1/3 sum over steps of  w_t logprob

    with A_n = (r_n - mean of the prompt) / std of the batch, and w_t 1 or the noise, of mean 1.
    """
    settings = {"max_steps": 1, "advantage_clip": None, "noise_weight": noise_weight}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    made, twin = (
        tiny.trainer(
            tmp_path / name,
            pipeline=tiny.pipeline(dtype=torch.float64),
            per_device_train_batch_size=3,
            **settings,
        )
        for name in ("made", "twin")
    )
    rollouts = tiny.collect(twin, version=0).rollouts
    reward = rollouts.reward_N.view(2, 6)
    std = reward.std(correction=0) + 1e-8
    advantage_N = ((reward - reward.mean(1, keepdim=True)) / std).flatten()
    noise_T = torch.stack([twin.policy.engine.replay(rollouts, step=t)[1][0] for t in range(3)])
    weight_T = noise_T / noise_T.mean() if noise_weight == "std" else torch.ones(3)
    logprob_NT = twin.policy.engine.logprobs(rollouts)[:, :3]
    loss = -(advantage_N[:, None] * weight_T.detach() * logprob_NT).sum() / (2 * 6 * 3)
    loss.backward()
    before = parameters(made)
    made.train()
    for name, weight in twin.model.named_parameters():
        expected = before[name] - 0.1 * weight.grad
        torch.testing.assert_close(made.model.state_dict()[name], expected, rtol=1e-8, atol=1e-10)
    assert difference(parameters(made), before) > 1e-3
    assert step_logs(tmp_path / "made")[0]["reward"] == pytest.approx(float(reward.mean()))


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [((1, 100), {}), ((3, 100), {"updates_per_step": 2, "num_iterations": 2, "max_steps": 1})],
    ids=["two steps", "four updates"],
)
def test_micro_batches_change_nothing_but_float_noise(tmp_path, sizes, settings):
    """Of 1, 3 (with leftovers) or all distinct latents; in float64 the weights agree to 1e-9."""
    one, other = (
        tiny.run(
            tmp_path / str(size),
            pipeline=tiny.pipeline(dtype=torch.float64),
            per_device_train_batch_size=size,
            learning_rate=1e-4,
            **settings,
        )
        for size in sizes
    )
    assert difference(parameters(one), start(torch.float64)) > 1e-4
    assert difference(parameters(one), parameters(other)) < 1e-9
    assert lines(one.args.output_dir) == lines(other.args.output_dir)


def test_float32_weights_differ_by_rounding_alone(tmp_path):
    """AdamW's first steps have the sign of the gradient, so weights whose gradient is rounding alone
    may differ by 2 lr a step: SGD it is."""
    common = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 1.0, "max_steps": 1}
    one, other = (
        tiny.run(tmp_path / str(size), per_device_train_batch_size=size, **common)
        for size in (1, 100)
    )
    assert difference(parameters(one), parameters(other)) < 1e-6
    assert difference(parameters(one), start()) > 1e-4


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_before_an_update_the_ratio_is_1_in_the_batches_of_generation(tmp_path, precision):
    tiny.run(tmp_path, per_device_train_batch_size=100, bf16=precision == "bf16", max_steps=1)
    for row in step_logs(tmp_path):
        assert row["mismatch"] == 0 and row["ratio/mean"] == 1 and row["kl_old"] == 0


def test_in_smaller_batches_the_mismatch_is_float_noise_and_is_logged(tmp_path):
    tiny.run(tmp_path, per_device_train_batch_size=1)
    for row in step_logs(tmp_path):
        assert 0 < row["mismatch"] < 1e-3  # nats, of summed log-probabilities of some 80
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-3)


def test_the_mismatch_is_measured_before_the_first_of_several_updates(tmp_path):
    tiny.run(tmp_path, updates_per_step=2, num_iterations=2, per_device_train_batch_size=100)
    for row in step_logs(tmp_path):
        assert row["mismatch"] < 1e-3 < abs(row["ratio/mean"] - 1)
        assert row["ledger/updates"] == 4


def test_siblings_train_in_one_update_and_no_update_is_empty(tmp_path):
    for updates, found in ((1, 1), (3, 3), (9, 4)):  # of four branches
        made = tiny.trainer(tmp_path / str(updates), updates_per_step=updates, num_iterations=2)
        batch = tiny.prepare(made, tiny.collect(made, version=0))
        parts = mini_batches(batch, made.objective)
        assert len(parts) == 2 * found and all(len(part) for part in parts)
        assert torch.equal(parts[0], parts[found])
        rows = torch.cat(parts[:found])
        assert sorted(rows.tolist()) == list(range(12))
        branches = [set(batch.rollouts.branch_N[part].tolist()) for part in parts[:found]]
        assert sum(map(len, branches)) == len(set.union(*branches)) == 4


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointed_activations_are_recomputed_and_give_the_same_update(name, tmp_path):
    runs, counts = [], []
    for settings in ({}, {name: True}):
        made = tiny.trainer(tmp_path / str(bool(settings)), max_steps=1, **settings)
        norm = made.model.down_blocks[0].resnets[0].norm1  # inside what is recomputed
        graphs = []
        norm.register_forward_hook(lambda *_, seen=graphs: seen.append(torch.is_grad_enabled()))
        made.train()
        runs.append(made)
        counts.append(sum(graphs))
    one, other = runs
    assert counts[1] == 2 * counts[0] > 0
    assert any(getattr(m, "gradient_checkpointing", False) for m in other.model.modules())
    assert difference(parameters(one), parameters(other)) < 1e-6


def test_settings_of_checkpointing_that_a_denoiser_does_not_take_are_refused(tmp_path):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"a": 1}}
    with pytest.raises(
        ValueError, match="activation_checkpointing_kwargs=.*is for language models"
    ):
        tiny.trainer(tmp_path, **settings)
