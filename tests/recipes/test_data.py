"""Reading prompts from files and folders, bringing them into shape, holding some out."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from recipes.data import load_rows, split_validation
from rollouts.prompts import prompt_key

ROWS = [{"prompt": "2+3=", "answer": "5"}, {"prompt": "4+4=", "answer": "8"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def jsonl(tmp_path):
    """A function that writes rows to a .jsonl file and returns its path."""
    return lambda *rows: write_jsonl(tmp_path / "prompts.jsonl", rows)


# Kinds of files and folders


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    for ending in ("parquet", "csv", "json", "jsonl"):
        assert load_rows(tmp_path / f"a.{ending}") == ROWS, ending
        assert load_rows(str(tmp_path / f"a.{ending}"), limit=1) == ROWS[:1], ending


def test_blank_lines_and_a_byte_order_mark_are_not_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "Zürich"}\n\n  \n{"prompt": "b"}', encoding="utf-8")
    assert load_rows(path) == [{"prompt": "Zürich"}, {"prompt": "b"}]


def test_a_csv_field_may_hold_commas_quotes_and_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n"a, ""b""\nc",5\n')
    assert load_rows(path) == [{"prompt": 'a, "b"\nc', "answer": "5"}]


def test_a_saved_data_set_and_its_splits(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": table, "test": table.select([1])})
    splits.save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "one", split="whatever") == ROWS
    assert load_rows(tmp_path / "two") == ROWS
    assert load_rows(tmp_path / "two", split="test") == ROWS[1:]
    with pytest.raises(
        ValueError, match=r"no split 'tests' \(nearest: 'test'\); it has \['test', 'train'\]"
    ):
        load_rows(tmp_path / "two", split="tests")


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path):
    write_jsonl(tmp_path / "part-1.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "part-0.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert load_rows(tmp_path) == ROWS


def test_a_folder_whose_files_name_splits_gives_the_split(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "held out"}])
    assert load_rows(tmp_path) == ROWS
    assert load_rows(tmp_path, split="test") == [{"prompt": "held out"}]
    with pytest.raises(ValueError, match=r"belongs to the split 'dev'; there are \['test.jsonl', "):
        load_rows(tmp_path, split="dev")


def test_a_hub_data_set_is_asked_for_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("openai/gsm8k", config="main", split="test") == ROWS
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_no_connection_is_said_clearly(monkeypatch, tmp_path):
    def load_dataset(*arguments, **settings):
        raise ConnectionError("Couldn't reach 'gsm8' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    message = (
        r"'gsm8' is no file or folder here \(nearest: 'gsm8k'\), and loading it from the hub "
        r"failed: Couldn't reach .* \(OfflineModeIsEnabled\).*HF_HUB_OFFLINE.*\.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        load_rows("gsm8")


# Shape


def test_columns_are_renamed(jsonl):
    path = jsonl({"question": "2+3=", "solution": "5", "level": 1})
    rows = load_rows(path, prompt_column="question", answer_column="solution")
    assert rows == [{"prompt": "2+3=", "answer": "5", "level": 1}]


def test_a_column_that_had_the_name_before_is_replaced(jsonl):
    path = jsonl({"prompt": "old", "question": "new", "answer": "long", "short": "5"})
    rows = load_rows(path, prompt_column="question", answer_column="short")
    assert rows == [{"prompt": "new", "answer": "5"}]


def test_a_dot_reaches_into_a_column(jsonl):
    path = jsonl({"prompt": "2+3=", "reward_model": {"ground_truth": "5"}})
    (row,) = load_rows(path, answer_column="reward_model.ground_truth")
    assert row["answer"] == "5"
    assert row["reward_model"] == {"ground_truth": "5"}


def test_a_template_makes_the_prompt(jsonl):
    path = jsonl({"question": "2+3", "digits": 1, "answer": "5"})
    (row,) = load_rows(path, prompt_template=r"{question} in \boxed{{}}, {digits} digit:")
    assert row["prompt"] == r"2+3 in \boxed{}, 1 digit:"
    assert row["answer"] == "5"


def test_a_template_may_wrap_the_prompt_column(jsonl):
    (row,) = load_rows(jsonl({"prompt": "2+3"}), prompt_template="Q: {prompt}\nA:")
    assert row == {"prompt": "Q: 2+3\nA:"}


def test_text_is_not_a_template_itself(jsonl):
    (row,) = load_rows(jsonl({"prompt": "{answer} {", "answer": "5"}), prompt_template="{prompt}!")
    assert row["prompt"] == "{answer} {!"


def test_a_system_prompt_makes_a_conversation(jsonl):
    (row,) = load_rows(jsonl({"prompt": "2+3"}), system_prompt="Be brief")
    assert row["prompt"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "2+3"},
    ]
    messages = [{"role": "user", "content": "2+3"}]
    (row,) = load_rows(jsonl({"prompt": messages}), system_prompt="Be brief")
    assert row["prompt"] == [{"role": "system", "content": "Be brief"}, *messages]
    (row,) = load_rows(jsonl({"prompt": "2+3"}), conversational=True)
    assert row["prompt"] == messages


# What is wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"a\.jsonl, line 3: not JSON \(Expecting"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', r"a\.jsonl, line 2: a list; every line must be"),
        ("a.jsonl", "", r"a\.jsonl' has no rows"),
        ("a.json", "[]", r"a\.json' has no rows"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', r"a\.json, line 2: .*name it \.jsonl"),
        ("a.json", '{"prompt": "a"}', r"a\.json holds a dict; it must be a list of objects"),
        ("a.json", '[{"prompt": "a"}, 3]', r"a\.json, row 1: a int; it must be an object"),
        ("a.csv", "prompt,answer\na,5\nb\n", r"a\.csv, line 3: .* differs from the 2 of the head"),
        ("a.csv", "prompt,answer\na,5,6\n", r"a\.csv, line 2: the number of fields differs"),
        ("a.csv", "prompt,answer\n", r"a\.csv' has no rows"),
        ("a.parquet", "PAR?", r"a\.parquet is not a parquet file"),
        ("a.xml", "2+3", r"cannot read '.*a\.xml': the name must end in one of \.jsonl, \.json"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_a_missing_file_is_answered_with_the_nearest(jsonl):
    folder = jsonl(*ROWS).parent
    message = r"no file or folder '.*promts\.jsonl' \(nearest: '.*prompts\.jsonl'\)"
    with pytest.raises(ValueError, match=message):
        load_rows(folder / "promts.jsonl")
    # The first part of the path that is wrong is the one that is put right.
    wrong = folder.parent / (folder.name + "x") / "prompts.jsonl"
    with pytest.raises(ValueError, match=rf"\(nearest: '{folder}'\)"):
        load_rows(wrong)
    with pytest.raises(ValueError, match="no file or folder './data'"):
        load_rows("./data")


def test_a_folder_without_data_is_said(tmp_path):
    (tmp_path / "README.md").write_text("not data")
    with pytest.raises(ValueError, match="holds no saved data set and no file that ends in one of"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"prompt": "a"}, {"promt": "b"}],
            {},
            r"row 1 .* has no column 'prompt' \(nearest: 'promt'\); its columns are \['promt'\]",
        ),
        (
            ROWS,
            {"answer_column": "answers"},
            r"row 0 .* has no column 'answers' \(nearest: 'answer'",
        ),
        (ROWS, {"answer_column": "answer.x"}, "row 0 .* has no column 'answer.x'"),
        (ROWS, {"limit": 0}, "limit must be at least 1 or None, got 0"),
        (
            ROWS,
            {"prompt_template": "{promt}"},
            r"row 0 .* has no column 'promt' \(nearest: 'prompt'",
        ),
        (ROWS, {"prompt_template": "{prompt"}, r"malformed \(.*a literal brace is doubled"),
        (ROWS, {"prompt_template": r"{prompt} \boxed{}"}, "a field without a plain column name"),
        (ROWS, {"prompt_template": "{prompt!r}"}, "a field without a plain column name"),
        (ROWS, {"prompt_template": "prompt"}, "names no column; a column stands in braces"),
        (
            [{"prompt": "a", "x": None}],
            {"prompt_template": "{x}"},
            "row 0 .*: the column 'x' of the prompt template holds None; it must be text or a number",
        ),
        (
            ROWS,
            {"prompt_template": "{answer}", "prompt_column": "answer"},
            r"both say what the prompt is: leave out prompt_column and write \{answer\}",
        ),
        (
            [{"prompt": [{"role": "system", "content": "Hi"}]}],
            {"system_prompt": "Ho"},
            r"row 0 .* has a system message already \('Hi'\): leave out system_prompt",
        ),
        ([{"prompt": 5}], {"system_prompt": "Ho"}, "row 0 .* has the prompt 5 of type int"),
    ],
)
def test_a_bad_row_or_setting_is_named(jsonl, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        load_rows(jsonl(*rows), **settings)


# Holding out


def questions(number):
    return [{"prompt": f"question {i}", "answer": str(i)} for i in range(number)]


def test_a_split_covers_the_rows_and_shares_no_prompt():
    rows = questions(100)
    training, validation = split_validation(rows, 30, seed=0)
    assert (len(training), len(validation)) == (70, 30)
    assert sorted(training + validation, key=rows.index) == rows
    assert not {prompt_key(r) for r in training} & {prompt_key(r) for r in validation}
    assert training == sorted(training, key=rows.index)
    assert validation == sorted(validation, key=rows.index)


def test_a_draw_depends_on_the_seed_and_not_on_the_order():
    rows = questions(100)
    _, validation = split_validation(rows, 30, seed=0)
    _, of_reversed = split_validation(rows[::-1], 30, seed=0)
    _, of_other_seed = split_validation(rows, 30, seed=1)
    assert of_reversed[::-1] == validation
    assert of_other_seed != validation


def test_a_smaller_validation_set_is_part_of_a_larger_one():
    _, small = split_validation(questions(100), 10, seed=3)
    _, large = split_validation(questions(100), 30, seed=3)
    assert all(row in large for row in small)


def test_every_prompt_is_equally_likely_to_be_held_out():
    rows = questions(10)
    trials, size = 2000, 3
    counts = [0] * 10
    for seed in range(trials):
        for row in split_validation(rows, size, seed=seed)[1]:
            counts[int(row["answer"])] += 1
    # Each count has mean 600 and standard error sqrt(2000 * 0.3 * 0.7) = 20.5; this is 4 of them.
    assert all(abs(count - 600) < 82 for count in counts)


def test_rows_with_one_key_stay_together():
    rows = questions(10) * 2
    training, validation = split_validation(rows, 4, seed=0)
    assert (len(training), len(validation)) == (12, 8)
    assert not [row for row in validation if row in training]


def test_an_id_column_is_the_key():
    rows = [{"prompt": "same", "uid": i} for i in range(4)]
    training, validation = split_validation(rows, 1, seed=0, id_column="uid")
    assert (len(training), len(validation)) == (3, 1)


def test_nothing_may_be_held_out_and_something_must_be_left():
    assert split_validation(questions(3), 0, seed=0) == (questions(3), [])
    for number in (-1, 3):
        message = f"leave a prompt to train on, got {number} of 3 distinct prompts"
        with pytest.raises(ValueError, match=message):
            split_validation(questions(3), number, seed=0)


def test_a_text_file_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('\ufeffa red circle\n\n  two cats, "asleep"  \n', encoding="utf-8")
    assert load_rows(path) == [{"prompt": "a red circle"}, {"prompt": 'two cats, "asleep"'}]


# Files that no one meant


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "prompt,answer\nok,1\ncaf\xe9,1\n".encode("latin-1"),
            "line 3: the byte 0xe9 is not",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: the byte 0xff is not UTF-8"),
        ("a.json", b'[{"prompt": "\xff"}]', "line 1: the byte 0xff is not UTF-8"),
        ("a.txt", b"ok\nok\n\xe9\n", "line 3: the byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.csv", gzip.compress(b"prompt\na\n", mtime=0), "compressed with gzip"),
        ("a.jsonl", b"PK\x03\x04...", "a zip archive"),
        ("a.jsonl", b"PAR1....", "a parquet file: name it .parquet"),
        ("a.parquet", b"PAR1 and no more", "is not a parquet file that can be read"),
        (
            "a.csv",
            "prompt,answer,prompt\n1,2,3\n",
            "line 1: the name 'prompt' stands twice in the header",
        ),
        ("a.csv", 'prompt\n"never closed\nb\n', "after line 1: not CSV"),
        (
            "a.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            "line 1: the name 'prompt' stands twice in one",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": {"b": 1, "b": 2}}',
            "line 1: the name 'b' stands twice",
        ),
        ("a.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "line 2: nested too deep"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.jsonl", '{"prompt": ' + "1" * 5000 + "}", "line 1: Exceeds the limit"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_rows(written(tmp_path, name, content))
    assert str(tmp_path / name) in str(error.value)


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: the name 'prompt' stands twice"):
        load_rows(tmp_path / "a.parquet")


def test_a_long_field_of_a_csv_file_is_read(tmp_path):
    (row,) = load_rows(written(tmp_path, "a.csv", "prompt,answer\n" + "a" * 140_000 + ",1\n"))
    assert len(row["prompt"]) == 140_000


def test_a_message_that_is_text_is_named(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"prompt": ["x"]}\n')
    with pytest.raises(
        ValueError, match=r"row 0 .*a.jsonl, line 1\) has the message 'x' of type str"
    ):
        load_rows(path, system_prompt="s")


def test_a_row_says_where_it_stands_also_after_the_split_of_validation(tmp_path):
    lines = "".join(json.dumps({"prompt": f"p{i}", "answer": str(i)}) + "\n\n" for i in range(4))
    rows = load_rows(written(tmp_path, "a.jsonl", lines))
    assert [row.where for row in rows] == [
        f"{tmp_path / 'a.jsonl'}, line {n}" for n in (1, 3, 5, 7)
    ]
    training, held_out = split_validation(rows, 1, seed=0)
    assert all(
        row.where.endswith(f"line {2 * int(row['answer']) + 1}") for row in training + held_out
    )
