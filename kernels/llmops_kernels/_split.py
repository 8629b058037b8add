"""The second half of a matmul that was split along K: the parts, float32, added in order.

Atomics would need no workspace and no second launch, but add in the order in which programs happen to finish: not the
same bits twice.
"""

from __future__ import annotations

from torch import Tensor

from ._interpret import narrow
from ._triton import tl, triton

__all__ = ["sum_parts"]


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def sum_parts_kernel(parts_ptr, bias_ptr, y_ptr, M, N, stride_ym,  # type: ignore[no-untyped-def]
                     PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y (M, N) = the parts (PARTS, M, N) float32 added in order, plus the bias."""
    row = tl.program_id(1).to(tl.int64)
    rn = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (row + part * M) * N + rn, mask=rn < N, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride_ym + rn, narrow(total, y_ptr.dtype.element_ty), mask=rn < N)


def sum_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y (M, N), rows of any stride <- parts (PARTS, M, N) float32 added along the first axis, plus bias (N)."""
    count, M, N = parts.shape
    sum_parts_kernel[(triton.cdiv(N, 1024), M)](parts, parts if bias is None else bias, y, M, N, y.stride(0),
                                                PARTS=count, BIAS=bias is not None, BLOCK=1024, num_warps=4)
    return y
