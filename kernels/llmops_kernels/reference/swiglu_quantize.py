"""silu(gate) * up, quantized: the arithmetic of swiglu_quantize.py, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize_tokens import quantize_tokens

__all__ = ["swiglu_quantize"]


def swiglu_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    return quantize_tokens(torch.nn.functional.silu(gate.float()) * up.float(), dtype, group_size)
