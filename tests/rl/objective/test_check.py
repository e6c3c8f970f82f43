"""Contract tests of advantages and losses: ours pass, and each way to be wrong is found out."""

import subprocess
import sys

import pytest
import torch

from rl import check_advantage, check_loss
from rl.config.methods import ADVANTAGES, LOSSES

pytestmark = pytest.mark.slow  # whole runs


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_of_ours_keeps_the_contract(name):
    settings = {"batch_whitened_tokens": {"beta": 0.1}}.get(name, {})
    function = ADVANTAGES[name].function
    if ADVANTAGES[name].binary or ADVANTAGES[name].reads_posterior:
        # Given successes, not the made-up rewards, and the parameters of each prompt.
        known = {"a_P": torch.ones(100), "b_P": torch.full((100,), 0.5)}
        known = known if ADVANTAGES[name].reads_posterior else {}
        check_advantage(
            lambda reward_N, prompt_N: function((reward_N > 0).to(reward_N), prompt_N, **known)
        )
    else:
        check_advantage(function, **settings)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"raft_pp", "hapo"}))
def test_every_loss_of_ours_keeps_the_contract(name):
    check_loss(LOSSES[name].function, **({"ratio_cap": 5.0} if name == "cispo" else {}))


def test_a_loss_of_accepted_rollouts_refuses_what_pushes_away():
    with pytest.raises(ValueError, match="no negative signal"):
        check_loss(LOSSES["raft_pp"].function)


def grouped(reward_N, prompt_N):
    return reward_N.reshape(-1, 4).sub(reward_N.reshape(-1, 4).mean(1, keepdim=True)).flatten()


def by_place(reward_N, prompt_N):
    return reward_N * torch.arange(len(reward_N))


def of_integers(reward_N, prompt_N):
    return (reward_N > 0.5).long()


def divided_by_the_std(reward_N, prompt_N):
    return (reward_N - reward_N.mean()) / reward_N.std()


def in_place(reward_N, prompt_N):
    reward_N -= 1
    return reward_N.clone()


def one_too_few(reward_N, prompt_N):
    return reward_N[1:]


def a_list(reward_N, prompt_N):
    return reward_N.tolist()


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (by_place, "by_place, groups of 4, 4 and 2 .*: depends on the order of rows; look rows up"),
        (of_integers, "gave torch.int64, not floats"),
        (divided_by_the_std, "divided_by_the_std, one rollout: is not finite"),
        (in_place, "changed its arguments"),
        (
            one_too_few,
            r"gave shape \(9,\) for 10 rollouts of 4 tokens, expected \(10,\) or \(10, 4\)",
        ),
        (a_list, "gave list, not a tensor"),
    ],
)
def test_an_advantage_that_breaks_the_contract_is_found_out(advantage, message):
    with pytest.raises(AssertionError, match=message):
        check_advantage(advantage)


def test_an_advantage_that_reshapes_to_groups_fails_on_ragged_ones():
    with pytest.raises(RuntimeError, match="shape"):
        check_advantage(grouped)


def surrogate(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator):
    ratio_NT = (logprob_NT - old_logprob_NT).exp()
    return -(weight_NT * ratio_NT * advantage_N[:, None]).sum() / denominator, {}


def test_a_plain_surrogate_is_a_loss():
    check_loss(surrogate)


def of_its_own_rows(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator):
    loss, sums = surrogate(
        logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator=denominator
    )
    return loss / len(logprob_NT), sums


def with_a_mean(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator):
    loss, _ = surrogate(logprob_NT, old_logprob_NT, advantage_N, weight_NT, denominator=denominator)
    return loss, {"ratio": (logprob_NT - old_logprob_NT).exp().detach().mean()}


def everywhere(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator):
    return -(logprob_NT * advantage_N[:, None]).sum() / denominator, {}


def detached(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator):
    loss, _ = surrogate(
        logprob_NT.detach(), old_logprob_NT, advantage_N, weight_NT, denominator=denominator
    )
    return loss.requires_grad_(), {}


def alone(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator):
    return -(weight_NT * logprob_NT * advantage_N[:, None]).sum() / denominator


def without_it(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator):
    return -(weight_NT * logprob_NT * advantage_N[:, None]).sum(), {}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (of_its_own_rows, "micro-batches do not add up: .* divide by denominator, and by nothing"),
        (with_a_mean, "statistic 'ratio' of micro-batches does not add up; give sums, no means"),
        (everywhere, "has a gradient where weight_NT is 0"),
        (detached, "has no gradient with respect to logprob_NT"),
        (alone, "must return the loss and a dict"),
        (without_it, "twice the denominator does not give half the loss"),
    ],
)
def test_a_loss_that_breaks_the_contract_is_found_out(loss, message):
    with pytest.raises(AssertionError, match=message):
        check_loss(loss)


def test_settings_and_columns_are_given_by_name():
    seen = {}

    def advantage(reward_N, prompt_N, length_N, scale):
        seen["advantage"] = (length_N.shape, scale)
        return scale * reward_N * length_N

    def loss(logprob_NT, old_logprob_NT, advantage_N, weight_NT, *, denominator, mask_NT, power):
        seen["loss"] = (mask_NT.dtype, power)
        return -(weight_NT * mask_NT * logprob_NT).sum() / denominator, {}

    check_advantage(advantage, scale=0.5)
    check_loss(loss, power=2)
    assert seen == {"advantage": (torch.Size([10]), 0.5), "loss": (torch.bool, 2)}


def test_the_contract_holds_without_assertions():
    code = (
        "from rl import check_advantage\ncheck_advantage(lambda reward_N, prompt_N: reward_N[1:])"
    )
    found = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "AssertionError: advantage <lambda>" in found.stderr
