"""Rotations folded into the weights offline: the same function, with its outliers spread over all features.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 4) and SpinQuant (Liu et al. 2024, arXiv 2405.16406, section
3.1), of whose rotations two need nothing at run time:

    R1   the residual stream x becomes x Q.  RMSNorm commutes with it once its gain g has moved into the layers that
         read it: n(x Q) = n(x) Q.
             embedding, output head, readers      E Q,   W diag(g) Q,   g <- 1
             writers (their biases, too)          Q^T W,  b Q
    R2   the values v of every head become v R:   v_proj's rows of a head  R^T W,   o_proj's columns of a head  W R
         one R a layer, so heads that share a value head need no care.

Left out: the rotations that would have to be computed at run time (R3, R4), and learning them. What results is an
ordinary transformers model.

Nothing is looked up by an architecture's name. Norms and the layers that read them are found as in `fold.py`, the
writers are the other layers as wide as the stream, and a block counts only once it has confirmed it: run on a rotated
stream, it must give its own output, rotated. So post-norms inside the residual branch (Gemma 2 and 3), norms that take
off a mean, routers and gates that read the stream by themselves are all found out, and refused with what is missing.
The embedding counts when what reaches the first block is it, up to one factor for all features.

A final norm whose gain is not all ones goes into the head, so a tied head has to be untied: a head's worth of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.block_stream import Stream, finite, instead, lent, passing
from llmops.errors import ModelError
from llmops.methods.quantize.hadamard import Hadamard, randomized
from llmops.models.arch import decoder_layers, linear_layers
from llmops.models.embeddings import untie
from llmops.models.fold import Link, after_norms, between_linears, is_norm

__all__ = ["PARTS", "Rotation", "Touch", "find_rotation", "rotate"]

PARTS = ("r1", "r2")
_TOLERANCE = 1e-2  # of what a block adds to the stream: what a wrong rotation changes is all of it
_ROWS = 8192  # of an embedding, rotated at a time


@dataclass(frozen=True)
class Touch:
    """How a block touches the stream. readers: norms with the layers that read them; writers: names of layers;
    values: v_proj -> o_proj, by head. Names within the block."""

    readers: tuple[Link, ...]
    writers: tuple[str, ...]
    values: tuple[Link, ...]


@dataclass(frozen=True)
class Rotation:
    """What is to be done: `begin` once, `block` for each block, in any order. Rotations are drawn from `seed`.

    stream: Q of R1, None without it; touches: one a block; norm: the final norm -> head, None without R1.
    """

    stream: Hadamard | None
    heads: bool
    touches: tuple[Touch, ...]
    norm: Link | None
    seed: int

    def describe(self) -> list[str]:
        """One event that says what is rotated, and by what."""
        said = []
        if self.stream is not None:
            size, copies = self.stream.block, len(self.stream.signs) // self.stream.block
            said.append(f"the stream by a randomized Hadamard matrix of order {size}" if copies == 1 else
                        f"the stream by {copies} blocks of order {size} ({len(self.stream.signs)} is the order of no "
                        "Hadamard matrix known here, so it mixes within a block alone)")
        if self.heads:
            widths = sorted({link.head for touch in self.touches for link in touch.values})
            said.append(f"the values of heads {', '.join(map(str, widths))} wide")
        return [f"rotated {' and '.join(said)}"]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def begin(self, model: Any) -> list[str]:
        """Rotate all that is outside the blocks. Returns what is worth telling."""
        if self.stream is None or self.norm is None:
            return []
        norm, head = model.get_submodule(self.norm.source), model.get_submodule(self.norm.targets[0])
        embedding = model.get_input_embeddings()
        gain = _gain(norm, self.norm.offset)
        told = []
        if head.weight is embedding.weight and not bool((gain == 1).all()):
            told.append("the output head is untied from the embedding: the final norm's gain is folded into it, which "
                        f"takes {untie(model):,} bytes more on disk")
        if head.weight is not embedding.weight:
            _columns(head.weight, self.stream, gain)
            norm.weight.fill_(1 - self.norm.offset)
        _columns(embedding.weight, self.stream)
        return told

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def block(self, index: int, module: nn.Module) -> None:
        """Rotate one block. In float32 the function changes by float32's rounding alone."""
        touch = self.touches[index]
        if self.heads:
            _rotate_values(module, touch, partial(randomized, seed=self.seed + 1 + index))
        if self.stream is not None:
            _rotate_stream(module, touch, self.stream)


def rotate(model: Any, parts: Sequence[str] = PARTS, seed: int = 0) -> list[str]:
    """Rotate a whole model in place; the function stays, to the precision of its weights. Returns what is to be told.

    Raises ModelError as `find_rotation` does; the model is then as it was.
    """
    found = find_rotation(model, parts, seed)
    told: list[str] = found.begin(model)
    for index, block in enumerate(decoder_layers(model)[1]):
        found.block(index, block)
    return told


@torch.no_grad()  # type: ignore[untyped-decorator]
def find_rotation(model: Any, parts: Sequence[str] = PARTS, seed: int = 0) -> Rotation:
    """The rotations `parts` (of PARTS) of a model, each confirmed by running it on a few tokens; nothing is changed.

    Cost: about four passes over 16 tokens, one block in float32 at a time. Raises ModelError naming what stands in the
    way; StepError when a weight is NaN or infinite.
    """
    path, blocks = decoder_layers(model)
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randint(0, embedding.weight.shape[0], (1, 16), generator=generator)
    with _noted(embedding) as embedded:
        flow = Stream(model, blocks, probe, 1, None, torch.float32)
    width = embedding.weight.shape[1]
    Q = randomized(width, seed) if "r1" in parts else None
    if Q is not None:
        _check_embedding(model, embedded[-1], flow.hidden[0])
    touches = []
    for index, block in enumerate(blocks):
        name = f"{path}.{index}"
        with lent(block, flow.device, torch.float32):
            for part, layer in linear_layers(block):
                finite(layer.weight, f"{name}.{part}: the weight holds")
            touches.append(_found(block, partial(flow.run, index, 0), width))
            run = partial(_run_on, flow, index)
            if Q is not None:
                _confirm_stream(block, touches[-1], run, Q, name)
            if "r2" in parts:
                _confirm_values(block, touches[-1], run, name)
            flow.advance(index, name)
    norm = _final_norm(model, flow) if Q is not None else None
    return Rotation(Q, "r2" in parts, tuple(touches), norm, seed)


# -------------------------------------------------------------------------------------------------------- the facts
def _found(block: nn.Module, run: Callable[[], Tensor], width: int) -> Touch:
    readers = tuple(link for link in after_norms(block, run)
                    if block.get_submodule(link.source).weight.numel() == width)
    reading = {name for link in readers for name in link.targets}
    writers = tuple(name for name, layer in linear_layers(block) if layer.out_features == width and name not in reading)
    return Touch(readers, writers, tuple(_values(block)))


def _values(block: nn.Module) -> Iterator[Link]:
    """Links between layers of an attention: what says how wide a head is has heads."""
    for link in between_linears(block):
        head = getattr(block.get_submodule(link.source.rpartition(".")[0]), "head_dim", None)
        source = block.get_submodule(link.source)
        if isinstance(head, int) and head > 0 and source.out_features % head == 0:
            yield Link(link.source, link.targets, norm=False, repeat=link.repeat, head=head)


def _final_norm(model: Any, flow: Stream) -> Link:
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)

    def run() -> None:
        with passing(flow.blocks, partial(instead, flow.hidden[0].to(flow.dtype))):
            model(input_ids=flow.tokens[0], use_cache=False)

    links = [link for link in after_norms(model, run) if name in link.targets] if name is not None else []
    if len(links) != 1 or links[0].targets != (name,):
        raise _refusal(model, "no norm outside the blocks was found whose output the output head reads as it is")
    if not _is_rms(model.get_submodule(links[0].source), links[0].offset):
        raise _refusal(model, f"{links[0].source}, before the output head, {_NO_RMS}")
    return links[0]


_NO_RMS = "is not an RMS norm: it takes off the mean or adds a bias, which a rotated stream does not have"


def _is_rms(norm: nn.Module, offset: float) -> bool:
    """Whether norm(x) is x times its gain times one number a row."""
    norm = deepcopy(norm).float()
    gain = _gain(norm, offset)
    x = torch.randn(4, len(gain), generator=torch.Generator().manual_seed(0)).to(gain.device) + 0.5
    live = gain.abs() > 1e-6
    ratio = (norm(x) / (x * gain))[:, live]
    middle = ratio.median(1, keepdim=True).values
    return bool(live.any()) and bool(((ratio - middle).abs() <= _TOLERANCE * middle.abs()).float().mean() > 0.99)


def _check_embedding(model: Any, embedded: Tensor, hidden: Tensor) -> None:
    e, h = embedded.double(), hidden.double()
    scaled = e * ((e * h).sum() / (e * e).sum())
    if not bool((scaled - h).norm() <= _TOLERANCE * h.norm()):
        raise _refusal(model, "what reaches the first block is not the token embedding times one factor (learned "
                              "positions, a norm or a factor for each feature?)")


# ------------------------------------------------------------------------------------------------------- confirming
def _run_on(flow: Stream, index: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(stream before, after) block `index`, float32; hidden: in place of the flow's own."""
    x = flow.hidden[0].float() if hidden is None else hidden
    return x, flow.run(index, 0, x).float()


def _confirm_stream(block: nn.Module, touch: Touch, run: Callable[..., tuple[Tensor, Tensor]], Q: Hadamard,
                    name: str) -> None:
    kind = type(block).__name__
    for link in touch.readers:
        if not _is_rms(block.get_submodule(link.source), link.offset):
            raise _refusal(block, f"{name}.{link.source} of {kind} {_NO_RMS}")
    x, exact = run()
    with _restored(block):
        _rotate_stream(block, touch, Q)
        _, rotated = run(Q.apply(x))
    if _same(rotated, Q.apply(exact), exact - x):
        return
    post = _after_writers(block, touch, run)
    if post is not None:
        raise _refusal(block, f"{name}.{post} of {kind} scales, feature by feature, what its branch adds to the "
                              "residual stream (a post-norm), so no rotation of the stream can be folded past it")
    read = ", ".join(link.source for link in touch.readers) or "its norms (none was found)"
    raise _refusal(block, f"{name} of {kind} does not give its output rotated for a rotated stream: something beside "
                          f"the linear layers behind {read} reads the stream, or something beside "
                          f"{', '.join(touch.writers) or 'linear layers'} writes to it")


def _after_writers(block: nn.Module, touch: Touch, run: Callable[[], Any]) -> str | None:
    """The first norm of the block itself that takes what a writer gives, if there is one."""
    written: list[Tensor] = []  # held, so that no other tensor can take their place in memory
    found: list[str] = []

    def note(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
        written.append(out)

    def look(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if any(args[0].data_ptr() == out.data_ptr() for out in written):
            found.append(name)

    handles = [block.get_submodule(name).register_forward_hook(note) for name in touch.writers]
    handles += [module.register_forward_pre_hook(partial(look, name)) for name, module in block.named_children()
                if is_norm(module)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _confirm_values(block: nn.Module, touch: Touch, run: Callable[..., tuple[Tensor, Tensor]], name: str) -> None:
    if not touch.values:
        raise ModelError(f"rotation r2: {name} of {type(block).__name__} has no v_proj beside an o_proj in a module "
                         "with head_dim; expected them as in arch.PRODUCERS: write rotate: [r1], or leave rotate out")
    x, exact = run()
    with _restored(block):
        _rotate_values(block, touch, partial(randomized, seed=0))
        _, rotated = run()
    if not _same(rotated, exact, exact - x):
        raise ModelError(f"rotation r2: {name} of {type(block).__name__} changes when its values are rotated (a norm "
                         f"or a gate between {touch.values[0].source} and {touch.values[0].targets[0]}?); expected "
                         "values that are only mixed: write rotate: [r1], or leave rotate out")


def _same(found: Tensor, wanted: Tensor, added: Tensor) -> bool:
    return bool((found - wanted).abs().mean() <= _TOLERANCE * added.abs().mean())


def _refusal(part: Any, what: str) -> ModelError:
    return ModelError(f"rotation r1: {what}; expected a stream that only RMS norms read and only linear layers write: "
                      "write rotate: [r2] to rotate the values of each head alone, or leave rotate out")


class _restored:
    """Within, parameters may be changed; after, they are what they were."""

    def __init__(self, block: nn.Module) -> None:
        self.saved = [(parameter, parameter.detach().clone()) for parameter in block.parameters()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for parameter, value in self.saved:
            parameter.data.copy_(value)


class _noted:
    """Within, every output of a module is added to the list that `with` gives."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.outputs = module, list[Tensor]()

    def __enter__(self) -> list[Tensor]:
        self.handle = self.module.register_forward_hook(lambda _, __, out: self.outputs.append(out))
        return self.outputs

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


# --------------------------------------------------------------------------------------------------------- rotating
def _rotate_stream(block: nn.Module, touch: Touch, Q: Hadamard) -> None:
    for link in touch.readers:
        norm = block.get_submodule(link.source)
        gain = _gain(norm, link.offset)
        for name in link.targets:
            _columns(block.get_submodule(name).weight, Q, gain)
        norm.weight.data.fill_(1 - link.offset)
    for name in touch.writers:
        _rows(block.get_submodule(name), Q)


def _rotate_values(block: nn.Module, touch: Touch, drawn: Callable[[int], Hadamard]) -> None:
    for link in touch.values:
        R = drawn(link.head)
        _rows(block.get_submodule(link.source), R)
        for name in link.targets:
            _columns(block.get_submodule(name).weight, R)


def _columns(weight: Tensor, Q: Hadamard, gain: Tensor | None = None) -> None:
    """W <- W diag(gain) Q, by heads where Q is smaller than a row."""
    for rows in weight.data.split(_ROWS):
        wide = rows.float() if gain is None else rows.float() * gain
        rows.copy_(Q.apply(wide))


def _rows(layer: nn.Module, Q: Hadamard) -> None:
    """W <- Q^T W and b <- b Q, by heads where Q is smaller than a column."""
    layer.weight.data.copy_(Q.apply(layer.weight.data.float().t()).t())
    if layer.bias is not None:
        layer.bias.data.copy_(Q.apply(layer.bias.data.float()))


def _gain(norm: nn.Module, offset: float) -> Tensor:
    return norm.weight.detach().float() + offset
