"""Prompts: keys, tokens, and what is said about a row that cannot be used."""

import json

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rollouts.prompts import (
    data_fingerprint,
    ensure_pad_token,
    make_prompts,
    plain_prompts,
    prompt_key,
)

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if not (loop.last and m.role == 'assistant') %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>"]


def tokenizer(*, chat_template=TEMPLATE, pad_token="<pad>", frame=None):
    """One token per character: 'a' is 3 + ord('a') - 32. `frame` adds special tokens around."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + [chr(c) for c in range(32, 127)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if frame is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[("<eos>", 1), ("<bos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        bos_token="<bos>",
        pad_token=pad_token,
        chat_template=chat_template,
    )


def ids(text):
    return tuple(3 + ord(c) - 32 for c in text)


def chat(text, **answer):
    return {"prompt": [{"role": "user", "content": text}], **answer}


def test_a_plain_prompt_keeps_its_text_tokens_and_columns():
    prompts, report = make_prompts([{"prompt": "2+3=", "answer": "5", "level": 1}], tokenizer())
    (prompt,) = prompts
    assert prompt.prompt == "2+3="
    assert prompt.token_ids == ids("2+3=")
    assert prompt.columns == {"answer": "5", "level": 1}
    assert not prompt.is_conversational
    assert (report.rows, report.kept, report.longest, report.tokens) == (1, 1, 4, 4)
    assert "1 of 1 plain prompts kept, 0 dropped and 0 truncated" in str(report)


def test_a_conversation_goes_through_the_chat_template_with_the_generation_prompt():
    row = {"prompt": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]}
    prompts, report = make_prompts([row], tokenizer())
    assert prompts[0].token_ids == ids("[system]Be brief;[user]Hi;[assistant]")
    assert prompts[0].prompt == row["prompt"]
    assert prompts[0].is_conversational and report.is_conversational


def test_a_last_assistant_message_is_continued():
    row = chat("Hi")
    row["prompt"].append({"role": "assistant", "content": "Well"})
    prompts, _ = make_prompts([row], tokenizer())
    assert prompts[0].token_ids == ids("[user]Hi;[assistant]Well")


def test_chat_template_arguments_arrive():
    template = TEMPLATE + "{% if think %}<think>{% endif %}"
    prompts, _ = make_prompts(
        [chat("Hi")], tokenizer(chat_template=template), chat_template_kwargs={"think": True}
    )
    assert prompts[0].token_ids == ids("[user]Hi;[assistant]<think>")


def test_special_tokens_are_added_to_plain_prompts_and_not_twice_to_conversations():
    with_bos = tokenizer(frame="<bos> $A")
    assert make_prompts([{"prompt": "Hi"}], with_bos)[0][0].token_ids == (2, *ids("Hi"))
    assert make_prompts([chat("Hi")], with_bos)[0][0].token_ids == ids("[user]Hi;[assistant]")


def test_a_data_set_gives_the_same_prompts_as_its_rows():
    # A table fills `name` of the first message with None.
    rows = [
        chat("Hi", answer="1"),
        {"prompt": [{"role": "user", "content": "Ho", "name": "Ann"}], "answer": "2"},
    ]
    from_rows, _ = make_prompts(rows, tokenizer())
    from_table, _ = make_prompts(datasets.Dataset.from_list(rows), tokenizer())
    assert [p.key for p in from_table] == [p.key for p in from_rows]
    assert [p.token_ids for p in from_table] == [p.token_ids for p in from_rows]


def test_rows_may_come_from_a_generator():
    prompts, _ = make_prompts(({"prompt": text} for text in "ab"), tokenizer())
    assert [p.prompt for p in prompts] == ["a", "b"]


def test_every_prompt_has_every_column():
    prompts, _ = make_prompts([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}], tokenizer())
    assert [p.columns for p in prompts] == [{"x": 1, "y": None}, {"x": None, "y": 2}]


# Keys


def test_a_key_depends_on_prompt_and_reference_answer_alone():
    key = prompt_key({"prompt": "2+3=", "answer": "5"})
    assert key == prompt_key({"answer": "5", "prompt": "2+3=", "source": "web", "level": None})
    others = [
        {"prompt": "2+3=", "answer": "6"},
        {"prompt": "2+3= ", "answer": "5"},
        {"prompt": "2+3=", "solution": "5"},
        {"prompt": "2+3="},
        {"prompt": "2+3=", "answer": 5},
    ]
    assert len({key, *map(prompt_key, others)}) == 6


@pytest.mark.parametrize("name", ["answer", "solution", "ground_truth", "target", "label"])
def test_every_reference_answer_column_counts(name):
    assert prompt_key({"prompt": "p", name: "1"}) != prompt_key({"prompt": "p", name: "2"})


def test_a_key_is_the_same_in_every_process_and_version():
    # blake2b of {"answer": "5", "prompt": "2+3="}: a changed key would orphan every checkpoint.
    assert prompt_key({"prompt": "2+3=", "answer": "5"}) == "79036ba468eda488a0067708b610a3ee"


def test_a_key_survives_json():
    row = chat("Zürich \ud800?", answer={"b": [1, 2], "a": (3.5, None)})
    assert prompt_key(json.loads(json.dumps(row))) == prompt_key(row)


def test_an_id_column_gives_the_keys():
    rows = [
        {"prompt": "a", "uid": 7},
        {"prompt": "a", "uid": "x"},
        {"prompt": "a", "uid": np.int64(9)},
    ]
    prompts, _ = make_prompts(rows, tokenizer(), id_column="uid")
    assert [p.key for p in prompts] == ["7", "x", "9"]


def test_a_fingerprint_depends_on_keys_and_order():
    assert data_fingerprint(["ab", "c"]) == data_fingerprint(["ab", "c"])
    others = [["a", "bc"], ["c", "ab"], ["abc"], ["ab"], []]
    assert len({data_fingerprint(keys) for keys in [["ab", "c"], *others]}) == 6


# Length


def test_truncation_keeps_the_end_and_is_counted():
    prompts, report = make_prompts(
        [{"prompt": "abcdef"}, {"prompt": "xyz"}],
        tokenizer(),
        max_prompt_length=4,
        overlong="truncate",
    )
    assert [p.token_ids for p in prompts] == [ids("cdef"), ids("xyz")]
    assert prompts[0].prompt == "abcdef"
    assert (report.kept, report.dropped, report.truncated) == (2, 0, 1)
    assert (report.longest, report.tokens) == (6, 7)


def test_dropping_is_counted_and_leaves_the_keys_of_the_rest():
    rows = [{"prompt": "abcdef"}, {"prompt": "xyz"}]
    prompts, report = make_prompts(rows, tokenizer(), max_prompt_length=4, overlong="drop")
    assert [p.key for p in prompts] == [prompt_key(rows[1])]
    assert (report.rows, report.kept, report.dropped, report.truncated) == (2, 1, 1, 0)


def test_a_prompt_of_exactly_the_limit_is_kept_whole():
    prompts, report = make_prompts([{"prompt": "abcd"}], tokenizer(), max_prompt_length=4)
    assert prompts[0].token_ids == ids("abcd")
    assert report.truncated == 0


def test_an_overlong_prompt_is_an_error_that_names_row_length_limit_and_ways_out():
    rows = [{"prompt": "ab"}, {"prompt": "abcdef"}, {"prompt": "abcdefg"}]
    with pytest.raises(ValueError, match="row 1 has 6 tokens, but max_prompt_length is 4") as error:
        make_prompts(rows, tokenizer(), max_prompt_length=4)
    for part in ("2 of 3 rows", "raise max_prompt_length", "'truncate'", "'drop'"):
        assert part in str(error.value)


def test_dropping_every_prompt_is_an_error():
    with pytest.raises(ValueError, match=r"leaves no prompt: all 2 rows .* the shortest has 3"):
        make_prompts(
            [{"prompt": "abc"}, {"prompt": "abcd"}],
            tokenizer(),
            max_prompt_length=2,
            overlong="drop",
        )


# What is wrong with a row


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data set is empty"),
        ({"train": []}, r"one split.*\['train'\]"),
        (["2+3="], r"row 0 is '2\+3='; a row must be a mapping"),
        ([{"prompt": "a"}, {"promt": "b"}], r"row 1 has no column 'prompt'.*nearest: 'promt'"),
        ([{"prompt": "a"}, {"prompt": " \n"}], "row 1 has an empty prompt"),
        ([{"prompt": "a"}, {"prompt": None}], "row 1 has the prompt None of type NoneType"),
        ([{"prompt": 5}], "row 0 has the prompt 5 of type int; write a string or a list"),
        ([{"prompt": []}], r"row 0 has an empty prompt \(\[\]\)"),
        ([chat("Hi"), chat("  ")], "row 1 has an empty prompt"),
        ([{"prompt": ["Hi"]}], "row 0, message 0 is 'Hi'; write a mapping with 'role'"),
        ([{"prompt": [{"content": "Hi"}]}], "row 0, message 0 is .*; write a mapping with 'role'"),
        ([chat(7)], "row 0, message 0 has the content 7 of type int; write a string"),
        ([{"prompt": [{"role": "user"}]}], "row 0, message 0 has the content None"),
        (
            [{"prompt": [{"role": "system", "content": "Hi"}]}],
            "row 0 ends with a message of role 'system'; the last message must be the 'user'",
        ),
        ([{"prompt": "a"}, chat("b")], "row 0 is plain but row 1 is a conversation: write all"),
        ([chat("a"), {"prompt": "b"}], "row 0 is a conversation but row 1 is plain: write all"),
        ([{"prompt": "a", "completions": 1}], "row 0 has a column 'completions'.*rename"),
        (
            [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}],
            r"rows 0 and 2 have the same prompt and reference answer \('a'\).*id_column=",
        ),
        ([{"prompt": "a", "answer": {1, 2}}], "row 0: cannot derive a key.*set.*id_column="),
    ],
)
def test_a_bad_row_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        make_prompts(rows, tokenizer())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "ui": 1}], r"row 0: no id column 'uid'.*nearest: 'ui'"),
        ([{"prompt": "a", "uid": None}], "row 0: id column 'uid' holds None; an id must be"),
        ([{"prompt": "a", "uid": 1.5}], "row 0: id column 'uid' holds 1.5"),
        ([{"prompt": "a", "uid": True}], "row 0: id column 'uid' holds True"),
        ([{"prompt": "a", "uid": ""}], "row 0: id column 'uid' holds ''"),
        (
            [{"prompt": "a", "uid": 1}, {"prompt": "b", "uid": "1"}],
            "rows 0 and 1 have the same id '1'.*make the ids unique",
        ),
    ],
)
def test_a_bad_id_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        make_prompts(rows, tokenizer(), id_column="uid")


def test_tool_calls_may_stand_for_content():
    call = {"role": "assistant", "tool_calls": [{"name": "search"}]}
    messages = [{"role": "user", "content": "Hi"}, call, {"role": "tool", "content": "42"}]
    prompts, _ = make_prompts([{"prompt": messages}], tokenizer())
    assert prompts[0].token_ids[-len("[tool]42;[assistant]") :] == ids("[tool]42;[assistant]")


def test_a_key_needs_a_prompt():
    with pytest.raises(ValueError, match=r"no column 'prompt'; the row's columns are \['answer'\]"):
        prompt_key({"answer": "5"})


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1 or None, got 0"):
        make_prompts([{"prompt": "a"}], tokenizer(), max_prompt_length=0)
    with pytest.raises(ValueError, match="overlong must be 'error', 'truncate' or 'drop', got 'x'"):
        make_prompts([{"prompt": "a"}], tokenizer(), overlong="x")


# What is wrong with the tokenizer


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"no chat template: set tokenizer.chat_template"):
        make_prompts([chat("Hi")], tokenizer(chat_template=None))
    make_prompts([{"prompt": "Hi"}], tokenizer(chat_template=None))


def test_a_chat_template_that_refuses_a_row_names_the_row():
    refuses = "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}x"
    with pytest.raises(ValueError, match="template failed on row 1 of the data set: .*no b"):
        make_prompts([chat("a"), chat("b")], tokenizer(chat_template=refuses))


def test_a_tokenizer_without_pad_token_is_refused():
    message = (
        "no pad token: set tokenizer.pad_token = tokenizer.eos_token .'<eos>'., or --pad_token"
    )
    with pytest.raises(ValueError, match=message):
        make_prompts([{"prompt": "Hi"}], tokenizer(pad_token=None))


def test_ensure_pad_token_sets_the_one_that_is_named():
    bare = tokenizer(pad_token=None)
    assert ensure_pad_token(bare, "<eos>") is bare
    assert bare.pad_token_id == 1
    assert ensure_pad_token(tokenizer()).pad_token_id == 0


def test_ensure_pad_token_adds_nothing_to_the_vocabulary():
    message = r"pad_token '<pads>' is not in .* 98 tokens \(nearest: '<pad>'\).*'<eos>'"
    with pytest.raises(ValueError, match=message):
        ensure_pad_token(tokenizer(pad_token=None), "<pads>")


def test_a_tokenizer_that_ends_prompts_is_refused():
    with pytest.raises(ValueError, match=r"ends the prompt of row 0 with '<eos>'.*add_eos_token"):
        make_prompts([{"prompt": "Hi"}], tokenizer(frame="$A <eos>"))


def test_a_prompt_without_tokens_is_refused():
    silent = tokenizer(chat_template="{# nothing #}")
    with pytest.raises(ValueError, match="row 0 has no tokens: the tokenizer makes nothing of ''"):
        make_prompts([chat("Hi")], silent)


# Prompts that no tokenizer reads


def test_plain_prompts_keep_text_and_columns_and_need_no_tokenizer():
    rows = [{"prompt": "a cat", "colour": "red"}, {"prompt": "a dog", "style": "ink"}]
    prompts, report = plain_prompts(rows)
    assert [p.prompt for p in prompts] == ["a cat", "a dog"]
    assert [p.token_ids for p in prompts] == [(), ()]
    assert [p.columns for p in prompts] == [
        {"colour": "red", "style": None},
        {"colour": None, "style": "ink"},
    ]
    assert (report.rows, report.kept, report.dropped, report.truncated) == (2, 2, 0, 0)
    assert (report.longest, report.tokens, report.is_conversational) == (0, 0, False)


def test_plain_prompts_have_the_keys_of_tokenized_ones():
    rows = [{"prompt": "a cat", "answer": "1"}, {"prompt": "a cat", "answer": "2"}]
    plain, tokenized = plain_prompts(rows)[0], make_prompts(rows, tokenizer())[0]
    assert [p.key for p in plain] == [p.key for p in tokenized]
    named, _ = plain_prompts([row | {"id": f"i{n}"} for n, row in enumerate(rows)], id_column="id")
    assert [p.key for p in named] == ["i0", "i1"]


def test_plain_prompts_may_be_any_iterable_of_mappings():
    table = datasets.Dataset.from_list([{"prompt": "a cat"}, {"prompt": "a dog"}])
    expected = [p.key for p in plain_prompts(list(table))[0]]
    assert [p.key for p in plain_prompts(table)[0]] == expected
    assert [p.key for p in plain_prompts(iter(table))[0]] == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data set is empty"),
        ([{"text": "a"}], "row 0 has no column 'prompt'"),
        ([{"prompt": "a"}, {"prompt": " "}], "row 1 has an empty prompt"),
        ([chat("Hi")], r"row 0 is a conversation \(.*\); write a text"),
        ([{"prompt": "a"}, chat("Hi")], "row 0 is plain but row 1 is a conversation"),
        ([{"prompt": "a"}, {"prompt": "a"}], "rows 0 and 1"),
        ([{"prompt": 3}], "row 0 has the prompt 3 of type int"),
    ],
)
def test_plain_prompts_that_cannot_be_used_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        plain_prompts(rows)


# What the chat template reads beside the messages


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
WITH_TOOLS = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + TEMPLATE


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL])])
def test_the_column_tools_reaches_the_chat_template(given):
    prompts, _ = make_prompts([chat("Hi", tools=given)], tokenizer(chat_template=WITH_TOOLS))
    assert prompts[0].token_ids == ids("<add>[user]Hi;[assistant]")


def test_a_prompt_with_other_tools_is_another_prompt():
    assert prompt_key(chat("Hi", tools=[TOOL])) != prompt_key(chat("Hi"))
    assert (
        prompt_key(chat("Hi", tools=[]))
        == prompt_key(chat("Hi", tools=None))
        == prompt_key(chat("Hi"))
    )


def test_tools_that_the_chat_template_does_not_read_are_warned_about():
    with pytest.warns(UserWarning, match="does not read tools"):
        make_prompts([chat("Hi", tools=[TOOL])], tokenizer())


def test_the_column_chat_template_kwargs_wins_over_the_setting():
    template = TEMPLATE + "{% if think %}<think>{% endif %}{{ more }}"
    rows = [chat("Hi"), chat("Ho", chat_template_kwargs={"think": False, "more": None})]
    prompts, _ = make_prompts(
        rows, tokenizer(chat_template=template), chat_template_kwargs={"think": True, "more": "+"}
    )
    assert prompts[0].token_ids == ids("[user]Hi;[assistant]<think>+")
    assert prompts[1].token_ids == ids("[user]Ho;[assistant]+")


def test_an_argument_that_the_chat_template_does_not_read_is_warned_about():
    with pytest.warns(UserWarning, match="does not read enable_thinkin,"):
        make_prompts([chat("Hi")], tokenizer(), chat_template_kwargs={"enable_thinkin": False})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("a", chat_template_kwargs="x"), "row 0: chat_template_kwargs must be a mapping"),
        (chat("a", chat_template_kwargs={"tokenize": True}), "must not set 'tokenize'"),
        (chat("a", tools="[}"), "row 0: tools is text that is not JSON"),
        (chat("a", tools={"name": "add"}), "row 0: tools must be a list"),
        ({"prompt": "a", "tools": [TOOL]}, "row 0 has a column 'tools'.*plain text"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, "row 0 has a column 'chat_template_kw"),
        (chat("a", image="a.png"), "row 0 has a column 'image', which .* not shown"),
        ({"prompt": "a", "images": ["a.png"]}, "row 0 has a column 'images'"),
        ({"prompt": "a", "audio": {"path": "x"}}, "row 0 has a column 'audio'"),
        (chat([{"type": "image"}]), "row 0, message 0 has a part of type 'image'"),
        (chat([{"type": "text"}]), "row 0, message 0 has the part"),
        (chat(["Hi"]), "row 0, message 0 has the part 'Hi'"),
        (chat([{"type": "text", "text": " "}]), "row 0 has an empty prompt"),
    ],
)
def test_what_the_policy_would_not_read_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        make_prompts([row], tokenizer())


def test_arguments_for_a_template_that_plain_prompts_do_not_have_are_refused():
    with pytest.raises(ValueError, match="chat_template_kwargs=.* no effect on .* plain text"):
        make_prompts([{"prompt": "a"}], tokenizer(), chat_template_kwargs={"think": True})


def test_empty_columns_of_images_and_tools_are_as_none():
    row = {"prompt": "a", "images": [], "image": None, "tools": None}
    assert make_prompts([row], tokenizer())[0][0].token_ids == ids("a")


def test_parts_of_text_are_joined_for_the_template_and_kept_for_the_rewards():
    row = chat([{"type": "text", "text": "2+"}, {"type": "text", "text": "3="}])
    (prompt,), _ = make_prompts([row], tokenizer())
    assert prompt.token_ids == ids("[user]2+3=;[assistant]")
    assert prompt.prompt == row["prompt"]


# A beginning of sequence stands once


def test_a_text_that_begins_with_bos_gets_no_second_one():
    with pytest.warns(UserWarning, match="1 of 2 prompts begin with '<bos>' already"):
        prompts, _ = make_prompts(
            [{"prompt": "<bos>Hi"}, {"prompt": "Ho"}], tokenizer(frame="<bos> $A")
        )
    assert [p.token_ids for p in prompts] == [(2, *ids("Hi")), (2, *ids("Ho"))]


# Rows that repeat


def test_rows_that_repeat_are_dropped_or_kept_apart():
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "a"}]
    with pytest.raises(ValueError, match="rows 0 and 2 .* set duplicates to 'drop' or 'keep'"):
        make_prompts(rows, tokenizer())
    for make in (lambda how: make_prompts(rows, tokenizer(), duplicates=how),
                 lambda how: plain_prompts(rows, duplicates=how)):  # fmt: skip
        dropped, report = make("drop")
        assert [p.prompt for p in dropped] == ["a", "b"]
        assert (report.rows, report.kept, report.dropped, report.repeated) == (4, 2, 2, 2)
        kept, report = make("keep")
        assert [p.prompt for p in kept] == ["a", "b", "a", "a"]
        assert [p.key for p in kept[:2]] == [p.key for p in dropped]
        assert len({p.key for p in kept}) == 4
        assert (report.kept, report.dropped, report.repeated) == (4, 0, 2)
        assert "2 repeat an earlier row" in str(report) or not report.tokens


def test_an_id_that_stands_twice_is_refused_whatever_duplicates_says():
    rows = [{"prompt": "a", "uid": 1}, {"prompt": "b", "uid": 1}]
    with pytest.raises(ValueError, match="rows 0 and 1 have the same id '1'"):
        make_prompts(rows, tokenizer(), id_column="uid", duplicates="keep")
    with pytest.raises(ValueError, match="duplicates must be 'error', 'drop' or 'keep', got 'no'"):
        make_prompts(rows, tokenizer(), duplicates="no")


# Room for the completion


def test_a_prompt_that_leaves_no_room_for_a_completion_is_too_long():
    rows = [{"prompt": "abc"}, {"prompt": "abcdef"}]
    most = {"num_positions": 8, "max_completion_length": 3}
    with pytest.raises(
        ValueError, match="row 1 has 6 tokens, but the model's 8 positions, less max_"
    ):
        make_prompts(rows, tokenizer(), **most)
    assert len(make_prompts(rows, tokenizer(), num_positions=9, max_completion_length=3)[0]) == 2
    assert len(make_prompts(rows, tokenizer(), overlong="drop", **most)[0]) == 1
    cut, _ = make_prompts(rows, tokenizer(), overlong="truncate", max_prompt_length=6, **most)
    assert [len(p.token_ids) for p in cut] == [3, 5]
    with pytest.raises(ValueError, match="max_completion_length=8 leaves no room"):
        make_prompts(rows, tokenizer(), num_positions=8, max_completion_length=8)


# Text that is not text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a\ud800="}, r"row 0, column 'prompt', holds '\\ud800' at character 1, half"),
        (chat("a\udfff"), "row 0, column 'prompt', holds"),
        ({"prompt": "a", "answer": ["1", {"b": "\ud800"}]}, "row 0, column 'answer', holds"),
        ({"prompt": "a", 3: "x"}, "row 0 has a column 3; the name must be text"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_row_and_column(row, message):
    with pytest.raises(ValueError, match=message):
        make_prompts([row], tokenizer())


def test_deep_nesting_is_refused_by_row_and_column():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="row 1, column 'answer', is nested more than 100 levels"):
        make_prompts([{"prompt": "a"}, {"prompt": "b", "answer": deep}], tokenizer())


def test_a_row_that_knows_where_it_was_read_is_named_by_it():
    class Row(dict):
        where = "prompts.jsonl, line 7"

    with pytest.raises(ValueError, match=r"row 1 \(prompts.jsonl, line 7\) has an empty prompt"):
        make_prompts([{"prompt": "a"}, Row(prompt=" ")], tokenizer())
