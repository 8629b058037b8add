"""`FormattedLinear`: a linear layer whose weight lies in 8-bit integers or 4- or 8-bit floats, never dense.

The counterpart of `PackedLinear` (packed.py) for the number formats that are no packed integers, with the same small
interface. Each kind names an op, which says how its tensors are laid out, run and given back:

    w8a8                                 int8 weights, int8 activations by token        ops/int8_matmul.py
    fp8-tensor, fp8-channel, fp8-block   E4M3 weights and activations                   ops/fp8_matmul.py
    mxfp4, nvfp4                         E2M1 weights, activations as they are          ops/fp4_matmul.py

The tensors are plain attributes, not buffers: a change of the model's type must not touch scales that the format fixes,
and oneDNN's layout of int8 has no storage that torch could move or copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError
from llmops.methods.quantize import float_packing
from llmops.ops import fp4_matmul, fp8_matmul, int8_matmul

__all__ = ["KINDS", "FormattedLinear"]

Held = Mapping[str, Tensor]


class _Op(NamedTuple):
    """choose: (rows, columns, device type, asked) -> name; describe: name -> for people; prepare, recover: parts as
    stored to as held, and back, for a name; run: (x, held, name, bias) -> y."""

    choose: Callable[[int, int, str, str], str]
    describe: Callable[[str], str]
    prepare: Callable[[Held, str], dict[str, Tensor]]
    recover: Callable[[Held, str], dict[str, Tensor]]
    run: Callable[[Tensor, Held, str, Tensor | None], Tensor]


def _as_it_is(parts: Held, name: str) -> dict[str, Tensor]:
    return dict(parts)


def _fp8(scales: str) -> _Op:
    return _Op(lambda rows, columns, device, asked: fp8_matmul.choose(asked, device), fp8_matmul.describe, _as_it_is,
               _as_it_is, lambda x, held, name, bias: fp8_matmul.fp8_matmul(x, held, scales, bias, name))


_FP4 = _Op(lambda rows, columns, device, asked: fp4_matmul.choose(asked), fp4_matmul.describe, _as_it_is, _as_it_is,
           lambda x, held, name, bias: fp4_matmul.fp4_matmul(x, held, bias))
_OPS = {"w8a8": _Op(lambda rows, columns, device, asked: int8_matmul.choose(rows, columns, device=device, kernel=asked),
                    int8_matmul.describe, int8_matmul.prepare, int8_matmul.recover, int8_matmul.int8_matmul),
        "fp8-tensor": _fp8("tensor"), "fp8-channel": _fp8("channel"), "fp8-block": _fp8("block"), "mxfp4": _FP4,
        "nvfp4": _FP4}
KINDS = tuple(_OPS)


class FormattedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """y = x @ dequantized.T + bias, the activations rounded first where the kind says so. x: (..., in); y: (..., out).

    parts: as `llmops.methods.quantize.float_packing` gives them; kind: one of KINDS; bias: (out,) or None; kernel:
    "auto", "torch" or "reference". Raises ModelError when the parts do not fit together, LlmopsError for another kind
    or kernel.
    """

    def __init__(self, parts: Held, kind: str, *, bias: Tensor | None = None, kernel: str = "auto") -> None:
        super().__init__()
        if kind not in _OPS:
            raise LlmopsError(f'kind "{kind}"; expected one of {", ".join(KINDS)}')
        self.kind, self.asked = kind, kernel
        self.out_features, self.in_features = _weight(parts, kind).shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._lay_out(parts)

    def _lay_out(self, parts: Held) -> None:
        """Choose the kernel for the device that the weight is on, and keep the weight in its layout alone."""
        op, device = _OPS[self.kind], parts["weight_scale"].device.type
        self.kernel_name = op.choose(self.out_features, self.in_features, device, self.asked)
        self.held = op.prepare(parts, self.kernel_name)

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.kind in ("mxfp4", "nvfp4") else 8

    @property
    def kernel(self) -> str:
        """What runs it, for people."""
        return _OPS[self.kind].describe(self.kernel_name)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}; expected (..., {self.in_features})")
        return _OPS[self.kind].run(x, self.held, self.kernel_name, self.bias)

    @property
    def takes(self) -> tuple[torch.dtype, int] | None:
        """(type, columns that share a scale or -1) of the codes that `on_codes` takes; None where it takes none."""
        if self.kernel_name not in (int8_matmul.TRITON, int8_matmul.OPS) or self.bits != 8:
            return None
        if self.kind == "w8a8":
            return torch.int8, -1
        return torch.float8_e4m3fn, fp8_matmul.BLOCK if self.kind == "fp8-block" else -1

    def on_codes(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """`forward` of activations that are rounded already, as `takes` says: codes (..., in), scale (tokens, groups)
        float32 -> (..., out) in `dtype`."""
        flat = codes.reshape(-1, self.in_features)
        y = (int8_matmul.on_codes(flat, scale, self.held, self.bias, dtype) if self.kind == "w8a8" else
             fp8_matmul.on_codes(flat, scale, self.held, self.kind.removeprefix("fp8-"), self.bias, dtype))
        return y.view(*codes.shape[:-1], self.out_features)

    def packed_tensors(self) -> dict[str, Tensor]:
        """What lies in memory for the weight. Nothing is copied."""
        return dict(self.held)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The layout on disk, by the last part of each name; the inverse of construction."""
        return _OPS[self.kind].recover(self.held, self.kernel_name)

    def dequantized(self) -> Tensor:
        """(out, in), dense: of 8 bits in the type of the scales, of 4 in float32. Nothing here keeps it."""
        return _weight(self.stored_tensors(), self.kind).dequantize()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.stored_tensors().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FormattedLinear:
        """On a move to another device the weight is laid out anew for the kernel that runs there; types stay."""
        super()._apply(fn, recurse)
        here = self.held["weight_scale"].device
        target = fn(torch.empty(0, device=here)).device
        if target != here and target.type != "meta":
            self._lay_out({name: tensor.to(target) for name, tensor in self.stored_tensors().items()})
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FormattedLinear:
        parts = {name: tensor.clone() for name, tensor in self.stored_tensors().items()}
        return FormattedLinear(parts, self.kind, kernel=self.asked,
                               bias=None if self.bias is None else self.bias.detach().clone())

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}, "
                f"bias={self.bias is not None}, kernel={self.kernel}")


def _weight(parts: Held, kind: str) -> Any:
    return (float_packing.unpack_int8(parts) if kind == "w8a8" else float_packing.unpack_floats(parts, kind))
