"""What Triton's interpreter gets wrong without a word, and the helpers that make a kernel right in both.

Under TRITON_INTERPRET=1 (read when triton is imported, so tests of kernels run in a process of their own):

    bf16 `tl.dot`, bf16 arithmetic, bf16 `tl.sum`   work on the bits as if they were integers: relative errors of 1e10
    integer -> bf16                                 gives garbage
    float32 -> bf16                                 cuts off where hardware rounds to nearest even
    float32 -> fp8                                  does not saturate
    inline assembly, libdevice, bf16 atomics        fail

So: multiply with `dot`, do arithmetic on bf16 only after `.to(tl.float32)`, leave float32 with `narrow`, and give every
inline assembly a plain alternative under `if INTERPRET:`.
"""

from __future__ import annotations

import os

from ._triton import tl, triton

__all__ = ["INTERPRET", "INTERPRETED", "dot", "narrow"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # for Python
INTERPRET = tl.constexpr(INTERPRETED)  # for kernels


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b, summed in float32 (int8 operands: in int32). a: (M, K); b: (K, N), brought to a's dtype here."""
    if INTERPRET and acc.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b.to(a.dtype), acc)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def narrow(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 -> dtype, to nearest even as hardware does."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where(x == x, even, x).to(dtype)
    return x.to(dtype)
