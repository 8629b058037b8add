"""What the walk measures of the inputs of linear layers: the statistics, who shares an input, and the passes.

A statistic is added up by a forward hook, in float32 or wider whatever the model's dtype, so that the input itself is
never kept. Layers that see the very same tensor (q, k and v; gate and up) are measured once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.block_stream import Stream, finite
from llmops.errors import LlmopsError, StepError, unknown
from llmops.models.expert_names import expert_of
from llmops.models.experts import Routing, covered
from llmops.models.tail import Tail, lent_tail, through
from llmops.ops.float32 import Products

__all__ = ["AT_ONCE", "STATISTICS", "InPassing", "Named", "Turn", "measure", "merged", "statistic_of", "tail_of",
           "turns_of"]

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
    """(in, in) H = 2/N sum_t x_t x_t^T, float32: the Hessian of the layer's squared output error (GPTQ, OBS).

    H is symmetric: blocks of rows are summed from the diagonal on, and mirrored at the end.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        wide = x.float()
        if self.total is None:
            self.total = wide.new_zeros(wide.shape[1], wide.shape[1])
        with Products():
            for first in range(0, len(self.total), _ROWS):
                self.total[first:first + _ROWS, first:].addmm_(wide[:, first:first + _ROWS].t(), wide[:, first:])

    def result(self, tokens: int) -> Tensor:
        assert self.total is not None
        H = self.total.mul_(2.0 / tokens)  # the only one: it is in^2
        for first in range(0, len(H), _ROWS):
            H[first + _ROWS:, first:first + _ROWS] = H[first:first + _ROWS, first + _ROWS:].t()
        return H


_ROWS = 128  # of a Hessian that are summed together
STATISTICS: dict[str, Callable[[], Any] | None] = {"none": None, "x_norm": _Norm, "x_absmax": _AbsMax,
                                                   "hessian": _Hessian}


AT_ONCE = 2 << 30  # bytes that the statistics of one turn of experts may take


UNREACHED = ("{}: no calibration token reached this layer; expected every linear layer to be used. Give more data, or "
             "name the layer in ignore")


class _Reached(Exception):
    """Ends a forward pass of which the rest is not needed."""


class _Apart(Exception):
    """Layers that seemed to see the same tensors did not in a later batch."""


class _Pass:
    """What the gathers of a turn tell each other: who added the input that was seen last, who is still to run.

    The last input is held, so that none is its heir. stop: whether a forward pass ends at the last of the layers;
    share: whether a layer that sees the input that another has just added takes the other's statistic for its own.
    """

    def __init__(self, *, stop: bool, share: bool) -> None:
        self.stop, self.share = stop, share
        self.last: tuple[Tensor, int, _Gather] | None = None
        self.left: set[str] = set()

    def begin(self, gathers: Sequence[_Gather]) -> None:
        self.last, self.left = None, {gather.name for gather in gathers}

    def added(self, gather: _Gather, x: Tensor) -> bool:
        """Whether the one whose statistic is this gather's, too, has added x. Raises _Apart when it should have."""
        if self.share and self.last is not None and _same(self.last[0], self.last[1], x):
            other, first = self.last[2], x.numel() // x.shape[-1]
            if gather.lead is None and gather.tokens == 0 and other.tokens == first:
                gather.lead = other
            if gather.lead is other:
                return True
        if gather.lead is not None:
            raise _Apart
        self.last = (x, x._version, gather)
        return False

    def ran(self, name: str) -> None:
        self.left.discard(name)
        if self.stop and not self.left:
            raise _Reached


class _Gather:
    """Adds up one linear layer's statistic through a forward hook. lead: whose statistic is this layer's, too."""

    def __init__(self, name: str, layer: nn.Linear, make: Callable[[], Any], passing: _Pass) -> None:
        self.name, self.tokens, self.statistic, self.passing = name, 0, make(), passing
        self.lead: _Gather | None = None
        self.handle = layer.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        if not self.passing.added(self, args[0]):
            self.statistic.add(x)
        self.tokens += x.shape[0]
        self.passing.ran(self.name)

    def result(self, routing: Routing, known: dict[str, Tensor]) -> Tensor | None:
        """The statistic; None for the layer of an expert that saw too few tokens. known: those there are, by the name
        of the first layer; this one is added."""
        self.handle.remove()
        if not routing.enough(self.name, self.tokens):
            return None
        if not self.tokens:
            raise StepError(UNREACHED.format(self.name))
        if self.lead is not None and self.lead.tokens != self.tokens:
            raise _Apart
        first = self.lead or self
        if first.name not in known:
            known[first.name] = finite(first.statistic.result(first.tokens),
                                       f"{first.name}: the input activations hold")
        return known[first.name]


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
            if _same(other, version, x):
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


def measure(stream: Stream, index: int, turn: Turn, make: Callable[[], Any], routing: Routing) -> list[Tensor | None]:
    """The statistic of every group; the first layer's is everybody's there. A pass ends at the last layer of the turn.

    Groups that turn out to see the very same tensor, one right after the other, get the very same statistic, which is
    added up once. Each layer is taken to run once in a pass; those of experts may not at all, so nothing ends there.
    """
    stop = len(turn) == 1 or not any(expert_of(name) for group in turn for name, _ in group)
    try:
        return _measure(stream, index, turn, make, routing, _Pass(stop=stop, share=True))
    except _Apart:
        return _measure(stream, index, turn, make, routing, _Pass(stop=stop, share=False))


def _measure(stream: Stream, index: int, turn: Turn, make: Callable[[], Any], routing: Routing,
             passing: _Pass) -> list[Tensor | None]:
    gathers = [_Gather(*group[0], make, passing) for group in turn]
    found: list[Tensor | None] = []
    known: dict[str, Tensor] = {}
    try:
        with covered(stream.blocks[index], routing.everything):
            for batch in range(len(stream.hidden)):
                passing.begin(gathers)
                with suppress(_Reached):
                    stream.run(index, batch)
        passing.begin(())
        for gather, group in zip(gathers, turn, strict=True):
            found.append(gather.result(routing, known))
            for name, _ in group:
                routing.enough(name, gather.tokens)
    finally:
        for gather in gathers:
            gather.handle.remove()
    return found


def merged(turn: Turn, found: Sequence[Tensor | None]) -> tuple[Turn, list[Tensor | None]]:
    """The turn and its statistics with those groups as one that got the very same."""
    groups: list[tuple[list[tuple[str, nn.Linear]], Tensor | None]] = []
    for group, statistic in zip(turn, found, strict=True):
        same = next((layers for layers, other in groups if statistic is not None and other is statistic), None)
        if same is None:
            groups.append((list(group), statistic))
        else:
            same.extend(group)
    return [layers for layers, _ in groups], [statistic for _, statistic in groups]


def tail_of(stream: Stream, name: str, head: nn.Linear,
            compute: torch.dtype | None) -> AbstractContextManager[Tail]:
    """The head behind the blocks, to be measured by the model's own forward, fed the last block's output."""

    def measure(statistic: str, dtype: torch.dtype) -> Tensor:
        make = statistic_of(statistic)
        assert make is not None
        gather = _Gather(name, head, make, passing := _Pass(stop=True, share=False))
        try:
            for batch in range(len(stream.hidden)):
                passing.begin([gather])
                with suppress(_Reached):
                    through(stream, dtype, batch)
            found = gather.result(Routing(), {})
        finally:
            gather.handle.remove()
        assert found is not None  # a head is no expert
        return found

    return lent_tail(stream, name, head, compute, measure)


class InPassing:
    """One forward pass of a block on a single batch, in which every layer is measured and updated just before it runs.

    The pass that measures a layer is then the one that shows the others what it became: nothing is run twice. `reached`
    gets the layers that see the very same tensor one after the other, with the statistic it made of it for the first.
    wanted: whether the pass is to go on behind the last of them.
    """

    def __init__(self, layers: Named, make: Callable[[], Any], once: Callable[[str, Tensor], Any],
                 reached: Callable[[str, nn.Linear, Any], None], wanted: bool = True) -> None:
        self.left, self.make, self.once, self.reached, self.wanted = dict(layers), make, once, reached, wanted
        self.seen: tuple[Tensor, int, Any] | None = None  # an input, held so that none is its heir; what once made

    def __enter__(self) -> InPassing:
        self.handles = [layer.register_forward_pre_hook(partial(self.hook, name)) for name, layer in self.left.items()]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.seen = None
        for handle in self.handles:
            handle.remove()
        return kind is _Reached

    def hook(self, name: str, layer: nn.Linear, args: tuple[Any, ...]) -> None:
        if self.left.pop(name, None) is None:
            return
        x = args[0]
        if self.seen is None or not _same(self.seen[0], self.seen[1], x):
            self.seen = None  # the statistic of the one before goes first
            self.seen = (x, x._version, self.once(name, self.statistic(name, x)))
        self.reached(name, layer, self.seen[2])
        if not self.left and not self.wanted:
            raise _Reached

    def statistic(self, name: str, x: Tensor) -> Tensor:
        summed = self.make()
        flat = x.detach().flatten(0, -2)
        summed.add(flat)
        value: Tensor = summed.result(len(flat))
        return finite(value, f"{name}: the input activations hold")

    def check(self) -> None:
        """Raises StepError when a layer was not run."""
        for name in self.left:
            raise StepError(UNREACHED.format(name))


def _same(other: Tensor, version: int, x: Tensor) -> bool:
    """Whether x is the very tensor that `other` was when its version was that."""
    return bool(other.data_ptr() == x.data_ptr() and other.shape == x.shape and version == x._version)
