"""One namespace of PyTorch ops, and the one way to put an op into it.

`torch.library.Library` and not `custom_op`: its call costs 2.5 us where `custom_op` costs 16 and `triton_op` 21 to 25
(measured on one CPU), and a decode step of a large layer is itself 5 us. Both trace under `torch.compile` and pass
`torch.library.opcheck`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._interpret import INTERPRETED
from ._ops import add_op_namespace_prefix, ops
from ._triton import HAVE_TRITON

__all__ = ["define", "ops"]

_LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")


def define(schema: str, *, check: Callable[..., None], cpu: Callable[..., Any], cuda: Callable[..., Any],
           fake: Callable[..., Any]) -> None:
    """Put an op into the namespace: `define("name(Tensor x, ...) -> Tensor", ...)`, then `ops.name(x, ...)`.

    check: called first with the op's arguments on every way in (CPU, CUDA, tracing); raises ValueError with what was
    given and what was expected. cpu: the PyTorch reference. cuda: the launch of the kernel, or a PyTorch path for CUDA.
    fake: an empty result of the right shape, dtype and strides. All four take the arguments by position.

    Under TRITON_INTERPRET=1 the CPU implementation is the launch, so that tests reach the kernel through the op.
    """
    name = schema.split("(", 1)[0]

    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        def op(*arguments: Any) -> Any:
            check(*arguments)
            return run(*arguments)

        return op

    def on_device(*arguments: Any) -> Any:
        check(*arguments)
        first = next(value for value in arguments if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(first):  # Triton launches on the current device, which need not be the tensors'
            return cuda(*arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, checked(cuda) if INTERPRETED and HAVE_TRITON else checked(cpu), "CPU")
    _LIBRARY.impl(name, on_device, "CUDA")
    torch.library.register_fake(add_op_namespace_prefix(name), checked(fake), lib=_LIBRARY)
