"""The update sees the probabilities that rollouts were drawn with, or the run says so and stops."""

import json
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from rl.logprobs.reference import Reference, not_its_own_reference
from rl.policies import loading
from rl.policies.loading import load_policy, require_trainable, without_dropout
from rl.stages import fidelity, metrics
from rl.stages.fidelity import MismatchError
from tests import tiny

pytestmark = pytest.mark.slow  # whole runs

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
GRPO = {"trainer": "grpo", "allocator": "uniform", "reward": tiny.small_digit, "max_steps": 1}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "vocab_size": 14}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
ROWS = [{"prompt": text} for text in ("a5=", "a", "b2=c3=a1=", "c", "bb", "a0=a1=")]
"""Prompts of several lengths, so that there is padding."""


def opt():
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.3,
            attention_dropout=0.3,
            layerdrop=0.5,
            **IDS,
        )
    )


def seed_oss():
    return SeedOssForCausalLM(
        SeedOssConfig(**SIZES, **HEADS, **IDS, head_dim=16, residual_dropout=0.3)
    )


def xglm():
    return XGLMForCausalLM(
        XGLMConfig(
            d_model=32,
            ffn_dim=64,
            num_layers=2,
            attention_heads=2,
            max_position_embeddings=64,
            dropout=0.3,
            activation_dropout=0.3,
            **IDS,
        )
    )


def big_code():
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.3, **IDS)
    )


def phimoe():
    """Chooses experts by noise in training mode, by no attribute that could be set to 0."""
    return PhimoeForCausalLM(
        PhimoeConfig(
            **SIZES, **HEADS, **IDS, num_local_experts=4, input_jitter_noise=0.1, rope_theta=1e4
        )
    )


def larger(model, factor=4):
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)
    return model


class Noisy(tiny.Qwen3ForCausalLM):
    """Noise in training mode from nowhere that can be seen."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.training:
            output.logits = output.logits + torch.randn(output.logits.shape[-1])
        return output


class IgnoresTheMask(tiny.Qwen3ForCausalLM):
    """Sees the padding on its left, as xLSTM and RWKV do."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        kwargs.pop("position_ids", None)
        return super().forward(input_ids, **kwargs)


class LooksBeside(tiny.Qwen3ForCausalLM):
    """A row's logits change with the rows beside it, as with experts of limited capacity."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(dim=(0, 1), keepdim=True)
        return output


def of_class(kind):
    torch.manual_seed(0)
    return larger(kind(tiny.model().config))


def mismatch_of(folder, **settings):
    tiny.run(folder, **(GRPO | {"data": ROWS} | settings))
    return tiny.step_logs(folder)[0]["mismatch"]


@pytest.mark.parametrize("make", [opt, seed_oss, xglm, big_code, phimoe])
def test_dropout_and_noise_of_any_name_are_off_in_the_update(make, tmp_path):
    torch.manual_seed(0)
    assert mismatch_of(tmp_path, model=larger(make(), 2)) < 1e-5


def falcon():
    """Reads rates of dropout from its configuration, in layers that can recompute activations."""
    return FalconForCausalLM(
        FalconConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            alibi=True,
            hidden_dropout=0.3,
            attention_dropout=0.3,
            **IDS,
        )
    )


@pytest.mark.parametrize("make", [opt, phimoe, falcon])
def test_and_off_where_activations_are_recomputed(make, tmp_path):
    torch.manual_seed(0)
    model = larger(make(), 2)
    assert mismatch_of(tmp_path, model=model, gradient_checkpointing=True) < 1e-5
    assert model.is_activation_checkpointing
    if make is falcon:
        assert model.config.hidden_dropout == 0.3  # which is saved


@pytest.mark.parametrize(
    ("kind", "right_padded", "in_eval"),
    [
        (tiny.Qwen3ForCausalLM, False, False),
        (Noisy, False, True),
        (IgnoresTheMask, True, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*costs a full forward pass")
def test_the_way_of_scoring_that_is_right_is_found(kind, right_padded, in_eval, tmp_path):
    made = tiny.trainer(tmp_path, model=of_class(kind), data=ROWS, **GRPO)
    made.train()
    assert made.policy.scorer.right_padded is right_padded
    assert made.policy.scorer.in_eval is in_eval
    assert tiny.step_logs(tmp_path)[0]["mismatch"] < 1e-5


def test_a_policy_that_is_never_that_of_its_rollouts_is_refused_before_any(tmp_path):
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return tiny.small_digit(completions)

    settings = GRPO | {"reward": reward, "model": of_class(LooksBeside)}
    made = tiny.trainer(tmp_path / "1", **settings)
    with pytest.raises(ValueError, match="LooksBeside cannot generate rollouts here"):
        made.train()
    engine = Colder(settings["model"], tiny.tokenizer())  # one that the trainer knows nothing of
    made = tiny.trainer(tmp_path / "2", engine=engine, **settings)
    with pytest.raises(
        ValueError, match="LooksBeside cannot be trained here.*training mode, padded"
    ):
        made.train()
    assert not seen


@pytest.mark.parametrize("fused", [False, True])
def test_padding_on_the_right_gives_the_same_log_probabilities_and_gradients(fused):
    model = tiny.model()
    scores, grads = [], []
    for right_padded in (False, True):
        scorer = fidelity.Scorer(temperature=0.7, pad_id=0, fused=fused)
        scorer.right_padded = right_padded
        rollouts = some_rollouts()
        logprob_NT, entropy_NT = scorer.statistics(model, rollouts)
        model.zero_grad()
        (logprob_NT * torch.arange(1.0, 5.0)).sum().backward()
        scores.append((logprob_NT.detach(), entropy_NT))
        grads.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(scores[0], scores[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


def some_rollouts():
    from rollouts.batch import TokenRollouts

    mask_NT = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    return TokenRollouts(
        prompt_N=torch.tensor([0, 1, 1, 2]),
        mask_NT=mask_NT,
        logprob_NT=torch.zeros(4, 4),
        version=0,
        token_NT=torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9], [0] * 4, [2, 0, 0, 0]]),
        truncated_N=torch.zeros(4, dtype=torch.bool),
        seed_N=torch.arange(4),
        prompt_ids=((10,), (11, 3, 12, 4, 13), (10, 13)),
    )


# The mismatch acts


class Colder:
    """An engine whose log-probabilities are those of another temperature."""

    def __init__(self, model, tokenizer):
        from rollouts.engines.transformers import TransformersEngine

        self.inner = TransformersEngine(model, tokenizer)

    def load_weights(self, model):
        self.inner.load_weights(model)

    def generate(self, *args, params, **kwargs):
        return self.inner.generate(*args, params=replace(params, temperature=0.1), **kwargs)


def with_colder_engine(folder, **settings):
    model = tiny.model()
    engine = Colder(model, tiny.tokenizer())
    return tiny.trainer(folder, model=model, engine=engine, **(GRPO | settings))


@pytest.mark.parametrize("settings", [{}, {"updates_per_step": 2}, {"num_iterations": 2}])
def test_a_mismatch_stops_the_run_before_the_first_update(settings, tmp_path):
    made = with_colder_engine(tmp_path, **settings)
    before = tiny.parameters(made)
    with pytest.raises(MismatchError, match="more than max_mismatch=0.05. Likely causes: dropout"):
        made.train()
    after = tiny.parameters(made)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_mismatch_is_a_warning_where_it_is_corrected_for_or_allowed(tmp_path, caplog):
    made = with_colder_engine(tmp_path / "1", importance_correction="token_truncate", max_steps=2)
    warned = []
    fidelity.logger.warning, original = warned.append, fidelity.logger.warning
    try:
        made.train()
    finally:
        fidelity.logger.warning = original
    assert len([text for text in warned if "weighs tokens by it" in text]) == 1
    with_colder_engine(tmp_path / "2", max_mismatch=float("inf")).train()
    assert tiny.step_logs(tmp_path / "2")[0]["mismatch"] > 0.05


def test_a_temperature_that_adapts_is_no_mismatch(tmp_path):
    made = tiny.trainer(
        tmp_path, **(GRPO | {"max_steps": 3}), loss="hapo", adaptive_temperature_tau=0.5
    )
    made.train()


def test_groups_that_waited_are_not_compared_with_the_policy_at_hand(tmp_path):
    # Learning this fast, older rows differ by far more than a rounding error.
    settings = {
        "refill": True,
        "refill_max_age": 2,
        "refill_min_prompts": 12,
        "learning_rate": 0.05,
    }
    tiny.run(tmp_path, **(GRPO | settings | {"max_steps": 4, "prompts_per_step": 3}))
    logs = tiny.step_logs(tmp_path)
    assert all(row.get("mismatch", 0.0) < 1e-5 for row in logs)
    assert max(row["kl_old"] for row in logs) > 1e-3


def test_mismatch_counts_fresh_rows_with_weight():
    rollouts = replace(some_rollouts(), weight_NT=torch.tensor([[1.0, 0, 0, 0]] * 4))
    logprob_NT = torch.tensor([[-1.0, -9, -9, -9]] * 2 + [[-3.0, 0, 0, 0]] * 2)
    found = metrics.mismatch(logprob_NT, rollouts, torch.tensor([True, False, True, False]))
    assert {name: float(value) for name, value in found.items()} == {
        "mismatch": 4.0,
        "mismatch_count": 2.0,
    }


def test_limits_of_the_mismatch_are_numbers(tmp_path):
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="max_mismatch must be at least 0"):
            tiny.config(tmp_path, max_mismatch=bad)
    with pytest.raises(ValueError, match="neftune_noise_alpha=5.0 adds noise"):
        tiny.config(tmp_path, neftune_noise_alpha=5.0)


# What is turned off, and what is not


def test_rates_of_dropout_are_0_wherever_they_are_kept():
    model = nn.Module()
    model.norm = nn.LayerNorm(3, eps=1e-5)
    model.drop = nn.Dropout2d(0.3)
    model.lstm = nn.LSTM(3, 3, num_layers=2, dropout=0.2)
    model.resid_pdrop, model.layerdrop, model.drop_path = 0.1, 0.2, 0.3
    model.moe_token_dropout, model.drop_last = True, 3
    model.router_jitter_noise = 0.01  # PhiMoE's router reads it in evaluation too
    without_dropout(model)
    assert model.drop.p == model.lstm.dropout == 0
    assert model.resid_pdrop == model.layerdrop == model.drop_path == 0
    assert model.moe_token_dropout is True and model.drop_last == 3
    assert model.router_jitter_noise == 0.01 and model.norm.eps == 1e-5


# Adapters


def qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, **IDS))  # with biases


def test_a_second_adapter_is_refused():
    adapted = get_peft_model(tiny.model(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"has adapters already \(default\).*merge_and_unload"):
        load_policy(adapted, tiny.tokenizer(), LoraConfig(**LORA))
    integrated = tiny.model()
    integrated.add_adapter(LoraConfig(**LORA))
    with pytest.raises(ValueError, match="has adapters already"):
        load_policy(integrated, tiny.tokenizer(), LoraConfig(**LORA))


def test_a_policy_of_which_nothing_trains_is_refused(tmp_path):
    get_peft_model(tiny.model(), LoraConfig(**LORA)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path)
    with pytest.raises(ValueError, match="nothing of the Peft.* trains.*is_trainable=True"):
        load_policy(loaded, tiny.tokenizer())
    with pytest.raises(ValueError, match="nothing of the Qwen3.* trains; requires_grad is False"):
        load_policy(tiny.model().requires_grad_(False), tiny.tokenizer())
    require_trainable(PeftModel.from_pretrained(tiny.model(), tmp_path, is_trainable=True))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(**LORA), None),
        (LoraConfig(**LORA, use_dora=True), None),
        (LoraConfig(**LORA, modules_to_save=["lm_head"]), None),
        (LoraConfig(**LORA, trainable_token_indices=[3, 4]), None),
        (LoraConfig(**LORA, bias="all"), "bias trains, which is no adapter's"),
        (LoraConfig(**LORA, bias="lora_only"), "bias trains, which is no adapter's"),
        (
            IA3Config(
                task_type="CAUSAL_LM",
                target_modules=["v_proj", "up_proj"],
                feedforward_modules=["up_proj"],
            ),
            "of kind IA3, changes the model already is not known",
        ),
    ],
)
def test_the_reference_is_the_policy_before_training_whatever_trains(config, why):
    from accelerate import Accelerator

    policy = get_peft_model(qwen2(), config)
    found = not_its_own_reference(policy)
    assert (found is None) if why is None else (why in found)
    start = qwen2().eval()
    reference = Reference(policy, Accelerator(cpu=True))
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    ids = torch.tensor([[10, 5, 13, 3]])
    policy.eval()
    with torch.no_grad(), reference.of(policy) as before:
        torch.testing.assert_close(
            before(input_ids=ids).logits, start(input_ids=ids).logits, atol=1e-6, rtol=0
        )
        assert (
            not torch.allclose(policy(input_ids=ids).logits, start(input_ids=ids).logits, atol=1e-3)
            or why is None
        )


# Told before the run


@pytest.fixture
def told(monkeypatch):
    """What `rl.policies.loading` warns of."""
    said = []
    monkeypatch.setattr(loading.logger, "warning", said.append)
    return said


def test_dropout_of_an_adapter_is_said_to_be_off(told):
    load_policy(tiny.model(), tiny.tokenizer(), LoraConfig(**LORA, lora_dropout=0.1))
    load_policy(tiny.model(), tiny.tokenizer(), LoraConfig(**LORA))
    assert len(told) == 1 and told[0].startswith("lora_dropout=0.1 is not applied")


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "is_told"),
    [
        (torch.bfloat16, 1e-6, True),  # 2^-9 of a weight of .02 is 4e-5
        (torch.bfloat16, 1e-2, False),
        (torch.float16, 1e-6, True),  # 2^-12 of it is 5e-6
        (torch.float32, 1e-6, False),
        (torch.float32, 1e-12, True),
    ],
)
def test_weights_too_coarse_for_the_learning_rate_are_told(
    dtype, learning_rate, is_told, told, tmp_path
):
    tiny.trainer(tmp_path, model=tiny.model(dtype=dtype), learning_rate=learning_rate)
    said = [text for text in told if "is less than what" in text]
    assert len(said) == is_told
    if is_told:
        kind = str(dtype).removeprefix("torch.")
        assert f"learning_rate={learning_rate:g} is less than what {kind} can add" in said[0]


def test_code_of_a_model_folder_is_not_run_without_leave(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings |= {"model_type": "own", "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ValueError, match="comes with Python code of its own, which was not run"):
        load_policy(str(tmp_path), tiny.tokenizer())


# Activation checkpointing by both names


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_activations_are_recomputed_under_either_name(name, tmp_path, recwarn):
    layers = []

    def count(folder, **settings):
        model = tiny.model()
        layers.clear()
        norm = model.model.layers[0].input_layernorm  # inside what is recomputed
        norm.register_forward_hook(lambda *_: layers.append(torch.is_grad_enabled()))
        tiny.run(folder, model=model, **(GRPO | settings))
        return sum(layers)

    once = count(tmp_path / "1")
    assert count(tmp_path / "2", **{name: True}) == 2 * once
    every_other = {"every_n_layers": 2, "use_reentrant": False}
    assert count(tmp_path / "3", **{name: True, f"{name}_kwargs": every_other}) == 2 * once
    assert not [
        w for w in recwarn if "deprecated" in str(w.message) and "checkpoint" in str(w.message)
    ]


def test_weights_without_gradient_are_looked_for_where_checkpointing_allows_it(tmp_path):
    assert tiny.config(tmp_path).ddp_find_unused_parameters is None
    on = tiny.config(tmp_path, gradient_checkpointing=True)
    assert on.activation_checkpointing and on.ddp_find_unused_parameters
    reentrant = {"use_reentrant": True}
    on = tiny.config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=reentrant)
    assert on.activation_checkpointing_kwargs == reentrant
    assert on.ddp_find_unused_parameters is None
