"""What becomes of a model's output when single layers get other weights: the measurements behind mixed bits.

    swap_scores      run the model with one swap after another, and compare its logits with its own. A swap changes
                     layers of one decoder block, so what comes before that block is computed once for all of them
    skip_losses      the loss without one run of decoder blocks after another
    crop_gradients   one backward pass with labels drawn from the model; each layer's gradients, a crop each, are handed
                     over and let go, so gradients of the whole model are never held

Calibration walks elsewhere (`calibrate`) change the model block by block; here it ends as it began. The whole model is
in its computing type while it is measured: 4 bytes a weight on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from llmops.block_stream import Stream, finite, instead, lent, passing
from llmops.errors import LlmopsError
from llmops.models.arch import decoder_layers

__all__ = ["Swap", "crop_gradients", "skip_losses", "swap_scores"]

class Stored(Protocol):
    """A weight in some other form, made dense where it is needed: a quantized one, or a mask on one."""

    def dequantize(self) -> Tensor: ...


Swap = Mapping[str, Stored]
Progress = Callable[[int, int], None]


# ------------------------------------------------------------------------------------------------------------- swaps
@torch.no_grad()  # type: ignore[untyped-decorator]
def swap_scores(model: nn.Module, tokens: Tensor, swaps: Sequence[Swap], score: Callable[[Tensor, Tensor], Tensor], *,
                where: Tensor | None = None, batch_size: int = 8, compute: torch.dtype | None = None,
                progress: Progress | None = None) -> list[float]:
    """For each swap, `score(logits of the model, logits with the swap)` summed over batches, a token.

    tokens: (samples, length) int64; swaps: weights by full layer name, each within one decoder block, or of a head
    after the blocks; score: (n, V), (n, V) -> a scalar, summed over n tokens; where: (samples, length) bool, after
    which tokens logits count, all by default. Cost: the blocks from each swap's own
    to the last, and the head. Raises LlmopsError for a swap across blocks, StepError when the model's output is NaN.
    """
    path, blocks = decoder_layers(model)
    places = [_place(swap, path) for swap in swaps]
    totals = [0.0] * len(swaps)
    counted = torch.ones_like(tokens, dtype=torch.bool) if where is None else where
    batches = tokens.split(batch_size)
    with lent(model, None, compute):
        for done, batch in enumerate(batches):
            stream = Stream(model, blocks, batch, len(batch), None)
            states = [stream.hidden[0]]
            for index in range(len(blocks)):
                states.append(stream.run(index, 0, states[-1]))
            here = counted[done * batch_size:][:len(batch)].to(stream.home)
            exact = finite(_logits(stream, states[-1])[here], "the model's logits hold")
            for number, (swap, place) in enumerate(zip(swaps, places, strict=True)):
                weights = {f"{name}.weight": weight.dequantize().to(stream.home, stream.dtype)
                           for name, weight in swap.items()}
                totals[number] += float(score(exact, _swapped(stream, states, place, path, weights)[here]))
            if progress is not None:
                progress(done + 1, len(batches))
    return [total / int(counted.sum()) for total in totals]


@torch.no_grad()  # type: ignore[untyped-decorator]
def skip_losses(model: nn.Module, tokens: Tensor, length: int = 1, *, batch_size: int = 8,
                progress: Progress | None = None) -> list[float]:
    """Next-token loss, nats a token, without each run of `length` neighbouring decoder blocks: of the run that begins
    at each block. tokens: (samples, length) int64. Cost: about half the model a run. The model is not changed."""
    _, blocks = decoder_layers(model)
    runs = len(blocks) - length + 1
    totals, count = [0.0] * runs, 0
    batches = tokens.split(batch_size)
    for done, batch in enumerate(batches):
        stream = Stream(model, blocks, batch, len(batch), None)
        states = [stream.hidden[0]]
        for index in range(len(blocks)):
            states.append(stream.run(index, 0, states[-1]))
        for first in range(runs):
            hidden = states[first]
            for index in range(first + length, len(blocks)):
                hidden = stream.run(index, 0, hidden)
            logits = finite(_logits(stream, hidden), "the model's logits hold")[:, :-1].float()
            labels = stream.tokens[0][:, 1:].to(logits.device)
            totals[first] += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(),
                                                               reduction="sum"))
        count += batch[:, 1:].numel()
        if progress is not None:
            progress(done + 1, len(batches))
    return [total / count for total in totals]


def _place(swap: Swap, path: str) -> int | None:
    """The block that a swap is in, None for a head outside the blocks."""
    found = {int(name.removeprefix(f"{path}.").partition(".")[0]) if name.startswith(f"{path}.") else None
             for name in swap}
    if len(found) != 1:
        raise LlmopsError(f"a swap of {sorted(swap)}; expected layers of one decoder block")
    return found.pop()


def _swapped(stream: Stream, states: Sequence[Tensor], place: int | None, path: str,
             weights: Mapping[str, Tensor]) -> Tensor:
    if place is None:
        return _logits(stream, states[-1], weights)
    inside = {name.removeprefix(f"{path}.{place}."): weight for name, weight in weights.items()}
    hidden = stream.run(place, 0, states[place], inside)
    for index in range(place + 1, len(stream.blocks)):
        hidden = stream.run(index, 0, hidden)
    return _logits(stream, hidden)


def _logits(stream: Stream, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """What the model makes of the last block's output: final norm, head, and whatever it does to logits."""
    with passing(stream.blocks, partial(instead, hidden)):
        call = {"input_ids": stream.tokens[0], "use_cache": False}
        out = stream.model(**call) if not weights else torch.func.functional_call(stream.model, dict(weights), (), call)
    logits: Tensor = out.logits
    return logits


# --------------------------------------------------------------------------------------------------------- gradients
def crop_gradients(model: nn.Module, tokens: Tensor, names: Sequence[str],
                   take: Callable[[slice, str, Tensor], None], *, where: Tensor | None = None, batch_size: int = 4,
                   seed: int = 0, compute: torch.dtype | None = None, progress: Progress | None = None) -> None:
    """Hand the gradient of each crop's loss by each weight to `take(which crops, layer name, (crops, out, in))`.

    The loss is -sum_t log p(y_t | x_<=t) with y_t drawn from the model's own p, seeded: the gradients whose second
    moment is the Fisher information. tokens: (samples, length); where: as `swap_scores`, the t that are summed over;
    names: full names of linear layers. A layer that runs
    several times in one pass is handed over as often. Cost: a forward and a backward pass of all the tokens; memory:
    activations of a batch through all blocks, and a layer's gradients for each of its crops.
    """
    layers = [(name, model.get_submodule(name)) for name in names]
    kept = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    draw = torch.Generator().manual_seed(seed)
    current = [slice(0)]
    handles = [model.get_input_embeddings().register_forward_hook(_differentiable),  # type: ignore[operator]
               *(layer.register_forward_hook(partial(_watch, take, current, name)) for name, layer in layers)]
    try:
        for parameter, _ in kept:
            parameter.requires_grad_(False)  # only activations are differentiated; a weight's gradient is made of them
        with lent(model, None, compute), torch.enable_grad():
            for first in range(0, len(tokens), batch_size):
                current[0] = slice(first, min(first + batch_size, len(tokens)))
                _backward(model, tokens[current[0]], None if where is None else where[current[0]], draw)
                if progress is not None:
                    progress(current[0].stop, len(tokens))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in kept:
            parameter.requires_grad_(wanted)


def _backward(model: nn.Module, ids: Tensor, where: Tensor | None, draw: torch.Generator) -> None:
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits.float().flatten(0, 1)
    finite(logits.detach(), "the model's logits hold")
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw).flatten().to(device)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    (losses if where is None else losses * where.flatten().to(device)).sum().backward()


def _differentiable(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.detach().requires_grad_(True)


def _watch(take: Callable[[slice, str, Tensor], None], current: list[slice], name: str, layer: nn.Module,
           args: tuple[Tensor, ...], out: Tensor) -> None:
    x = args[0].detach()  # (batch, length, in)
    out.register_hook(lambda g: take(current[0], name, g.float().transpose(1, 2) @ x.float()))
