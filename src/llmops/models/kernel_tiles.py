"""With which tiles the kernels of a model run: `tiles_used(model)`, for its row in the ledger.

A kernel takes its tiles from a table for the device, or from a rule of its own where the table has no entry; the same
layer can run fast or slowly by that alone, so a figure without them cannot be repeated. What is listed is for `rows`
tokens at once, one by default: decode.
"""

from __future__ import annotations

from typing import Any

import torch

from llmops.models.formatted import FormattedLinear
from llmops.models.packed import PackedLinear
from llmops.ops.int8_matmul import OPS, TRITON

__all__ = ["tiles_used"]

Tiles = dict[str, int]


def tiles_used(model: Any, rows: int = 1) -> dict[str, dict[str, Any]]:
    """{"int_linear N=4096,K=4096,bits=4,group=128": {"tiles": {...}, "from": "table" | "rule", "layers": 32}}.

    Empty where no layer runs on an op of `llmops_kernels`. With kernel "ops" the tiles are those of an H100.
    """
    found: dict[str, dict[str, Any]] = {}
    for module in model.modules():
        if getattr(module, "kernel_name", None) in (TRITON, OPS):
            name, tiles, tuned = _tiles(module, rows)
            entry = found.setdefault(name, {"tiles": tiles, "from": "table" if tuned else "rule", "layers": 0})
            entry["layers"] += 1
    return found


def _tiles(layer: Any, rows: int) -> tuple[str, Tiles, bool]:
    """(op and shape, its tiles, whether a table has them)."""
    from llmops_kernels import config, fp8_linear, int8_linear, int_linear, nf4_linear

    N, K, device = layer.out_features, layer.in_features, _device(layer)
    processors = config.processors(device)
    if isinstance(layer, PackedLinear):
        group = -1 if layer.group_size in (-1, K) else layer.group_size
        op, shape = "int_linear", config.key(N, K, bits=layer.bits, group=group)
        rule: Tiles = int_linear.tiles(rows, N, K, layer.bits, group, processors)
    elif not isinstance(layer, FormattedLinear):
        state = getattr(layer.weight, "quant_state", layer) if hasattr(layer, "weight") else layer
        op, shape = "nf4_linear", config.key(N, K, kind=state.quant_type, block=state.blocksize)
        rule = nf4_linear.tiles(rows, N, K, processors)
    elif layer.kind == "w8a8":
        op, shape = int8_linear.OP, config.key(N, K)
        rule = int8_linear.rule(rows, N, K, processors)
    else:
        op, shape = fp8_linear.OP, config.key(N, K, scales=layer.kind.removeprefix("fp8-"))
        rule = fp8_linear.rule(rows, N, K, processors)
    tuned = config.pick(op, shape, rows, config.device_name(device))
    return f"{op} {shape}", tuned or rule, tuned is not None


def _device(layer: Any) -> int | None:
    held: torch.Tensor = next(iter(layer.packed_tensors().values()))
    return held.device.index if held.device.type == "cuda" else None
