"""Replay in whole runs: what trains, what is counted, resume, micro-batches, several losses."""

import pytest
import torch

from tests import tiny

RUN = {
    "reward": tiny.small_digit,
    "trainer": "grpo",
    "allocator": "uniform",
    "prompts_per_step": 4,
    "max_steps": 6,
    "replay_share": 0.4,
    "replay_steps": 2,
}


def test_what_cannot_be_is_refused(tmp_path):
    for settings, message in (
        ({"replay_share": 0.6}, r"replay_share must lie in \[0, 0.5\].*num_iterations"),
        ({"replay_share": 0.25, "replay_steps": 0}, "replay_steps must be at least 1"),
        ({"replay_share": 0.25, "replay_weight_max": 0.5}, "replay_weight_max must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.config(tmp_path, **settings)


class Seen(list):
    """Batches that a run updates on."""

    def watch(self, made, monkeypatch):
        mix = made.replay.mix

        def kept(batch, *args, **kwargs):
            mixed = mix(batch, *args, **kwargs)
            self.append((batch, mixed))
            return mixed

        monkeypatch.setattr(made.replay, "mix", kept)
        made.train()
        return made


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_a_replayed_row_counts_as_at_its_birth_times_the_capped_ratio(tmp_path, monkeypatch, rate):
    seen = Seen()
    made = seen.watch(tiny.trainer(tmp_path, **RUN | {"learning_rate": rate}), monkeypatch)
    born = {}  # seed of a row -> (step, weights over its denominator, advantage, tokens)
    replayed, ratios = set(), []
    rho = 0.4 / 0.6 / 2
    for step, (fresh, mixed) in enumerate(seen):
        part = 1 / (1 + rho * min(step, 2))
        rows, num = mixed.rollouts, len(fresh.rollouts)
        assert mixed.denominator == fresh.denominator
        for i, seed in enumerate(rows.seed_N.tolist()):
            length = int(rows.length_N[i])
            weight_T = rows.weight_NT[i, :length] / mixed.denominator
            if i < num:
                whole_T = fresh.rollouts.weight_NT[i, :length] / fresh.denominator
                born[seed] = step, whole_T, rows.advantage_N[i], rows.token_NT[i, :length]
                torch.testing.assert_close(weight_T, whole_T * part)
                continue
            birth, whole_T, advantage, token_T = born[seed]
            assert seed not in replayed and 1 <= step - birth <= 2
            replayed.add(seed)
            ratio_T = (rows.old_logprob_NT[i] - rows.logprob_NT[i]).exp()[:length].clamp(max=2)
            torch.testing.assert_close(weight_T, whole_T * part * ratio_T, rtol=1e-6, atol=0)
            # A policy that stands still is the one that drew it.
            assert (ratio_T - 1).abs().max() < 1e-4 or rate > 0
            ratios += ratio_T.tolist()
            assert rows.advantage_N[i] == advantage
            assert torch.equal(rows.token_NT[i, :length], token_T)
            key = mixed.prompts[int(rows.prompt_N[i])].key
            ids = rows.prompt_ids[int(rows.prompt_N[i])]
            assert {p.key: p for p in made.prompts}[key].token_ids == ids
    assert len(replayed) > 10 and (max(ratios) == 2) == (rate > 0)
    totals = made.ledger.totals
    assert totals["rollouts_replayed"] == len(replayed)
    assert 0 < totals["tokens_replayed"] < totals["tokens_trained"]
    logs = tiny.step_logs(tmp_path)
    assert sum(row["replay/rows"] for row in logs) == len(replayed)
    assert all(row["mismatch"] < 1e-4 for row in logs)


@pytest.mark.slow
def test_a_share_of_0_is_the_plain_run_bit_for_bit(tmp_path):
    plain = {name: value for name, value in RUN.items() if not name.startswith("replay")}
    one = tiny.run(tmp_path / "plain", **plain)
    other = tiny.run(tmp_path / "none", **plain, replay_share=0.0)
    assert other.replay is None and "replay" not in other.stages_state()
    expected = tiny.parameters(one)
    assert all(torch.equal(value, expected[n]) for n, value in tiny.parameters(other).items())
    assert "ledger/tokens_replayed" not in tiny.step_logs(tmp_path / "none")[-1]


LOSSES = {
    "grpo": {"beta": 0.05, "updates_per_step": 2},
    "raft": {"trainer": "raft++", "entropy_coef": 0.01},
    "gspo": {"loss": "gspo", "num_iterations": 2},
    "hapo": {"loss": "hapo", "token_selection": "entropy"},
    "corrected": {"loss": "cispo", "importance_correction": "token_truncate"},
    "buffer": {"refill": True, "refill_max_age": 2, "prompts_per_step": 3, "refill_min_prompts": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_run_resumes_exactly(tmp_path, name):
    settings = RUN | {"max_steps": 4} | LOSSES[name]
    whole = tiny.run(tmp_path / "whole", save_strategy="steps", save_steps=2, **settings)
    assert whole.ledger.totals["rollouts_replayed"] > 0
    folder = str(tmp_path / "whole" / "checkpoint-2")
    resumed = tiny.run(tmp_path / "again", resume=folder, **settings)
    weights, expected = tiny.parameters(resumed), tiny.parameters(whole)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert resumed.ledger.totals["tokens_replayed"] == whole.ledger.totals["tokens_replayed"]
    start = tiny.model().state_dict()
    assert not all(torch.equal(start[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_micro_batches_change_nothing(tmp_path, name):
    settings = RUN | {"max_steps": 4} | LOSSES[name]
    expected = tiny.parameters(tiny.run(tmp_path / "whole", **settings))
    small = tiny.run(tmp_path / "small", **settings | {"per_device_train_batch_size": 2})
    for key, value in tiny.parameters(small).items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_where_nothing_is_new_the_old_rows_train_alone(tmp_path, monkeypatch):
    seen = Seen()
    calls = []

    def then_nothing(completions, **_):
        calls.append(1)
        return tiny.small_digit(completions) if len(calls) <= 2 else [0.0] * len(completions)

    made = seen.watch(tiny.trainer(tmp_path, **RUN | {"reward": then_nothing}), monkeypatch)
    alone = [mixed for fresh, mixed in seen if not len(fresh.rollouts) and len(mixed.rollouts)]
    assert alone and made.state.global_step == 6
    # Rows of the second step, the last with a signal, are at most two steps old.
    assert [len(mixed.rollouts) > 0 for _, mixed in seen] == [True] * 4 + [False] * 2


@pytest.mark.slow
def test_the_gradient_of_replayed_rows_is_weighed_by_how_far_the_policy_went(tmp_path, monkeypatch):
    seen = Seen()
    seen.watch(tiny.trainer(tmp_path, **RUN | {"learning_rate": 1e-2}), monkeypatch)
    fresh, mixed = seen[-1]
    rows = mixed.rollouts.take(torch.arange(len(fresh.rollouts), len(mixed.rollouts)))
    ratio_NT = (rows.old_logprob_NT - rows.logprob_NT).exp()[rows.mask_NT]
    assert (ratio_NT - 1).abs().max() > 0.05
    log = tiny.step_logs(tmp_path)[-1]
    assert log["replay/ratio_mean"] == pytest.approx(ratio_NT.mean().item(), rel=1e-4)
    assert log["replay/share_above_cap"] == pytest.approx((ratio_NT > 2).double().mean().item())
    # The old rows are not held against the engine.
    assert log["mismatch"] < 1e-4
