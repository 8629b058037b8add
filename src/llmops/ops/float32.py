"""float32 matrix products of a CPU at the width of its registers, no bit less exact.

torch gives float32 products on x86 to MKL, which on processors of other makers than its own uses half the width that
they have (AVX2 where there is AVX-512): on a Zen 5 107 of the 250 GFLOP/s that oneDNN, which torch carries as well,
reaches with the same operands and the same error. torch hands a product to oneDNN where it is told that bfloat16 inside
would do (`torch.backends.mkldnn.matmul.fp32_precision`); oneDNN takes that liberty only on processors with tile
registers (AMX), where nothing is changed here. Whether it is as exact as it should be is not assumed: the first use
multiplies two matrices and compares with float64.

Only single products are wrapped: inside attention the same setting is slower (many small products, each set up anew).
A result may differ from MKL's in its last bits, as MKL's own do from one processor to another; on one machine it is the
same every time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Products", "linear", "narrower", "wider"]

#: What a relative error of float32 products stays below, by the norm; with bfloat16 inside it is 2e-3.
EXACT = 2e-6


@cache
def wider() -> bool:
    """Whether this CPU multiplies float32 faster through oneDNN, and as exactly."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if (not torch.backends.mkldnn.is_available() or not hasattr(matmul, "fp32_precision")
            or torch.backends.cpu.get_cpu_capability() != "AVX512"
            or getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(48, 128, generator=generator), torch.randn(128, 48, generator=generator)
    exact = a.double() @ b.double()
    with Products(always=True):
        return bool((a @ b - exact).norm() < EXACT * exact.norm())


@cache
def narrower() -> bool:
    """Whether this CPU multiplies bfloat16, summed in float32, faster than float32: it has instructions for that."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
                and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


class Products:
    """Within, products of large float32 matrices are those of `wider`, where it is true. Two microseconds."""

    def __init__(self, *, always: bool = False) -> None:
        self.on = always or wider()

    def __enter__(self) -> None:
        if self.on:
            self.before = torch.backends.mkldnn.matmul.fp32_precision
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"

    def __exit__(self, *_: object) -> None:
        if self.on:
            torch.backends.mkldnn.matmul.fp32_precision = self.before


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias as `F.linear`; its products, backward ones too, in `Products` where all is float32 on a CPU."""
    if not wider() or any(each.dtype != torch.float32 or each.device.type != "cpu" for each in (x, W)):
        return F.linear(x, W, bias)
    if torch.is_grad_enabled() and (x.requires_grad or W.requires_grad):
        y: Tensor = _Linear.apply(x, W)
        return y if bias is None else y + bias
    with Products():
        return F.linear(x, W, bias)


class _Linear(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T with all three products in `Products`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        with Products():
            return F.linear(x, W)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, W = ctx.saved_tensors
        with Products():
            return (g @ W if ctx.needs_input_grad[0] else None,
                    g.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None)
