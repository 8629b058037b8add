"""Run 2:4 weights as they were pruned: packed, by the kernel of `llmops_kernels.sparse24_linear`.

A dense tensor with zeros in it costs what any tensor costs. On a GPU every linear layer whose weight has two zeros in
each four neighbours is put into 0.5625 of its bytes, which is what decoding reads; with many tokens cuSPARSELt's
product is taken where torch has it (its layout is kept beside, 0.625 of the bytes), else a dense copy. On a CPU there
is nothing to gain, so nothing is done. The folder stays dense: packing takes place in memory, after loading.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Sparse24Linear", "is_24", "run_as_pruned"]


class Sparse24Linear(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """y = x W^T + b with W 2:4, (out, in), fp16 or bf16."""

    kernel = "2:4"

    def __init__(self, layer: nn.Linear, prefill: bool = False) -> None:
        from llmops_kernels.sparse24_linear import pack

        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        packed = pack(layer.weight.detach(), prefill)
        self.register_buffer("values", packed.values)
        self.register_buffer("places", packed.places)
        self.register_buffer("compressed", packed.compressed)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        from llmops_kernels.sparse24_linear import Sparse24, sparse24_linear

        y = sparse24_linear(x.reshape(-1, self.in_features), Sparse24(self.values, self.places, self.compressed),
                            self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def packed_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.named_buffers()}

    def dequantized(self) -> Tensor:
        from llmops_kernels.reference.sparse24_linear import unpack

        return unpack(self.values, self.places)


def is_24(weight: Tensor) -> bool:
    """Whether every four neighbours along the input hold at least two zeros."""
    return weight.shape[1] % 4 == 0 and bool(((weight == 0).view(-1, 4).sum(1) >= 2).all())


def run_as_pruned(model: Any, *, everywhere: bool = False) -> list[str]:
    """Put a `Sparse24Linear` in the place of every 2:4 linear layer but the head, in place: their names.

    None on a CPU, in float32, or where the kernels are not installed; everywhere: on a CPU, too (slow; for tests). A
    layer whose packed product is not that of the dense one is left as it is.
    """
    if find_spec("llmops_kernels") is None:
        return []
    head = model.get_output_embeddings()
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
             and layer.weight.dtype in (torch.float16, torch.bfloat16)
             and (everywhere or layer.weight.device.type == "cuda") and is_24(layer.weight)}
    done = []
    for name, layer in found.items():
        made = _tried(layer)
        if made is not None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
            done.append(name)
    return done


@torch.no_grad()  # type: ignore[untyped-decorator]
def _tried(layer: nn.Linear) -> Sparse24Linear | None:
    """The packed layer, once it gave what the dense one gives for a token and for many."""
    with_prefill = layer.weight.device.type == "cuda" and torch.backends.cusparselt.is_available() and not (
        layer.out_features % 16 or layer.in_features % 16)
    made = Sparse24Linear(layer, with_prefill)
    for tokens in (1, 256):
        x = torch.randn(tokens, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
        wanted, given = layer(x).float(), made(x).float()
        if not bool((given - wanted).norm() <= 0.02 * wanted.norm() + 1e-6):
            return None
    return made
