"""The one walk through a model, decoder block by decoder block.

Quantizers and pruners all want the same thing: each linear layer's weight, perhaps something about the inputs that
the layer sees, and to put a new weight in its place before the next block is looked at. So there is one loop, and a
method is a statistic and an update, never another loop.

    capture   the model's own forward is run once with every decoder block made a pass-through that notes its arguments.
              So the first block's inputs, and each block's masks, positions and rotary embeddings, are exactly what the
              model would give it, whatever the architecture (sliding and full attention may alternate).
    per block move it to the accelerator; run the calibration batches and gather the statistic; hand each linear
              layer to the update; run the batches again with the new weights, so that later blocks see what they will
              really get.

Only one block is on the accelerator; activations wait on the model's own device. The peak is one block and
`samples x length x hidden` activations, whatever the model's size. With statistic "none" nothing is run at all.

With `sequential` the layers of a block take turns in the order in which they run, those that see the very same tensor
(q, k and v; gate and up) together, and every turn measures with the earlier ones already updated ("true-sequential").
Where the calibration set is small (`WHOLE`), all of it is one batch, and one forward pass of the block does everything:
each layer is measured and updated just before it runs (`InPassing`). Else every turn is a pass, which ends at the
turn's last layer.

Experts (`models/experts.py`) see only the tokens that were sent to them, or all, as `Routing` says; all of a layer take
one turn, as far as their statistics fit into `AT_ONCE` bytes. An expert that saw too few is given to the update without
a statistic.

An untied head behind the blocks has the last turn (`models/tail.py`): it is measured like any layer, and methods that
look at blocks are given it in `tail`.

A method that looks at a whole block (its output, the norms between its layers) takes `walk_blocks` instead: the same
walk, with the block itself in place of its layers. Either walk hands each block to `prepare` first, if given: whatever
changes the weights and not what the block computes (a rotation, factors moved between layers) happens there, once the
block is on the accelerator and in the wider dtype, and before anything of it is measured.

Deliberate differences from others: without `sequential` all linear layers of a block are measured in one pass, which
ends at the last of them, and those that see the very same tensor are measured and solved together;
statistics are summed in float32 or wider whatever the model's dtype; a layer that got no tokens is an error, not a
silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.block_stream import Stream, computing, finite, lent
from llmops.errors import LlmopsError
from llmops.gathering import STATISTICS, InPassing, Turn, measure, merged, statistic_of, tail_of, turns_of
from llmops.models.arch import check_ignore, decoder_layers, is_ignored, linear_layers, routers
from llmops.models.expert_names import expert_of
from llmops.models.experts import Routing
from llmops.models.tail import Tail
from llmops.shelf import APART, give_back, keeping

__all__ = ["STATISTICS", "Block", "block_influence", "block_scores", "targets", "walk", "walk_blocks"]

Update = Callable[[str, nn.Linear, Any], Tensor | None]
Once = Callable[[Tensor], Any]
Product = Callable[[str, Tensor], Tensor]
Progress = Callable[[int, int], None]
BlockUpdate = Callable[["Block"], None]
TailUpdate = Callable[[Tail], None]

#: Bytes that the activations of one block may take (all of them, as if none was freed) for one pass on all samples.
WHOLE = 1 << 29


# ---------------------------------------------------------------------------------------------------- the walk
@keeping()
@torch.no_grad()  # type: ignore[untyped-decorator]
def walk(model: nn.Module, tokens: Tensor | None, statistic: str, update: Update, *, ignore: Sequence[str] = (),
         batch_size: int = 8, device: str | torch.device | None = None, sequential: bool = False,
         compute: torch.dtype | None = None, prepare: BlockUpdate | None = None, tail: TailUpdate | None = None,
         once: Once | None = None, progress: Progress | None = None, routing: Routing | None = None) -> None:
    """Give every linear layer to `update` and put the weight it returns in its place. The model changes in place.

    tokens:     (samples, length) int64 without padding; may be None when statistic is "none"
    statistic:  what update gets of the layer's inputs: "none" None, "x_norm" and "x_absmax" (in,), "hessian" (in, in)
    update:     (full name, layer, statistic) -> new weight (out, in), or None to leave the layer as it is
    ignore:     layers left alone, by full name or its end
    device:     where a block computes; the model's own device by default
    sequential: whether the layers of a block take turns, as the module's docstring says
    compute:    dtype in which a block computes and update sees its weights; as stored by default
    prepare:    called with every block before its layers are measured
    once:       makes of a statistic what update gets in its place, once for the layers of a turn that share an input;
                nobody else looks at the statistic after that, so it may take its memory
    tail:       called with a head outside the blocks before it is measured, where data is run
    progress:   called with (blocks done, blocks in all)
    routing:    how experts are measured; it is told how many tokens each saw. Those with too few get no statistic

    Raises LlmopsError for a wrong call, StepError naming the layer when a weight or an activation is NaN or infinite.
    """
    make = statistic_of(statistic)
    if make is not None and (tokens is None or tokens.numel() == 0):
        raise LlmopsError(f'statistic "{statistic}" needs calibration tokens (samples, length); none were given')
    path, blocks = decoder_layers(model)
    todo = _targets(model, path, blocks, ignore)
    stream = Stream(model, blocks, tokens, _batch(blocks, todo, tokens, batch_size), device, compute) \
        if make is not None and tokens is not None else None
    routing = _begun(routing, tokens)
    outside = [(full, layer) for full, layer in todo.items() if not full.startswith(f"{path}.")]
    for index, block in enumerate(blocks):
        name = f"{path}.{index}"
        layers = _inside(todo, name)
        wanted = index + 1 < len(blocks) or bool(outside)  # whether anything sees what the block makes
        with lent(block, stream.device if stream else device, compute):
            if prepare is not None:
                for full, layer in layers:
                    finite(layer.weight, f"{full}: the weight holds")
                prepare(Block(name, block, dict(layers), [], stream, index, routing))
            if stream and make and sequential and len(stream.hidden) == 1 and not any(map(expert_of, dict(layers))):
                with InPassing(layers, make, partial(_made, once), partial(_replace, update), wanted) as passing:
                    stream.advance(index, name)
                passing.check()
            else:
                alone: list[Turn] = [[[layer] for layer in layers]]
                for turn in turns_of(stream, index, layers) if stream and sequential else alone:
                    found = measure(stream, index, turn, make, routing) if stream and make and turn else None
                    if found is None:
                        _updated(turn, None, update, once)
                    else:
                        _updated(*merged(turn, found), update, once)
                if stream and wanted:
                    stream.advance(index, name)
        if progress is not None:
            progress(index + 1, len(blocks))
    for name, layer in outside:
        if stream is None:
            _replace(update, name, layer, None)
            continue
        with tail_of(stream, name, layer, compute) as end:
            if tail is not None:
                tail(end)
            _replace(update, name, layer, _made(once, name, end.measure(statistic)))


@torch.no_grad()  # type: ignore[untyped-decorator]
def walk_blocks(model: nn.Module, tokens: Tensor, update: BlockUpdate, *, ignore: Sequence[str] = (),
                batch_size: int = 8, device: str | torch.device | None = None, compute: torch.dtype | None = None,
                targets: bool = False, prepare: BlockUpdate | None = None, tail: TailUpdate | None = None,
                progress: Progress | None = None, routing: Routing | None = None) -> None:
    """Give every decoder block to `update`, which may change it as it likes. Later blocks see what it became.

    targets: whether `Block.targets` holds what the block makes of the activations of the unchanged model; that is a
    second set of hidden states and one more forward pass. tail: is given an untied head outside the blocks; without it
    such a head is an LlmopsError unless it is ignored. Everything else, and what is raised, as `walk`.
    """
    if tokens.numel() == 0:
        raise LlmopsError("no calibration tokens; expected (samples, length)")
    path, blocks = decoder_layers(model)
    todo = _targets(model, path, blocks, ignore)
    outside = [name for name in todo if not name.startswith(f"{path}.")]
    if outside and tail is None:
        raise LlmopsError(f"{outside[0]} stands outside the decoder blocks, where this method has nothing to compare "
                          f"with; expected ignore to list it")
    stream = Stream(model, blocks, tokens, batch_size, device, compute)
    exact = list(stream.hidden) if targets else []
    routing = _begun(routing, tokens)
    for index, module in enumerate(blocks):
        name = f"{path}.{index}"
        layers = _inside(todo, name)
        with lent(module, stream.device, compute):
            for full, layer in layers:
                finite(layer.weight, f"{full}: the weight holds")
            if prepare is not None:
                prepare(Block(name, module, dict(layers), [], stream, index, routing))
            exact = [stream.run(index, batch, hidden).to(stream.home) for batch, hidden in enumerate(exact)]
            if layers:
                update(Block(name, module, dict(layers), exact, stream, index, routing))
            stream.advance(index, name)
        if progress is not None:
            progress(index + 1, len(blocks))
    if tail is not None:
        for name in outside:
            with tail_of(stream, name, todo[name], compute) as end:
                tail(end)


@dataclass(frozen=True)
class Block:
    """A decoder block in its turn. layers: those to update, by full name; targets: see `walk_blocks`; stream: the
    calibration batches, None in a walk without any, where nothing can be run or measured."""

    name: str
    module: nn.Module
    layers: Mapping[str, nn.Linear]
    targets: Sequence[Tensor]
    stream: Stream | None
    index: int
    routing: Routing

    @property
    def flow(self) -> Stream:
        if self.stream is None:
            raise LlmopsError(f"{self.name}: this walk runs no data; expected calibration tokens (samples, length)")
        return self.stream

    @property
    def batches(self) -> int:
        return len(self.flow.hidden)

    def run(self, batch: int = 0, product: Product | None = None, names: Sequence[str] = ()) -> Tensor:
        """The block's output on a batch; x W^T of the layers `names` (full) is what `product` makes of (name, x)."""
        with ExitStack() as stack:
            for name in names if product is not None else ():
                assert product is not None
                stack.enter_context(computing(self.layers[name], partial(product, name)))
            return self.flow.run(self.index, batch)

    def turns(self) -> list[list[str]]:
        """All linear layers by full name, ignored ones too, in the order in which they run; same input, same turn."""
        layers = [(f"{self.name}.{name}", layer) for name, layer in linear_layers(self.module)]
        return [[name for name, _ in group] for turn in turns_of(self.flow, self.index, layers) for group in turn]

    def measure(self, statistic: str, names: Sequence[str]) -> dict[str, Tensor | None]:
        """The statistic of the layers `names` (full), each on its own; None for experts that saw too little."""
        make = statistic_of(statistic)
        assert make is not None
        layers = [(name, self.module.get_submodule(name.removeprefix(self.name + "."))) for name in names]
        found = measure(self.flow, self.index, [[layer] for layer in layers], make, self.routing)
        return dict(zip(names, found, strict=True))

    def put(self, name: str, weight: Tensor) -> None:
        """Put a new weight into the layer of a full name."""
        _replace(lambda *_: weight, name, self.layers[name], None)


@torch.no_grad()  # type: ignore[untyped-decorator]
def block_scores(model: nn.Module, tokens: Tensor, score: Callable[[Tensor, Tensor], float], *, batch_size: int = 8,
                 device: str | torch.device | None = None, progress: Progress | None = None) -> list[float]:
    """One number per decoder block: `score(input, output)`, (batch, length, hidden) each, averaged over the tokens.

    The model is not changed. Raises StepError naming the block when an activation is NaN or infinite.
    """
    if tokens.numel() == 0:
        raise LlmopsError("no calibration tokens; expected (samples, length)")
    path, blocks = decoder_layers(model)
    stream = Stream(model, blocks, tokens, batch_size, device)
    scores = []
    for index, block in enumerate(blocks):
        before = list(stream.hidden)
        with lent(block, stream.device, changes=False):
            stream.advance(index, f"{path}.{index}")
        parts = [score(x, y) * x.shape[0] for x, y in zip(before, stream.hidden, strict=True)]
        scores.append(sum(parts) / sum(x.shape[0] for x in before))
        if progress is not None:
            progress(index + 1, len(blocks))
    return scores


def block_influence(model: nn.Module, tokens: Tensor, *, batch_size: int = 8, device: str | torch.device | None = None,
                    progress: Progress | None = None) -> list[float]:
    """Block influence of every decoder block (Men et al. 2024): 1 - mean cosine between its input and its output."""
    from llmops.methods.prune.depth import block_influence as influence

    scores: list[float] = block_scores(model, tokens, influence, batch_size=batch_size, device=device,
                                       progress=progress)
    return scores


# ---------------------------------------------------------------------------------------------------- pieces
def targets(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Full name -> layer of everything that `walk` would give to `update`. Raises LlmopsError as `walk` does."""
    path, blocks = decoder_layers(model)
    return _targets(model, path, blocks, ignore)


def _inside(todo: Mapping[str, nn.Linear], block: str) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in todo.items() if name.startswith(f"{block}.")]


def _begun(routing: Routing | None, tokens: Tensor | None) -> Routing:
    routing = Routing() if routing is None else routing
    routing.tokens = 0 if tokens is None else tokens.numel()
    return routing


def _targets(model: nn.Module, path: str, blocks: nn.ModuleList, ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """Full name -> layer of everything to update; refuses what the walk would otherwise miss in silence."""
    for name, module in blocks.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd):
                raise LlmopsError(f"{path}.{name}.{part} holds {parameter.dim()}-D weights (fused experts?), which the "
                                  f"walk would leave untouched; expected plain linear layers")
    named = dict(linear_layers(model))
    check_ignore(list(named), ignore)
    choosing = set(routers(model))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = [name for name in named if name.startswith(path + ".")]
    if not inside:
        raise LlmopsError(_no_layers(model, blocks))
    todo = {}
    for name in [*inside, *(["lm_head"] if head is None else [n for n, m in named.items() if m is head])]:
        is_head = name not in inside
        if name not in named or name in choosing or is_ignored(name, ignore) or (is_head and "lm_head" in ignore):
            continue
        if is_head and _is_tied(model, named[name]):
            raise LlmopsError(f"{name} shares its weight with the input embedding, which would change too; "
                              f"expected ignore to list lm_head")
        todo[name] = named[name]
    return todo


def _no_layers(model: nn.Module, blocks: nn.ModuleList) -> str:
    """Why there is nothing to walk: layers that are quantized already, or of a class that is not known."""
    told = f"no plain linear layer in the decoder blocks of {type(model).__name__}: "
    if any(hasattr(module, "packed_tensors") for module in blocks.modules()):
        return told + "they are quantized already; expected the model that they were made of"
    found = sorted({type(module).__name__ for module in blocks.modules()
                    if any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))})
    return told + (f"their weights are in {', '.join(found) or 'no module'}, and only torch.nn.Linear is known; "
                   "expected an architecture with plain linear layers (of others, prune: depth can drop layers)")


def _is_tied(model: nn.Module, head: nn.Linear) -> bool:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embedding is not None and getattr(embedding, "weight", None) is head.weight


def _batch(blocks: nn.ModuleList, todo: Mapping[str, nn.Linear], tokens: Tensor, batch_size: int) -> int:
    """Samples of a batch: all of them where what a block makes of all fits into `WHOLE` bytes, and there are no
    experts."""
    if any(map(expert_of, todo)):
        return batch_size
    width = max(sum(layer.in_features + layer.out_features for _, layer in linear_layers(block)) for block in blocks)
    return len(tokens) if 4 * width * tokens.numel() <= WHOLE else batch_size


def _updated(turn: Turn, found: list[Tensor | None] | None, update: Update, once: Once | None) -> None:
    """Update all layers of a turn. found: the statistic of each group, taken out one by one."""
    for group in turn:
        made = _made(once, group[0][0], found.pop(0) if found is not None else None)
        for name, layer in group:
            _replace(update, name, layer, made)


def _made(once: Once | None, name: str, statistic: Tensor | None) -> Any:
    if once is None or statistic is None:
        return statistic
    if statistic.nbytes >= 4 * APART:
        give_back()  # what layers before have left in the heap; this one is about to take twice its size
    try:
        return once(statistic)
    except LlmopsError as error:
        raise type(error)(f"{name}: {error}") from error


def _replace(update: Update, name: str, layer: nn.Linear, statistic: Any) -> None:
    finite(layer.weight, f"{name}: the weight holds")
    try:
        weight = update(name, layer, statistic)
    except LlmopsError as error:
        raise type(error)(f"{name}: {error}") from error
    if weight is None:
        return
    if weight.shape != layer.weight.shape:
        raise ValueError(f"{name}: new weight is {tuple(weight.shape)}; expected {tuple(layer.weight.shape)}")
    new = finite(weight, f"{name}: the new weight holds")
    layer.weight.data = new.to(layer.weight)  # not copied into the old one: written to, a mapped file's pages are kept
