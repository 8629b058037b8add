"""GPTQ and AWQ checkpoints read the slow way, bit by bit, from what is published of their layouts.

Shares no line with the code that writes them: a mistake made there and undone on reading would not be seen otherwise.
numpy only; every weight is expanded, so this is for checking, not for running.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["decode_awq", "decode_gptq"]

Array = NDArray[Any]


def decode_gptq(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a GPTQ folder by its dense name, in float32: W[o, i] = s[g(i), o] (q[i, o] - z[g(i), o])."""
    block = _block(folder)
    offset = 0 if block.get("checkpoint_format") == "gptq_v2" else 1

    def layer(name: str, parts: dict[str, Array]) -> Array:
        other: dict[str, Any] = block.get("dynamic") or {}
        said: dict[str, Any] = next((each for pattern, each in other.items() if pattern[:2] != "-:"
                                     and re.match(pattern.removeprefix("+:"), name)), {})
        bits = int(said.get("bits", block["bits"]))
        codes = _fields(parts["qweight"].T, bits)  # (out, in): words follow each other along the input
        zeros = _fields(parts["qzeros"], bits) + offset  # (groups, out)
        group = parts["g_idx"]
        dense: Array = parts["scales"][group].T.astype(np.float32) * (codes - zeros[group].T)
        return dense.astype(np.float32)

    return _decoded(folder, ("qweight", "qzeros", "scales", "g_idx"), layer)


def decode_awq(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an AWQ gemm folder by its dense name, in float32."""
    def layer(_: str, parts: dict[str, Array]) -> Array:
        codes, zeros = (_unshuffled(_fields(parts[name], 4)) for name in ("qweight", "qzeros"))  # (in or groups, out)
        each = codes.shape[0] // zeros.shape[0]
        scale, zero = (np.repeat(part, each, axis=0) for part in (parts["scales"].astype(np.float32), zeros))
        dense: Array = scale * (codes - zero)
        return dense.T.astype(np.float32)

    return _decoded(folder, ("qweight", "qzeros", "scales"), layer)


def _fields(words: Array, bits: int) -> Array:
    """(n, w) int32 words -> (n, w * 32 / bits) unsigned fields of a little-endian bit stream along each row."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little")
    stream = stream[:, :stream.shape[1] // bits * bits].reshape(len(stream), -1, bits)
    fields: Array = (stream.astype(np.int64) << np.arange(bits)).sum(-1)
    return fields


def _unshuffled(fields: Array) -> Array:
    """Columns back in order: the eight fields of a word hold columns 0, 2, 4, 6, 1, 3, 5, 7."""
    eights = fields.reshape(len(fields), -1, 8)
    return np.stack([eights[..., place] for place in (0, 4, 1, 5, 2, 6, 3, 7)], axis=-1).reshape(len(fields), -1)


def _decoded(folder: Path, names: tuple[str, ...],
             layer: Callable[[str, dict[str, Array]], Array]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    found = {}
    for name in layers:
        parts = {part: stored.pop(f"{name}.{part}").numpy() for part in names}
        found[f"{name}.weight"] = torch.from_numpy(layer(name, parts))
    return found | {name: tensor.float() for name, tensor in stored.items()}


def _block(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"])
