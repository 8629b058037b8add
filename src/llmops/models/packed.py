"""`PackedLinear`: a linear layer that holds packed integers and never a dense weight.

It takes the place of `nn.Linear` in an ordinary model, which does not know. Its buffers are the codes in the layout
of the kernel that runs them, the scales and the zero points; `state_dict()` gives the stored (compressed-tensors)
layout back, recovered exactly, so a loaded model can be saved again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmops.ops import int_matmul as op
from llmops.ops.int_matmul_grad import int_matmul_grad

__all__ = ["PackedLinear"]


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """y = x @ dequantized.T + bias. x: (..., in) of any floating dtype; y: (..., out) in the same dtype.

    parts: `weight_packed`, `weight_scale`, `weight_shape` and, when asymmetric, `weight_zero_point`, as
    `llmops.methods.quantize.packing.pack` gives them; bias: (out,) or None; kernel: "auto", "torch", "triton",
    "ops", "reference".
    """

    def __init__(self, parts: Mapping[str, Tensor], *, bits: int, group_size: int, bias: Tensor | None = None,
                 kernel: str = "auto") -> None:
        super().__init__()
        self.out_features, self.in_features = (int(n) for n in parts["weight_shape"].tolist())
        self.bits, self.group_size, self.asked = bits, group_size, kernel
        self.register_buffer("weight_scale", parts["weight_scale"])
        self.register_buffer("weight_zero_point", parts.get("weight_zero_point"))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._lay_out(parts["weight_packed"])

    def _lay_out(self, packed: Tensor) -> None:
        """Choose the kernel for the device that the weight is on, and keep the codes in its layout alone."""
        self.kernel_name = op.choose(self.out_features, self.in_features, bits=self.bits, group_size=self.group_size,
                                     symmetric=self.weight_zero_point is None, device=packed.device.type,
                                     kernel=self.asked)
        prepared = op.prepare(packed, self._weight(), self.kernel_name)
        self.register_buffer("codes", prepared.codes, persistent=False)
        self.register_buffer("codes_extra", prepared.extra, persistent=False)
        self.register_buffer("codes_zero", prepared.zero, persistent=False)

    def _prepared(self) -> op.Prepared:
        return op.Prepared(self.codes, self.codes_extra, self.codes_zero)

    def _weight(self) -> op.IntWeight:
        return op.IntWeight(self.weight_scale, self.weight_zero_point, self.bits, self.group_size, self.out_features,
                            self.in_features)

    @property
    def kernel(self) -> str:
        """What runs it, for people: `torch:int4pack (3-bit codes in 4-bit slots)`."""
        return op.describe(self.kernel_name, self.bits)

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which PEFT finds out where a packed layer lies."""
        return self.codes

    def forward(self, x: Tensor) -> Tensor:
        prepared = self._prepared()
        if torch.is_grad_enabled() and x.requires_grad:  # adapters are trained on top
            return int_matmul_grad(x, prepared, self._weight(), self.kernel_name, self.bias)
        return op.int_matmul(x, prepared, self._weight(), self.kernel_name, self.bias)

    def packed_tensors(self) -> dict[str, Tensor]:
        """What lies in memory for the weight: codes in the kernel's layout, scales, zero points. Nothing is copied."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def stored_tensors(self) -> dict[str, Tensor]:
        """The layout on disk, by the last part of each name, made anew; the inverse of construction."""
        parts = {"weight_packed": self._packed(), "weight_scale": self.weight_scale,
                 "weight_shape": torch.tensor([self.out_features, self.in_features])}
        if self.weight_zero_point is not None:
            parts["weight_zero_point"] = self.weight_zero_point
        return parts

    def dequantized(self) -> Tensor:
        """(out, in), dense, in the dtype of the scales. Nothing here keeps it."""
        return op.dense(self._prepared(), self._weight(), self.kernel_name)

    def _packed(self) -> Tensor:
        return op.recover(self._prepared(), self._weight(), self.kernel_name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.stored_tensors().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """On a move to another kind of device the codes are laid out anew for the kernel that runs there."""
        target = fn(torch.empty(0, device=self.codes.device)).device.type
        if target in (self.codes.device.type, "meta"):
            super()._apply(fn, recurse)
            return self
        packed = self._packed()
        super()._apply(fn, recurse)
        self._lay_out(packed.to(self.weight_scale.device))
        return self

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
                f"group_size={self.group_size}, bias={self.bias is not None}, kernel={self.kernel}")
