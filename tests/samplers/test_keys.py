import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from samplers.keys import fingerprint, rollout_seeds, stable_hash, step_generator


def test_the_hash_never_changes():
    # A changed value would give every run other rollouts and refuse every checkpoint.
    assert stable_hash() == 0xE4A6A0577479B2B4
    assert stable_hash(0, "a", 7) == 0x892324DC8E880242
    assert rollout_seeds(3, "key", 1, [0, 1]).tolist() == [5560590162149071130, 1544431286347374950]
    assert fingerprint(["a", "b"]) == "c1b694b33ef2c3e3"


def test_by_hand():
    # Tag, length in eight bytes, encoding: "é" is two bytes of UTF-8, -12 is three of ASCII.
    encoded = b"s" + bytes(7) + b"\x02" + b"\xc3\xa9" + b"i" + bytes(7) + b"\x03" + b"-12"
    expected = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    assert f"{stable_hash('é', -12):016x}" == expected


@pytest.mark.slow
def test_the_hash_does_not_depend_on_the_process():
    program = "from samplers.keys import stable_hash; print(stable_hash('prompt é', 5))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": salt},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for salt in ("0", "1")
    }
    assert outputs == {f"{stable_hash('prompt é', 5)}\n"}


def test_parts_do_not_run_into_each_other():
    hashes = [
        stable_hash("ab", "c"),
        stable_hash("a", "bc"),
        stable_hash("abc"),
        stable_hash("abc", ""),
        stable_hash("1"),
        stable_hash(1),
        stable_hash(-1),
        stable_hash(11),
        stable_hash(1, 1),
    ]
    assert len(set(hashes)) == len(hashes)


def test_integers_of_numpy_and_python_are_the_same_part():
    assert stable_hash(np.int64(-3), np.uint8(7)) == stable_hash(-3, 7)


@pytest.mark.parametrize("part", [1.0, None, b"a", np.float64(2)])
def test_other_parts_are_refused(part):
    with pytest.raises(TypeError, match="must be strings or integers, got"):
        stable_hash(part)


def test_seeds_are_distinct_over_key_draw_and_slot():
    seeds = np.concatenate(
        [
            rollout_seeds(run, key, draw, range(16))
            for run in (0, 1)
            for key in ("a", "b", "1")
            for draw in range(20)
        ]
    )
    assert len(np.unique(seeds)) == 2 * 3 * 20 * 16
    assert seeds.dtype == np.int64
    assert seeds.min() >= 0


def test_a_seed_belongs_to_its_slot_and_not_to_its_place():
    whole = rollout_seeds(5, "a", 2, range(8))
    np.testing.assert_array_equal(rollout_seeds(5, "a", 2, [6, 0, 3]), whole[[6, 0, 3]])
    assert rollout_seeds(5, "a", 2, []).shape == (0,)


def test_seeds_are_the_upper_63_bits_of_the_hash():
    assert rollout_seeds(5, "a", 2, [9]).tolist() == [stable_hash(5, "a", 2, 9) // 2]


def test_a_step_redraws_its_numbers_and_shares_them_with_no_other():
    def numbers(*arguments):
        return tuple(step_generator(*arguments).random(4))

    assert numbers(0, "select", 3) == numbers(0, "select", 3)
    others = [(0, "select", 4), (1, "select", 3), (0, "epoch", 3)]
    assert len({numbers(0, "select", 3), *(numbers(*other) for other in others)}) == 4


def test_the_fingerprint_tells_data_sets_and_row_orders_apart():
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"]) != fingerprint(["a", "b", "c"])
