"""The benchmark of branching measures what it says it measures."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import diffusion
from benchmarks.diffusion import (
    ARMS,
    MODELS,
    SIZES,
    build_engine,
    difference,
    main,
    mismatch,
    plan_of,
    roll_out,
    run_arm,
    speeds,
    table,
)

pytestmark = pytest.mark.slow  # whole runs

SMALL = replace(
    SIZES["quick"],
    side=8,
    unet_widths=(16, 16),
    transformer_layers=1,
    transformer_heads=1,
    text_width=16,
    steps=4,
    images=6,
    children=3,
    batch_size=4,
    rounds=1,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def engine_and_name(request):
    return build_engine(request.param, SMALL, device="cpu", dtype=torch.float32), request.param


def test_arms_evaluate_what_their_formulas_say(engine_and_name):
    engine, name = engine_and_name
    # T = 4, t0 = 2, k = 3: 3 * 4 = 12, 2 + 3 * 2 = 8, 3 + 3 * 1 = 6 for three images.
    spent = {arm: run_arm(arm, engine, name, SMALL, seed=0)[1] for arm in ARMS}
    assert spent == {"linear": 12 / 3, "state copy": 8 / 3, "action": 6 / 3}


def test_rows_of_speed_say_what_was_promised(engine_and_name):
    engine, name = engine_and_name
    rows = {row["arm"]: row for row in speeds(engine, name, SMALL)}
    assert [rows[arm]["promised"] for arm in ARMS] == [1, 12 / 8, 12 / 6]
    assert rows["linear"]["speed_median"] == 1
    for row in rows.values():
        assert 0 < row["images_per_second_median"] <= row["images_per_second_best"]


def test_models_predict_something_and_branches_part_at_the_split(engine_and_name):
    engine, name = engine_and_name
    rollouts = roll_out(engine, plan_of(name, SMALL, branch=True), SMALL, seed=0)
    sample_N = rollouts.tree.latent_M[rollouts.node_NS[:, -1]]
    assert torch.isfinite(sample_N).all()
    assert [len(rollouts.node_NS[:, step].unique()) for step in range(5)] == [2, 2, 2, 6, 6]


def test_the_mismatch_is_zero_in_the_rollouts_own_batches_and_small_in_others(engine_and_name):
    engine, name = engine_and_name
    rows = {row["replayed"]: row for row in mismatch(engine, name, SMALL)}
    assert rows["all rows"]["nats"] == rows["all rows, gradients on"]["nats"] == 0
    for row in rows.values():
        assert row["nats"] < 0.01
        assert row["ratio_error"] == pytest.approx(row["nats"], rel=0.01)
        assert row["nats_per_element"] == row["nats"] / (4 * 8 * 8)


def test_a_changed_weight_is_seen():
    engine = build_engine("unet", SMALL, device="cpu", dtype=torch.float32)
    rollouts = roll_out(engine, plan_of("unet", SMALL, branch=True), SMALL, seed=0)
    with torch.no_grad():
        engine.denoiser.conv_out.bias.add_(0.1)
    shift = difference(engine, rollouts, gradient=False)
    # The largest by the definition, all edges at once.
    with torch.no_grad():
        expected_NT = (engine.logprobs(rollouts) - rollouts.logprob_NT).abs()
    assert shift == expected_NT[:, :3].max() > 0.1


def test_a_log_probability_that_is_not_finite_is_no_match():
    engine = build_engine("sd3", SMALL, device="cpu", dtype=torch.float32)
    rollouts = roll_out(engine, plan_of("sd3", SMALL, branch=True), SMALL, seed=0)
    with torch.no_grad():
        engine.denoiser.proj_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="edge 0 are not finite"):
        difference(engine, rollouts, gradient=False)


def test_a_table_by_hand():
    rows = [{"arm": "linear", "speed": 1.0}, {"arm": "x", "speed": 12.34567}]
    assert table(rows) == "arm     speed\nlinear  1\nx       12.35"


def test_the_report_names_the_hardware(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(diffusion.SIZES, "quick", SMALL)
    output = tmp_path / "results" / "report.json"
    main(["--quick", "--output", str(output)])
    report = json.loads(output.read_text())
    assert "logical CPUs" in report["hardware"] and report["hardware"] in capsys.readouterr().out
    assert report["dtype"] == "float32" and report["size"]["steps"] == 4
    assert [(row["model"], row["arm"]) for row in report["speed"]] == [
        (model, arm) for model in MODELS for arm in ARMS
    ]
