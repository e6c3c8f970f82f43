"""Whatever happens to a file of a run folder, the run goes on from the newest whole checkpoint and says
which file was damaged."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from rl.run import checkpoint, tracking
from tests import tiny

NEWEST = "checkpoint-3"
DEEP = b"[" * 100_000


@pytest.fixture
def told(caplog):
    """The warnings of the modules, as one text."""
    for logger in (checkpoint.logger, tracking.logger):
        logger.propagate = True
        logger.setLevel("WARNING")
    return lambda: caplog.text


@pytest.fixture
def run(tmp_path):
    """A run folder of three whole checkpoints, with every kind of file a run writes."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2, 3):
        name = f"checkpoint-{step}"
        staged = checkpoint.stage(folder, name) / name
        checkpoint.save_state(staged, {"step": step})
        (staged / "config.json").write_text('{"hidden_size": 32}')
        (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (staged / "model.safetensors").write_bytes(bytes(range(256)) * 4)
        (staged / "parts").mkdir()
        (staged / "parts" / "optimizer.bin").write_bytes(b"moments" * 50)
        checkpoint.commit(folder, name)
    (folder / "run.json").write_text(json.dumps({"settings": {"learning_rate": 0.1}}))
    for name in ("metrics.jsonl", "steps.jsonl"):
        lines = [json.dumps({"step": step, "seed": 7}) for step in (1, 2, 3)]
        (folder / name).write_text("".join(line + "\n" for line in lines))
    return folder


def args_of(folder):
    return SimpleNamespace(output_dir=str(folder), if_run_exists="resume", should_save=True)


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :]


def entry(value):
    """A manifest that is right but for one entry."""

    def damage(content):
        manifest = json.loads(content)
        manifest["files"] |= value
        return json.dumps(manifest).encode()

    return damage


def without(name):
    def damage(content):
        manifest = json.loads(content)
        del manifest["files"][name]
        return json.dumps(manifest).encode()

    return damage


MANIFESTS = {
    "no UTF-8": lambda content: flip(content, 60),
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "binary": lambda _: bytes(range(256)),
    "a list": lambda _: b"[]",
    "null": lambda _: b"null",
    "a number": lambda _: b"17",
    "a text": lambda _: b'"files"',
    "nested deep": lambda _: DEEP,
    "no files": lambda _: b"{}",
    "files a list": lambda _: b'{"files": []}',
    "files null": lambda _: b'{"files": null}',
    "files a number": lambda _: b'{"files": 3}',
    "files empty": lambda _: b'{"files": {}}',
    "entry null": entry({"config.json": None}),
    "entry a number": entry({"config.json": 19}),
    "entry a list": entry({"config.json": [19, "abc"]}),
    "entry without size": entry({"config.json": {"blake2b": "abc"}}),
    "entry without checksum": entry({"config.json": {"bytes": 19}}),
    "size negative": entry({"config.json": {"bytes": -1, "blake2b": "abc"}}),
    "size a text": entry({"config.json": {"bytes": "19", "blake2b": "abc"}}),
    "size true": entry({"config.json": {"bytes": True, "blake2b": "abc"}}),
    "checksum null": entry({"config.json": {"bytes": 19, "blake2b": None}}),
    "absolute path": entry({"/etc/hostname": {"bytes": 1, "blake2b": "abc"}}),
    "path upwards": entry({"../run.json": {"bytes": 1, "blake2b": "abc"}}),
    "path empty": entry({"": {"bytes": 1, "blake2b": "abc"}}),
    "path with NUL": entry({"a\0b": {"bytes": 1, "blake2b": "abc"}}),
    "path a surrogate": entry({"\udc80": {"bytes": 1, "blake2b": "abc"}}),
    "path too long": entry({"x" * 5000: {"bytes": 1, "blake2b": "abc"}}),
    "a file more": entry({"other.bin": {"bytes": 1, "blake2b": "abc"}}),
    "state not named": without("apportion_state.json"),
    "arrays not named": without("apportion_state.safetensors"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest_is_told_and_the_checkpoint_before_is_used(run, told, name):
    path = run / NEWEST / "manifest.json"
    path.write_bytes(MANIFESTS[name](path.read_bytes()))
    assert tracking.checkpoint_to_resume(args_of(run), None).name == "checkpoint-2"
    assert f"{NEWEST} is torn and not used" in told()
    assert str(run / NEWEST) in told()


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def as_link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


FILES = (
    "manifest.json",
    "apportion_state.json",
    "apportion_state.safetensors",
    "trainer_state.json",
    "model.safetensors",
    "parts/optimizer.bin",
)
DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a bit": lambda path: path.write_bytes(flip(path.read_bytes(), 4)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": as_folder,
    "a dangling link": as_dangling_link,
    "a link to itself": as_link_to_itself,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_a_checkpoint_is_told_and_the_one_before_is_used(run, told, file, damage):
    DAMAGES[damage](run / NEWEST / file)
    assert checkpoint.latest_whole(run).name == "checkpoint-2"
    assert f"{NEWEST} is torn and not used" in told() and file in told()


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_told(run, told, monkeypatch, file):
    """As the superuser may read everything, the refusal is the test's."""
    denied, read = str(run / NEWEST / file), open

    def refuse(path, *rest, **more):
        if str(path) == denied:
            raise PermissionError(13, "Permission denied", denied)
        return read(path, *rest, **more)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    assert checkpoint.latest_whole(run).name == "checkpoint-2"
    assert f"{NEWEST} is torn and not used" in told() and "Permission denied" in told()


def as_file(folder):
    shutil.rmtree(folder)
    folder.write_text("no folder")


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def renamed(folder):
    """An older checkpoint under a newer name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("checkpoint-1"), folder)


def linked_to_nothing(folder):
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [as_file, emptied, renamed, linked_to_nothing])
def test_a_checkpoint_that_is_none_is_told_and_can_be_written_anew(run, told, damage):
    damage(run / NEWEST)
    assert checkpoint.latest_whole(run).name == "checkpoint-2"
    assert NEWEST in told()
    checkpoint.set_aside(run, after=2)
    checkpoint.save_state(checkpoint.stage(run, NEWEST) / NEWEST, {"step": 3})
    checkpoint.verify(checkpoint.commit(run, NEWEST))
    assert checkpoint.latest_whole(run).name == NEWEST


def test_a_checkpoint_copied_to_another_name_is_whole(run):
    shutil.copytree(run / NEWEST, run.parent / "best")
    checkpoint.verify(run.parent / "best")


def test_two_torn_ones_fall_back_twice_and_all_torn_is_an_error(run, told):
    for name in ("checkpoint-3", "checkpoint-2"):
        (run / name / "manifest.json").write_bytes(b"\xff")
    assert checkpoint.latest_whole(run).name == "checkpoint-1"
    (run / "checkpoint-1" / "manifest.json").write_bytes(b"\xff")
    with pytest.raises(checkpoint.TornCheckpointError, match="none of the 3 checkpoints"):
        checkpoint.latest_whole(run)


RUN_FILES = {
    "empty": b"",
    "cut": b'{"settings": {"learning',
    "zeros": bytes(100),
    "no UTF-8": b'{"settings": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "a text": b'"run"',
    "nested deep": DEEP,
    "settings null": b'{"settings": null}',
    "settings a list": b'{"settings": [1]}',
    "no settings": b'{"prompts": 24}',
    "changes a number": b'{"settings": {}, "changes": 3}',
    "changes of null": b'{"settings": {}, "changes": [null]}',
    "change without step": b'{"settings": {}, "changes": [{"settings": {"a": [1, 2]}}]}',
    "change of one value": b'{"settings": {}, "changes": [{"step": 1, "settings": {"a": 1}}]}',
}


def claim(run, from_step=3):
    about = {"settings": {"learning_rate": 0.1}}
    folder = tracking.RunFolder(str(run))
    return folder.claimed(args_of(run), from_step=from_step, about=about)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_run_json_is_told_and_written_anew(run, told, name):
    (run / "run.json").write_bytes(RUN_FILES[name])
    assert tracking.read_about(run) == {}
    with claim(run):
        pass
    assert json.loads((run / "run.json").read_text())["settings"] == {"learning_rate": 0.1}
    assert f"{run / 'run.json'} is damaged and not used" in told()


LINES = {
    "torn": b'{"step": 2, "se',
    "zeros": bytes(40),
    "binary": bytes(x for x in range(256) if x != 10),
    "no UTF-8": b'{"step": 2, "text": "\xff"}',
    "a list": b"[2]",
    "null": b"null",
    "a number": b"2",
    "a text": b'"step"',
    "no step": b'{"loss": 0.5}',
    "step null": b'{"step": null}',
    "step a text": b'{"step": "2"}',
    "step no number": b'{"step": NaN}',
    "step true": b'{"step": true}',
    "nested deep": DEEP,
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("log", ["metrics.jsonl", "steps.jsonl"])
def test_a_damaged_line_of_a_log_is_told_and_left_out(run, told, log, name):
    path = run / log
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, LINES[name], third, b""]))
    with claim(run):
        assert path.read_bytes() == first + b"\n" + third + b"\n"
    assert f"{path}: left out what is no whole line, in line 2" in told()


def test_zeros_after_the_last_line_are_left_out(run, told):
    path = run / "steps.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    with claim(run):
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [as_folder, as_dangling_link, as_link_to_itself])
@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "steps.jsonl"])
def test_what_is_no_file_is_set_aside(run, told, file, damage):
    damage(run / file)
    with claim(run):
        tracking.RunFolder(str(run)).write_step({"step": 4})
    assert (run / "run.json").is_file()
    assert file in told()


def test_files_in_the_place_of_folders_are_set_aside(run, told):
    for name in ("completions", "images"):
        (run / name).write_text("no folder")
    (run / ".lock").mkdir()
    (run / checkpoint.STAGING).write_text("no folder")
    with claim(run):
        assert not (run / "completions").exists() and (run / ".lock").is_file()
    for name in ("completions", "images", ".lock"):
        assert f"{run / name} is no" in told()
    checkpoint.save_state(checkpoint.stage(run, "checkpoint-4") / "checkpoint-4", {"step": 4})
    checkpoint.verify(checkpoint.commit(run, "checkpoint-4"))


def test_run_json_and_logs_are_on_disk_before_they_get_their_names(run, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append(path.name))
    with claim(run):
        pass
    assert "run.json.tmp" in synced and run.name in synced
    assert synced.index("run.json.tmp") < len(synced) - 1 - synced[::-1].index(run.name)
    assert not list(run.glob("*.tmp"))


@pytest.mark.slow
def test_a_run_with_much_damage_goes_on_as_the_one_without(tmp_path, told):
    settings = {"reward": tiny.small_digit, "save_strategy": "steps", "save_steps": 1}
    settings |= {"trainer": "grpo", "max_steps": 3, "log_level": "warning"}
    whole = tiny.run(tmp_path / "whole", **settings)
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / NEWEST / "manifest.json").write_bytes(b'{"files": \xff}')
    (folder / "run.json").write_bytes(bytes(64))
    (folder / "metrics.jsonl").open("ab").write(b"\0" * 30 + b'\n{"loss": 1}\n')
    os.remove(folder / "steps.jsonl")
    shutil.copy(tmp_path / "whole" / "steps.jsonl", folder / "steps.jsonl")
    with open(folder / "steps.jsonl", "ab") as file:
        file.write(b'{"step": 4, "pro')
    (folder / checkpoint.STAGING).mkdir()
    (folder / checkpoint.STAGING / "checkpoint-9").mkdir()
    again = tiny.run(folder, resume=True, **settings)
    assert tiny.lines(folder) == tiny.lines(tmp_path / "whole")
    ours, theirs = tiny.parameters(again), tiny.parameters(whole)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    for name in ("manifest.json", "run.json", "metrics.jsonl", "steps.jsonl"):
        assert str(folder / name) in told() or f"{NEWEST}/{name}" in told()
    assert json.loads((folder / "run.json").read_text())["resumed_from_step"] == 2
