"""Methods made for language models serve diffusion models: prompts, budgets, rows, stopping."""

import pytest
import torch

from tests import tiny_denoising as tiny
from tests.tiny import lines, step_logs

pytestmark = pytest.mark.slow  # whole runs

torch.set_num_threads(1)

METHODS = {
    "vade": {"selector": "vade"},
    "mopps": {"selector": "mopps", "selection_candidates": 2},
    "gvm": {"allocator": "gvm", "rollouts_per_prompt": 9},
    "leave-one-out budgets": {"allocator": "leave_one_out", "rollouts_per_prompt": 9},
    "knapsack": {"allocator": "knapsack", "rollouts_per_prompt": 9},
    "d3s rows": {"down_sampling": "d3s", "row_fraction_initial": 0.5, "row_fraction_final": 0.5},
    "largest variance": {"down_sampling": "max_variance", "rows_per_prompt": 2},
    "early stop": {
        "stopping": "early_unbiased",
        "stopping_round_size": 3,
        "rollouts_per_prompt": 9,
        "sibling_within_share": 0.5,
    },
    "all together": {
        "selector": "vade",
        "allocator": "gvm",
        "down_sampling": "d3s",
        "rollouts_per_prompt": 9,
        "baseline": "leave_one_out",
        "posterior_decay_chosen": 0.8,
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_accounts_for_every_sample_and_learns(tmp_path, name):
    made = tiny.run(tmp_path, data=tiny.rows(4), max_steps=3, success_above=0.5, **METHODS[name])
    totals = made.ledger.totals
    assert totals["rollouts_drawn"] == totals["rollouts_trained"] + totals["rollouts_filtered"]
    assert totals["rollouts_trained"] > 0
    for step in lines(tmp_path):
        assert all(budget % 3 == 0 and budget > 0 for budget in step["budgets"])
        assert len(set(step["prompts"])) == 2
    logs = step_logs(tmp_path)
    assert len(logs) == 3 and all(row["mismatch"] < 1e-4 for row in logs if "mismatch" in row)
    assert not tiny.equal(tiny.start(), made.pipeline.unet.state_dict())
    drawn = totals["rollouts_drawn"] // 3
    assert made.evaluations == drawn * (2 + 3 * 2)  # (t0 + 1) + k (T - t0 - 1)
    if METHODS[name].get("down_sampling"):
        assert totals["rollouts_trained"] < totals["rollouts_drawn"]


def test_siblings_count_less_in_the_posterior(tmp_path):
    settings = {"max_steps": 1, "posterior_decay_chosen": 1.0, "success_above": 0.5}
    alone, alike = (
        tiny.run(tmp_path / str(share), sibling_within_share=share, **settings)
        for share in (1.0, 0.0)
    )
    for made, worth in ((alone, 1.0), (alike, 1 / 3)):
        a, b = made.planner.posterior.parameters()
        visited = (a + b) > 2
        assert visited.sum() == 2
        assert (a + b - 2)[visited] == pytest.approx(6 * worth)
