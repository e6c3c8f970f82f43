"""Whole runs whose posterior has a prior that learns: they resume exactly and log what it expects."""

import numpy as np
import pytest

from tests import tiny, tiny_denoising

pytestmark = pytest.mark.slow  # whole runs

ROWS = [
    row | {"letter": row["prompt"][0], "place": [float(ord(row["prompt"][0])), i / 9]}
    for i, row in enumerate(tiny.rows("ab"))
]
PRIORS = {
    "pooled": {},
    "column": {"posterior_prior_column": ["letter"]},
    "features": {},
    "features of a column": {"posterior_prior_column": ["place"]},
}


@pytest.mark.parametrize("prior", PRIORS)
def test_a_killed_run_goes_on_as_one_never_killed(tmp_path, prior):
    given, prior = PRIORS[prior], prior.split()[0]
    settings = (
        dict(
            data=ROWS,
            trainer="grpo",
            selector="vade",
            allocator="neyman",
            logging_steps=1,
            posterior_prior=prior,
            uniform_share=0.2,
            save_strategy="steps",
            save_steps=2,
            reward=tiny.small_digit,
        )
        | given
    )
    whole = tiny.run(tmp_path / "whole", max_steps=4, **settings)
    tiny.run(tmp_path / "killed", max_steps=2, **settings)
    again = tiny.run(tmp_path / "killed", max_steps=4, resume=True, **settings)
    np.testing.assert_equal(again.planner.state_dict(), whole.planner.state_dict())
    assert tiny.lines(tmp_path / "killed") == tiny.lines(tmp_path / "whole")
    logged = tiny.step_logs(tmp_path / "whole")[-1]
    assert 0 < logged["planner/prior_mean"] < 1
    assert 2 <= logged["planner/prior_kappa"] <= 50
    assert 0 <= logged["planner/prior_calibration_error"] <= 1
    with pytest.raises(ValueError, match=f"posterior_prior was '{prior}', is 'flat'"):
        tiny.run(
            tmp_path / "killed",
            max_steps=6,
            resume=True,
            **(settings | {"posterior_prior": "flat"}),
        )


def test_a_diffusion_model_needs_a_column_of_embeddings(tmp_path):
    with pytest.raises(
        ValueError, match="needs posterior_prior_column here, a column of embeddings"
    ):
        tiny_denoising.run(tmp_path, selector="vade", posterior_prior="features", max_steps=1)
