"""Tiny causal language models with random weights, and a tokenizer for them; nothing downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3NextConfig,
)

from rollouts.prompts import Prompt

PAD, EOS = 0, 1
PIECES = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz", " ", ".", "ab", "cd", "xyz", "é"]
VOCABULARY = len(PIECES)
POSITIONS = 128


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and a few pieces of several letters; text is the pieces one after the other."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_config(architecture: str):
    common = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS}
    # Two layers, grouped-query attention, and a sliding window shorter than the prompts.
    llama_like = common | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": None,
    }
    sliding = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    if architecture == "qwen3":
        return Qwen3Config(**llama_like)
    if architecture == "llama":
        return LlamaConfig(**llama_like)
    if architecture == "gpt2":
        return GPT2Config(
            **common, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, bos_token_id=EOS
        )
    if architecture == "gemma2":
        return Gemma2Config(**llama_like, **sliding)
    if architecture == "gemma3":
        return Gemma3TextConfig(**llama_like, **sliding)
    if architecture == "qwen3_next":
        return Qwen3NextConfig(**llama_like, **linear)
    if architecture == "mamba":
        return MambaConfig(**common, hidden_size=32, num_hidden_layers=2, state_size=8)
    raise ValueError(f"no tiny model of architecture {architecture!r}")


def tiny_model(architecture: str = "qwen3", *, seed: int = 0):
    """In eval mode, float32; weights four times the usual size, so that tokens depend on context."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def tiny_prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    """Random prompts of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            key=f"prompt-{i}",
            prompt="",
            token_ids=tuple(torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()),
            columns={},
        )
        for i, n in enumerate(lengths)
    ]
