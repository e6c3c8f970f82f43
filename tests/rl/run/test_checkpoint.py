"""Checkpoints: exact state, torn folders detected, all or nothing."""

import json

import numpy as np
import pytest

from rl.run import checkpoint


def state():
    return {
        "posterior": {"alpha": np.array([0.1, 2.0]), "decay": 0.2},
        "draws": np.array([3, 2**62], dtype=np.int64),
        "in_flight": None,
        "history": [{"step": 1, "seeds": np.array([7])}, "text", True],
        "third": 1 / 3,
        "empty": np.zeros(0),
    }


def write(run, step=1, **changes):
    name = f"checkpoint-{step}"
    staging = checkpoint.stage(run, name)
    checkpoint.save_state(staging / name, state() | changes)
    return checkpoint.commit(run, name)


def test_state_comes_back_exactly(tmp_path):
    loaded = checkpoint.load_state(write(tmp_path))
    np.testing.assert_equal(loaded, state())
    assert loaded["draws"].dtype == np.int64
    assert loaded["third"] == 1 / 3  # to the last bit


def test_what_is_neither_array_nor_plain_is_refused_with_its_path(tmp_path):
    with pytest.raises(TypeError, match="state/posterior/bad is a set"):
        checkpoint.save_state(tmp_path, {"posterior": {"bad": {1}}})


def test_a_whole_checkpoint_verifies(tmp_path):
    checkpoint.verify(write(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "not written to the end"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "apportion_state.json").unlink(), "is missing"),
        (lambda f: (f / "apportion_state.json").write_text(""), "has 0 bytes, its manifest says"),
    ],
)
def test_damage_is_found(tmp_path, damage, message):
    folder = write(tmp_path)
    damage(folder)
    with pytest.raises(checkpoint.TornCheckpointError, match=message):
        checkpoint.verify(folder)


def test_a_changed_byte_is_found(tmp_path):
    folder = write(tmp_path)
    path = folder / "apportion_state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoint.TornCheckpointError, match="does not have the checksum"):
        checkpoint.verify(folder)


def test_the_one_before_a_torn_one_is_used_loudly(tmp_path, caplog):
    write(tmp_path, 9)
    (write(tmp_path, 10) / "apportion_state.json").unlink()
    checkpoint.logger.propagate = True
    checkpoint.logger.setLevel("WARNING")
    assert checkpoint.latest_whole(tmp_path).name == "checkpoint-9"  # by number, not by name
    assert "checkpoint-10 is torn and not used" in caplog.text


def test_no_whole_checkpoint_is_an_error_and_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest_whole(tmp_path / "absent") is None
    assert checkpoint.latest_whole(tmp_path) is None
    (write(tmp_path) / "manifest.json").unlink()
    with pytest.raises(checkpoint.TornCheckpointError, match="none of the 1 checkpoints"):
        checkpoint.latest_whole(tmp_path)


def test_a_staged_checkpoint_that_was_never_committed_does_not_exist(tmp_path):
    write(tmp_path, 1)
    staging = checkpoint.stage(tmp_path, "checkpoint-2")
    checkpoint.save_state(staging / "checkpoint-2", state())
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]
    checkpoint.stage(tmp_path, "checkpoint-2")  # what the killed run left is cleared
    assert not list((staging / "checkpoint-2").iterdir())


def test_committing_again_replaces(tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 1, third=0.5)
    assert json.loads((folder / "apportion_state.json").read_text())["third"] == 0.5
    assert not (tmp_path / checkpoint.STAGING).exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    folders = [write(tmp_path, step) for step in (1, 2, 3, 10)]
    checkpoint.rotate(tmp_path, keep=None, best=None)
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    checkpoint.rotate(tmp_path, keep=2, best=str(folders[0]))
    names = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-3", "checkpoint-1"]
