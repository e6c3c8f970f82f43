"""A causal language model of the Qwen3 architecture with 0.7 million parameters, and its tokenizer.

Both are ordinary: `AutoModelForCausalLM` and `AutoTokenizer` load the saved folder, and whatever
trains or serves a Qwen3 checkpoint takes this one.
"""

from __future__ import annotations

import re
import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

PHRASES = (
    "State the final answer to the following arithmetic problem: ",
    "Spell this word backward (example: sun -> nus): ",
    "<answer>",
    "</answer>",
    " + ",
    " - ",
    " =",
)
"""What is one token, longest match first in this order."""

CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['content'] }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% elif not loop.last %}
{% endif %}{% endfor %}"""
"""The last message as it stands, earlier ones above it, each on a line of its own."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer over phrases, two-digit numbers and printable characters; it loses nothing.

    The text is cut into the phrases of the prompts, pairs of digits, and single characters. So a
    problem is 6 to 20 tokens and a solution 4 to 30, and a sum up to 99 is one token. What is not
    printable ASCII or a newline becomes the unknown token.
    """
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    pairs = [f"{number:02d}" for number in range(100)]
    tokens = [PAD, EOS, UNKNOWN, *PHRASES, *pairs, *characters]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    pattern = "|".join([*(re.escape(phrase) for phrase in PHRASES), "[0-9]{2}", "[\\s\\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
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
