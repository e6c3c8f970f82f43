"""Tiny models of many architectures of transformers: the update sees what the engine drew with.

All have dropout, odd prompts and small windows, so that noise, padding and caches would show. Not here:
models of two towers, encoders, and those that `TransformersEngine` refuses (tests/rollouts).
"""

import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests import tiny

pytestmark = pytest.mark.slow  # whole runs

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_heads"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "time_step_rank"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "state_size"), 8),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "chunk_size": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "lru_width": 32,
    "attention_window_size": 6,
    "mamba_chunk_size": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "attention_hidden_size": 32,
    "vocab_size": 14,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
DROPOUT = dict.fromkeys(
    (
        "dropout",
        "attention_dropout",
        "hidden_dropout",
        "residual_dropout",
        "activation_dropout",
        "resid_pdrop",
        "attn_pdrop",
        "embd_pdrop",
        "layerdrop",
        "hidden_dropout_prob",
    ),
    0.2,
)
OWN = {
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "falcon": {"alibi": True, "num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "expand": 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "mixtral": {"router_jitter_noise": 0.3},
    "phi3": {"num_key_value_heads": 4},
    "phimoe": {"input_jitter_noise": 0.3},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "xlstm": {"chunkwise_kernel": "chunkwise--native_autograd", "step_kernel": "native"}
    | {"sequence_kernel": "native_sequence__native"},
}
QUICK = ("falcon", "mixtral", "recurrent_gemma", "minimax")
"""Dropout read from the configuration, noise of a router, state in modules, a cache of its own."""
SLOW = (
    *("apertus", "biogpt", "bloom", "cohere2", "ctrl", "deepseek_v2", "deepseek_v3", "exaone4"),
    *(
        "falcon_h1",
        "falcon_mamba",
        "gemma2",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
    ),
    *("gpt_oss", "granitemoe", "jamba", "lfm2", "mamba2", "mpt", "nemotron", "olmo2", "opt"),
    *(
        "persimmon",
        "phi3",
        "phimoe",
        "qwen3_moe",
        "qwen3_next",
        "rwkv",
        "seed_oss",
        "xglm",
        "xlstm",
    ),
)
WITHOUT_CHECKPOINTING = ("ctrl",)
ROWS = [{"prompt": text} for text in ("a5=", "a", "b2=c3=a1=", "c", "bb", "a0=a1=")]


def model_of(architecture):
    """With random weights twice the usual size, so that tokens depend on what stands before them."""
    kind = CONFIG_MAPPING[architecture]
    known = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    known |= set(getattr(kind, "__dataclass_fields__", ()))
    settings = {name: value for name, value in (SIZES | DROPOUT).items() if name in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(settings | OWN.get(architecture, {}))))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(2)
    return model


@pytest.mark.parametrize(
    "architecture", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
@pytest.mark.filterwarnings("ignore:.*costs a full forward pass")
def test_the_update_sees_what_was_drawn(architecture, tmp_path):
    settings = {
        "trainer": "grpo",
        "allocator": "uniform",
        "reward": tiny.small_digit,
        "max_steps": 2,
    }
    model = model_of(architecture)
    for saving in (False, True)[: 1 if architecture in WITHOUT_CHECKPOINTING else 2]:
        folder = tmp_path / str(saving)
        tiny.run(folder, model=model, data=ROWS, activation_checkpointing=saving, **settings)
        logs = tiny.step_logs(folder)
        assert all(row["mismatch"] < 1e-5 for row in logs if "mismatch" in row), logs
        assert "mismatch" in logs[0]
