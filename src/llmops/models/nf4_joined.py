"""NF4 layers that read the same input, below each other, as one product of `llmops_kernels`' `nf4_linear`.

A weight in bitsandbytes' 4 bits is one run of codes, row after row, with a scale for each 64 of them (`nf4.py`). Where
every weight ends with a whole block, runs and scales laid below each other are the run and the scales of the taller
weight: no code and no scale is made anew. With double quantization the scales are codes themselves, less their mean,
which each weight has its own of: the op takes one for every row. Their blocks of 256 have to be whole, too.

Not joined: what bitsandbytes runs itself (a CPU; `kernel: torch`), whose own format has one mean for all, and what
does not end with a whole block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["JoinedNF4", "joined_nf4", "product"]

NESTED_BLOCK = 256  # scales that share a scale of theirs


def product(x: Tensor, codes: Tensor, state: Any, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    """x (..., in) times the weight of a bitsandbytes state, (..., out) in x's type, by the op of `llmops_kernels`.

    state: `quant_state` of a weight, or a JoinedNF4. compute: in which type, where it has 16 bits; else in bfloat16.
    """
    from llmops_kernels.nf4_linear import nf4_linear

    half = compute if compute in (torch.float16, torch.bfloat16) else torch.bfloat16
    flat = x.reshape(-1, x.shape[-1]).to(half)
    y: Tensor = nf4_linear(flat if flat.stride(-1) == 1 else flat.contiguous(), codes, state, bias)
    return y.to(x.dtype).view(*x.shape[:-1], state.shape[0])


class JoinedNF4(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """layers: `nf4.Linear4bit`s that fit together (`joined_nf4`). Has no derivative: it serves.

    Names and meanings of its tensors are those of bitsandbytes' QuantState, as which `nf4_linear` reads it: `absmax`
    the scales of the blocks, or their codes, whose own scales, table and mean are `nested_absmax`, `nested_table` and
    `offset` (out,).
    """

    bits = 4

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        first = layers[0].weight.quant_state
        states = [layer.weight.quant_state for layer in layers]
        self.in_features, self.out_features = layers[0].in_features, sum(layer.out_features for layer in layers)
        self.shape = torch.Size((self.out_features, self.in_features))
        self.compute_dtype, self.kernel_name = layers[0].compute_dtype, layers[0].kernel_name
        self.quant_type, self.blocksize, self.nested = first.quant_type, first.blocksize, first.nested
        self._hold("codes", torch.cat([layer.weight.data.flatten() for layer in layers]))
        self._hold("absmax", torch.cat([state.absmax.flatten() for state in states]))
        if self.nested:
            self._hold("nested_absmax", torch.cat([state.state2.absmax for state in states]))
            self._hold("nested_table", first.state2.code)
            self._hold("offset", torch.cat([state.offset.detach().float().reshape(1).expand(layer.out_features)
                                            for state, layer in zip(states, layers, strict=True)]))
        self.bias = None if layers[0].bias is None else nn.Parameter(
            torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    @property
    def state2(self) -> Any:
        """The scales of the scales, as bitsandbytes names them."""
        return _Nested(self.nested_absmax, self.nested_table)

    @property
    def kernel(self) -> str:
        """What runs it, for people."""
        return f"{self.kernel_name} ({self.quant_type} codes as bitsandbytes stores them)"

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.codes, self, self.bias, self.compute_dtype)

    def packed_tensors(self) -> dict[str, Tensor]:
        """What lies in memory for the weight."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def dequantized(self) -> Tensor:
        """(out, in), in the type that it computes in. Nothing here keeps it."""
        from llmops_kernels.nf4_linear import of_bitsandbytes
        from llmops_kernels.reference.nf4_linear import absmax_of, dequantize

        scales = absmax_of(*of_bitsandbytes(self))
        return dequantize(self.codes, scales, self.quant_type, self.blocksize, self.out_features, self.in_features,
                          self.compute_dtype)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, {self.quant_type}, "
                f"bias={self.bias is not None}, kernel={self.kernel}")


class _Nested:
    """bitsandbytes' state of the scales, of which `nf4_linear` reads these three."""

    blocksize = NESTED_BLOCK

    def __init__(self, absmax: Tensor, code: Tensor) -> None:
        self.absmax, self.code = absmax, code


def joined_nf4(layers: Sequence[Any]) -> JoinedNF4 | None:
    """One layer that gives the outputs of all `nf4.Linear4bit`s, one after the other; None where there is none."""
    states = [layer.weight.quant_state for layer in layers]
    alike = {(layer.kernel_name, layer.compute_dtype, state.quant_type, state.blocksize, state.nested,
              layer.bias is None) for layer, state in zip(layers, states, strict=True)}
    if len(alike) > 1 or not layers[0].kernel_name:
        return None
    blocks = [layer.out_features * layer.in_features // state.blocksize for layer, state in
              zip(layers, states, strict=True)]  # whole ones, where the op runs a layer
    if states[0].nested:
        rows = layers[0].in_features % states[0].blocksize == 0  # each block in one row, whose offset is its own
        whole = all(count % NESTED_BLOCK == 0 for count in blocks[:-1])
        tables = all(torch.equal(state.state2.code, states[0].state2.code) for state in states)
        if not (rows and whole and tables and all(state.state2.blocksize == NESTED_BLOCK for state in states)):
            return None
    return JoinedNF4(layers)
