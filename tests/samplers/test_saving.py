"""States on disk without pickle: exact, whole or absent, and nothing that executes."""

import pickle
import warnings

import numpy as np
import pytest

import samplers
from samplers.allocation import gvm, neyman
from samplers.ledger import Ledger
from samplers.planner import Planner
from samplers.posterior import BetaPosterior
from samplers.refill import Refill
from samplers.saving import load_state, save_state
from samplers.selection import ThompsonSelector, UniformSelector


def same(a, b):
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)  # repr: NaN, and -0.0


@pytest.mark.parametrize("selector", ["vade", "uniform"])
def test_a_planner_saved_anywhere_goes_on_exactly(tmp_path, selector):
    def make():
        posterior = BetaPosterior(9)
        made = ThompsonSelector(posterior) if selector == "vade" else UniformSelector(9, seed=1)
        return Planner(
            posterior, made, neyman, scale=gvm, keys=[f"ключ {i}" for i in range(9)],
            prompts_per_step=4, rollouts_per_step=16, pilot=2,
        )  # fmt: skip

    def go(planner, rounds):
        for _ in range(rounds):
            proposal = planner.propose()
            generator = np.random.default_rng(proposal.seed_N.tolist())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reward_N = generator.normal(size=len(proposal.seed_N))
                planner.observe(proposal, reward_N, proposal.prompt_N)
            planner.observe_gradient_norms(proposal.index_P[:2], [1.0, 2.0])
        planner.propose()
        return planner

    for cut in range(4):
        first, second = go(make(), cut), make()
        save_state(tmp_path / "planner", first.state_dict())
        state = load_state(tmp_path / "planner")
        assert same(state, first.state_dict())
        second.load_state_dict(state)
        assert same(go(second, 4 - cut).state_dict(), go(make(), 4).state_dict())


def test_ledger_refill_and_posterior_come_back_exactly(tmp_path):
    ledger, refill, posterior = Ledger(), Refill(2, max_drawn=4, at_cap="pad"), BetaPosterior(3)
    ledger.begin(3)
    ledger.drawn(3, tokens=2**60)
    ledger.seconds("reward", 0.1)
    refill.begin(0)
    refill.finish(refill.dispatch("a", 0), [0.1, 0.2], tokens=3)
    refill.dispatch("b", 7)
    posterior.observe([0, 2], [0.1, 1 / 3], [1, 2])
    state = {"ledger": ledger.state_dict(), "refill": refill.state_dict()}
    state["posterior"] = posterior.state_dict()
    samplers.save_state(tmp_path / "state.npz", state)
    loaded = samplers.load_state(tmp_path / "state.npz")
    assert same(loaded, state)
    for fresh, name in ((Ledger(), "ledger"), (BetaPosterior(3), "posterior")):
        fresh.load_state_dict(loaded[name])
        assert same(fresh.state_dict(), state[name])
    again = Refill(2, max_drawn=4, at_cap="pad")
    again.load_state_dict(loaded["refill"])
    assert same(again.state_dict(), state["refill"])


@pytest.mark.parametrize(
    "value",
    [
        {}, [], None, True, 0, -(10**30), 0.1, -0.0, float("nan"), float("-inf"), "é\ud800\n",
        {"__array__": 0}, {"__float__": "nan"}, {"__dict__": {"__dict__": 1}}, {"plain": [[], {}]},
        np.zeros(0), np.array(3.5), np.array([[1, 2]], dtype=np.int8), np.array([True, False]),
        np.array(["a", "bcd"]), np.arange(4, dtype=np.uint64), np.array([np.nan, -0.0]),
        {"a": [np.arange(2), {"b": np.arange(3)}]},
    ],
    ids=repr,
)  # fmt: skip
def test_every_value_comes_back_exactly(tmp_path, value):
    save_state(tmp_path / "s", value)
    assert same(load_state(tmp_path / "s"), value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [{1, 2}]}, r"state\['a'\]\[0\] is a set"),
        ({"a": {3: 1}}, r"state\['a'\] has the key 3; keys must be strings"),
        (np.array([None]), "state is an array of object"),
        (np.array([b"x"]), "array of .S1"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_the_old_file(tmp_path, value, message):
    save_state(tmp_path / "s", 1)
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path / "s", value)
    assert load_state(tmp_path / "s") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    save_state(tmp_path / "s", 1)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        save_state(tmp_path / "s", 2)
    assert load_state(tmp_path / "s") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_damaged_and_foreign_files_are_refused_and_nothing_executes(tmp_path):
    path = tmp_path / "s"
    save_state(path, {"a": np.arange(1000)})
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    np.savez(tmp_path / "other.npz", x=np.arange(3))
    other = (tmp_path / "other.npz").read_bytes()
    for content in (b"", whole[:-100], bytes(changed), b"{}", pickle.dumps({"a": 1}), other):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or holds no state"):
            load_state(path)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none")
