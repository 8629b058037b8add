"""Rows that say the same, word for word or nearly (Broder 1997, "On the resemblance and containment of documents").

    resemblance of two texts = |A and B| / |A or B|          A, B: their runs of three words ("shingles")

All pairs would be quadratic. A text's MinHash signature is the smallest hash of its shingles under each of 128 hash
functions; two texts agree in one place with exactly their resemblance as probability. Signatures are cut into bands of
r places; texts that agree in a whole band are candidates, and only they are compared in full, so nothing is left out
that does not resemble an earlier row that far. A pair right at a threshold t is missed with (1 - t^r)^(128 / r); r is
the largest with which that stays below a thousandth. Texts of fewer than three words are one shingle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["first_of_their_kind", "repetition", "resemblance", "shingles"]

HASHES, RUN = 128, 3
MISSED = 1e-3  # share of the pairs right at the threshold that may be missed; of those above it, fewer


def words(text: str) -> list[str]:
    """The words of a text in small letters, punctuation apart."""
    return re.findall(r"\w+", text.lower())


def shingles(text: str, run: int = RUN) -> frozenset[str]:
    """All runs of `run` words; the whole text where it has fewer, or no words at all."""
    found = words(text)
    if len(found) < run:
        return frozenset([" ".join(found) or text])
    return frozenset(" ".join(found[at:at + run]) for at in range(len(found) - run + 1))


def resemblance(a: frozenset[str], b: frozenset[str]) -> float:
    """|a and b| / |a or b|."""
    return len(a & b) / len(a | b)


def repetition(text: str, run: int = 4) -> float:
    """Share of the runs of `run` words that stand earlier in the same text already; 0 for a text of fewer words."""
    found = words(text)
    runs = [tuple(found[at:at + run]) for at in range(len(found) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def first_of_their_kind(texts: Sequence[str], most: float) -> tuple[list[int], int, int]:
    """(indices that are kept, equal ones left out, near ones left out): a text is left out when it equals an earlier
    one that was kept, or resembles one more than `most`. most = 1: only equal ones."""
    kept: list[int] = []
    equal = near = 0
    seen: set[str] = set()
    bands: dict[tuple[int, bytes], list[int]] = {}
    sets: dict[int, frozenset[str]] = {}
    factors, width = _factors(), _rows_a_band(most)
    for index, text in enumerate(texts):
        if text in seen:
            equal += 1
            continue
        seen.add(text)
        if most < 1:
            mine = shingles(text)
            keys = _bands(mine, factors, width)
            rivals = dict.fromkeys(rival for key in keys for rival in bands.get(key, ()))
            if any(resemblance(mine, sets[rival]) > most for rival in rivals):
                near += 1
                continue
            sets[index] = mine
            for key in keys:
                bands.setdefault(key, []).append(index)
        kept.append(index)
    return kept, equal, near


def _factors() -> npt.NDArray[np.uint64]:
    """(2, HASHES): a and b of the hash functions h -> (a h + b) mod 2^64, the same on every machine."""
    drawn = [int.from_bytes(hashlib.blake2b(f"{name}{number}".encode(), digest_size=8).digest(), "little")
             for name in "ab" for number in range(HASHES)]
    return np.array(drawn, dtype=np.uint64).reshape(2, HASHES) | np.uint64(1)


def _rows_a_band(most: float) -> int:
    return next((rows for rows in (8, 4, 2) if (1 - most**rows) ** (HASHES // rows) < MISSED), 1)


def _bands(found: frozenset[str], factors: npt.NDArray[np.uint64], width: int) -> list[tuple[int, bytes]]:
    """The bands of a signature. Multiplication wraps at 64 bits; the upper half of the product is the hash."""
    hashed = np.array([int.from_bytes(hashlib.blake2b(each.encode(), digest_size=8).digest(), "little")
                       for each in found], dtype=np.uint64)
    with np.errstate(over="ignore"):
        signature = ((hashed[:, None] * factors[0] + factors[1]) >> np.uint64(32)).min(0)
    return [(at, signature[at:at + width].tobytes()) for at in range(0, HASHES, width)]
