"""docs/from-trl.md has every key of TRL's GRPOConfig, and what it says of each is so."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig

from recipes.arguments import RecipeArguments
from rl import RolloutConfig

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "from-trl.md").read_text()
DEFAULTS, KEYS = (
    dict(re.findall(r"^\| (.+?) \| (.+) \|$", part, flags=re.MULTILINE))
    for part in TEXT.split("## Defaults that differ")[1].split("## Every key of")
)
BASE = {f.name for f in fields(TrainingArguments)}


def default(field):
    return field.default if field.default is not MISSING else field.default_factory()


TRL = {f.name: default(f) for f in fields(GRPOConfig)}
OURS = {f.name: default(f) for f in fields(RolloutConfig)}
SETTINGS = {*OURS, *(f.name for kind in (RecipeArguments, ModelConfig) for f in fields(kind))}
ANSWER = {name.strip("`"): text for name, text in KEYS.items() if name.startswith("`")}


def test_every_key_of_trl_is_in_the_table_and_no_other():
    assert set(ANSWER) == set(TRL) - BASE


@pytest.mark.parametrize("name", [n for n, text in ANSWER.items() if text == "same"])
def test_what_is_called_the_same_is_the_same(name):
    assert OURS[name] == TRL[name]


@pytest.mark.parametrize("name", [n for n, text in ANSWER.items() if text.startswith("same")])
def test_what_has_the_same_name_is_a_setting(name):
    assert name in OURS


@pytest.mark.parametrize("name", [n for n, text in ANSWER.items() if text.startswith("`")])
def test_an_answer_begins_with_a_setting_of_ours(name):
    setting = re.match(r"`(\w+)", ANSWER[name]).group(1)
    assert setting in SETTINGS


def test_every_default_that_differs_is_explained():
    text = " ".join(DEFAULTS) + " ".join(t for t in ANSWER.values() if t != "same")
    differ = {n for n in OURS.keys() & TRL.keys() if OURS[n] != TRL[n]}
    unexplained = {n for n in differ if f"`{n}`" not in text and ANSWER.get(n, "same") == "same"}
    assert unexplained == set()
