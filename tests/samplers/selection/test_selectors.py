import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.selection.selectors import UniformSelector, _next

UNUSED = np.random.default_rng(0)


def choices(selector, num_prompts, calls):
    return [selector.select(num_prompts, generator=UNUSED).tolist() for _ in range(calls)]


def flat(calls):
    return [row for call in calls for row in call]


@pytest.mark.slow
@given(
    sizes=st.integers(1, 9).flatmap(
        lambda total: st.tuples(st.just(total), st.lists(st.integers(1, total), max_size=20))
    ),
    seed=st.integers(0, 5),
)
def test_every_epoch_visits_every_prompt_once_and_no_call_repeats_one(sizes, seed):
    num_prompts, calls = sizes
    selector = UniformSelector(num_prompts, seed=seed)
    visits = np.zeros(num_prompts, dtype=int)
    for size in calls:
        chosen = selector.select(size, generator=UNUSED)
        assert chosen.dtype == np.int64
        assert len(np.unique(chosen)) == len(chosen) == size
        visits[chosen] += 1
        # A prompt may run at most one epoch ahead of another.
        assert visits.max() - visits.min() <= 2
    waiting = selector.state_dict()["waiting"]
    visits[waiting] += 1
    # With what is left of the epoch everyone has been visited once an epoch.
    assert (visits == selector.state_dict()["epoch"] + 1).all()


@pytest.mark.slow
@given(data=st.data(), size=st.integers(2, 7), seed=st.integers(0, 3))
def test_excluded_prompts_are_owed_their_visit(data, size, seed):
    selector, kept = UniformSelector(size, seed=seed), UniformSelector(size, seed=seed)
    visits = np.zeros(size, dtype=int)
    for _ in range(data.draw(st.integers(1, 12))):
        exclude = data.draw(st.lists(st.integers(0, size - 1), max_size=size - 1, unique=True))
        count = data.draw(st.integers(1, size - len(exclude)))
        chosen = selector.select(count, generator=UNUSED, exclude=exclude)
        assert len(set(chosen.tolist()) - set(exclude)) == count
        again = kept.select(count, generator=UNUSED, exclude=exclude)
        assert chosen.tolist() == again.tolist()
        restored = UniformSelector(size, seed=seed)
        restored.load_state_dict(kept.state_dict())
        kept = restored
        visits[chosen] += 1
    state = selector.state_dict()
    np.add.at(visits, state["waiting"], 1)
    np.add.at(visits, state["owed"], 1)
    # With what is left and what is owed, everyone has been visited once an epoch.
    assert (visits == state["epoch"] + 1).all()


def test_an_excluded_prompt_comes_first_once_it_is_free():
    order = UniformSelector(4, seed=0)._order(0).tolist()
    selector = UniformSelector(4, seed=0)
    assert selector.select(3, generator=UNUSED, exclude=[order[0]]).tolist() == order[1:]
    assert selector.select(1, generator=UNUSED).tolist() == [order[0]]
    assert (
        selector.select(2, generator=UNUSED, exclude=[order[0]]).tolist()
        == [row for row in UniformSelector(4, seed=0)._order(1).tolist() if row != order[0]][:2]
    )


def test_the_order_is_a_function_of_seed_and_epoch_and_not_of_the_step_size():
    by_two, by_three = UniformSelector(6, seed=1), UniformSelector(6, seed=1)
    epochs = flat(choices(by_two, 2, 6))
    assert epochs == flat(choices(by_three, 3, 4))
    assert epochs[:6] != epochs[6:]
    assert epochs[:6] != flat(choices(UniformSelector(6, seed=2), 2, 3))


def test_a_prompt_met_again_at_the_end_of_an_epoch_waits_for_the_next_call():
    # 5 prompts by 3: the second call takes the last 2 of epoch 0 and 1 of epoch 1.
    selector = UniformSelector(5, seed=0)
    first = selector._order(0).tolist()
    second = selector._order(1).tolist()
    fresh = next(row for row in second if row not in first[3:])
    rest = [row for row in second if row != fresh]
    assert choices(selector, 3, 3) == [first[:3], [*first[3:], fresh], rest[:3]]


def test_first_places_are_shared_evenly():
    # 3000 seeds, 5 prompts: 600 each, standard deviation sqrt(3000 * .2 * .8) = 22.
    first = [choices(UniformSelector(5, seed=seed), 1, 1)[0][0] for seed in range(3000)]
    assert np.abs(np.bincount(first) - 600).max() < 4 * 22


def test_a_restart_at_any_call_goes_on_bit_for_bit():
    whole = choices(UniformSelector(7, seed=3), 3, 12)
    for kill in range(12):
        killed, restored = UniformSelector(7, seed=3), UniformSelector(7, seed=3)
        choices(killed, 3, kill)
        restored.load_state_dict(killed.state_dict())
        assert choices(restored, 3, 12 - kill) == whole[kill:]


def test_with_keys_a_shuffle_of_the_rows_changes_nothing():
    keys = [f"prompt {i}" for i in range(11)]
    shuffled = [keys[i] for i in np.random.default_rng(0).permutation(11)]
    chosen = choices(UniformSelector(11, seed=0, keys=keys), 4, 9)
    again = choices(UniformSelector(11, seed=0, keys=shuffled), 4, 9)
    assert chosen != again
    assert [[keys[i] for i in call] for call in chosen] == [
        [shuffled[i] for i in call] for call in again
    ]


def test_what_is_handed_out_is_the_callers_to_change():
    selector, other = UniformSelector(4, seed=0), UniformSelector(4, seed=0)
    selector.select(2, generator=UNUSED)[:] = 0
    other.select(2, generator=UNUSED)
    assert choices(selector, 2, 3) == choices(other, 2, 3)


def test_it_says_what_is_wrong():
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        UniformSelector(0, seed=0)
    with pytest.raises(ValueError, match=r"in \[1, 3\], the size of the data set, got 4"):
        choices(UniformSelector(3, seed=0), 4, 1)
    with pytest.raises(ValueError, match=r"in \[1, 3\], the size of the data set, got 0"):
        choices(UniformSelector(3, seed=0), 0, 1)
    with pytest.raises(ValueError, match="must be 3 distinct ones, got 3 of which 2 are distinct"):
        UniformSelector(3, seed=0, keys=["a", "b", "a"])
    with pytest.raises(ValueError, match="the state belongs to another data set"):
        UniformSelector(3, seed=0).load_state_dict(UniformSelector(4, seed=0).state_dict())


def test_a_long_queue_is_passed_over_as_if_looked_through_whole():
    generator = np.random.default_rng(0)
    for _ in range(200):
        often = generator.integers(
            0, 6, generator.integers(0, 100)
        )  # the same rows again and again
        queue = np.concatenate([often, generator.integers(0, 60, generator.integers(1, 60))])
        passed_over = generator.choice(60, generator.integers(0, 50), replace=False)
        count = int(generator.integers(1, 9))
        expected, seen = [], set(passed_over.tolist())
        places = []
        for place, row in enumerate(queue.tolist()):
            if row not in seen and len(expected) < count:
                expected.append(row)
                places.append(place)
                seen.add(row)
        taken, rest = _next(queue, count, passed_over)
        assert taken.tolist() == expected
        assert rest.tolist() == np.delete(queue, places).tolist()


@pytest.mark.parametrize("waiting", [[1, 1], [-1], [5]])
def test_a_uniform_state_of_other_rows_is_refused(waiting):
    selector = UniformSelector(5, seed=0)
    with pytest.raises(ValueError, match=r"waiting must be distinct rows in \[0, 5\)"):
        selector.load_state_dict({"epoch": 0, "waiting": waiting, "owed": []})
