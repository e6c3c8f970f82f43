"""The tokenizer of the search task, and its chat template with tool calls.

A transcript of two turns, where `<eos>` ends what the policy writes::

    <tools> search</tools><|user|> Who taught Mira Tolen?
    <|assistant|><tool_call>{"name": "search", "arguments": {"query": " Mira Tolen taught"}}</tool_call>
    <eos>
    <|tool|> Mira Tolen was taught by Ivo Hale.
    <|assistant|><answer> Ivo Hale</answer><eos>

without the breaks of lines. Words carry the space before them, so a name is the same tokens wherever
it stands.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerFast

from .. import tiny_model
from .world import DISTRACTORS, QUESTIONS, RELATIONS, WORDS_OF

CALL = ('{"name": "search", "arguments": {"query": "', '"}}')
"""What stands before and after the query of a call, as transformers' templates write JSON."""

TAGS = (
    *("<tools>", "</tools>", "<|user|>", "<|assistant|>", "<|tool|>"),
    *("<tool_call>", "</tool_call>", "<answer>", "</answer>"),
)

CHAT_TEMPLATE = """\
{% if tools %}<tools>{% for tool in tools %} {{ tool.function.name }}{% endfor %}</tools>{% endif %}\
{% for message in messages %}\
{% if message.role == 'assistant' %}<|assistant|>{{ message.content or '' }}\
{% for call in message.tool_calls or [] %}{% set call = call.function or call %}\
<tool_call>{{ {'name': call.name, 'arguments': call.arguments} | tojson }}</tool_call>\
{% endfor %}{{ eos_token }}\
{% elif message.role == 'tool' %}<|tool|>{{ message.content }}\
{% else %}<|user|> {{ message.content }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
"""Earlier messages read the same whatever follows, so a transcript can be made turn by turn."""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": tiny_model.EOS, "content": "text"},
    },
}
"""How transformers' `parse_response` reads what the policy wrote."""


def words() -> list[str]:
    """Every word of the world's names, questions and passages, each once, with its space."""
    texts = [
        *(half for pair in WORDS_OF.values() for half in pair),
        *QUESTIONS.values(),
        *(relation.passage for relation in RELATIONS.values()),
        *(relation.asked for relation in RELATIONS.values()),
        *(passage for *_, passage in DISTRACTORS),
        "search",
    ]
    plain = [text.replace("{s}", " ").replace("{o}", " ").replace("{}", " ") for text in texts]
    return [f" {word}" for word in dict.fromkeys(re.findall(r"[A-Za-z]+", " ".join(plain)))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with a token per word, tag and mark; another word is one unknown token."""
    whole = [*TAGS, *CALL, ".", "?"]
    special = [tiny_model.PAD, tiny_model.EOS]
    pattern = "|".join(
        [*map(re.escape, [*special, *whole]), " ?[A-Za-z]+", " ?[^ <A-Za-z.?]+", "[\\s\\S]"]
    )
    tokenizer = tiny_model.build_tokenizer([*whole, *words()], pattern=pattern, longest=256)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer
