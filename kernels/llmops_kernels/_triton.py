"""Triton when it is there, a stand-in when it is not: kernels can be declared anywhere and launched where Triton is.

On a machine without Triton (macOS, a slim CPU image) every op still runs, on its PyTorch reference. The stand-in knows
the few names that a module of this package touches while it is imported; a launch says what is missing.
"""

from __future__ import annotations

from typing import Any

__all__ = ["HAVE_TRITON", "tl", "triton"]


class _Missing:
    """What `@triton.jit` gives without Triton."""

    def __init__(self, function: Any) -> None:
        self.name = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: object) -> Any:
        raise RuntimeError(f"kernel {self.name} needs Triton, which is not installed; pip install triton, or keep the "
                           f"tensors on the CPU, where the reference runs")


class _Stand:
    """Stands for `triton` and for `triton.language`."""

    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        return _Missing if function is None else _Missing(function)

    @staticmethod
    def constexpr_function(function: Any) -> Any:
        return function

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)


def _load() -> tuple[Any, Any, bool]:
    try:
        import triton
        import triton.language as language
    except ImportError:
        return _Stand(), _Stand(), False
    return triton, language, True


triton, tl, HAVE_TRITON = _load()
