"""The trainer with vLLM in the engine's place: the same run as with the model itself."""

import pytest
import torch

from tests import tiny
from tests.vllm_stand_in import serving

pytestmark = pytest.mark.slow  # whole runs

RUN = {
    "reward": tiny.small_digit,
    "max_steps": 3,
    "trainer": "grpo",
    "stopping": "early_unbiased",
    "stopping_round_size": 2,
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
        ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size must be at least 1"),
        (
            {"vllm_tensor_parallel_size": 2, "vllm_mode": "server"},
            "is for vllm_mode: colocate; start the server with --tensor-parallel-size",
        ),
        (
            {"vllm_server_base_url": "http://a:1", "vllm_server_port": 2},
            "has host and port of its own: leave it out",
        ),
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


def test_the_mismatch_is_corrected_by_default_as_in_trl(tmp_path):
    def correction(**settings):
        made = tiny.config(tmp_path, **settings)
        return made.importance_correction

    assert correction(engine="vllm") == "sequence_mask"
    assert correction(engine="vllm", trainer="grpo", loss="vespo") == "token_truncate"
    assert correction(engine="vllm", importance_correction="none") == "none"
    assert correction() == "none"


def test_the_server_is_found_by_host_and_port_or_by_its_address(tmp_path):
    assert tiny.config(tmp_path).vllm_address == "http://localhost:8000"
    apart = {"vllm_server_host": "10.0.0.7", "vllm_server_port": 8001}
    assert tiny.config(tmp_path, **apart).vllm_address == "http://10.0.0.7:8001"
    whole = {"vllm_server_base_url": "https://a.b/c"}
    assert tiny.config(tmp_path, **whole).vllm_address == "https://a.b/c"


def test_tokens_without_a_log_probability_train_at_ratio_1_and_are_counted(server, tmp_path):
    url = {"engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url}
    one = RUN | {"max_steps": 1, "eval_strategy": "no", "stopping": "none"}
    plain = tiny.run(tmp_path / "plain", data=tiny.rows("ab"), **one, **url)

    def spoil(choice):
        table = choice["logprobs"]
        values = [float("nan"), *table["token_logprobs"][1:]]
        tops = [{name: x} for name, x in zip(table["tokens"], values, strict=True)]
        return choice | {"logprobs": table | {"token_logprobs": values, "top_logprobs": tops}}

    server.model.load_state_dict(tiny.model().state_dict())
    server.spoil = spoil
    spoilt = tiny.run(tmp_path / "nan", data=tiny.rows("ab"), **one, **url)
    log = tiny.step_logs(tmp_path / "nan")[0]
    assert log["importance/unknown_logprobs"] == 36  # the first token of every rollout
    assert "importance/unknown_logprobs" not in tiny.step_logs(tmp_path / "plain")[0]
    assert tiny.lines(tmp_path / "nan") == tiny.lines(tmp_path / "plain")
    for name, value in tiny.parameters(plain).items():
        torch.testing.assert_close(tiny.parameters(spoilt)[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_a_process_without_rows_generates_with_those_that_share_its_vllm(tmp_path, together):
    import numpy as np

    asked = []

    class Engine:
        generates_together = together

        def load_weights(self, model):
            asked.append("weights")

        def generate(self, prompts, budget_P, *, seeds_N, params, version):
            asked.append((list(prompts), budget_P.tolist(), len(seeds_N), params, version))

    policy = tiny.trainer(tmp_path, engine=Engine()).policy
    no_row = np.zeros(0, dtype=np.int64)
    settings = {"seeds_N": no_row, "params": "params", "version": 7}
    assert policy.generate(["a", "b"], np.array([0, 0]), **settings) is None
    assert asked == ["weights"] + [(["a", "b"], [0, 0], 0, "params", 7)] * together
