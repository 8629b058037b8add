"""FORMATS: how each format is written, and how a foreign reader reads it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from llmops.formats import awq, compressed, dense, gguf, gptq, onnx, openvino
from llmops.formats.source import Source, Written

__all__ = ["FORMATS", "Format"]


class Format(NamedTuple):
    """write: (source, empty folder) -> what it says of its work. read: (folder, token ids (B, T), source) -> (who read
    it, logits (B, T, V) float32)."""

    write: Callable[[Source, Path], Written]
    read: Callable[[Path, Tensor, Source], tuple[str, Tensor]]


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(compressed.write, compressed.read),
    "gptq": Format(gptq.write, gptq.read),
    "awq": Format(awq.write, awq.read),
    "dense": Format(dense.write, dense.read),
    "safetensors": Format(dense.write, dense.read),
    "gguf": Format(gguf.write, gguf.read),
    "gguf-f16": Format(gguf.write_f16, gguf.read),
    "gguf-q8_0": Format(gguf.write_q8_0, gguf.read),
    "gguf-q4_0": Format(gguf.write_q4_0, gguf.read),
    "gguf-q4_k": Format(gguf.write_q4_k, gguf.read),
    "gguf-q4_k_m": Format(gguf.write_q4_k_m, gguf.read),
    "gguf-q6_k": Format(gguf.write_q6_k, gguf.read),
    "onnx": Format(onnx.write, onnx.read),
    "openvino": Format(openvino.write, openvino.read),
}
