"""A user's own advantage, loss, selector and allocator, given to the trainer."""

import json

import numpy as np
import pytest
import torch

from rl.objective.advantages import leave_one_out
from rl.objective.losses import clipped_surrogate
from samplers import allocation
from samplers.selection import ThompsonSelector, UniformSelector
from tests import tiny, tiny_denoising

COMMON = {"trainer": "grpo", "reward": tiny.small_digit, "allocator": "uniform", "max_steps": 2}


def own(folder, settings, **functions):
    """The weights and decisions of a run, with functions of one's own beside the settings."""
    settings = COMMON | settings
    reward = settings.pop("reward")
    made = tiny.RolloutTrainer(
        tiny.model(),
        reward,
        tiny.config(folder, **settings),
        tiny.rows(),
        processing_class=tiny.tokenizer(),
        **functions,
    )
    made.train()
    return tiny.parameters(made), tiny.lines(folder)


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def centred_by_a_stranger(reward_N, prompt_N):
    return leave_one_out(reward_N, prompt_N)


def clipped_by_a_stranger(
    logprob_NT, old_NT, credit, weight_NT, *, denominator, epsilon, epsilon_high
):
    return clipped_surrogate(
        *(logprob_NT, old_NT, credit, weight_NT),
        denominator=denominator,
        epsilon_low=epsilon,
        epsilon_high=epsilon_high,
    )


def neyman_by_a_stranger(std_P, total, *, minimum=1, maximum=None):
    return allocation.neyman(std_P, total, minimum=minimum, maximum=maximum)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "functions"),
    [
        ({"advantage": "leave_one_out"}, {"advantage": centred_by_a_stranger}),
        ({"loss": "grpo", "updates_per_step": 2}, {"loss": clipped_by_a_stranger}),
        ({"allocator": "neyman"}, {"allocate": neyman_by_a_stranger}),
        (
            {"selector": "vade", "posterior_prior": "flat", "uniform_share": 0.0},
            {"selector": lambda posterior, keys: ThompsonSelector(posterior, keys=keys)},
        ),
    ],
    ids=["advantage", "loss", "allocate", "selector"],
)
def test_an_own_function_that_does_the_same_gives_the_same_run_bit_for_bit(
    tmp_path, settings, functions
):
    named = own(tmp_path / "named", settings)
    replaced = {"advantage": {"advantage": "grpo"}, "selector": {"selector": "uniform"}}
    without = settings | next((replaced[name] for name in functions if name in replaced), {})
    assert_same(own(tmp_path / "own", without, **functions), named)


@pytest.mark.slow
def test_a_selector_may_be_made_already(tmp_path):
    keys = [prompt.key for prompt in tiny.trainer(tmp_path / "keys").prompts]
    selector = UniformSelector(len(keys), seed=3, keys=keys)
    assert_same(own(tmp_path / "own", {}, selector=selector), own(tmp_path / "named", {}))


@pytest.mark.slow
def test_an_own_advantage_is_given_the_columns_it_names_and_may_differ_between_tokens(tmp_path):
    seen = {}

    def by_place(reward_N, prompt_N, *, mask_NT, length_N):
        seen["rows"] = len(length_N)
        value_N = leave_one_out(reward_N, prompt_N)
        return value_N[:, None] * mask_NT / torch.arange(1, mask_NT.shape[1] + 1)

    weights, _ = own(tmp_path / "own", {"max_steps": 1}, advantage=by_place)
    assert seen["rows"] == 36
    about = json.loads((tmp_path / "own" / "run.json").read_text())
    assert about["origins"]["training_functions"]["advantage"].startswith(f"by_place ({__file__}, ")
    plain, _ = own(tmp_path / "plain", {"max_steps": 1}, advantage=centred_by_a_stranger)
    assert any(not torch.equal(weights[name], plain[name]) for name in plain)


def short(reward_N, prompt_N):
    return reward_N[:3]


def undefined(reward_N, prompt_N):
    return reward_N / 0


def loss_of_rows(logprob_NT, old_NT, credit, weight_NT, *, denominator):
    return logprob_NT.sum(1) / denominator, {}


def bare_loss(logprob_NT, old_NT, credit, weight_NT, *, denominator):
    return logprob_NT.sum() / denominator


def of_reference(logprob_NT, old_NT, credit, weight_NT, *, denominator, reference_logprob_NT):
    return (weight_NT * (logprob_NT - reference_logprob_NT)).sum() / denominator, {}


class Selects:
    def select(self, num_prompts, *, generator, exclude=()):
        return np.arange(num_prompts)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"advantage": short}, r"advantage short, groups .*gave shape \(3,\) for 10 rollouts"),
        ({"advantage": undefined}, "advantage undefined, groups .*is not finite"),
        (
            {"loss": loss_of_rows},
            "loss loss_of_rows in float64: the loss must be a scalar of floats",
        ),
        ({"loss": bare_loss}, "loss bare_loss in float64: must return the loss and a dict"),
        ({"loss": of_reference}, "loss of_reference reads reference_logprob_NT.*write beta"),
        ({"selector": Selects()}, "selector=Selects must be a Selector .* has no state_dict, load"),
        ({"planner": print, "allocate": short}, "planner makes its own selector and allocator"),
    ],
)
def test_what_an_own_function_gets_wrong_names_it(tmp_path, functions, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        own(tmp_path, {}, **functions)


@pytest.mark.slow
def test_a_diffusion_model_takes_own_functions_too(tmp_path):
    """One that does what baseline `siblings` without a scale does gives the same run."""

    def siblings(reward_N, prompt_N):
        return leave_one_out(reward_N, torch.arange(len(reward_N)) // 3)  # three leaves a root

    settings = {"prompts_per_step": 2, "credit_scale": "none"}

    def run(name, **more):
        around = tiny_denoising.pipeline()
        functions = {n: more.pop(n) for n in ("advantage",) if n in more}
        config = tiny_denoising.config(tmp_path / name, **settings, **more)
        made = tiny_denoising.DenoisingTrainer(
            around,
            "brightness",
            config,
            tiny_denoising.rows(),
            engine=tiny_denoising.engine(around),
            **functions,
        )
        made.train()
        return tiny.parameters(made)

    named, ours = run("named", baseline="siblings"), run("ours", advantage=siblings)
    assert tiny_denoising.equal(named, ours)
    assert not tiny_denoising.equal(ours, tiny_denoising.start())
