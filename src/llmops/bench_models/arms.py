"""What is compared: `NAME=RUNTIME:MODEL` on the command line, an arm here.

MODEL is a folder, a file, a hub id, builtin:tiny, or RUN/VARIANT of a run in the store. What lies behind it is hashed,
so that a result is known to be of these weights and a changed folder is measured again: every file by name, size and
content, of files over 2 MiB the first and last MiB. A hub id is taken by its name, which is what it says of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmops.bench_models.runtimes import RUNTIMES, check
from llmops.errors import LlmopsError, unknown
from llmops.store import Store
from llmops.stored import zeros_save

__all__ = ["Arm", "arms", "fingerprint", "zeros"]

MIB = 1 << 20
DEFAULT = "llmops"


@dataclass(frozen=True)
class Arm:
    """name: in tables; runtime: one of RUNTIMES; model: what it opens; sha256: of what lies there, None of a hub id."""

    name: str
    runtime: str
    model: str
    sha256: str | None

    def as_dict(self) -> dict[str, str | None]:
        return {"name": self.name, "runtime": self.runtime, "model": self.model, "sha256": self.sha256}


def arms(given: Sequence[str], runs: str | None = None) -> list[Arm]:
    """The arms, in the order given. Raises LlmopsError for an unknown or missing runtime, a folder that is not there,
    and a name given twice."""
    found = [_arm(one, runs) for one in given]
    if not found:
        raise LlmopsError("no model was given; expected at least one as [NAME=][RUNTIME:]MODEL")
    names = [arm.name for arm in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LlmopsError(f'two models are called "{twice}"; give one of them another name, as other=RUNTIME:MODEL')
    return found


def _arm(given: str, runs: str | None) -> Arm:
    head, equals, tail = given.partition("=")
    name, rest = (head, tail) if equals and "/" not in head and ":" not in head else ("", given)
    runtime, colon, model = rest.partition(":")
    if not colon or runtime == "builtin":
        runtime, model = DEFAULT, rest
    elif runtime not in RUNTIMES:
        if "/" in runtime or len(runtime) == 1:  # a path, with or without a drive
            runtime, model = DEFAULT, rest
        else:
            raise LlmopsError(unknown("runtime", runtime, RUNTIMES))
    check(runtime)
    if not model or (equals and not head):
        raise LlmopsError(f'given "{given}"; expected [NAME=][RUNTIME:]MODEL, as w4=llmops:runs/demo/tuned-w4')
    place = _place(model, runtime, runs)
    label = name or f"{Path(model.removeprefix('builtin:')).name}-{runtime}"
    return Arm(label, runtime, str(place) if place is not None else model, fingerprint(place) if place else None)


def _place(model: str, runtime: str, runs: str | None) -> Path | None:
    """Where it lies; None for a hub id."""
    if model.startswith("builtin:"):
        from llmops.models.builtin import local_folder

        return local_folder(model)
    given = Path(model).expanduser()
    if given.exists():
        return given.resolve()
    linked = Store(runs).runs / model
    if linked.exists():
        return linked.resolve()
    is_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    home = Store(runs).runs
    if not is_id or runtime not in ("llmops", "transformers", "vllm") or (home / given.parts[0]).is_dir():
        raise LlmopsError(f"{model}: is not there, neither as a path nor as RUN/VARIANT in {home}; expected a folder, "
                          "a file, builtin:tiny, RUN/VARIANT, or a hub id for llmops, transformers and vllm")
    return None


def zeros(arm: Arm) -> str | None:
    """What the single zeros of a variant are worth; None of what has none, and of what no run of llmops made."""
    record = Path(arm.model) / "llmops.json"
    return zeros_save(json.loads(record.read_text(encoding="utf-8")), record.parent) if record.is_file() else None


def fingerprint(place: Path) -> str:
    """SHA-256 over names, sizes and contents (see the top of the file)."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    whole = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        name = path.name if place.is_file() else str(path.relative_to(place))
        if name == "README.md":  # a model card, written again whenever its run is
            continue
        whole.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= 2 * MIB:
                whole.update(file.read())
            else:
                whole.update(file.read(MIB))
                file.seek(-MIB, 2)
                whole.update(file.read(MIB))
    return whole.hexdigest()
