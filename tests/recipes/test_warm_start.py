"""The warm start that embedded tasks share: when it is made, and what it leaves; the tiny model."""

import pytest
import torch

from recipes import warm_start as module
from recipes.arithmetic.task import TASK
from recipes.tiny_model import build_model
from recipes.warm_start import SETTINGS_FILE, WarmStart, warm_start


def tiny(**changes):
    return WarmStart(
        **{"steps": 2, "rows": 40, "batch_size": 4, "hidden_size": 16, "num_layers": 1}
        | {"num_heads": 2, "validation": 2}
        | changes
    )


@pytest.fixture
def training(monkeypatch):
    """Counts trainings; each writes a small file in place of a model."""
    made = []

    def train(task, scratch, folder, settings, *, quiet):
        made.append(settings)
        folder.mkdir()
        (folder / "model.safetensors").write_text(str(settings.seed))

    monkeypatch.setattr(module, "_train", train)
    return made


def test_a_finished_warm_start_is_not_made_again(tmp_path, training):
    folder = warm_start(TASK, tmp_path / "model", tiny(), quiet=True)
    assert warm_start(TASK, folder, tiny(), quiet=True) == folder
    assert len(training) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_other_settings_replace_the_folder_and_say_why(tmp_path, training, capsys):
    folder = warm_start(TASK, tmp_path / "model", tiny(), quiet=True)
    warm_start(TASK, folder, tiny(seed=7))
    assert "made anew, because seed was 0, now 7" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_text() == "7"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_damaged_folder_is_made_anew(tmp_path, training, capsys):
    folder = warm_start(TASK, tmp_path / "model", tiny(), quiet=True)
    (folder / "model.safetensors").write_text("")
    warm_start(TASK, folder, tiny())
    assert "it is damaged" in capsys.readouterr().err
    assert len(training) == 2


def test_a_failed_training_leaves_the_old_folder_and_no_trace(tmp_path, training, monkeypatch):
    folder = warm_start(TASK, tmp_path / "model", tiny(), quiet=True)

    def fail(task, scratch, new, settings, *, quiet):
        new.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_train", fail)
    with pytest.raises(KeyboardInterrupt):
        warm_start(TASK, folder, tiny(seed=1), quiet=True)
    assert (folder / "model.safetensors").read_text() == "0"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_something_else_is_not_touched(tmp_path, training):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=f"has no {SETTINGS_FILE}, so it is not a warm start"):
        warm_start(TASK, tmp_path, tiny(), quiet=True)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_the_model_is_a_function_of_its_seed_and_leaves_torch_alone():
    tokenizer = TASK.build_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build_model(tokenizer, seed=seed, num_layers=1) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    weights = [m.model.embed_tokens.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.config.eos_token_id == tokenizer.eos_token_id
