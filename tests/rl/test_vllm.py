"""The trainer with vLLM in the engine's place: the same run as with the model itself."""

import pytest
import torch

from tests import tiny
from tests.vllm_stand_in import serving

RUN = {
    "reward": tiny.small_digit,
    "max_steps": 3,
    "trainer": "grpo",
    "stopping": "early_unbiased",
    "stopping_wave": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


def run(folder, **settings):
    return tiny.run(folder, data=tiny.rows("ab"), eval_dataset=tiny.rows("c"), **(RUN | settings))


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serving(tiny.model(), tiny.tokenizer(), tmp_path, monkeypatch) as made:
        yield made


def test_a_run_on_a_server_is_the_run_without_it(server, tmp_path):
    url = {"engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url}
    ours, theirs = run(tmp_path / "vllm", **url), run(tmp_path / "own")
    assert tiny.lines(tmp_path / "vllm") == tiny.lines(tmp_path / "own")
    start = tiny.model().state_dict()
    for name, value in tiny.parameters(theirs).items():
        torch.testing.assert_close(tiny.parameters(ours)[name], value, rtol=0, atol=1e-5)
    assert any(
        (value - start[name]).abs().max() > 1e-3 for name, value in tiny.parameters(ours).items()
    )
    # Weights go over once for each collection and each validation, however many rounds these have.
    assert server.paths().count("/update_weights") == 3 + 1
    assert server.paths().count("/reset_prefix_cache") == 3 + 1
    rounds = sum(row["rounds"] for row in tiny.step_logs(tmp_path / "vllm"))
    assert rounds > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"engine": "vlm"},
            "engine must be one of transformers, vllm, got 'vlm'. Did you mean 'vllm'",
        ),
        ({"vllm_mode": "near"}, "vllm_mode must be one of colocate, server"),
        ({"vllm_gpu_memory_utilization": 0}, "above 0 and at most 1, got 0"),
        ({"vllm_server_timeout": -1}, "vllm_server_timeout must be at least 0"),
        ({"vllm_max_model_length": 1}, "vllm_max_model_length must be at least 2"),
        ({"engine": "vllm", "adaptive_temperature_tau": 0.1}, "needs engine: transformers"),
        ({"engine": "vllm", "top_p": 0.9}, "come after .*'top_p': 0.9.*old_logprobs: trainer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)


def test_filters_are_taken_where_the_trainer_computes_its_own(tmp_path):
    settings = {"engine": "vllm", "top_p": 0.9, "old_logprobs": "trainer"}
    assert tiny.config(tmp_path, **settings).engine == "vllm"


def test_without_vllm_it_says_what_to_install(tmp_path):
    with pytest.raises(ImportError, match=r"apportion\[vllm\]"):
        tiny.trainer(tmp_path, engine="vllm")
