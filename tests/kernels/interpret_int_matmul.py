"""Run by test_int_matmul.py in a process of its own: TRITON_INTERPRET has to be set before triton is imported.

Prints one JSON line per case: the relative error of the kernel against float64, and of a second run against the first.
"""

from __future__ import annotations

import json
import sys

import torch

from llmops_kernels.int_matmul import int_matmul, pack_codes, unpack_codes


def case(bits: int, group: int, m: int, n: int, k: int, dtype: str, zero: bool) -> dict[str, object]:
    made = torch.Generator().manual_seed(bits * 1000 + m * 10 + n + k + zero)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=made, dtype=torch.int8)
    codes.view(-1)[: 2 * half] = torch.arange(-half, half, dtype=torch.int8)  # every code occurs
    size = k if group == -1 else group
    scale = torch.exp(torch.empty(n, k // size).uniform_(-6.9, 0.0, generator=made))  # over three decades
    scale[n // 2] *= 30  # one outlier row
    typed = getattr(torch, dtype)
    scale = scale.to(typed)
    points = torch.randint(-half, half, scale.shape, generator=made, dtype=torch.int8) if zero else None
    x = torch.randn(m, k, generator=made).to(typed)
    stored = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(stored, bits, k), codes)
    y = int_matmul(x, stored, scale, points, bits=bits, group_size=size)
    again = int_matmul(x, stored, scale, points, bits=bits, group_size=size)
    if m == 0:
        fits = tuple(y.shape) == (0, n) and y.dtype == typed
        return {"case": [bits, group, m, n, k, dtype, zero], "error": 0.0 if fits else 1.0, "worst_row": 0.0,
                "repeat": 0.0}
    shifted = codes.double() if points is None else codes.double() - points.double().repeat_interleave(size, 1)
    exact = x.double() @ (shifted * scale.double().repeat_interleave(size, 1)).T
    rows = ((y.double() - exact).norm(dim=0) / exact.norm(dim=0)).max()  # per output row: the outlier hides nothing
    return {"case": [bits, group, m, n, k, dtype, zero], "error": float((y.double() - exact).norm() / exact.norm()),
            "worst_row": float(rows), "repeat": float((y.double() - again.double()).abs().max())}


if __name__ == "__main__":
    for line in json.loads(sys.argv[1]):
        print(json.dumps(case(*line)), flush=True)
