"""Factors moved from one layer into another without changing what the block computes.

    norm -> linear      g * n(x) feeds W:       (g / s) n(x)  and  W diag(s)
    linear -> linear    A x reaches B feature by feature (values through attention, `up` through the gate):
                        diag(1/s) A  and  B diag(s)

Which norm feeds which layers is not looked up by name: it is the norm whose output is the very tensor that the layers
read. Which linear layer feeds another stands in `arch.PRODUCERS`. Either way a link counts only once the block itself
has confirmed it: with factors of 1/2, 1 and 2 folded in, its output must stay what it was. So whatever else reads the
norm's output (a router, experts, a second branch) is found out, in any architecture.

Where several query heads share a value head, the inputs of `o_proj` that stem from one value feature share its factor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.models.arch import PRODUCERS, linear_layers

__all__ = ["Link", "after_norms", "between_linears", "find_links", "find_norm", "fold", "is_norm", "norm_offset"]

_EXPERT = re.compile(r"\bexperts\.\d+\.")
_TOLERANCE = 1e-2  # of what the factors would change were they folded into one side alone


@dataclass(frozen=True)
class Link:
    """source: norm or linear layer, targets: linear layers that read its output; names within the block.

    norm: whether the source is a norm; offset: it multiplies by offset + weight (1 in Gemma, else 0); repeat: how many
    heads share a feature of the source, head: their width (0 when repeat is 1).
    """

    source: str
    targets: tuple[str, ...]
    norm: bool = True
    offset: float = 0.0
    repeat: int = 1
    head: int = 0

    def shared(self, x: Tensor) -> Tensor:
        """(in,) -> (in,): root mean square over the inputs that must have one factor."""
        if self.repeat == 1:
            return x
        heads = x.view(-1, self.repeat, self.head)
        return heads.square().mean(1, keepdim=True).sqrt().expand_as(heads).reshape(-1)

    def narrow(self, s: Tensor) -> Tensor:
        """(in,) factors of the targets' inputs -> (out,) of the source's outputs."""
        return s if self.repeat == 1 else s.view(-1, self.repeat, self.head)[:, 0].reshape(-1)


@torch.no_grad()  # type: ignore[untyped-decorator]
def find_links(block: nn.Module, run: Callable[[], Tensor]) -> list[Link]:
    """The links of a decoder block that its own output confirms, linear sources first. run: one forward pass of it.

    Experts are alike: what one that tokens reach confirms holds for all of them.
    """
    candidates = [*between_linears(block), *after_norms(block, run)]
    before = run()
    answers: dict[str, bool] = {}
    for link in candidates:
        kind = _EXPERT.sub("experts.*.", link.source)
        if kind not in answers:
            said = _confirmed(block, link, run, before)
            if said is not None:  # else the output does not depend on it: perhaps an expert that no token reached
                answers[kind] = said
    return [link for link in candidates if answers.get(_EXPERT.sub("experts.*.", link.source))]


@torch.no_grad()  # type: ignore[untyped-decorator]
def find_norm(model: nn.Module, name: str, run: Callable[[], Tensor]) -> Link | None:
    """The norm that the layer `name` of `model` reads as it is and alone, confirmed by what `run` gives; None where
    there is none."""
    links = [link for link in after_norms(model, run) if name in link.targets]
    if len(links) != 1 or links[0].targets != (name,):
        return None
    return links[0] if _confirmed(model, links[0], run, run()) else None


@torch.no_grad()  # type: ignore[untyped-decorator]
def fold(block: nn.Module, link: Link, s: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply the targets' columns by s (in,), divide the source by it. Returns the factors that were really used:

    a norm's new weight is rounded to `dtype` first, in which it will be stored, and the columns take what it became.
    """
    s = s.float()
    source = block.get_submodule(link.source)
    weight = source.weight
    if link.norm:
        gain = link.offset + weight.float()
        stored = (gain / s - link.offset).to(dtype or weight.dtype).float()
        usable = (stored + link.offset != 0) & (gain != 0)
        s = torch.where(usable, gain / torch.where(usable, stored + link.offset, torch.ones_like(s)), s)
        weight.copy_(stored)
    else:
        weight.div_(link.narrow(s).unsqueeze(1).to(weight.dtype))
    if getattr(source, "bias", None) is not None:
        source.bias.div_(link.narrow(s).to(source.bias.dtype))
    for name in link.targets:
        target = block.get_submodule(name)
        target.weight.copy_(target.weight.float() * s)
    return s


def between_linears(block: nn.Module) -> list[Link]:
    """The links that `arch.PRODUCERS` names, unconfirmed."""
    linears = dict(linear_layers(block))
    links = []
    for name, target in linears.items():
        parent, _, last = name.rpartition(".")
        source_name = ".".join(part for part in (parent, PRODUCERS.get(last, "")) if part)
        source = linears.get(source_name)
        if last not in PRODUCERS or source is None or target.in_features % source.out_features:
            continue
        repeat = target.in_features // source.out_features
        head = getattr(block.get_submodule(parent), "head_dim", 0) if repeat > 1 else 0
        if repeat == 1 or (isinstance(head, int) and head and source.out_features % head == 0):
            links.append(Link(source_name, (name,), norm=False, repeat=repeat, head=head))
    return links


def after_norms(block: nn.Module, run: Callable[[], Any]) -> list[Link]:
    """Every norm whose output is the very tensor that linear layers read in `run`, unconfirmed."""
    made: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def after(name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor):
            made[name] = out

    def before(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        read[name] = args[0]

    handles = [layer.register_forward_pre_hook(partial(before, name)) for name, layer in linear_layers(block)]
    handles += [module.register_forward_hook(partial(after, name)) for name, module in block.named_modules()
                if is_norm(module)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    links = []
    for name, out in made.items():
        targets = tuple(layer for layer, x in read.items() if x.data_ptr() == out.data_ptr()
                        and x.numel() == out.numel())
        if targets:
            links.append(Link(name, targets, offset=norm_offset(block.get_submodule(name))))
    return links


def is_norm(module: nn.Module) -> bool:
    """Whether a module multiplies feature by feature: all that is asked of a norm here."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def norm_offset(norm: nn.Module) -> float:
    """0 when a norm with a weight of zero gives nothing, 1 when it still passes its input on."""
    parameters = list(norm.parameters(recurse=False))
    saved = [parameter.clone() for parameter in parameters]
    x = torch.linspace(-1, 1, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)
    for parameter in parameters:
        parameter.zero_()
    out = norm(x.unsqueeze(0))
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
    return float(bool(out.abs().max() > 1e-3))


def _confirmed(block: nn.Module, link: Link, run: Callable[[], Tensor], before: Tensor) -> bool | None:
    """Whether the block's output stays, None where it does not depend on the source at all."""
    names = [link.source, *link.targets]
    tensors = [parameter for name in names for parameter in block.get_submodule(name).parameters(recurse=False)]
    saved = [tensor.clone() for tensor in tensors]
    width = block.get_submodule(link.targets[0]).in_features
    pattern = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5, 2.0, 2.0], device=before.device)
    s = pattern[torch.arange(width, device=before.device) % len(pattern)]
    if link.repeat > 1:
        s = s.view(-1, link.repeat, link.head)[:, :1].expand(-1, link.repeat, -1).reshape(-1)

    def change(folded: Link) -> float:
        fold(block, folded, s)
        moved = float((run().float() - before.float()).abs().mean())
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        return moved

    alone = change(replace(link, targets=()))
    return change(link) <= _TOLERANCE * alone if alone > 0 else None
