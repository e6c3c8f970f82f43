"""docs/methods.md says what the records say."""

from pathlib import Path

from rl.config.methods import METHODS
from rl.config.methods_table import TITLES, table

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_of_methods_is_made_of_the_records():
    told = "run: python -m rl.config.methods_table > docs/methods.md"
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == table(), told


def test_it_has_every_stage_and_every_file_exists():
    assert {*TITLES} == {*METHODS}
    for methods in METHODS.values():
        for method in methods.values():
            assert not method.file or (ROOT / method.file).is_file(), method.name
