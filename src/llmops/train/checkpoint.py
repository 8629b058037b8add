"""A state that a killed run goes on from as if nothing had happened.

What a training depends on, once its data and settings are given: the trained parameters, the optimizer, and the step
it is at (the order of the rows follows from the seed, the learning rate from the step, the random numbers of a step
from seed, step and rank). All of it lies in one folder, `step-000123`, as safetensors and JSON, never a pickle. A
checkpoint is written beside its place, flushed to the disk and renamed: a kill at any moment leaves the one before it.

The first checkpoint is written after the first step, so that a disk or a folder that cannot take it is found in the
first minute and not at the end. After that, one every `every_s` seconds, and less often where writing one takes long:
it gets at most a twentieth of the time. How often changes nothing that is computed.

    trained.safetensors     the parameters that require a gradient, by name
    optimizer.safetensors   its tensors as `index.name`; plain numbers of it stand in state.json
    best.safetensors        the parameters at the lowest held-out loss so far, where there is one
    state.json              step, losses, tokens, energy and time so far, stopping
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from llmops.errors import StoreError

__all__ = ["Checkpoints", "Saved"]

SHARE = 0.05  # of the time, for writing checkpoints


@dataclass
class Saved:
    """What a checkpoint holds. `state`: anything JSON can hold."""

    trained: dict[str, Tensor]
    optimizer: dict[Any, dict[str, Any]]  # as `torch.optim.Optimizer.state_dict()["state"]`
    state: dict[str, Any]
    best: dict[str, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training, in a folder of their own. Keeps the newest."""

    def __init__(self, folder: Path, every_s: float = 60.0, every_steps: int | None = None) -> None:
        self.folder, self.every_s, self.every_steps = folder, every_s, every_steps
        self._last = float("-inf")
        self._took = 0.0

    def due(self, step: int) -> bool:
        """Whether a checkpoint should follow step `step` (counted from 1). The first call is always due."""
        if self.every_steps is not None:
            return self._last == float("-inf") or step % self.every_steps == 0
        return time.monotonic() - self._last >= max(self.every_s, self._took / SHARE)

    def save(self, step: int, saved: Saved) -> None:
        """Write one and drop the ones before it. Raises StoreError when it cannot be written."""
        from safetensors.torch import save_file

        place, began = self.folder / f"step-{step:06d}", time.monotonic()
        scratch = self.folder / f".{place.name}.{os.getpid()}"
        try:
            for left in [*self.folder.glob(".step-*"), place]:  # of a process that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
            scratch.mkdir(parents=True)
            tensors, numbers = _flat(saved.optimizer)
            save_file(_own(saved.trained), scratch / "trained.safetensors")
            save_file(_own(tensors), scratch / "optimizer.safetensors")
            if saved.best:
                save_file(_own(saved.best), scratch / "best.safetensors")
            body = json.dumps({"step": step, "optimizer": numbers, "state": saved.state})
            (scratch / "state.json").write_text(body, encoding="utf-8")
            for path in (*scratch.iterdir(), scratch):
                _sync(path)
            scratch.rename(place)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{place}: the checkpoint could not be written ({error}); expected a folder that can be "
                             "written to and room for the checkpoint; free some disk or name another place with "
                             "--runs, and run the same command again: what was finished is kept, and it goes on from "
                             "the last checkpoint") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for older in self._all()[:-1]:
            shutil.rmtree(older, ignore_errors=True)
        self._last = time.monotonic()
        self._took = self._last - began

    def latest(self) -> tuple[int, Saved] | None:
        """(step, what was saved); None when there is none. Raises StoreError when it cannot be read."""
        from safetensors.torch import load_file

        found = self._all()
        if not found:
            return None
        folder = found[-1]
        try:
            body = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            best = folder / "best.safetensors"
            saved = Saved(load_file(folder / "trained.safetensors"),
                          _nested(load_file(folder / "optimizer.safetensors"), body["optimizer"]), body["state"],
                          load_file(best) if best.exists() else {})
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise StoreError(f"{folder}: the checkpoint cannot be read ({error}); remove the folder, the training "
                             "then starts from its beginning") from error
        return int(body["step"]), saved

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, or what it gave an earlier attempt: a JSON value that a resumed training must not redo."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = make()
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(value), encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            raise StoreError(f"{path}: could not be written ({error}); expected a folder that can be written to; free "
                             "some disk or name another place with --runs") from error
        return value

    def discard(self) -> None:
        """Forget all of it: the training is done and its result is stored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, whole, and sharing no memory, as safetensors wants them; copied only where they are not so yet."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        storage = held.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != held.nbytes:
            held = held.clone()
        seen.add(held.untyped_storage().data_ptr())
        found[name] = held
    return found


def _flat(state: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors and plain values by dotted name (8-bit optimizers nest it)."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            below = _flat(value, f"{prefix}{key}.")
            tensors |= below[0]
            numbers |= below[1]
        else:
            numbers[f"{prefix}{key}"] = value
    return tensors, numbers


def _nested(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    state: dict[Any, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        index, *names, last = key.split(".")
        place = state.setdefault(int(index), {})
        for name in names:
            place = place.setdefault(name, {})
        place[last] = value
    return state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
