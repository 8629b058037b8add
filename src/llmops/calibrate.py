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

Deliberate differences from others: all linear layers of a block are measured in one pass (not q, k, v before o, as
"true-sequential" variants do); statistics are summed in float32 or wider whatever the model's dtype; a layer that got
no tokens is an error, not a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError, StepError, unknown
from llmops.models.arch import check_ignore, decoder_layers, is_ignored, linear_layers

__all__ = ["STATISTICS", "block_influence", "block_scores", "walk"]

Update = Callable[[str, nn.Linear, Tensor | None], Tensor | None]
Progress = Callable[[int, int], None]
Call = tuple[tuple[Any, ...], dict[str, Any]]


# ---------------------------------------------------------------------------------------------------- statistics
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
        self.total: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        wide = x.float()
        self.total = self.total + wide.t() @ wide

    def result(self, tokens: int) -> Tensor:
        return torch.as_tensor(self.total) * (2.0 / tokens)


STATISTICS: dict[str, Callable[[], Any] | None] = {"none": None, "x_norm": _Norm, "x_absmax": _AbsMax,
                                                   "hessian": _Hessian}


class _Gather:
    """Adds up one linear layer's statistic through a forward hook."""

    def __init__(self, name: str, layer: nn.Linear, make: Callable[[], Any]) -> None:
        self.name, self.tokens, self.statistic = name, 0, make()
        self.handle = layer.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        self.tokens += x.shape[0]
        self.statistic.add(x)

    def result(self) -> Tensor:
        self.handle.remove()
        if not self.tokens:
            raise StepError(f"{self.name}: no calibration token reached this layer; expected every linear layer to be "
                            f"used. Give more data, or name the layer in ignore")
        value: Tensor = self.statistic.result(self.tokens)
        return _finite(value, f"{self.name}: the input activations hold")


# ---------------------------------------------------------------------------------------------------- the walk
@torch.no_grad()  # type: ignore[untyped-decorator]
def walk(model: nn.Module, tokens: Tensor | None, statistic: str, update: Update, *, ignore: Sequence[str] = (),
         batch_size: int = 8, device: str | torch.device | None = None, progress: Progress | None = None) -> None:
    """Give every linear layer to `update` and put the weight it returns in its place. The model changes in place.

    tokens:    (samples, length) int64 without padding; may be None when statistic is "none"
    statistic: what update gets of the layer's inputs: "none" None, "x_norm" and "x_absmax" (in,), "hessian" (in, in)
    update:    (full name, layer, statistic) -> new weight (out, in), or None to leave the layer as it is
    ignore:    layers left alone, by full name or its end
    device:    where a block computes; the model's own device by default
    progress:  called with (blocks done, blocks in all)

    Raises LlmopsError for a wrong call, StepError naming the layer when a weight or an activation is NaN or infinite.
    """
    if statistic not in STATISTICS:
        raise LlmopsError(unknown("statistic", statistic, STATISTICS))
    make = STATISTICS[statistic]
    if make is not None and (tokens is None or tokens.numel() == 0):
        raise LlmopsError(f'statistic "{statistic}" needs calibration tokens (samples, length); none were given')
    path, blocks = decoder_layers(model)
    todo = _targets(model, path, blocks, ignore)
    stream = _Stream(model, blocks, tokens, batch_size, device) if make is not None and tokens is not None else None
    for index, block in enumerate(blocks):
        layers = [(name, layer) for name, layer in todo.items() if name.startswith(f"{path}.{index}.")]
        with _on(block, stream.device if stream else device):
            gathered = _measure(stream, index, layers, make) if stream and make and layers else {}
            for name, layer in layers:
                _replace(name, layer, update, gathered.get(name))
            if stream:
                stream.advance(index, f"{path}.{index}")
        if progress is not None:
            progress(index + 1, len(blocks))
    outside = [(name, layer) for name, layer in todo.items() if not name.startswith(f"{path}.")]
    gathered = _measure_outside(stream, outside, make) if stream and make and outside else {}
    for name, layer in outside:
        _replace(name, layer, update, gathered.get(name))


@torch.no_grad()  # type: ignore[untyped-decorator]
def block_scores(model: nn.Module, tokens: Tensor, score: Callable[[Tensor, Tensor], float], *, batch_size: int = 8,
                 device: str | torch.device | None = None, progress: Progress | None = None) -> list[float]:
    """One number per decoder block: `score(input, output)`, (batch, length, hidden) each, averaged over the tokens.

    The model is not changed. Raises StepError naming the block when an activation is NaN or infinite.
    """
    if tokens.numel() == 0:
        raise LlmopsError("no calibration tokens; expected (samples, length)")
    path, blocks = decoder_layers(model)
    stream = _Stream(model, blocks, tokens, batch_size, device)
    scores = []
    for index, block in enumerate(blocks):
        before = list(stream.hidden)
        with _on(block, stream.device):
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
def _targets(model: nn.Module, path: str, blocks: nn.ModuleList, ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """Full name -> layer of everything to update; refuses what the walk would otherwise miss in silence."""
    for name, module in blocks.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd):
                raise LlmopsError(f"{path}.{name}.{part} holds {parameter.dim()}-D weights (fused experts?), which the "
                                  f"walk would leave untouched; expected plain linear layers")
    named = dict(linear_layers(model))
    check_ignore(list(named), ignore)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = [name for name in named if name.startswith(path + ".")]
    if not inside:
        raise LlmopsError(f"no plain linear layer in the decoder blocks of {type(model).__name__}; a model that is "
                          f"already quantized cannot be compressed again")
    todo = {}
    for name in [*inside, *(["lm_head"] if head is None else [n for n, m in named.items() if m is head])]:
        is_head = name not in inside
        if name not in named or is_ignored(name, ignore) or (is_head and "lm_head" in ignore):
            continue
        if is_head and _is_tied(model, named[name]):
            raise LlmopsError(f"{name} shares its weight with the input embedding, which would change too; "
                              f"expected ignore to list lm_head")
        todo[name] = named[name]
    return todo


def _is_tied(model: nn.Module, head: nn.Linear) -> bool:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embedding is not None and getattr(embedding, "weight", None) is head.weight


def _replace(name: str, layer: nn.Linear, update: Update, statistic: Tensor | None) -> None:
    _finite(layer.weight, f"{name}: the weight holds")
    try:
        weight = update(name, layer, statistic)
    except LlmopsError as error:
        raise type(error)(f"{name}: {error}") from error
    if weight is None:
        return
    if weight.shape != layer.weight.shape:
        raise ValueError(f"{name}: new weight is {tuple(weight.shape)}; expected {tuple(layer.weight.shape)}")
    layer.weight.data.copy_(_finite(weight, f"{name}: the new weight holds"))


def _finite(value: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise StepError(f"{what} NaN or infinity; expected finite values. Was training stable, and is the dtype "
                        f"wide enough (float16 overflows at 65504)?")
    return value


def _measure(stream: _Stream, index: int, layers: Sequence[tuple[str, nn.Linear]],
             make: Callable[[], Any]) -> dict[str, Tensor]:
    gathers = [_Gather(name, layer, make) for name, layer in layers]
    try:
        for batch in range(len(stream.hidden)):
            stream.run(index, batch)
        return {gather.name: gather.result() for gather in gathers}
    finally:
        for gather in gathers:
            gather.handle.remove()


def _measure_outside(stream: _Stream, layers: Sequence[tuple[str, nn.Linear]],
                     make: Callable[[], Any]) -> dict[str, Tensor]:
    """Statistics of layers after the blocks (an untied head): the model's own forward, fed the last block's output."""
    gathers = [_Gather(name, layer, make) for name, layer in layers]
    try:
        for batch, hidden in enumerate(stream.hidden):
            with _passing(stream.blocks, partial(_instead, hidden)):
                stream.model(input_ids=stream.tokens[batch], use_cache=False)
        return {gather.name: gather.result() for gather in gathers}
    finally:
        for gather in gathers:
            gather.handle.remove()


class _Stream:
    """The calibration batches on their way through the blocks: hidden states, and the other arguments of each block."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, batch_size: int,
                 device: str | torch.device | None) -> None:
        if model.training:
            model.eval()  # dropout has no place in a statistic
        self.model, self.blocks = model, blocks
        self.home = next(model.parameters()).device
        self.device = torch.device(device) if device is not None else self.home
        self.tokens = [batch.to(self.home) for batch in tokens.split(batch_size)]
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = []  # [batch][block]
        for batch in self.tokens:
            self._capture(batch)

    def _capture(self, batch: Tensor) -> None:
        calls: list[Call] = []

        def note(index: int, call: Call) -> Tensor:
            hidden = _hidden(call)
            if index == 0:
                self.hidden.append(hidden)
            calls.append(_share(_put(call, None), self.calls[-1][index] if self.calls else None))
            return hidden

        base = getattr(self.model, "base_model", self.model)  # without the head: its logits would be the largest tensor
        with _passing(self.blocks, note):
            base(input_ids=batch, use_cache=False)
        if len(calls) != len(self.blocks):
            raise LlmopsError(f"{type(self.model).__name__} ran {len(calls)} of its {len(self.blocks)} decoder blocks; "
                              f"expected each once")
        self.calls.append(calls)

    def run(self, index: int, batch: int) -> Tensor:
        args, kwargs = _to(_put(self.calls[batch][index], self.hidden[batch]), self.device)
        out = self.blocks[index](*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, index: int, name: str) -> None:
        """Replace every hidden state by what block `index` makes of it."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = _finite(self.run(index, batch), f"{name}: the output activations hold").to(self.home)
            self.calls[batch][index] = ((), {})  # masks of a block that is done are not needed any more


@contextmanager
def _passing(blocks: nn.ModuleList, note: Callable[[int, Call], Tensor]) -> Iterator[None]:
    """Within, a block does not compute: it returns what `note(index, its arguments)` returns."""
    saved = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = lambda *args, _i=index, **kwargs: note(_i, (args, kwargs))
    try:
        yield
    finally:
        for block, forward in zip(blocks, saved, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@contextmanager
def _on(block: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    home = next(block.parameters()).device
    if device is None or torch.device(device) == home:
        yield
        return
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    value: Tensor = args[0] if args else kwargs["hidden_states"]
    return value


def _put(call: Call, hidden: Tensor | None) -> Call:
    """The call with its hidden states replaced (None: left out until they are known)."""
    args, kwargs = call
    if args:
        return (hidden, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": hidden}


def _instead(out: Tensor, index: int, call: Call) -> Tensor:
    return out


def _to(value: Any, device: torch.device) -> Any:
    """Every tensor inside tuples, lists and dicts, moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value


def _share(value: Any, other: Any) -> Any:
    """`value`, with tensors that equal their counterpart in `other` replaced by it: masks are kept once."""
    if isinstance(value, Tensor):
        same = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype
        return other if same and torch.equal(value, other) else value
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)) and len(value) == len(other):
        return type(value)(_share(item, twin) for item, twin in zip(value, other, strict=True))
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: _share(item, other.get(key)) for key, item in value.items()}
    return value
