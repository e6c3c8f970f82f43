"""Verdicts through the pipeline: rewards, posterior, validation and other rollouts are as without."""

import numpy as np
import pandas
import pytest
import torch

from rl.policies import language
from rollouts.rewards.contract import RewardError
from tests import tiny
from tests.rl.test_trainer import Scripted
from tests.tiny import SmallDigit

SETTINGS = {
    "trainer": "grpo",
    "allocator": "uniform",
    "loss": "dr_grpo",
    "max_completion_length": 12,
    "verdict_every": 2,
}


class FirstDigit:
    """1 if the completion begins with the answer; the first character decides."""

    __name__ = "first_digit"

    def __call__(self, completions, answer, **_):
        return tiny.first_digit(completions, answer)

    def decided(self, prompt, completion_so_far, answer):
        text = completion_so_far.replace(" ", "")
        return float(text.startswith(answer)) if text else None


def trainer(folder, **settings):
    return tiny.trainer(folder, **(SETTINGS | {"reward": SmallDigit()} | settings))


def all_rows(batch):
    return batch.visits[0].rounds[0].rollouts


@pytest.mark.slow
def test_a_step_with_verdicts_is_the_step_without_but_for_tokens_after_the_decision(tmp_path):
    with_ = trainer(tmp_path / "a")
    without = trainer(tmp_path / "b", verdict_every=0)
    ended, whole = (tiny.collect(made, version=1) for made in (with_, without))
    short, long = all_rows(ended), all_rows(whole)
    assert long.decided_N is None and short.decided_N.double().mean() > 0.5
    assert torch.equal(short.reward_N, long.reward_N)
    assert torch.equal(short.success_N, long.success_N)
    for a, b in ((with_, without),):
        for one, other in zip(
            a.planner.posterior.parameters(), b.planner.posterior.parameters(), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    torch.testing.assert_close(ended.rollouts.advantage_N, whole.rollouts.advantage_N)
    for row in range(len(short)):
        tokens = long.token_NT[row][long.mask_NT[row]]
        found = short.token_NT[row][short.mask_NT[row]]
        assert torch.equal(found, tokens[: len(found)])
        assert len(found) == (2 if short.decided_N[row] else len(tokens))
        assert not (short.decided_N[row] and short.truncated_N[row])
    assert ended.metrics["verdicts/decided_share"] == short.decided_N.double().mean().item()
    assert "verdicts/decided_share" not in whole.metrics
    assert (
        ended.metrics["rewards/decided_digit/mean"] == whole.metrics["rewards/decided_digit/mean"]
    )
    drawn = [made.ledger.metrics()["ledger/tokens_drawn"] for made in (with_, without)]
    assert drawn == [short.size[1], long.size[1]] and drawn[0] < 0.5 * drawn[1]


@pytest.mark.slow
def test_decided_rows_are_not_masked_as_truncated_and_the_reward_is_not_asked_for_them(tmp_path):
    calls = []

    class Counted(SmallDigit):
        def __call__(self, completions, **_):
            calls.append(len(completions))
            return super().__call__(completions)

    made = trainer(tmp_path, reward=Counted(), mask_truncated_completions=True)
    batch = tiny.collect(made, version=1)
    rollouts = all_rows(batch)
    assert sum(calls) == len(rollouts) - int(rollouts.decided_N.sum())
    mixed = batch.rollouts
    assert mixed.decided_N.any()
    trained = made.objective.trained_length(mixed)
    assert torch.equal(trained[mixed.decided_N], mixed.length_N[mixed.decided_N])


@pytest.mark.slow
def test_validation_with_verdicts_has_the_same_pass_rate(tmp_path):
    def validated(folder, **settings):
        made = trainer(folder, data=tiny.rows("ab"), eval_dataset=tiny.rows("c"), **settings)
        made.state.global_step = 1
        return made.evaluate()

    ended, whole = validated(tmp_path / "a"), validated(tmp_path / "b", verdict_every=0)
    assert ended["eval_mean_length"] < 0.5 * whole["eval_mean_length"]
    differs = {"eval_mean_length", "eval_runtime", "eval_samples_per_second"}
    differs |= {"eval_steps_per_second"}
    same = {n: v for n, v in whole.items() if n not in differs and "seconds" not in n}
    assert {"eval_pass_rate", "eval_greedy_accuracy", "eval_reward"} <= same.keys()
    assert {name: ended[name] for name in same} == same


@pytest.mark.slow
def test_the_first_step_is_drawn_whole_and_checks_the_verdicts(tmp_path):
    made = trainer(tmp_path / "a")
    first = all_rows(tiny.collect(made))
    assert first.decided_N is not None and not first.decided_N.any()

    class Hasty(FirstDigit):
        def decided(self, prompt, completion_so_far, answer):
            return 0.0

    made = trainer(tmp_path / "b", reward=Hasty(), rollouts_per_prompt=20)
    with pytest.raises(
        RewardError,
        match="verdicts of reward first_digit are wrong.*gave 0, .*gets 1.*verdict_every: 0",
    ):
        tiny.collect(made)
    made = trainer(
        tmp_path / "c",
        reward=Hasty(),
        rollouts_per_prompt=20,
        data=tiny.rows("ab"),
        eval_dataset=tiny.rows("c"),
    )
    with pytest.raises(RewardError, match="verdicts of reward first_digit are wrong"):
        made.evaluate()


@pytest.mark.slow
def test_a_verdict_that_fails_stops_the_run_as_a_reward_that_fails(tmp_path):
    class Gone(SmallDigit):
        def decided(self, prompt, completion_so_far):
            raise KeyError("gone")

    with pytest.raises(RewardError, match="decided_digit: decided raised KeyError: 'gone'"):
        tiny.collect(trainer(tmp_path, reward=Gone()), version=1)


def warnings_of(monkeypatch, folder, **settings):
    said = []
    monkeypatch.setattr(language.logger, "warning", said.append)
    return trainer(folder, **settings).policy.verdicts, said


@pytest.mark.slow
def test_what_keeps_verdicts_from_ending_rollouts_is_said_once(tmp_path, monkeypatch):
    def graded(completions, **_):
        return [0.0] * len(completions)

    def of(**settings):
        return warnings_of(monkeypatch, tmp_path, **settings)

    both = [SmallDigit(), graded]
    verdicts, (said,) = of(reward=both)
    assert verdicts is None and "reward graded has a weight and no `decided`" in said
    assert of(reward=both, reward_weights=[1.0, 0.0])[0] is not None
    for settings in ({"reward": graded}, {"verdict_every": 0}):
        assert of(**settings) == (None, [])
    verdicts, (said,) = of(engine=Scripted({}))
    assert verdicts is None and "Scripted does not say takes_verdicts = True" in said
    verdicts, (said,) = of(reward_kl=0.1, advantage="batch_whitened_tokens", loss="grpo")
    assert verdicts is None and "reward_kl depends on every token" in said
    with pytest.raises(ValueError, match="verdict_every must be at least 0, got -1"):
        of(verdict_every=-1)


COMBINED = {
    "starts": "traces",
    "starts_plain_share": 0.2,
    "stopping": "balanced",
    "stopping_round_size": 2,
    "rollouts_per_prompt": 8,
    "logging_steps": 1,
    "completions_every": 2,
    "posterior_prior": "flat",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:starts. .* changes what is ascended")
def test_with_starts_stopping_and_a_resumed_run_the_decisions_are_the_same(tmp_path):
    settings = SETTINGS | COMBINED | {"reward": SmallDigit(), "data": tiny.rows("ab")}
    straight = tiny.run(tmp_path / "a", max_steps=4, **settings)
    saving = settings | {"save_strategy": "steps", "save_steps": 2}
    tiny.run(tmp_path / "b", max_steps=2, **saving)
    resumed = tiny.run(tmp_path / "b", resume=True, max_steps=4, **saving)
    assert tiny.lines(tmp_path / "a") == tiny.lines(tmp_path / "b")
    for name, value in tiny.parameters(straight).items():
        assert torch.equal(value, tiny.parameters(resumed)[name]), name
    logs = tiny.step_logs(tmp_path / "a")
    assert logs[0]["verdicts/decided_share"] == 0.0
    assert all(log["verdicts/decided_share"] > 0.3 for log in logs[1:])
    assert sum(log["starts/share"] for log in logs) > 0
    tables = sorted((tmp_path / "a" / "completions").glob("*.parquet"))
    table = pandas.concat([pandas.read_parquet(path) for path in tables])
    assert table["decided"].any() and not (table["decided"] & table["truncated"]).any()


@pytest.mark.slow
def test_groups_that_wait_for_refill_keep_what_ended_them(tmp_path):
    made = tiny.run(
        tmp_path,
        **SETTINGS,
        reward=SmallDigit(),
        refill=True,
        refill_max_age=2,
        refill_max_draws=3,
        max_steps=4,
        prompts_per_step=3,
    )
    assert made.state.global_step == 4
    held = [of.rollouts.decided_N for of in made.sampling.buffer._held.values()]
    assert all(column is not None for column in held)


@pytest.mark.slow
def test_the_text_of_a_start_belongs_to_what_is_decided(tmp_path):
    seen = []

    class Watching(SmallDigit):
        def decided(self, prompt, completion_so_far):
            seen.append(completion_so_far.replace(" ", ""))

    made = trainer(tmp_path, reward=Watching())
    begin = made.processing_class("01", add_special_tokens=False)["input_ids"]
    prompts = [made.prompts[0].started(begin)]
    made.policy.generate(
        prompts, np.array([4]), seeds_N=np.arange(4), params=made.policy.sampling, version=1
    )
    assert seen and all(text.startswith("01") for text in seen)
    # <pad> and <eos> are no text; two tokens of start and two, four, ... of what was drawn are.
    assert min(map(len, seen)) >= 2 and max(map(len, seen)) <= 10


@pytest.mark.slow
def test_a_reward_with_verdicts_for_images_is_refused(tmp_path):
    from tests import tiny_denoising

    def bright(image_NHWC, prompts, metadata):
        return [0.0] * len(prompts)

    bright.decided = lambda prompt, text: None
    with pytest.raises(ValueError, match="reward bright has a `decided`.*leave it out"):
        tiny_denoising.run(tmp_path, reward=bright, plan=tiny_denoising.CHAIN)


def test_verdicts_are_on_by_default_only_where_the_expected_gradient_stays_as_it_is(tmp_path):
    def every(**settings):
        return tiny.config(tmp_path, trainer="grpo", allocator="uniform", **settings).verdict_every

    assert every(loss="dr_grpo") == every(length_weight="token_sum") == 8
    assert every(length_weight="row_mean") == every(loss="dapo") == every() == 0
    assert every(loss="dr_grpo", beta=0.1) == every(loss="dr_grpo", entropy_coef=0.1) == 0
    assert every(length_weight="row_mean", verdict_every=4) == 4
