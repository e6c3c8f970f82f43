"""Whole runs of the trainer, in this process: what it learns, what it counts, what it leaves alone."""

import inspect
import json

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from rl.logprobs.from_logits import completion_logprobs
from rl.run import checkpoint
from rl.stages.gradient_norms import norms_of
from rl.stages.metrics import drawn
from rl.trainer import NoSignalError, RolloutTrainer
from rollouts.batch import TokenRollouts
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def never(completions, **_):
    return [0.0] * len(completions)


# What is learnt


@pytest.mark.parametrize("trainer", ["grpo", "raft", "raft++"])
def test_presets_learn(tmp_path, trainer):
    tiny.run(
        tmp_path,
        reward=tiny.small_digit,
        trainer=trainer,
        seed=2,
        max_steps=12,
        learning_rate=1e-2,
    )
    reward = [row["reward"] for row in tiny.step_logs(tmp_path)]
    before, after = np.mean(reward[:3]), np.mean(reward[-3:])
    # Each mean is over 108 rollouts, standard error 0.05: a policy that learns nothing stays five
    # standard errors of the difference below the margin.
    assert before < 0.5
    assert after > before + 0.35


def test_the_update_raises_the_probability_of_accepted_completions(tmp_path):
    made = tiny.trainer(tmp_path, reward=tiny.small_digit, max_steps=1, learning_rate=1e-3)
    batches = []
    inner = made._close
    made._close = lambda batch, learned: (batches.append(batch), inner(batch, learned))[1]
    made.train()
    (batch,) = batches
    with torch.no_grad():
        now_NT = completion_logprobs(made.model, batch.rollouts, temperature=1.0, pad_id=0)
    assert (now_NT.sum(1) - batch.rollouts.logprob_NT.sum(1)).mean() > 0


def test_three_updates_on_one_collection_leave_the_sampling_policy(tmp_path):
    settings = {"reward": tiny.small_digit, "max_steps": 2, "learning_rate": 1e-2}
    one = tiny.run(tmp_path / "one", updates_per_step=1, **settings)
    three = tiny.run(tmp_path / "three", updates_per_step=3, **settings)
    for row in tiny.step_logs(tmp_path / "one"):
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert row["kl_old"] == pytest.approx(0, abs=1e-9)
    for row in tiny.step_logs(tmp_path / "three"):
        assert abs(row["ratio/mean"] - 1) > 1e-3
        assert row["kl_old"] > 1e-5
    assert one.ledger.totals["updates"] == 2
    assert three.ledger.totals["updates"] == 6
    (state,) = {int(s["step"]) for s in three.optimizer.state_dict()["state"].values()}
    assert state == 6  # Adam's own count
    assert len(tiny.step_logs(tmp_path / "three")) == 2


def test_there_are_never_more_updates_than_rows_to_train_on(tmp_path):
    made = tiny.run(
        tmp_path,
        data=tiny.rows("ab"),
        reward=tiny.one_prompt,
        seed=7,
        max_steps=7,
        updates_per_step=5,
    )
    rows = [row["ledger/rollouts_trained"] for row in tiny.step_logs(tmp_path)]
    assert 0 < max(rows) < 5
    assert [row["ledger/updates"] for row in tiny.step_logs(tmp_path)] == rows
    (state,) = {int(s["step"]) for s in made.optimizer.state_dict()["state"].values()}
    assert state == sum(rows)


def test_training_follows_the_seed_and_nothing_else(tmp_path):
    one = tiny.run(tmp_path / "1")
    torch.manual_seed(123)
    again = tiny.run(tmp_path / "2")
    other = tiny.run(tmp_path / "3", seed=4)
    assert equal(tiny.parameters(one), tiny.parameters(again))
    assert tiny.lines(tmp_path / "1") == tiny.lines(tmp_path / "2")
    assert not equal(tiny.parameters(one), tiny.parameters(other))


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": "raft++"},
        {"trainer": "grpo", "loss": "dapo", "objective": "mean"},
        {
            "trainer": "grpo",
            "objective": "log",
            "length_weight": "token_sum",
            "updates_per_step": 2,
        },
    ],
    ids=["raft++", "dapo", "log"],
)
def test_micro_batches_do_not_change_the_update(tmp_path, settings):
    found = []
    for rows in (1, 3, 100):
        made = tiny.run(
            tmp_path / str(rows),
            model=tiny.model(dtype=torch.float64),
            reward=tiny.small_digit,
            per_device_train_batch_size=rows,
            optim="sgd",
            learning_rate=0.5,
            prompts_per_step=4,
            **settings,
        )
        found.append(tiny.parameters(made))
    assert distance(found[0], tiny.parameters(tiny.trainer(tmp_path / "start"))) > 1e-3
    assert distance(found[0], found[2]) < 1e-12
    assert distance(found[1], found[2]) < 1e-12


def test_micro_batches_do_not_change_float32_weights_by_more_than_rounding(tmp_path):
    found = [
        tiny.parameters(tiny.run(tmp_path / str(rows), per_device_train_batch_size=rows))
        for rows in (1, 3, 100)
    ]
    assert distance(found[0], found[2]) < 1e-6
    assert distance(found[1], found[2]) < 1e-6


def test_activation_checkpointing_and_generation_batches_do_not_change_the_update(tmp_path):
    settings = {"reward": tiny.small_digit, "optim": "sgd", "learning_rate": 0.5}
    plain = tiny.run(tmp_path / "1", **settings)
    less_memory = tiny.run(
        tmp_path / "2", activation_checkpointing=True, generation_batch_size=5, **settings
    )
    assert less_memory.model.is_activation_checkpointing  # and on again after each generation
    assert distance(tiny.parameters(plain), tiny.parameters(less_memory)) < 1e-6


def test_dropout_is_off(tmp_path):
    model = tiny.model()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    tiny.run(tmp_path, model=model, reward=tiny.small_digit)
    for row in tiny.step_logs(tmp_path):
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-5)


def test_bf16_autocast_trains_float32_weights(tmp_path):
    made = tiny.trainer(tmp_path / "bf16", bf16=True, reward=tiny.small_digit, learning_rate=1e-2)
    before = tiny.parameters(made)
    made.train()
    after = tiny.parameters(made)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in after.values())
    assert distance(before, after) > 1e-3
    exact = tiny.run(tmp_path / "exact", reward=tiny.small_digit, learning_rate=1e-2)
    assert distance(tiny.parameters(exact), after) > 1e-6  # it really ran in bf16
    # Generation and update run in the same precision, so the ratios stay those of the policy.
    assert max(row["kl_old"] for row in tiny.step_logs(tmp_path / "bf16")) < 1e-4


# What is counted


@pytest.mark.parametrize(
    ("settings", "pilots"),
    [
        ({}, 0),
        ({"pilot_rollouts": 2}, 0),
        ({"pilot_rollouts": 2, "pilot_use": "discard", "pilot_estimate": "pilot"}, 2),
        ({"allocator": "uniform", "updates_per_step": 2}, 0),
    ],
    ids=["one round", "pooled", "discarded", "uniform"],
)
def test_everything_drawn_is_observed_and_accounted_for(tmp_path, settings, pilots):
    made = tiny.run(
        tmp_path,
        reward=tiny.small_digit,
        trainer="grpo",
        max_steps=4,
        posterior_decay_chosen=1.0,
        posterior_decay_rest=1.0,
        **settings,
    )
    steps, logs = tiny.lines(tmp_path), tiny.step_logs(tmp_path)
    assert len(steps) == len(logs) == 4
    for step, log in zip(steps, logs, strict=True):
        assert sum(step["budgets"]) == 6 * 6
        assert len(set(step["prompts"])) == 6
        for unit in ("rollouts", "tokens"):
            fates = ("trained", "filtered", "surplus", "failed")
            drawn = log[f"ledger/{unit}_drawn"]
            assert drawn == sum(log[f"ledger/{unit}_{fate}"] for fate in fates) > 0
        assert log["ledger/rollouts_drawn"] == 36
        assert log.get("ledger/rollouts_filtered_pilot", 0) == 6 * pilots
        if not pilots:
            # Rewards are 0 or 1, so a group's sum says whether it was constant.
            groups = list(zip(step["budgets"], step["reward_sums"], strict=True))
            expected = {
                "lone": sum(n for n, r in groups if n == 1),
                "all_fail": sum(n for n, r in groups if n > 1 and r == 0),
                "all_pass": sum(n for n, r in groups if n > 1 and r == n),
            }
            for reason, count in expected.items():
                assert log.get(f"ledger/rollouts_filtered_{reason}", 0) == count
            assert log["ledger/rollouts_trained"] == 36 - sum(expected.values())
    # Nothing decays, so the posterior's counts are all rollouts, and its successes all rewards.
    posterior = made.planner.posterior
    assert posterior.alpha_D.sum() + posterior.beta_D.sum() == pytest.approx(4 * 36)
    assert posterior.alpha_D.sum() == pytest.approx(sum(sum(s["reward_sums"]) for s in steps))
    assert made.ledger.totals["rollouts_drawn"] == 4 * 36


def test_a_group_where_only_some_are_accepted_says_so(tmp_path):
    tiny.run(tmp_path, reward=tiny.small_digit, trainer="raft", allocator="uniform", max_steps=1)
    (step,), (log,) = tiny.lines(tmp_path), tiny.step_logs(tmp_path)
    groups = list(zip(step["budgets"], step["reward_sums"], strict=True))
    assert log["ledger/rollouts_trained"] == sum(r for _, r in groups)
    assert log["ledger/rollouts_filtered_no_advantage"] == sum(
        n - r for n, r in groups if 0 < r < n
    )


class Scripted:
    """An engine that says what it was told to."""

    def __init__(self, completions):
        self.completions = completions  # prompt text -> its completions, in turn

    def load_weights(self, model):
        pass

    def generate(self, prompts, budget_P, *, seeds_N, params, version=0):
        tokenizer = tiny.tokenizer()
        texts = [
            self.completions[prompt.prompt][slot]
            for prompt, budget in zip(prompts, budget_P, strict=True)
            for slot in range(budget)
        ]
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        length_N = torch.tensor([len(row) for row in ids])
        mask_NT = torch.arange(int(length_N.max())) < length_N[:, None]
        return TokenRollouts(
            prompt_N=torch.arange(len(prompts)).repeat_interleave(torch.as_tensor(budget_P)),
            mask_NT=mask_NT,
            logprob_NT=torch.where(mask_NT, -1.0, 0.0),
            version=version,
            token_NT=torch.tensor([row + [0] * (mask_NT.shape[1] - len(row)) for row in ids]),
            truncated_N=length_N >= params.max_completion_length,
            seed_N=torch.as_tensor(seeds_N),
            prompt_ids=tuple(prompt.token_ids for prompt in prompts),
        )


def scripted(folder, **settings):
    data = [{"prompt": f"a{d}=", "answer": d} for d in "012"]
    # Lengths with the end token: 2, 4 | 3, 3 | 2, 5. Rewards: 1, 0 | 1, 1 | 0, 0.
    said = {"a0=": ["0", "1aa"], "a1=": ["1b", "1c"], "a2=": ["0", "aaaa"]}
    return tiny.run(
        folder,
        engine=Scripted(said),
        data=data,
        **{
            "prompts_per_step": 3,
            "rollouts_per_prompt": 2,
            "allocator": "uniform",
            "max_steps": 1,
            "max_completion_length": 5,
            "max_mismatch": float("inf"),  # the script's log-probabilities are made up
            **settings,
        },
    )


def test_metrics_of_one_step_by_hand(tmp_path):
    scripted(tmp_path, trainer="grpo")
    (log,) = tiny.step_logs(tmp_path)
    expected = {
        "reward": 3 / 6,
        "reward_trained": 1 / 2,  # of the mixed group alone
        "reward_std": (6 / 5 * 0.25) ** 0.5,  # of all rewards, unbiased
        "frac_reward_zero_std": 2 / 3,
        "groups/mixed_share": 1 / 3,
        "groups/all_pass_share": 1 / 3,
        "groups/all_fail_share": 1 / 3,
        "groups/unscored_prompts": 0,
        "rows/trained_share": 2 / 6,
        "rewards/first_digit/mean": 3 / 6,
        "rewards/first_digit/std": (6 / 5 * 0.25) ** 0.5,
        "completions/mean_length": (2 + 4 + 3 + 3 + 2 + 5) / 6,
        "completions/max_length": 5,
        "completions/clipped_ratio": 1 / 6,
        "completions/mean_length_trained": (2 + 4) / 2,
        "advantage_abs_mean": 0.5 / (0.5**0.5 + 1e-4),  # (1 - 0.5) and (0 - 0.5), unbiased std
        "ledger/rollouts_drawn": 6,
        "ledger/rollouts_trained": 2,
        "ledger/rollouts_filtered_all_pass": 2,
        "ledger/rollouts_filtered_all_fail": 2,
        "ledger/tokens_drawn": 19,
        "ledger/tokens_trained": 6,
        "ledger/tokens_filtered_all_pass": 6,
        "ledger/tokens_filtered_all_fail": 7,
        "ledger_total/rollouts_drawn": 6,
        "ledger/updates": 1,
        "planner/budget_mean": 2,
    }
    assert {name: log[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    for name in ("step_time", "learning_rate", "grad_norm", "clip_ratio/low", "clip_ratio/high"):
        assert np.isfinite(log[name])
    for phase in ("rollout", "reward", "gather", "update"):
        assert log[f"ledger/seconds_{phase}"] >= 0


@pytest.mark.parametrize("updates", [1, 3])
def test_the_loss_of_one_step_by_hand(tmp_path, updates):
    # Nothing moves, so the updates' losses, each over its part of the rows, average to the whole.
    made = scripted(tmp_path, trainer="raft", learning_rate=0.0, updates_per_step=updates)
    (log,) = tiny.step_logs(tmp_path)
    # em: each prompt is the mean over its accepted rows of the mean log-prob, over 3 prompts.
    tokenizer, model = tiny.tokenizer(), made.model

    def mean_logprob(prompt, completion):
        ids = tokenizer(prompt)["input_ids"]
        said = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logprob = model(torch.tensor([ids + said])).logits[0].log_softmax(-1)
        return np.mean([float(logprob[len(ids) - 1 + t, token]) for t, token in enumerate(said)])

    one, two = mean_logprob("a1=", "1b"), mean_logprob("a1=", "1c")
    expected = -(mean_logprob("a0=", "0") + (one + two) / 2 + 0) / 3
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_gradient_norms_reach_the_planner_and_are_those_of_autograd(tmp_path):
    model = tiny.model()
    model.lm_head = torch.nn.Linear(
        32, 14, bias=False
    )  # its own weights: autograd sees the head alone
    made = tiny.trainer(
        tmp_path, model=model, reward=tiny.small_digit, gvm_gradient_norm="mean", temperature=0.7
    )
    batch = tiny.collect(made, version=0)
    index_P = batch.visits[0].index_P
    index_K, norm_K = norms_of(made.policy, made.ranks, drawn(batch.visits), index_P, kind="mean")
    rollouts = batch.visits[0].rounds[0].rollouts
    expected = {}
    for row in (rollouts.reward_N > 0).nonzero().flatten().tolist():
        one = rollouts.take(torch.tensor([row]))
        model.zero_grad()
        completion_logprobs(model, one, temperature=0.7, pad_id=0).sum().backward()
        place = int(rollouts.prompt_N[row])
        expected.setdefault(place, []).append(float(model.lm_head.weight.grad.norm()))
    expected = {int(batch.visits[0].index_P[p]): np.mean(norms) for p, norms in expected.items()}
    assert dict(zip(index_K.tolist(), norm_K.tolist(), strict=True)) == pytest.approx(
        expected, rel=1e-4
    )
    model.zero_grad()

    trained = tiny.run(
        tmp_path, reward=tiny.small_digit, gvm_gradient_norm="rms", max_steps=4, pilot_rollouts=2
    )
    assert tiny.step_logs(tmp_path)[-1]["planner/gradient_norm_coverage"] > 0.25
    state = trained.planner.state_dict()
    assert np.nanmax(state["next_norm_D"]) > 0
    assert "ledger/seconds_gradient_norm" in tiny.step_logs(tmp_path)[-1]


# A step without signal


class TrainingForwards:
    """Counts forward passes that build a graph."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.count += int(torch.is_grad_enabled())


def test_a_step_without_signal_costs_no_forward_and_moves_nothing(tmp_path):
    calls = []

    def mute_after_two_steps(completions, **_):
        calls.append(len(completions))
        return tiny.small_digit(completions) if len(calls) <= 2 else [0.0] * len(completions)

    model = tiny.model()
    forwards = TrainingForwards(model)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((forwards.count, {n: p.clone() for n, p in model.state_dict().items()}))

    tiny.run(
        tmp_path,
        model=model,
        reward=mute_after_two_steps,
        weight_decay=0.1,  # and Adam has momentum by then
        max_steps=4,
        callbacks=[Look()],
    )
    (one, _), (two, after_two), (three, after_three), (four, after_four) = seen
    assert 0 < one < two == three == four
    assert equal(after_two, after_three)
    assert equal(after_two, after_four)
    log = tiny.step_logs(tmp_path)[-1]
    assert log["loss"] == 0
    assert log["groups/all_fail_share"] == 1
    assert "reward_trained" not in log
    assert (log["ledger/updates"], log["ledger_total/updates"]) == (0, 2)
    assert log["ledger/rollouts_trained"] == 0


def test_a_run_without_any_signal_stops_and_says_why(tmp_path):
    with pytest.raises(NoSignalError, match=r"last 3 steps.*reward 0\.000.*max_empty_steps"):
        tiny.run(tmp_path, reward=never, max_steps=9, max_empty_steps=3)
    assert len(tiny.lines(tmp_path)) == 3


def test_one_step_with_signal_starts_the_count_again(tmp_path):
    calls = []

    def every_third(completions, **_):
        calls.append(1)
        return tiny.small_digit(completions) if len(calls) % 3 == 0 else never(completions)

    tiny.run(tmp_path, reward=every_third, max_steps=8, max_empty_steps=3)
    assert len(tiny.lines(tmp_path)) == 8


# Adapters


def adapter():
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.3,
        task_type="CAUSAL_LM",
    )


def test_lora_trains_saves_and_resumes_an_adapter_alone(tmp_path):
    settings = {
        "reward": tiny.small_digit,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "peft_config": adapter(),
    }
    made = tiny.trainer(tmp_path / "whole", max_steps=4, **settings)
    before = tiny.parameters(made)
    made.train()
    after = tiny.parameters(made)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    assert all(abs(r["ratio/mean"] - 1) < 1e-5 for r in tiny.step_logs(tmp_path / "whole"))

    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files

    tiny.run(tmp_path / "cut", max_steps=2, **settings | {"peft_config": adapter()})
    resumed = tiny.run(
        tmp_path / "cut", max_steps=4, resume=True, **settings | {"peft_config": adapter()}
    )
    assert equal(tiny.parameters(resumed), after)
    assert tiny.lines(tmp_path / "cut") == tiny.lines(tmp_path / "whole")


# Validation


def held_out():
    return [{"prompt": f"c{d}=", "answer": d} for d in tiny.DIGITS]


def test_evaluation_is_repeatable_and_leaves_training_alone(tmp_path):
    settings = {"reward": tiny.small_digit, "data": tiny.rows("ab"), "eval_dataset": held_out()}
    watched = tiny.run(tmp_path / "1", eval_strategy="steps", eval_steps=1, **settings)
    alone = tiny.run(tmp_path / "2", **settings)
    assert equal(tiny.parameters(watched), tiny.parameters(alone))
    assert tiny.lines(tmp_path / "1") == tiny.lines(tmp_path / "2")
    counts = [
        {name: n for name, n in made.ledger.totals.items() if "seconds" not in name}
        for made in (watched, alone)
    ]
    assert counts[0] == counts[1]

    assert watched.evaluate() == watched.evaluate()
    rows = [r for r in tiny.lines(tmp_path / "1", "metrics.jsonl") if "eval_pass_rate" in r]
    assert [row["step"] for row in rows[:3]] == [1, 2, 3]
    assert rows[2]["eval_pass_rate"] == watched.evaluate()["eval_pass_rate"]


def test_evaluation_by_hand(tmp_path):
    data = held_out()[:3]
    said = {
        "c0=": ["0", "0", "1", "1"],
        "c1=": ["2", "1", "1", "1"],
        "c2=": ["a", "a", "b", "c"],
    }
    made = tiny.trainer(
        tmp_path, data=tiny.rows("a"), eval_dataset=data, engine=Scripted(said), max_steps=1
    )
    found = made.evaluate(metric_key_prefix="test")
    shares = [2 / 4, 3 / 4, 0 / 4]
    assert {name: found[name] for name in found if name != "epoch"} == pytest.approx(
        {
            "test_greedy_accuracy": 1 / 3,  # the greedy completion is the first
            "test_pass_rate": np.mean(shares),
            "test_pass_rate_se": np.std(shares, ddof=1) / 3**0.5,
            "test_reward": 5 / 12,
            "test_reward_std": (12 / 11 * 5 / 12 * 7 / 12) ** 0.5,
            "test_rewards/first_digit/mean": 5 / 12,
            "test_rewards/first_digit/std": (12 / 11 * 5 / 12 * 7 / 12) ** 0.5,
            "test_mean_length": 2,
            "test_rollouts": 3 + 12,
        }
    )
    other = made.evaluate(eval_dataset=data[:2])
    assert other["eval_greedy_accuracy"] == 1 / 2


def test_greedy_is_greedy_and_samples_are_not(tmp_path):
    made = tiny.trainer(tmp_path, data=tiny.rows("ab"), eval_dataset=held_out())
    seen = []

    class Look:
        def load_weights(self, model):
            pass

        def generate(self, *args, params, **kwargs):
            seen.append(params.temperature)
            return made_engine.generate(*args, params=params, **kwargs)

    made_engine = made.policy.engine
    made.policy.engine = Look()
    made.evaluate()
    assert seen == [0.0, 1.0]


# Checkpoints, in one process


def test_resuming_gives_the_run_that_was_never_stopped(tmp_path):
    settings = {
        "reward": tiny.small_digit,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 7,
        "logging_steps": 2,  # a log line that reaches over the checkpoint
    }

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    whole = tiny.run(tmp_path / "whole", **settings)
    tiny.run(tmp_path / "cut", callbacks=[Stop()], **settings)  # at step 5, saved at step 3
    assert saved(tmp_path / "cut") == ["checkpoint-3"]
    resumed = tiny.run(tmp_path / "cut", resume=True, **settings)
    assert equal(tiny.parameters(resumed), tiny.parameters(whole))
    assert tiny.lines(tmp_path / "cut") == tiny.lines(tmp_path / "whole")
    one, other = tiny.step_logs(tmp_path / "cut"), tiny.step_logs(tmp_path / "whole")
    names = [n for n in other[-1] if "seconds" not in n and n not in ("step_time", "loss")]
    assert [[r[n] for n in names] for r in one] == [[r[n] for n in names] for r in other]


def test_a_run_that_goes_back_sets_its_later_checkpoints_aside(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    tiny.run(tmp_path, max_steps=4, **settings)
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    tiny.run(tmp_path, max_steps=3, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert [row["step"] for row in tiny.lines(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "superseded-checkpoint-4").is_dir()


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_only_so_many_checkpoints_are_kept(tmp_path):
    tiny.run(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert saved(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_the_best_model_is_kept_and_loaded_at_the_end(tmp_path):
    made = tiny.trainer(
        tmp_path,
        reward=tiny.small_digit,
        data=tiny.rows("ab"),
        eval_dataset=held_out(),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="pass_rate",
        learning_rate=3.0,  # the first step is the best: everything breaks after it
        optim="sgd",
        max_steps=3,
    )
    truth = iter([0.9, 0.5, 0.1])
    inner = made.evaluate

    def evaluate(**kwargs):
        logs = inner(**kwargs)
        logs["eval_pass_rate"] = next(truth)
        return logs

    made.evaluate = evaluate
    kept = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept[state.global_step] = tiny.parameters(made)

    made.add_callback(Look())
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1").is_dir()
    assert equal(tiny.parameters(made), kept[1])
    assert not equal(kept[1], kept[3])
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(
        tmp_path / "checkpoint-1"
    )  # not where it was staged


# The rest of the ecosystem


def test_only_whole_checkpoints_are_pushed(tmp_path):
    made = tiny.trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    pushed = []

    def push(folder):
        checkpoint.verify(folder)
        pushed.append((folder, made.args.output_dir))

    class SwitchOn(TrainerCallback):  # set from the start, it would ask the hub for a repository
        def on_step_end(self, args, state, control, **kwargs):
            args.push_to_hub = state.global_step == 1

    made._push_from_checkpoint = push
    made.add_callback(SwitchOn())
    made.train()
    assert pushed == [(str(tmp_path / "checkpoint-1"), str(tmp_path))]


def test_users_callbacks_are_called(tmp_path):
    events = []

    class Watch(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda *args, **kwargs: events.append(name)
            return super().__getattribute__(name)

    tiny.run(
        tmp_path,
        data=tiny.rows("ab"),
        eval_dataset=held_out(),
        callbacks=[Watch()],
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    for name in ("on_init_end", "on_train_begin", "on_train_end", "on_evaluate", "on_save"):
        assert events.count(name) == 1, name
    for name in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
        assert events.count(name) == 2, name
    assert events.count("on_log") == 2 + 1 + 1  # steps, validation, closing summary


def test_a_model_may_be_given_as_a_folder(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    made = RolloutTrainer(
        str(tmp_path / "model"), tiny.first_digit, tiny.config(tmp_path / "run"), tiny.rows()
    )
    made.train()
    other = tiny.run(tmp_path / "other")
    assert equal(tiny.parameters(made), tiny.parameters(other))


def test_the_private_names_we_rely_on_are_still_there():
    for owner, name in (
        (Trainer, "_save_checkpoint"),
        (Trainer, "_push_from_checkpoint"),
        (GradientState, "_set_sync_gradients"),
    ):
        assert callable(getattr(owner, name, None)), (
            f"{owner.__module__}.{owner.__name__}.{name} is gone: rl/trainer.py and "
            "rl/ranks.py rely on it; see what took its place before raising the pinned version"
        )
    taken = inspect.signature(unwrap_model_for_generation).parameters
    assert {"model", "accelerator", "gradient_checkpointing_kwargs"} <= taken.keys(), (
        f"trl.models.utils.unwrap_model_for_generation takes {list(taken)}: rl/ranks.py calls "
        "it with model, accelerator and gradient_checkpointing_kwargs"
    )
    taken = inspect.signature(Trainer._save_checkpoint).parameters
    assert list(taken) == ["self", "model", "trial"], (
        f"Trainer._save_checkpoint takes {list(taken)}: rl/trainer.py overrides it"
    )


@pytest.mark.filterwarnings("ignore:budgets change")
def test_norms_of_discarded_pilots_act_in_their_step_and_pooled_ones_later(tmp_path):
    def visited(folder, use):
        pilots = {"pilot_rollouts": 3, "pilot_estimate": "pilot", "pilot_use": use}
        made = tiny.trainer(
            folder, reward=tiny.small_digit, gvm_gradient_norm="mean", budget_min=0, **pilots
        )
        made.ledger.begin(0)
        made.sampling.visit(made.policy, version=0)
        return made.planner.state_dict()["norm_D"]

    discarded = visited(tmp_path / "1", "discard")
    assert 0 < np.isfinite(discarded).sum() <= 6 and (discarded[np.isfinite(discarded)] > 0).all()
    with pytest.warns(UserWarning, match="counts from the next step on.*pilot_use: discard"):
        assert np.isnan(visited(tmp_path / "2", "pool")).all()
