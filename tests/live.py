"""How many bytes of tensors live at a time: the memory of an algorithm by its structure, no matter the allocator."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within, `peak` is the most bytes that tensors made within took at one time; views count with what they show.

    Tensors laid over a file (`Tensor.set_` to a mapped storage) do not count, nor what one op takes inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
        made = func(*args, **(kwargs or {}))
        if "set_" not in str(func):
            for leaf in tree_leaves(made):
                if _counts(leaf) and leaf.untyped_storage()._cdata not in given:
                    self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes or not size:
            return
        self.sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu"


def test_it_counts_what_lives_and_forgets_what_does_not() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.ones(500).add_(1)[10:]
        view = kept[5:]
    assert live.peak == 6000 and live.now == 4000 and len(view) == 995
    del kept, view
    assert live.now == 0
