"""Functions of the user's own, by path: loaded and tested first, given what they name, remembered."""

import json
import warnings

import pytest

from rl.config.methods import method_of, own_method
from rl.config.own import is_own
from rl.run.origins import origins, own_functions
from tests import tiny

GOOD = {
    "advantage": "def f(reward_N, prompt_N, length_N):\n    return reward_N - 0.25 + 0 * length_N\n",
    "loss": (
        "def f(logprob_NT, old_logprob_NT, advantage, weight_NT, *, denominator, epsilon_high=0.2):\n"
        "    ratio_NT = (logprob_NT - old_logprob_NT).exp().clamp(max=1 + epsilon_high)\n"
        "    advantage = advantage if advantage.ndim == 2 else advantage[:, None]\n"
        "    return -(weight_NT * ratio_NT * advantage).sum() / denominator, {}\n"
    ),
    "selector": "from samplers.selection import UniformSelector\n"
    "def f(num_prompts, keys, seed):\n"
    "    return UniformSelector(num_prompts, seed=seed + 1, keys=keys)\n",
    "allocator": "from samplers.allocation import neyman\n"
    "def f(std_P, total, *, minimum, maximum):\n"
    "    return neyman(std_P**2, total, minimum=minimum, maximum=maximum)\n",
    "stopping": "def f(counts):\n    return counts.trials_P < 2\n",
    "down_sampling": "import numpy as np\n"
    "def f(reward_N, advantage_N, progress):\n"
    "    return np.flatnonzero(np.arange(len(reward_N)) % 2 == 0)\n",
    "token_selection": "def f(mask_NT, entropy_NT, fraction):\n    return mask_NT & (entropy_NT >= 0)\n",
}
MORE = {"stopping": {"stopping_round_size": 2}}


def written(tmp_path, text, name="own.py"):
    path = tmp_path / name
    path.write_text(text)
    return f"{path}:f"


@pytest.mark.slow
@pytest.mark.parametrize("stage", GOOD)
def test_a_run_with_a_function_of_ones_own_in_any_stage_trains_and_says_what_it_was_made_of(
    tmp_path, stage
):
    settings = {"trainer": "grpo", "allocator": "uniform", "max_steps": 1} | MORE.get(stage, {})
    settings[stage] = written(tmp_path, GOOD[stage])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = tiny.trainer(tmp_path / "run", **settings)
        made.train()
    assert made.state.global_step == 1
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    own = {**(told["origins"]["sampling_functions"] or {})}
    own |= told["origins"]["training_functions"] or {}
    assert {*own} == {stage} and f"f ({tmp_path}/own.py, " in own[stage]
    assert told["settings"][stage] == settings[stage]


BAD = {
    "advantage": ("def f(reward_N, prompt_N):\n    return reward_N[1:]", "gave shape"),
    "loss": (
        "def f(a, b, c, w, *, denominator):\n    return (a * w).mean(), {}",
        "micro-batches do not add up",
    ),
    "allocator": (
        "def f(std_P, total, *, minimum, maximum):\n    return [1] * len(std_P)",
        "gave .* which is not all",
    ),
    "stopping": ("def f(counts):\n    return counts.trials_P", "must give .* bool"),
    "selector": ("class f:\n    def __init__(self, keys):\n        pass", "must make a selector"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", BAD)
def test_a_function_that_breaks_its_contract_is_refused_before_a_rollout(tmp_path, stage):
    text, message = BAD[stage]

    def reward(**_):
        raise AssertionError("called")

    settings = {"trainer": "grpo", "allocator": "uniform"} | MORE.get(stage, {})
    settings[stage] = written(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path / "run", reward=reward, **settings)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.py:f", "no advantage file 'nowhere.py'"),
        ("OWN:g", "has no function 'g'.*'f'"),
        ("leave_on_out", "path/to/file.py:function, got.*Did you mean 'leave_one_out'"),
    ],
)
def test_what_is_not_there_is_said_with_the_nearest(tmp_path, value, message):
    value = value.replace("OWN", written(tmp_path, GOOD["advantage"]).removesuffix(":f"))
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, trainer="grpo", advantage=value)


def test_a_parameter_that_nothing_has_is_named_with_what_there_is(tmp_path):
    path = written(tmp_path, "def f(reward_N, prompt_N, lenght_N):\n    return reward_N")
    with pytest.raises(ValueError, match=r"wants 'lenght_N', .* Did you mean 'length_N'\?"):
        tiny.config(tmp_path, trainer="grpo", advantage=path)


def test_parameters_named_as_settings_have_their_values_and_others_their_defaults(tmp_path):
    def mine(reward_N, prompt_N, length_N, std_eps, slope=3.0):
        return reward_N

    made = own_method(tiny.config(tmp_path, trainer="grpo"), "advantage", mine)
    assert made.columns == {"length_N": "length_N"} and made.settings == {"std_eps": "std_eps"}
    assert made.name == "mine" and not is_own(made.name)


def test_another_text_of_the_file_is_another_run(tmp_path):
    path = written(tmp_path, GOOD["allocator"])
    config = tiny.config(tmp_path, trainer="grpo", allocator=path)
    first = described(config)
    assert first == described(config)
    written(tmp_path, GOOD["allocator"] + "# another\n")
    assert method_of(config, "allocator").name == path
    assert described(config) != first


def described(config):
    own = own_functions(config)
    return origins(tiny.model(), [], [], [], has_reference=False, own=own)["sampling_functions"]
