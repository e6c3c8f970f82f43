"""The tokenizer of the arithmetic task."""

from __future__ import annotations

import re
import string

from transformers import PreTrainedTokenizerFast

from .. import tiny_model

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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer over phrases, two-digit numbers and printable characters; it loses nothing.

    The text is cut into the phrases of the prompts, pairs of digits, and single characters. So a
    problem is 6 to 20 tokens and a solution 4 to 30, and a sum up to 99 is one token. What is not
    printable ASCII or a newline becomes the unknown token.
    """
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    pairs = [f"{number:02d}" for number in range(100)]
    pattern = "|".join([*(re.escape(phrase) for phrase in PHRASES), "[0-9]{2}", "[\\s\\S]"])
    return tiny_model.build_tokenizer([*PHRASES, *pairs, *characters], pattern=pattern, longest=128)
