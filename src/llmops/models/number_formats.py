"""How compressed-tensors' config.json describes the number formats that are no packed integers, and how it is read.

    kind          format in config.json   weights                                       input_activations
    w8a8          int-quantized           int 8, channel                                int 8, token, dynamic
    fp8-tensor    float-quantized         float 8, tensor                               float 8, token, dynamic
    fp8-channel   float-quantized         float 8, channel                              float 8, token, dynamic
    fp8-block     float-quantized         float 8, block of 128 x 128                   float 8, group of 128, dynamic
    mxfp4         mxfp4-pack-quantized    float 4, group of 32, scales as uint8         none
    nvfp4         nvfp4-pack-quantized    float 4, tensor_group of 16, scales in E4M3   none

What is read is read as one of these kinds or as integers (`layouts.py`). Activations of integer or 4-bit float weights
that are rounded in another way are left in 16 bit, with a warning: the weights are the stored ones. 8-bit floats with
other activations (static scales) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmops.errors import ModelError

__all__ = ["FORMATS", "TOLD", "activations", "activations_are_left", "kind_of", "weights"]

#: The name of each kind in config.json.
FORMATS = {"w8a8": "int-quantized", "fp8-tensor": "float-quantized", "fp8-channel": "float-quantized",
           "fp8-block": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
#: The same for people.
TOLD = {"w8a8": "int8 row, int8 activations by token", "fp8-tensor": "fp8 tensor, fp8 activations by token",
        "fp8-channel": "fp8 row, fp8 activations by token", "fp8-block": "fp8 128x128, fp8 activations by 128",
        "mxfp4": "mxfp4 g32", "nvfp4": "nvfp4 g16"}
_BITS = {"w8a8": 8, "fp8-tensor": 8, "fp8-channel": 8, "fp8-block": 8, "mxfp4": 4, "nvfp4": 4}
_STRATEGY: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8": ("channel", {}), "fp8-tensor": ("tensor", {}), "fp8-channel": ("channel", {}),
    "fp8-block": ("block", {"block_structure": [128, 128]}),
    "mxfp4": ("group", {"group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}),
    "nvfp4": ("tensor_group", {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn",
                               "zp_dtype": "torch.float8_e4m3fn"})}


def weights(kind: str) -> dict[str, Any]:
    """The `weights` of a config group."""
    strategy, more = _STRATEGY[kind]
    return {"num_bits": _BITS[kind], "type": "int" if kind == "w8a8" else "float", "symmetric": True,
            "strategy": strategy, "group_size": None, "dynamic": False, "actorder": None, "block_structure": None,
            "observer": "minmax", "observer_kwargs": {}, **more}


def activations(kind: str) -> dict[str, Any] | None:
    """The `input_activations` of a config group; None where they stay in 16 bit."""
    if _BITS[kind] == 4:
        return None
    block = kind == "fp8-block"
    return {"num_bits": 8, "type": "int" if kind == "w8a8" else "float", "symmetric": True,
            "strategy": "group" if block else "token", "group_size": 128 if block else None, "dynamic": True,
            "actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {}}


def kind_of(group: Mapping[str, Any]) -> str | None:
    """The kind that a config group describes; None when it is integers that are packed or run with 16-bit inputs.

    Raises ModelError for weights that no kind here has.
    """
    described = group.get("weights") or {}
    if described.get("type", "int") == "int":
        return "w8a8" if _is(described, "w8a8") and not _left(group, "w8a8") else None
    for kind in ("fp8-tensor", "fp8-channel", "fp8-block", "mxfp4", "nvfp4"):
        if _is(described, kind):
            if _BITS[kind] == 8 and _left(group, kind):
                raise ModelError(f"8-bit float weights by {described.get('strategy')} with activations "
                                 f"{_said(group.get('input_activations'))}; expected {_said(activations(kind))}, as "
                                 f"{kind} has them: static scales and other groups are not run here")
            return kind
    raise ModelError(f"weights of type {described.get('type')!r}, {described.get('num_bits')} bits, strategy "
                     f"{described.get('strategy')!r}, group {described.get('group_size')}, block "
                     f"{described.get('block_structure')}; expected int in groups or channels, or one of "
                     f"{', '.join(FORMATS)}")


def activations_are_left(group: Mapping[str, Any], kind: str | None) -> bool:
    """Whether the group wants activations rounded and they are not."""
    return bool(group.get("input_activations")) and (kind is None or activations(kind) is None)


def _is(described: Mapping[str, Any], kind: str) -> bool:
    wanted = weights(kind)
    same = all(described.get(key) == wanted[key] for key in ("num_bits", "type", "strategy"))
    size = described.get("group_size") or -1
    return (same and bool(described.get("symmetric", True)) and size == (wanted["group_size"] or -1)
            and (kind != "fp8-block" or list(described.get("block_structure") or ()) == [128, 128]))


def _left(group: Mapping[str, Any], kind: str) -> bool:
    """Whether the activations of a group are not those that the kind runs."""
    found, wanted = group.get("input_activations") or {}, activations(kind)
    assert wanted is not None
    keys = ("num_bits", "type", "strategy", "dynamic")
    return (any(found.get(key) != wanted[key] for key in keys) or not found.get("symmetric", True)
            or (found.get("group_size") or None) != wanted["group_size"])


def _said(described: Mapping[str, Any] | None) -> str:
    if not described:
        return "in 16 bit"
    how = "dynamic" if described.get("dynamic") else "static"
    size = f" of {described['group_size']}" if described.get("group_size") else ""
    return f"{described.get('type')} {described.get('num_bits')} by {described.get('strategy')}{size}, {how}"
