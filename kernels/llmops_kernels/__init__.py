"""Triton kernels of llmops, one op a file. Needs torch and triton, nothing else; importing it imports neither.

An op's module is imported when it is first asked for: `llmops_kernels.int_linear.int_linear(x, weight)`.
"""

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if not name.startswith("_") and find_spec(f".{name}", __name__) is not None:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
