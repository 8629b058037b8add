"""A graph behind the interface: greedy decoding over a function from token ids to the logits of the last one.

With a cache a step gives the graph one new token; without one it gives it the whole text again, which is what such a
graph costs whoever decodes with it, and the notes say so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmops.errors import ModelError
from llmops.measure.workload import Timing

__all__ = ["GraphRunning", "attended", "beside", "file_in", "positions"]

Array = Any  # numpy array


@dataclass
class GraphRunning:
    """forward(ids (batch, new), past) -> logits (batch, vocabulary) of the last position; past: tokens in the cache.

    reset: forget the cache. cached: whether there is one.
    """

    forward: Callable[[Array, int], Array]
    reset: Callable[[], None]
    cached: bool

    def sync(self) -> None:
        """A call returns when it is done."""

    def prefill(self, prompt: Tensor) -> Array:
        self.reset()
        return self._next(prompt.numpy().astype(np.int64), 0)

    def request(self, prompt: Tensor, new_tokens: int) -> Timing:
        self.reset()
        ids = prompt.numpy().astype(np.int64)
        began = time.perf_counter()
        token = self._next(ids, 0)
        marks = [time.perf_counter()]
        for _ in range(new_tokens - 1):
            past = ids.shape[1]
            ids = np.concatenate([ids, token], axis=1)
            token = self._next(token if self.cached else ids, past if self.cached else 0)
            marks.append(time.perf_counter())
        return Timing(marks[0] - began, marks[-1] - marks[0],
                      [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)])

    def _next(self, ids: Array, past: int) -> Array:
        return self.forward(ids, past).argmax(axis=-1)[:, None].astype(np.int64)


def file_in(model: str, name: str, runtime: str) -> Path:
    """The graph's file: given itself, or in a folder (also in its onnx/). Raises ModelError when there is none."""
    given = Path(model).expanduser()
    places = [given] if given.suffix == Path(name).suffix else [given / name, given / "onnx" / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ModelError(f"{model}: runtime {runtime} needs {name} there; write one with `llmops export`, or give the "
                         "file itself")
    return found


def beside(file: Path) -> tuple[list[str] | None, set[int], int | None, int]:
    """(pieces, special ids, context, bytes of the weights) from the plain JSON that lies by the graph."""
    folder = next((place for place in (file.parent, file.parent.parent) if (place / "tokenizer.json").is_file()),
                  file.parent)
    size = sum(path.stat().st_size for path in file.parent.glob(f"{file.stem}*"))
    config = _json(folder / "config.json")
    body = _json(folder / "tokenizer.json")
    context = config.get("max_position_embeddings")
    if not body:
        return None, set(), context, size
    vocabulary = body["model"]["vocab"]
    numbered = ({place: piece[0] for place, piece in enumerate(vocabulary)} if isinstance(vocabulary, list)
                else {number: piece for piece, number in vocabulary.items()})
    added = body.get("added_tokens") or []
    numbered |= {one["id"]: one["content"] for one in added}
    return ([numbered.get(number, "") for number in range(max(numbered) + 1)], {one["id"] for one in added}, context,
            size)


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def positions(ids: Array, past: int) -> Array:
    """(batch, new) positions of the new tokens."""
    return np.broadcast_to(np.arange(past, past + ids.shape[1]), ids.shape).astype(np.int64)


def attended(ids: Array, past: int) -> Array:
    """(batch, past + new) ones: nothing is padded."""
    return np.ones((ids.shape[0], past + ids.shape[1]), dtype=np.int64)

