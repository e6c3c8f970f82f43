"""Hidden states of prompts as features."""

import numpy as np
import pytest
import torch

from rl.policies import prompt_features as of_policy
from rl.policies.prompt_features import hidden_features
from rl.stages.prompt_features import prompt_features
from rollouts.prompts import Prompt
from tests import tiny


def prompts(lengths):
    generator = np.random.default_rng(0)
    ids = [tuple(generator.integers(1, 10, length).tolist()) for length in lengths]
    return [Prompt(key=str(i), prompt="", token_ids=t, columns={}) for i, t in enumerate(ids)]


def test_they_are_the_mean_and_the_last_of_what_the_head_sees():
    model, data = tiny.model(), prompts([3, 1, 5])
    found = hidden_features(model, data, pad_id=0)
    for row, prompt in enumerate(data):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt.token_ids])).last_hidden_state[0]
        expected = torch.cat([states.mean(dim=0), states[-1]])
        np.testing.assert_allclose(found[row], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_batches_padding_and_the_mode_of_the_model_do_not_matter(monkeypatch):
    model, data = tiny.model(), prompts([3, 1, 5, 2, 4])
    whole = hidden_features(model, data, pad_id=0)
    monkeypatch.setattr(of_policy, "ROWS", 2)
    model.train()
    np.testing.assert_allclose(hidden_features(model, data, pad_id=7), whole, rtol=1e-4, atol=1e-5)
    assert model.training
    assert hidden_features(model, [], pad_id=0).shape == (0, 0)


@pytest.mark.parametrize("num", [2, 7])
def test_ranks_share_the_prompts_and_all_have_all_of_them(num):
    data = prompts([3, 1, 5, 2, 4])
    model = tiny.model()

    class Policy:
        def prompt_features(self, some):
            return hidden_features(model, some, pad_id=0)

    class Rank:
        def __init__(self, rank):
            self.rank, self.num = rank, num

        def until_gather(self):
            return torch.no_grad()  # a context that does nothing to the matter

        def gather(self, mine):
            others = [Policy().prompt_features(data[rank::num]) for rank in range(num)]
            np.testing.assert_array_equal(others[self.rank], mine)
            return others

    found = [prompt_features(Policy(), Rank(rank), data) for rank in range(num)]
    for each in found:
        np.testing.assert_array_equal(each, found[0])
    np.testing.assert_allclose(found[0], hidden_features(model, data, pad_id=0), atol=1e-5)
