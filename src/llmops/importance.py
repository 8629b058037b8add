"""How large activations are: what depth and width pruning want to know of a model, block by block.

Like the calibration walk (`calibrate`), this streams decoder blocks and holds the hidden states of one place; unlike
it, nothing is changed. A norm's mean squares are noted too, so that what is left of a stream can be given the scale
that the whole had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.block_stream import Stream, instead, lent, passing
from llmops.errors import LlmopsError
from llmops.methods.prune.depth import block_influence
from llmops.methods.prune.width import aggregate
from llmops.models.arch import decoder_layers
from llmops.models.narrow import Shape, norms_of, shape_of

__all__ = ["Importance", "run_influence", "width_importance"]

Progress = Callable[[int, int], None]


@dataclass
class Importance:
    """hidden: (H,); channels: (F,) a layer; heads: (Q,) a layer; squares: (H,) mean square of what each norm of the
    residual stream's width reads, by full name."""

    hidden: Tensor
    channels: list[Tensor]
    heads: list[Tensor]
    squares: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()  # type: ignore[untyped-decorator]
def run_influence(model: nn.Module, tokens: Tensor, length: int, *, batch_size: int = 8,
                  progress: Progress | None = None) -> list[float]:
    """Block influence of every run of `length` neighbouring blocks: of what goes into the first and comes out of the
    last. Memory: hidden states of `length` + 1 places."""
    path, blocks = decoder_layers(model)
    if not 1 <= length <= len(blocks):
        raise LlmopsError(f"a run of {length} layers of {len(blocks)}; expected 1 to {len(blocks)}")
    stream = Stream(model, blocks, _checked(tokens), batch_size, None)
    places, found = [list(stream.hidden)], []
    for index, block in enumerate(blocks):
        with lent(block, stream.device, changes=False):
            stream.advance(index, f"{path}.{index}")
        places.append(list(stream.hidden))
        if len(places) > length:
            first = places.pop(0)
            parts = [block_influence(x, y) * len(x) for x, y in zip(first, stream.hidden, strict=True)]
            found.append(sum(parts) / sum(len(x) for x in first))
        if progress is not None:
            progress(index + 1, len(blocks))
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def width_importance(model: nn.Module, tokens: Tensor, how: str = "l2", *, batch_size: int = 8,
                     progress: Progress | None = None) -> Importance:
    """Importance of every hidden feature, FFN channel and query head over `tokens` (samples, length).

    how: "l2" or "mean", over crops. Raises LlmopsError for a model that `shape_of` does not know.
    """
    shape, norms = shape_of(model), norms_of(model)
    path, blocks = decoder_layers(model)
    stream = Stream(model, blocks, _checked(tokens), batch_size, None)
    hidden, made = torch.zeros(shape.hidden), Importance(torch.zeros(0), [], [])
    for index, block in enumerate(blocks):
        inside = {name: model.get_submodule(name) for name in norms if name.startswith(f"{path}.{index}.")}
        with lent(block, stream.device, changes=False), _Noted(inside, how) as noted, _Read(block, shape) as read:
            stream.advance(index, f"{path}.{index}")
        made.channels.append(aggregate(read.channels, how))
        made.heads.append(aggregate(read.heads, how))
        hidden += noted.importance()
        made.squares |= noted.squares()
        if progress is not None:
            progress(index + 1, len(blocks))
    outside = {name: model.get_submodule(name) for name in norms if not name.startswith(f"{path}.")}
    with _Noted(outside, how) as noted:
        base: Any = getattr(model, "base_model", model)
        for batch, state in enumerate(stream.hidden):
            with passing(blocks, partial(instead, state)):
                base(input_ids=stream.tokens[batch], use_cache=False)
    made.hidden = hidden + noted.importance()
    made.squares |= noted.squares()
    return made


def _checked(tokens: Tensor) -> Tensor:
    if tokens.numel() == 0:
        raise LlmopsError("no calibration tokens; expected (samples, length)")
    return tokens


class _Noted:
    """Listens at norms: mean sizes of what they give, crop by crop, and mean squares of what they read."""

    def __init__(self, norms: dict[str, nn.Module], how: str) -> None:
        self.norms, self.how = norms, how
        self.sizes: dict[str, list[Tensor]] = {name: [] for name in norms}
        self.read: dict[str, list[Tensor]] = {name: [] for name in norms}

    def __enter__(self) -> _Noted:
        self.handles = [module.register_forward_hook(partial(self._note, name)) for name, module in self.norms.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.sizes[name].append(out.float().abs().mean(1).cpu())
        self.read[name].append(args[0].float().square().mean(1).cpu())

    def importance(self) -> Tensor:
        """(H,), summed over the norms."""
        return torch.stack([aggregate(sizes, self.how) for sizes in self.sizes.values()]).sum(0)

    def squares(self) -> dict[str, Tensor]:
        return {name: torch.cat(read).double().mean(0).float() for name, read in self.read.items()}


class _Read:
    """Listens at what the output and the down projection of a block read."""

    def __init__(self, block: nn.Module, shape: Shape) -> None:
        self.block, self.shape = block, shape
        self.channels: list[Tensor] = []
        self.heads: list[Tensor] = []

    def __enter__(self) -> _Read:
        down, out = (self.block.get_submodule(name) for name in ("mlp.down_proj", "self_attn.o_proj"))
        self.handles = [down.register_forward_pre_hook(self._channel), out.register_forward_pre_hook(self._head)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _channel(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.channels.append(args[0].float().abs().mean(1).cpu())

    def _head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.heads.append(args[0].float().unflatten(-1, (self.shape.heads, -1)).norm(dim=-1).mean(1).cpu())

