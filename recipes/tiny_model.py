"""A causal language model of the Qwen3 architecture with under a million parameters, and its tokenizer.

Both are ordinary: `AutoModelForCausalLM` and `AutoTokenizer` load the saved folder, and whatever
trains or serves a Qwen3 checkpoint takes this one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['content'] }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% elif not loop.last %}
{% endif %}{% endfor %}"""
"""The last message as it stands, earlier ones above it, each on a line of its own."""


def build_tokenizer(words: Sequence[str], *, pattern: str, longest: int) -> PreTrainedTokenizerFast:
    """Tokenizer with one token per word, and three more: pad, end of text, unknown.

    Args:
        words: distinct; a text of these words is given back as it was.
        pattern: regular expression whose matches cut a text into words.
        longest: tokens that the model reads, at most.
    """
    tokens = [PAD, EOS, UNKNOWN, *words]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
) -> Qwen3ForCausalLM:
    """An untrained model for the tokenizer.

    Rotary frequencies start at a base of 100 and weights at a standard deviation of 0.05: with the
    values of large models (10,000 and 0.02), a model this narrow and texts this short learn more
    slowly.

    Args:
        tokenizer: gives vocabulary and special tokens.
        seed: of the initial weights; the state of torch's generator is left as it was.
        hidden_size: width, divisible by `num_heads`; the feed-forward layers are three times as
            wide.
        num_layers: decoder layers.
        num_heads: attention heads.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
