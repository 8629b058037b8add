"""The cost of what several students share, split among them.

A teacher's pass over the data is paid once and serves all students that read its signals. So each is charged with an
equal part, and with what the teacher did beside it alone:

    E_row = E_own + sum over what it shares of E_shared / users
    E_teacher = E_beside + the same sum                            (the first is part of E_own)

users: the students of the recipe that read it, and every other build that has by then. A row is written once: a student
that comes later, from another recipe, is charged with a smaller part, and those before it are not paid back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmops.measure.cost import total
from llmops.quantity import Quantity

__all__ = ["charged", "teacher_cost"]


def charged(manifest: Mapping[str, Any], users: Callable[[str], int]) -> Quantity:
    """Joules of building what the manifest tells of. users: how many share the folder of that key."""
    own = Quantity.from_dict(manifest["cost"]["energy_j"])
    parts = _parts(manifest, users)
    return total([own, *parts]) if parts else own


def teacher_cost(manifest: Mapping[str, Any], users: Callable[[str], int]) -> Quantity | None:
    """Joules of the teacher for this student; None where there was none."""
    teaching = manifest.get("teaching") or {}
    parts = _parts(manifest, users)
    if not teaching and not parts:
        return None
    beside = [Quantity.from_dict(teaching["energy_j"])] if teaching else []
    real = [part for part in beside if part.value != 0 or not parts]
    return total([*real, *parts])


def _parts(manifest: Mapping[str, Any], users: Callable[[str], int]) -> list[Quantity]:
    return [_split(Quantity.from_dict(entry["energy_j"]), max(1, users(entry["key"])), entry["what"])
            for entry in manifest.get("shared") or []]


def _split(whole: Quantity, users: int, what: str) -> Quantity:
    if whole.value is None:
        return Quantity.null("J", f"{what}: {whole.method}")
    return Quantity(whole.value / users, "J", whole.provenance,
                    f"{what}, {whole.value:.4g} J, split over {users} builds; {whole.method}")
