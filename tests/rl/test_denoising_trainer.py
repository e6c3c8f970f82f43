"""DenoisingTrainer on a tiny pipeline: what it learns, repeats, skips, saves and continues."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from rl.denoising_trainer import DenoisingTrainer
from rl.run.pictures import diversity
from rl.trainer import NoSignalError
from rollouts.diffusion.engine import DiffusersEngine
from rollouts.rewards.image import brightness
from rollouts.rewards.image_models import MODEL_REWARDS
from tests import tiny_denoising as tiny
from tests.tiny import lines, parameters, step_logs
from tests.tiny_denoising import equal, start
from tests.tiny_pipelines import add_tiny_text_encoder, embeddings, tiny_pipeline

pytestmark = pytest.mark.slow  # whole runs

torch.set_num_threads(1)

LORA = dict(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])


# What a run does


@pytest.mark.parametrize(
    "settings",
    [
        {"plan": tiny.CHAIN},
        {"baseline": "leave_one_out", "credit_scale": "prompt", "noise_weight": "std"},
        {"baseline": "history", "branch_threshold": 0.3, "logprob_reduction": "mean"},
    ],
    ids=["chains", "tree", "b2"],
)
def test_brightness_improves(tmp_path, settings):
    """By four steps: the means with and without noise, of the same seeds, by .015 and more.

    Nothing is left to chance, as all follows the seed; over seeds and settings gains are .02 to .12.
    """
    made = tiny.trainer(
        tmp_path, max_steps=4, learning_rate=2e-3, eval_dataset=tiny.rows(), **settings
    )
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    for name in ("eval_reward", "eval_deterministic_reward"):
        assert after[name] > before[name] + 0.015


def test_a_run_follows_its_seed_alone(tmp_path):
    one = tiny.run(tmp_path / "one")
    torch.manual_seed(123)  # the global generator has no say
    other = tiny.run(tmp_path / "other")
    assert equal(parameters(one), parameters(other))
    assert lines(tmp_path / "one") == lines(tmp_path / "other")
    tiny.run(tmp_path / "third", seed=4, max_steps=1)
    assert lines(tmp_path / "third")[0] != lines(tmp_path / "one")[0]


def test_a_step_in_which_no_branch_is_selected_is_skipped_and_logged(tmp_path):
    made = tiny.trainer(tmp_path, branch_threshold=4.9, max_steps=3, max_empty_steps=3)
    before = parameters(made)
    with pytest.raises(NoSignalError, match="no rollout carried a gradient in the last 3 steps"):
        made.train()
    assert equal(parameters(made), before)
    assert made.policy.engine.replay_evaluations == 0
    logs = step_logs(tmp_path)
    assert len(lines(tmp_path)) == 3
    for row in logs:
        assert row["loss"] == 0 and "mismatch" not in row and "reward_trained" not in row
        assert row["ledger/rollouts_trained"] == row["ledger/updates"] == 0
        assert row["ledger/rollouts_filtered_down_sampled"] == row["ledger/rollouts_drawn"] == 12
        assert row["branches/informative_share"] == 1  # though none was extreme enough


def test_rewards_that_are_all_equal_are_no_signal(tmp_path):
    def flat(image_NHWC, prompts, metadata):
        return np.full(len(image_NHWC), 0.7)

    made = tiny.run(tmp_path, reward=flat, baseline="parent", credit_scale="prompt")
    assert equal(parameters(made), start())
    assert step_logs(tmp_path)[0]["branches/informative_share"] == 0
    assert step_logs(tmp_path)[0]["groups/all_fail_share"] == 1


def never(image_NHWC, prompts, metadata):
    return np.zeros(len(image_NHWC))


def test_a_prompts_samples_share_their_start_in_every_round_and_not_with_another_draw(tmp_path):
    made = tiny.trainer(
        tmp_path,
        plan=tiny.CHAIN,
        shared_start_noise=True,
        prompts_per_step=3,
        stopping="positive",
        stopping_round_size=2,
        reward=never,
    )
    starts = []
    made.ledger.begin(0)
    for version in range(2):
        visit = made.sampling.visit(made.policy, version=version)
        assert len(visit.rounds) == 3  # of two samples each, as none was positive
        key_P = [prompt.key for prompt in visit.prompts]
        for scored in visit.rounds:
            r = scored.rollouts
            x_N = r.tree.latent_M[r.node_NS[:, 0]]
            starts += [
                (version, key_P[p], x) for p, x in zip(r.prompt_N.tolist(), x_N, strict=True)
            ]
    for version, key, x in starts:
        for other, name, y in starts:
            assert torch.equal(x, y) == ((version, key) == (other, name))


def test_rounds_of_a_stopping_rule_are_whole_branches(tmp_path):
    """Groups whose first branch is mixed may stop, so that budgets differ."""
    made = tiny.run(
        tmp_path,
        success_above=0.62,
        stopping="positive",
        stopping_round_size=3,
        max_steps=3,
    )
    budgets = [budget for row in lines(tmp_path) for budget in row["budgets"]]
    assert set(budgets) <= {3, 6} and len(set(budgets)) == 2
    assert max(row["rounds"] for row in step_logs(tmp_path)) == 2
    branches = sum(budgets) // 3
    assert made.evaluations == made.policy.engine.evaluations == branches * 8
    total = step_logs(tmp_path)[-1]["ledger_total/rollouts_drawn"]
    assert total == sum(budgets)


def test_evaluations_of_the_denoiser_are_counted_and_can_end_a_run(tmp_path):
    """A root costs 1 + 1 + 3 + 3 evaluations, and a step has four roots."""
    made = tiny.run(tmp_path, max_steps=9, max_evaluations=65)
    assert [row["denoiser_evaluations"] for row in step_logs(tmp_path)] == [32, 64, 96]
    assert made.policy.engine.evaluations == 96 and made.state.global_step == 3
    # Each trained state once: 4 roots at edges 0 and 1, and 12 states at edge 2.
    assert made.policy.engine.replay_evaluations == 3 * (4 + 4 + 12)


def test_steps_without_noise_are_generated_and_not_trained(tmp_path):
    """Three samples of two prompts, four steps each, of which one draws noise and trains."""
    window = {"schedule": "sliding_window", "size": 1, "every": 9}
    tiny.run(tmp_path, plan=tiny.CHAIN | {"stochastic": window}, rollouts_per_prompt=3, max_steps=1)
    (row,) = step_logs(tmp_path)
    assert row["ledger/tokens_drawn"] == 2 * 3 * 4
    assert row["ledger/tokens_trained"] == 2 * 3
    assert row["ledger/tokens_filtered_tokens_not_selected"] == 2 * 3 * 3
    assert row["denoiser_evaluations"] == 2 * 3 * 4


def test_rewards_that_fail_are_counted_and_the_others_train(tmp_path):
    def fails_on_dark(image_NHWC, prompts, metadata):
        found = brightness(image_NHWC, prompts, metadata)
        if (found < 0.585).any():
            raise ValueError("too dark to judge")
        return found

    made = tiny.run(tmp_path, reward=fails_on_dark, max_failed_share=0.9, max_steps=1)
    row = step_logs(tmp_path)[0]
    failed = row["ledger/rollouts_failed"]
    assert 0 < failed < 12 and row["ledger/rollouts_trained"] == 12 - failed
    assert len(lines(tmp_path)[0]["failures"]) == failed
    assert not equal(parameters(made), start())


def test_the_kl_of_an_adapter_is_logged_and_holds_it_back(tmp_path):
    """Its gradient is 0 at the reference, so that the first update is the same whatever its weight."""
    kl = {}
    for beta in (1e-3, 1e5):
        folder = tmp_path / str(beta)
        settings = {"beta": beta, "max_steps": 3, "learning_rate": 3e-3}
        tiny.run(folder, peft_config=LoraConfig(**LORA), **settings)
        kl[beta] = [row["kl"] for row in step_logs(folder)]
    assert kl[1e-3][0] == kl[1e5][0] == 0
    assert kl[1e-3][1] > 0
    assert kl[1e5][1] == pytest.approx(kl[1e-3][1], rel=0.5)  # of other samples
    assert kl[1e5][2] < 0.9 * kl[1e-3][2]


def test_a_reference_needs_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="a reference policy needs LoRA adapters"):
        tiny.run(tmp_path, beta=0.1)


def test_the_pipelines_own_text_encoder_and_guidance_serve(tmp_path):
    around = tiny.pipeline()
    torch.manual_seed(5)
    add_tiny_text_encoder(around)
    config = tiny.config(tmp_path, guidance_scale=3.0, max_steps=1)
    made = DenoisingTrainer(around, "brightness", config, tiny.rows())
    frozen = {n: w.clone() for n, w in around.text_encoder.state_dict().items()}
    made.train()
    assert equal(frozen, dict(around.text_encoder.state_dict()))
    assert made.policy.engine.batch_size == 16
    assert not equal(parameters(made), start())
    assert step_logs(tmp_path)[0]["mismatch"] < 1e-3


def with_text_encoder():
    around = tiny.pipeline()
    torch.manual_seed(5)
    add_tiny_text_encoder(around)
    return around


def test_settings_reach_the_pipelines_call_and_a_plan_it_cannot_make_is_refused_first(tmp_path):
    def made(**settings):
        config = tiny.config(tmp_path, guidance_scale=3.0, **settings)
        return DenoisingTrainer(with_text_encoder(), "brightness", config, tiny.rows())

    ours = made(negative_prompt="dark", pipeline_kwargs={"guidance_rescale": 0.5}).policy.engine
    assert ours.negative_prompt == "dark"
    assert ours._arguments["guidance_rescale"] == 0.5
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no true_cfg_scale"):
        made(pipeline_kwargs={"true_cfg_scale": 4.0})
    with pytest.raises(ValueError, match="timestep 1000 of 1000 steps is beyond the model's 1000"):
        made(plan={"num_steps": 1000, "rule": "ddim", "level": 1.0}, baseline="prompt")


def test_a_negative_prompt_of_each_prompt_is_asked_of_validation_too(tmp_path):
    config = tiny.config(tmp_path, guidance_scale=3.0, negative_prompt_column="against")
    rows = [row | {"against": "dark"} for row in tiny.rows()]
    around = with_text_encoder()
    with pytest.raises(ValueError, match="'against' must be a text of every prompt"):
        DenoisingTrainer(around, "brightness", config, rows, eval_dataset=tiny.rows())
    DenoisingTrainer(around, "brightness", config, rows, eval_dataset=rows)


# Validation and pictures


def test_the_diversity_of_a_steps_samples_is_logged(tmp_path):
    seen = []

    def reward(image_NHWC, prompts, metadata):
        seen.append((image_NHWC, np.array(prompts)))
        return brightness(image_NHWC, prompts, metadata)

    made = tiny.run(tmp_path, reward=reward)
    logged = [row["diversity"] for row in step_logs(tmp_path)]
    expected = [diversity(image_NHWC, prompt_N) for image_NHWC, prompt_N in seen]
    assert logged == pytest.approx(expected, rel=1e-12) and min(logged) > 0
    assert made.state.log_history[0]["diversity"] == logged[0]
    alone = {"plan": tiny.CHAIN, "rollouts_per_prompt": 1, "baseline": "history"}
    tiny.run(tmp_path / "alone", max_steps=1, **alone)
    assert "diversity" not in step_logs(tmp_path / "alone")[0]


def test_validation_repeats_itself_and_leaves_training_alone(tmp_path):
    validated = {"eval_dataset": tiny.rows(2), "eval_strategy": "steps", "eval_steps": 1}
    one = tiny.run(tmp_path / "one", **validated)
    other = tiny.run(tmp_path / "other")
    assert equal(parameters(one), parameters(other))
    assert lines(tmp_path / "one") == lines(tmp_path / "other")
    assert one.evaluations == other.evaluations == 64
    logged = [r for r in lines(tmp_path / "one", "metrics.jsonl") if "eval_reward" in r]
    again = one.evaluate()
    for name in ("eval_reward", "eval_deterministic_reward", "eval_sampled_diversity"):
        assert again[name] == logged[-1][name] and logged[0][name] != logged[1][name]
    assert again["eval_denoiser_evaluations"] == 64  # validation is not counted
    # Two samples without noise differ by where they start from.
    assert again["eval_deterministic_diversity"] > 0


def test_validation_by_hand(tmp_path):
    """The deterministic samples are those of the unmodified pipeline."""
    made = tiny.trainer(tmp_path, reward=tiny.bright, eval_dataset=tiny.rows(2))
    found = made.evaluate()
    policy, prompts = made.policy, made.eval_prompts
    from samplers.keys import rollout_seeds

    seeds = np.concatenate(
        [rollout_seeds(0, f"validation {p.key}", 0, np.arange(2)) for p in prompts]
    )
    for name, prefix in (
        ("deterministic", "eval_deterministic_reward"),
        ("sampled", "eval_reward"),
    ):
        plan = policy.validations[name][1]
        rollouts = policy.engine.generate(prompts, [2, 2], seeds_N=seeds, params=plan)
        reward_N = tiny.bright(policy.engine.decode(rollouts), None, None)
        assert found[prefix] == pytest.approx(reward_N.mean())
    assert found["eval_pass_rate"] == found["eval_reward"]  # 0 or 1, and equally many of both
    assert found["eval_deterministic_accuracy"] == found["eval_deterministic_reward"]
    with pytest.raises(
        ValueError, match="evaluate needs held-out prompts: pass eval_dataset to the trainer"
    ):
        tiny.trainer(tmp_path / "none").evaluate()
    # One prompt, two samples without noise and two with it.
    assert made.evaluate(tiny.rows(1))["eval_rollouts"] == 4


def test_a_column_that_validation_lacks_is_told_before_the_run(tmp_path):
    data = [{"prompt": "three cats", "count": 3}, {"prompt": "a dog", "count": 1}]
    with pytest.warns(
        UserWarning, match="eval_dataset has no column count, which train_dataset has"
    ):
        tiny.trainer(tmp_path, data=data, eval_dataset=tiny.rows(1))


def test_pictures_show_branches_and_validation(tmp_path):
    tiny.run(
        tmp_path,
        max_steps=4,
        images_every=2,
        eval_dataset=tiny.rows(2),
        eval_strategy="steps",
        eval_steps=4,
    )
    names = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    assert names == [
        *("deterministic-000004.png", "sampled-000004.png"),
        *("train-000001.png", "train-000002.png", "train-000004.png"),
    ]
    # Six images a prompt, each 4 x 8 pixels and two of a gap wide, six of a line high.
    with Image.open(tmp_path / "images" / "train-000002.png") as picture:
        assert picture.size == (6 * 34, 2 * 38)
    texts = (tmp_path / "images" / "train-000002.txt").read_text().splitlines()
    keys = lines(tmp_path)[1]["prompts"]
    by_key = {p.key: p.prompt for p in tiny.trainer(tmp_path / "other").prompts}
    assert texts == [by_key[key] for key in keys]
    tiny.run(tmp_path / "off", max_steps=1)
    assert not (tmp_path / "off" / "images").exists()


def test_a_run_says_how_its_chains_were_made(tmp_path):
    made = tiny.run(tmp_path, baseline="buffer", history_steps=20, max_steps=1)
    assert made.objective.history.rewards == 20
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["plan"] == tiny.BRANCHED and settings["baseline"] == "buffer"


def test_a_run_says_what_its_engine_was_run_with(tmp_path):
    """An engine of one's own has its own guidance and size, which the settings then show."""
    around = tiny.pipeline()
    settings = tiny.config(tmp_path, guidance_scale=7.5, height=None, width=None, max_steps=1)
    with pytest.warns(UserWarning, match="guidance_scale: 7.5 of the settings is not that of the"):
        made = DenoisingTrainer(
            around, "brightness", settings, tiny.rows(), engine=tiny.engine(around)
        )
    assert tiny.ENGINE.items() <= made.policy.engine.used.items()
    made.train()
    recorded = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert {name: recorded[name] for name in tiny.ENGINE} == tiny.ENGINE
    assert made.decisive_settings()["guidance_scale"] == 1.0


def test_a_guidance_that_is_not_given_or_not_read_is_told():
    def used(name, **settings):
        encode, size = embeddings(name), {"height": 64, "width": 64}
        return DiffusersEngine(tiny_pipeline(name), encode=encode, **size, **settings).used

    assert used("sd")["guidance_scale"] == 7.5  # the pipeline's own default
    found = {name: value for name, value in used("sd3", guidance_scale=2.0).items() if value}
    assert found == {"guidance_scale": 2.0, "height": 64, "width": 64}
    assert used("sd3", shift=2.0)["shift"] == 2.0
    assert used("qwen")["guidance_scale"] is None


def test_rewards_by_name_are_loaded_where_the_run_is_or_is_told(tmp_path, monkeypatch):
    devices = []

    def load(*, device):
        devices.append(device)
        return brightness

    monkeypatch.setitem(MODEL_REWARDS, "clip_score", load)
    tiny.trainer(tmp_path, reward=["clip_score", "contrast"])
    tiny.trainer(tmp_path, reward="clip_score", reward_device="cuda:3")
    assert devices == ["cpu", "cuda:3"]
    with pytest.raises(
        ValueError, match="reward_device must be a device such as cpu or cuda:1, got"
    ):
        tiny.config(tmp_path, reward_device="gpu")


def test_the_model_is_the_pipelines_own(tmp_path):
    made = tiny.trainer(tmp_path)
    assert made.policy.engine.pipeline is made.pipeline and made.model is made.pipeline.unet
    other = tiny.trainer(tmp_path / "other", height=None, width=None)
    assert other.policy.params(1) == other.args.step_plan(1)
