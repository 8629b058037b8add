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
from llmops.models.arch import TRANSPOSED, decoder_layers
from llmops.models.expert_names import expert_of
from llmops.models.widths import axes_of, ffn_of, head_norms_of, norms_of, shape_of

__all__ = ["Importance", "run_influence", "width_importance"]

Progress = Callable[[int, int], None]


@dataclass
class Importance:
    """hidden: (H,); channels: of each layer (F,) by the FFN's path in it; heads: (Q,) a layer; squares: mean square of
    what each norm of the residual stream's width, or of all heads, reads, by full name; means: of layer norms, which
    both are of x - its mean there. unseen: experts that no token was sent to."""

    hidden: Tensor
    channels: list[dict[str, Tensor]]
    heads: list[Tensor]
    squares: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


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

    how: "l2" or "mean", over crops; an expert's channels by the mean over the tokens that were sent to it, or the norms
    of its down projection where none were. Raises LlmopsError for a model that `shape_of` does not know.
    """
    shape, norms, over_heads = shape_of(model), norms_of(model), head_norms_of(model)
    path, blocks = decoder_layers(model)
    stream = Stream(model, blocks, _checked(tokens), batch_size, None)
    hidden, made = torch.zeros(shape.hidden), Importance(torch.zeros(0), [], [])
    for index, block in enumerate(blocks):
        place = f"{path}.{index}"
        inside, wide = ({name: model.get_submodule(name) for name in names if name.startswith(f"{place}.")}
                        for names in (norms, over_heads))
        with lent(block, stream.device, changes=False), _Noted(inside, how) as noted, _Noted(wide, how) as of_heads, \
                _Read(block, shape.heads, how) as read:
            stream.advance(index, place)
            made.channels.append(read.importance())
            made.unseen += [f"{place}.{name}" for name in read.unseen]
        made.heads.append(aggregate(read.heads, how))
        hidden += noted.importance()
        _keep(made, noted, of_heads)
        if progress is not None:
            progress(index + 1, len(blocks))
    outside = {name: model.get_submodule(name) for name in norms if not name.startswith(f"{path}.")}
    with _Noted(outside, how) as noted:
        base: Any = getattr(model, "base_model", model)
        for batch, state in enumerate(stream.hidden):
            with passing(blocks, partial(instead, state)):
                base(input_ids=stream.tokens[batch], use_cache=False)
    made.hidden = hidden + noted.importance()
    _keep(made, noted)
    return made


def _keep(made: Importance, *noted: _Noted) -> None:
    for each in noted:
        made.squares |= each.mean_of(each.read)
        made.means |= each.mean_of(each.shifts)


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
        self.shifts: dict[str, list[Tensor]] = {name: [] for name, norm in norms.items()
                                                if isinstance(norm, nn.LayerNorm)}

    def __enter__(self) -> _Noted:
        self.handles = [module.register_forward_hook(partial(self._note, name)) for name, module in self.norms.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        x = args[0].float()
        if name in self.shifts:
            x = x - x.mean(-1, keepdim=True)
            self.shifts[name].append(x.mean(1).cpu())
        self.sizes[name].append(out.float().abs().mean(1).cpu())
        self.read[name].append(x.square().mean(1).cpu())

    def importance(self) -> Tensor:
        """(H,), summed over the norms."""
        return torch.stack([aggregate(sizes, self.how) for sizes in self.sizes.values()]).sum(0)

    def mean_of(self, noted: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat(each).double().mean(0).float() for name, each in noted.items()}


class _Read:
    """Listens at what the output projection and every FFN's last one read of a block."""

    def __init__(self, block: nn.Module, heads: int, how: str) -> None:
        self.count, self.how = heads, how
        self.heads: list[Tensor] = []
        self.channels: dict[str, list[Tensor]] = {}
        self.sent: dict[str, int] = {}
        self.unseen: list[str] = []
        owners = dict(block.named_modules())
        self.outs: list[nn.Module] = []
        self.downs: dict[str, nn.Module] = {}
        for name, module in owners.items():
            weight = module._parameters.get("weight")
            axes = axes_of(f"{name}.weight", weight, owners) if weight is not None else None
            if axes and set(axes) == {"H", "Q"} and name.rpartition(".")[2] != "q_proj":
                self.outs.append(module)
            if axes and len(axes) == 2 and ffn_of(name, axes) and _reads_channels(axes, module):
                self.downs[str(ffn_of(name, axes))] = module

    def __enter__(self) -> _Read:
        self.handles = [module.register_forward_pre_hook(self._head) for module in self.outs]
        self.handles += [module.register_forward_pre_hook(partial(self._channel, name))
                         for name, module in self.downs.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _channel(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        sizes = args[0].float().abs()
        if expert_of(f"{name}.") is not None:  # (tokens, F): those of all crops that were sent to it
            self.sent[name] = self.sent.get(name, 0) + len(sizes)
            self.channels.setdefault(name, []).append(sizes.sum(0, keepdim=True).cpu())
        else:  # a shared expert has lost sight of the crops, too: a batch is one
            self.channels.setdefault(name, []).append((sizes if sizes.dim() > 2 else sizes.unsqueeze(0)).mean(1).cpu())

    def importance(self) -> dict[str, Tensor]:
        """(F,) by FFN."""
        found = {}
        for name, module in self.downs.items():
            if self.sent.get(name):
                found[name] = torch.cat(self.channels[name]).double().sum(0).div(self.sent[name]).float()
            elif name in self.channels and expert_of(f"{name}.") is None:
                found[name] = aggregate(self.channels[name], self.how)
            else:
                self.unseen.append(name)
                found[name] = module.weight.detach().float().norm(dim=0).cpu()
        return found

    def _head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.heads.append(args[0].float().unflatten(-1, (self.count, -1)).norm(dim=-1).mean(1).cpu())


def _reads_channels(axes: str, module: nn.Module) -> bool:
    """Whether hidden features are what the layer gives: the first axis, or the last where weights are transposed."""
    return axes[-1 if type(module).__name__ in TRANSPOSED else 0] == "H"
