"""What torch asks of every op: schema, fake implementation and tracing right, and a whole graph under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["assert_traces"]


def assert_traces(op: Any, arguments: tuple[Any, ...], door: Callable[..., Any], *given: Any) -> None:
    """opcheck on `op(*arguments)`; `door(*given)` gives the same bits compiled with fullgraph=True as plain."""
    tests = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
    if any(isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn for value in arguments):
        tests.remove("test_schema")  # it multiplies copies of the arguments, which torch has no fp8 product for
    torch.library.opcheck(op, arguments, test_utils=sorted(tests))
    torch._dynamo.reset()
    plain, compiled = door(*given), torch.compile(door, fullgraph=True, backend="aot_eager")(*given)
    for a, b in zip(_tuple(plain), _tuple(compiled), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a.float(), b.float())


def _tuple(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)
