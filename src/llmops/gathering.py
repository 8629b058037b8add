"""What the walk measures of the inputs of linear layers: the statistics, who shares an input, and the passes.

A statistic is added up by a forward hook, in float32 or wider whatever the model's dtype, so that the input itself is
never kept. Layers that see the very same tensor (q, k and v; gate and up) are measured once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.block_stream import Stream, finite, instead, passing
from llmops.errors import LlmopsError, StepError, unknown
from llmops.models.expert_names import expert_of
from llmops.models.experts import Routing, covered

__all__ = ["AT_ONCE", "STATISTICS", "Named", "Turn", "measure", "measure_outside", "statistic_of", "turns_of"]

Named = Sequence[tuple[str, nn.Linear]]
Turn = Sequence[Named]  # groups of layers that are measured in one pass; those of a group see the very same tensor


class _Norm:
    """(in,) L2 norm of each input feature over all tokens."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        self.total = self.total + x.float().square().sum(0).double()

    def result(self, tokens: int) -> Tensor:
        return torch.as_tensor(self.total).sqrt().float()


class _AbsMax:
    """(in,) largest |x| of each input feature."""

    def __init__(self) -> None:
        self.peak: Tensor | None = None

    def add(self, x: Tensor) -> None:
        peak = x.abs().amax(0).float()
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def result(self, tokens: int) -> Tensor:
        assert self.peak is not None
        return self.peak


class _Hessian:
    """(in, in) H = 2/N sum_t x_t x_t^T, float32: the Hessian of the layer's squared output error (GPTQ, OBS)."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        wide = x.float()
        if self.total is None:
            self.total = wide.t() @ wide
        else:
            self.total.addmm_(wide.t(), wide)

    def result(self, tokens: int) -> Tensor:
        assert self.total is not None
        return self.total.mul_(2.0 / tokens)  # the only one: it is in^2


STATISTICS: dict[str, Callable[[], Any] | None] = {"none": None, "x_norm": _Norm, "x_absmax": _AbsMax,
                                                   "hessian": _Hessian}


AT_ONCE = 2 << 30  # bytes that the statistics of one turn of experts may take


class _Reached(Exception):
    """Ends a forward pass of which the rest is not needed."""


class _Gather:
    """Adds up one linear layer's statistic through a forward hook; with `stop`, the pass ends there."""

    def __init__(self, name: str, layer: nn.Linear, make: Callable[[], Any], stop: bool = False) -> None:
        self.name, self.tokens, self.statistic, self.stop = name, 0, make(), stop
        self.handle = layer.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        self.tokens += x.shape[0]
        self.statistic.add(x)
        if self.stop:
            raise _Reached

    def result(self, routing: Routing) -> Tensor | None:
        """The statistic; None for the layer of an expert that saw too few tokens."""
        self.handle.remove()
        if not routing.enough(self.name, self.tokens):
            return None
        if not self.tokens:
            raise StepError(f"{self.name}: no calibration token reached this layer; expected every linear layer to be "
                            f"used. Give more data, or name the layer in ignore")
        value: Tensor = self.statistic.result(self.tokens)
        return finite(value, f"{self.name}: the input activations hold")


def statistic_of(name: str) -> Callable[[], Any] | None:
    if name not in STATISTICS:
        raise LlmopsError(unknown("statistic", name, STATISTICS))
    return STATISTICS[name]


def turns_of(stream: Stream, index: int, layers: Named) -> list[Turn]:
    """The layers in the order in which they run; those that see the very same tensor in one group, one group a turn.

    The experts of a layer that do the same take a turn together; one that no token reached is a group of its own there.
    """
    groups: list[tuple[Tensor, int, list[tuple[str, nn.Linear]]]] = []  # tensors are held, so none is another's heir
    left = dict(layers)

    def note(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if name not in left:
            return
        for other, version, group in groups:
            if other.data_ptr() == x.data_ptr() and other.shape == x.shape and version == x._version:
                group.append((name, left.pop(name)))
                return
        groups.append((x, x._version, [(name, left.pop(name))]))

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers]
    try:
        for batch in range(len(stream.hidden)):
            if left:
                stream.run(index, batch)
    finally:
        for handle in handles:
            handle.remove()
    return _experts_together([*(group for _, _, group in groups), *([layer] for layer in left.items())])


def _experts_together(groups: Sequence[Named]) -> list[Turn]:
    """Groups in turns: one a turn, but experts that do the same together, up to AT_ONCE bytes of Hessians."""
    turns: list[tuple[int, list[Named]]] = []  # (bytes, groups)
    open_turn: dict[str, int] = {}  # what the layers of an expert are called, without its number -> its turn so far
    for group in groups:
        name, layer = group[0]
        same = [re.sub(r"\.experts\.\d+\.", ".experts.*.", each) for each, _ in group]
        place = open_turn.get(same[0]) if expert_of(name) else None
        size = 4 * layer.in_features ** 2
        if place is not None and turns[place][0] + size <= AT_ONCE:
            turns[place] = (turns[place][0] + size, [*turns[place][1], group])
        else:
            open_turn.update(dict.fromkeys(same, len(turns)))
            turns.append((size, [group]))
    return [turn for _, turn in turns]


def measure(stream: Stream, index: int, turn: Turn, make: Callable[[], Any],
             routing: Routing) -> dict[str, Tensor | None]:
    """The statistic of every layer; the first one's of a group is everybody's there. A turn of one group ends there."""
    gathers = [_Gather(*group[0], make, stop=len(turn) == 1) for group in turn]
    found: dict[str, Tensor | None] = {}
    try:
        with covered(stream.blocks[index], routing.everything):
            for batch in range(len(stream.hidden)):
                with suppress(_Reached):
                    stream.run(index, batch)
        for gather, group in zip(gathers, turn, strict=True):
            result = gather.result(routing)
            for name, _ in group:
                routing.enough(name, gather.tokens)
                found[name] = result
    finally:
        for gather in gathers:
            gather.handle.remove()
    return found


def measure_outside(stream: Stream, layers: Named,
                     make: Callable[[], Any]) -> dict[str, Tensor]:
    """Statistics of layers after the blocks (an untied head): the model's own forward, fed the last block's output."""
    gathers = [_Gather(name, layer, make) for name, layer in layers]
    try:
        for batch, hidden in enumerate(stream.hidden):
            with passing(stream.blocks, partial(instead, hidden.to(stream.dtype))):
                stream.model(input_ids=stream.tokens[batch], use_cache=False)
        found = {gather.name: gather.result(Routing()) for gather in gathers}
        return {name: result for name, result in found.items() if result is not None}
    finally:
        for gather in gathers:
            gather.handle.remove()
