"""What the decoder blocks of a model put out in an ordinary forward pass, gradients and all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmops.models.arch import decoder_layers

__all__ = ["block_outputs"]


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Inside, each forward pass leaves the output of every decoder block in the dict: {block: (B, T, D)}.

    Read it before the backward pass: with gradient checkpointing the blocks run once more in there.
    """
    _, blocks = decoder_layers(model)
    outputs: dict[int, Tensor] = {}

    def note(index: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        outputs[index] = out[0] if isinstance(out, tuple) else out

    handles = [block.register_forward_hook(partial(note, index)) for index, block in enumerate(blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
