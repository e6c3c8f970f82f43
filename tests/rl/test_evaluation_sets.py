"""Validation sets by name, and each reward by itself."""

import numpy as np
import pytest

from rl.stages.metrics import spread
from tests import tiny


def length(completions, **_):
    return [float(len(text)) for text in completions]


def sets():
    return {"easy": tiny.rows("d")[:3], "hard": tiny.rows("e")[:2]}


@pytest.mark.slow
def test_each_set_has_metrics_of_its_own_and_one_of_them_chooses_the_best_model(tmp_path):
    made = tiny.run(
        tmp_path,
        reward=[tiny.small_digit, length],
        reward_weights=[1.0, 0.1],
        success_above=1.0,
        eval_dataset=sets(),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="hard_pass_rate",
        max_steps=2,
    )
    rows = [row for row in tiny.lines(tmp_path, "metrics.jsonl") if "eval_easy_pass_rate" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0 <= row["eval_hard_pass_rate"] <= 1
        for name in ("easy", "hard"):
            means = [row[f"eval_{name}_rewards/{f}/mean"] for f in ("small_digit", "length")]
            assert row[f"eval_{name}_reward"] == pytest.approx(means[0] + 0.1 * means[1])
            assert row[f"eval_{name}_rewards/length/std"] > 0
            assert row[f"eval_{name}_reward_std"] > 0
        assert "eval_pass_rate" not in row
    assert made.state.best_metric == max(row["eval_hard_pass_rate"] for row in rows)
    found = made.evaluate("easy")
    assert found.keys() >= {"eval_easy_reward"} and "eval_hard_reward" not in found


def test_a_set_without_a_name_keeps_its_metrics(tmp_path):
    made = tiny.trainer(tmp_path, eval_dataset=tiny.rows("d")[:3])
    found = made.evaluate()
    assert found["eval_rewards/first_digit/mean"] == found["eval_reward"] == found["eval_pass_rate"]
    assert found["eval_rewards/first_digit/std"] == found["eval_reward_std"]
    assert made.evaluate(tiny.rows("e")[:1], metric_key_prefix="test").keys() >= {"test_reward"}


def test_what_cannot_be_validated_is_refused_before_the_run(tmp_path):
    shared = tiny.rows("a")[:1]
    with pytest.raises(ValueError, match="both in train_dataset and eval_dataset"):
        tiny.trainer(tmp_path, eval_dataset={"x": tiny.rows("d"), "y": shared})
    with pytest.raises(ValueError, match=r"eval_dataset\['y'\]: the data set is empty"):
        tiny.trainer(tmp_path, eval_dataset={"x": tiny.rows("d"), "y": []})
    with pytest.raises(ValueError, match="write metric_for_best_model: easy_pass_rate, or"):
        tiny.trainer(
            tmp_path,
            eval_dataset=sets(),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
        )
    with pytest.raises(ValueError, match="eval_dataset must be one of easy, hard, got 'haard'"):
        tiny.trainer(tmp_path, eval_dataset=sets()).evaluate("haard")


def test_spread_is_the_unbiased_std_and_does_not_overflow():
    values = np.array([1.0, 2.0, 4.0])
    assert spread(values) == pytest.approx(values.std(ddof=1))
    assert spread(np.array([3.0])) == spread(np.zeros(4)) == 0
    assert spread(np.array([1e300, -1e300])) == pytest.approx(2**0.5 * 1e300)
