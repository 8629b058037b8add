"""The names of the formats, what each is, and what must be installed for it. Imports nothing heavy."""

from __future__ import annotations

from importlib.util import find_spec

from llmops.errors import LlmopsError, unknown

__all__ = ["ABOUT", "NEEDS", "check_format", "with_type"]

ABOUT = {
    "compressed-tensors": "packed integers as transformers and vLLM read them: what a quantized variant is already",
    "gptq": "GPTQ's layout, 2, 3, 4 or 8 bits",
    "awq": "AWQ's layout (gemm), 4 bits",
    "dense": "16-bit safetensors, quantized weights multiplied out",
    "safetensors": "another name of dense",
    "gguf": "llama.cpp's file: Q4_0 or Q8_0 where they hold the codes exactly, F16 elsewhere",
    "gguf-f16": "llama.cpp's file, all in F16",
    "gguf-q8_0": "llama.cpp's file, linear layers in Q8_0 (rounded again where it does not hold them exactly)",
    "gguf-q4_0": "llama.cpp's file, linear layers in Q4_0 (rounded again where it does not hold them exactly)",
    "gguf-q4_k": "llama.cpp's file, linear layers in Q4_K (rounded again, 4.5 bits)",
    "gguf-q4_k_m": "llama.cpp's file, Q4_K with Q6_K for the head and the layers that llama.cpp's mixture gives it",
    "gguf-q6_k": "llama.cpp's file, linear layers in Q6_K (rounded again, 6.6 bits)",
    "onnx": "a graph for ONNX Runtime, weights in float32",
    "openvino": "a graph for OpenVINO, weights in float16",
}
#: Modules a format needs beside what llmops needs; each is also the name of its package.
NEEDS = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


def with_type(name: str, kind: str | None) -> str:
    """The format of a name and a type apart: gguf and Q4_K give gguf-q4_k. Raises LlmopsError where they do not fit."""
    if kind is None:
        return name
    known = sorted(each.partition("-")[2] for each in ABOUT if each.startswith(f"{name}-"))
    if not known or name != "gguf":
        raise LlmopsError(f"a type ({kind}) of format {name}, which has none; expected --to gguf with --type")
    if kind.lower() not in known:
        raise LlmopsError(unknown("type of gguf", kind.lower(), known))
    return f"{name}-{kind.lower()}"


def check_format(name: str) -> None:
    """Raises LlmopsError for an unknown format, and for one whose packages are not installed."""
    if name not in ABOUT:
        raise LlmopsError(unknown("format", name, ABOUT))
    needed = NEEDS.get(name.partition("-")[0], ())
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        raise LlmopsError(f"format {name} needs {', '.join(missing)}, not installed here; expected them installed: "
                          f"pip install {' '.join(needed)}")
