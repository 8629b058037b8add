"""The calibration batches on their way through a model, one decoder block at a time.

The model's own forward is run once with every decoder block made a pass-through that notes its arguments; from then on
a block is called with what was noted and with the hidden states that the block before it made. Hidden states wait on
the model's own device; a block is moved to where it computes, and may compute in a wider dtype than it is stored in,
for the time of its turn (`lent`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError, StepError
from llmops.ops.finite import all_finite
from llmops.ops.float32 import linear
from llmops.shelf import give_back, shelved, sparing

__all__ = ["SHELVED_FROM", "Call", "Stream", "computing", "finite", "instead", "lent", "passing"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
#: Bytes of a block from which on it is put on the disk once it has been changed (`shelf.py`).
SHELVED_FROM = 1 << 24


def finite(value: Tensor, what: str) -> Tensor:
    """`value` itself. Raises StepError, `what` before "NaN", unless every entry is finite."""
    if not all_finite(value):
        raise StepError(f"{what} NaN or infinity; expected finite values. Was training stable, and is the dtype "
                        f"wide enough (float16 overflows at 65504)?")
    return value


class Stream:
    """The calibration batches on their way through the blocks: hidden states, and the other arguments of each block."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, batch_size: int,
                 device: str | torch.device | None, compute: torch.dtype | None = None) -> None:
        if model.training:
            model.eval()  # dropout has no place in a statistic
        self.model, self.blocks = model, blocks
        self.home = next(model.parameters()).device
        self.device = torch.device(device) if device is not None else self.home
        self.compute = compute
        self.dtype = next(model.parameters()).dtype
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
        with passing(self.blocks, note):
            base(input_ids=batch, use_cache=False)
        if len(calls) != len(self.blocks):
            raise LlmopsError(f"{type(self.model).__name__} ran {len(calls)} of its {len(self.blocks)} decoder blocks; "
                              f"expected each once")
        self.calls.append(calls)

    def run(self, index: int, batch: int, hidden: Tensor | None = None,
            weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What block `index` makes of a batch, or of other hidden states in its place, or with other parameters."""
        hidden = self.hidden[batch] if hidden is None else hidden
        args, kwargs = _to(_put(self.calls[batch][index], hidden), self.device, self.compute)
        block = self.blocks[index]
        with _wide(block):
            out = block(*args, **kwargs) if weights is None else torch.func.functional_call(block, dict(weights), args,
                                                                                            kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, index: int, name: str) -> None:
        """Replace every hidden state by what block `index` makes of it."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = finite(self.run(index, batch), f"{name}: the output activations hold").to(self.home)
            self.calls[batch][index] = ((), {})  # masks of a block that is done are not needed any more


@contextmanager
def passing(blocks: nn.ModuleList, note: Callable[[int, Call], Tensor]) -> Iterator[None]:
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
def computing(layer: nn.Linear, product: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, x W^T of the layer is what `product` makes of x; its bias, and its hooks, are as they were."""
    saved = layer.__dict__.get("forward")
    layer.forward = lambda x: product(x) if layer.bias is None else product(x) + layer.bias  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward
        if saved is not None:
            layer.forward = saved  # type: ignore[method-assign]


@contextmanager
def _wide(block: nn.Module) -> Iterator[None]:
    """Within, linear layers whose forward nobody has replaced multiply as `ops/float32.py` does."""
    layers = [layer for layer in block.modules() if type(layer) is nn.Linear and "forward" not in layer.__dict__]
    for layer in layers:
        layer.forward = lambda x, _of=layer: linear(x, _of.weight, _of.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def lent(block: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None = None, *,
         changes: bool = True) -> Iterator[None]:
    """Within, the block is on `device` and, if given, in `dtype`; after, where it was and as it was stored.

    A large block that has changed comes back mapped from a scratch file: what the walk leaves behind it takes no
    memory. changes: whether it may have.
    """
    home = next(block.parameters()).device
    tensors = dict(chain(block.named_parameters(), block.named_buffers()))
    stored = {name: tensor.dtype for name, tensor in tensors.items()}
    large = changes and sum(tensor.nbytes for tensor in tensors.values()) >= SHELVED_FROM
    moved = dtype is not None or (device is not None and torch.device(device) != home)
    with ExitStack() as stack:
        if large:
            stack.enter_context(sparing())
        if moved:
            block.to(device=device, dtype=dtype)
        if large:
            give_back()
        try:
            yield
        finally:
            for name, tensor in chain(block.named_parameters(), block.named_buffers()) if moved or large else ():
                data = tensor.data.to(device=home, dtype=stored[name])
                tensor.data = shelved(data) if large else data
                del data
            if large:
                give_back()


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


def instead(out: Tensor, index: int, call: Call) -> Tensor:
    return out


def _to(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Every tensor inside tuples, lists and dicts, moved; those of floating point in `dtype`, if given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device, dtype) for key, item in value.items()}
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
