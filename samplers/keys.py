"""Keys, seeds and generators that depend on names and never on positions.

A prompt is known by its key (a content hash or a data-set id), a group of rollouts by its draw key
(prompt key, draw number), a rollout by (run seed, prompt key, draw number, slot). All of them are
hashed with BLAKE2b, so they agree between processes, machines and Python versions; Python's own
`hash` is salted per process and is not used. Axis: n rollouts of one prompt.
"""

import hashlib
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray


def stable_hash(*parts: str | SupportsIndex) -> int:
    """Hash of a sequence of strings and integers, the same in every process.

        BLAKE2b-64 of  tag | length of the encoding, 8 bytes | encoding,  part after part

    The length prefix keeps ("ab", "c") apart from ("a", "bc"), the tag keeps "1" apart from 1.

    Args:
        parts: strings and integers (Python's or NumPy's), in an order that matters.

    Returns:
        An integer in [0, 2**64). No parts at all is a sequence too and has a hash.

    Raises:
        TypeError: if a part is neither a string nor an integer. A float is refused because two
            ways of computing one number need not give the same bits.
    """
    return int.from_bytes(_digested(hashlib.blake2b(digest_size=8), parts).digest(), "big")


def _digested(digest: "hashlib.blake2b", parts: Sequence[str | SupportsIndex]) -> "hashlib.blake2b":
    """The digest, having taken in the parts."""
    for part in parts:
        if isinstance(part, str):
            tag, encoded = b"s", part.encode("utf-8", "surrogatepass")
        else:
            try:
                tag, encoded = b"i", str(operator.index(part)).encode("ascii")
            except TypeError:
                raise TypeError(
                    f"parts of a key must be strings or integers, got {part!r} "
                    f"of type {type(part).__name__}"
                ) from None
        digest.update(tag + len(encoded).to_bytes(8, "big") + encoded)
    return digest


def rollout_seeds(run_seed: int, key: str, draw: int, slot_n: ArrayLike) -> NDArray[np.int64]:
    """Seed of each rollout of one draw of one prompt.

        seed = stable_hash(run_seed, key, draw, slot) // 2

    A rollout keeps its seed whatever else is in the batch and whichever process runs it. Halving
    leaves 63 bits, so that a seed is a non-negative int64 and every library takes it.

    Args:
        run_seed: seed of the run.
        key: prompt key.
        draw: how often the prompt had been drawn before this draw.
        slot_n: (n,) integer places within the draw; a second round continues the first's.

    Returns:
        (n,) int64 seeds in [0, 2**63), in the order of `slot_n`. No slots give no seeds.
    """
    # Seeds differ in their last part only, so the others are taken in once.
    common = _digested(hashlib.blake2b(digest_size=8), (run_seed, key, draw))
    hashes = [
        int.from_bytes(_digested(common.copy(), (slot,)).digest(), "big")
        for slot in np.asarray(slot_n).tolist()
    ]
    return np.array([seed >> 1 for seed in hashes], dtype=np.int64)


def step_generator(run_seed: int, purpose: str, step: int) -> np.random.Generator:
    """Fresh generator for one purpose at one step.

    A resumed step redraws the same numbers because the generator depends on nothing but the
    arguments: there is no generator state to save. The bit generator is named (PCG64) because
    NumPy may change its default one.

    Args:
        run_seed: seed of the run.
        purpose: what the numbers are for, for example "select"; purposes do not share numbers.
        step: step of the run, or an epoch for what happens once an epoch.
    """
    return np.random.Generator(np.random.PCG64(stable_hash(run_seed, purpose, step)))


def fingerprint(keys: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that name a data set: the hash of its keys in row order.

    Row order is part of it because saved arrays are indexed by row.
    """
    return f"{stable_hash(*keys):016x}"
