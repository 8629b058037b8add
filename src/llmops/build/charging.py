"""What a build has cost, and who is charged with what it shares with others.

    own       all attempts, less what went into folders that others use, too (`shared.py`)
    beside    what the teacher took of it, running beside the student: its share of the time, so an estimate
    shared    the whole cost of each such folder, whoever made it; a row is charged with its part (`measure/sharing.py`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmops.build.attempts import Spent
from llmops.build.job import Work
from llmops.build.shared import Shared
from llmops.quantity import Quantity, weakest

__all__ = ["cost_of"]

#: What a row is told of a folder's manifest.
TOLD = ("k", "vocabulary", "temperature", "dtype", "bytes_per_token", "tokens", "rows", "counts", "rows_sha256",
        "answers", "teacher")


def cost_of(spent: Spent, wall_s: float, work: Work, written: Mapping[str, Shared], key: str) -> dict[str, Any]:
    """The groups `cost`, `teaching` and `shared` of a manifest. wall_s: of the attempt that finished; written: data
    that a teacher wrote, by name; key: of the build."""
    shared = [*work.shared, *((f"data {name}", folder) for name, folder in written.items())]
    own_s, own_j = spent.wall_s, spent.energy_j
    for _, folder in shared:
        made_s, made_j = folder.cost(by=key)
        if made_s.value:
            own_s, own_j = _less(own_s, made_s), _less(own_j, made_j)
    teaching = dict(work.teaching)
    if teaching:
        share = min(1.0, teaching["beside_s"] / max(1e-9, wall_s))
        teaching["energy_j"] = _part(spent.energy_j, share).as_dict()
    return {"cost": {"wall_s": own_s.as_dict(), "energy_j": own_j.as_dict(), "flops": work.flops.as_dict(),
                     "tokens": Quantity.measured(work.tokens, "tokens", "tokens run through the model").as_dict()},
            "teaching": teaching, "shared": [_entry(what, folder) for what, folder in shared]}


def _entry(what: str, folder: Shared) -> dict[str, Any]:
    wall, energy = folder.cost()
    manifest = folder.manifest() or {}
    said: dict[str, Any] = {name: manifest[name] for name in TOLD if name in manifest}
    return {"what": what, "key": folder.folder.name, "wall_s": wall.as_dict(), "energy_j": energy.as_dict(),
            "bytes": folder.size(), **said}


def _less(whole: Quantity, part: Quantity) -> Quantity:
    if whole.value is None or part.value is None:
        return whole if whole.value is None else Quantity(
            whole.value, whole.unit, whole.provenance, f"{whole.method}; with what others use, too ({part.method})")
    return Quantity(max(0.0, whole.value - part.value), whole.unit, weakest([whole.provenance, part.provenance]),
                    f"{whole.method}; without what others use, too", n=whole.n)


def _part(whole: Quantity, share: float) -> Quantity:
    if whole.value is None or share == 0:
        return whole if whole.value is None else Quantity(0.0, "J", "constant", "the teacher did not run in this build")
    return Quantity(whole.value * share, "J", "estimated", f"the {share:.1%} of the time in which the teacher ran; "
                                                          f"{whole.method}")
