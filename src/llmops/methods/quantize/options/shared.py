"""Names and figures that the options of several methods share. Nothing here is a model."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["BITS", "BITSANDBYTES", "BLOCK", "FACTORS", "FIXED", "KV_CACHE", "KV_DTYPES", "KV_RECORD", "ROTATE", "Clip",
           "Experts", "Integers", "KvDtype", "Rotate", "Scales", "Scheme", "parts"]

Scheme = Literal["w8a16", "w4a16", "w3a16", "w2a16", "w8a8", "fp8", "mxfp4", "nvfp4"]
Integers = Literal["w8a16", "w4a16", "w3a16", "w2a16"]  # that layers of one model can be given each its own of
Scales = Literal["tensor", "channel", "block"]
Clip = Literal["absmax", "mse"]
Experts = Literal["routed", "all"]
Rotate = Literal["hadamard"] | list[Literal["r1", "r2"]] | None
KvDtype = Literal["int8", "fp8", "int4"]
KV_DTYPES: tuple[str, ...] = get_args(KvDtype)
KV_RECORD = "llmops_kv_cache"  # key of a config.json whose model keeps its keys and values so
KV_CACHE = "type that keys and values are kept in, with a scale for every token and head; default: that of activations"
BITS: dict[str, int] = {"w8a16": 8, "w4a16": 4, "w3a16": 3, "w2a16": 2, "w8a8": 8, "fp8": 8, "mxfp4": 4, "nvfp4": 4,
                        "nf4": 4, "llm_int8": 8}
#: Schemes that say all there is to say: weights that share a scale (-1 a row, for fp8 what `scales` says), symmetric.
FIXED = {"w8a8": -1, "fp8": -1, "mxfp4": 32, "nvfp4": 16}
BLOCK = 128
#: Schemes that bitsandbytes stores and runs.
BITSANDBYTES = ("nf4", "llm_int8")
ROTATE = ("rotate the weights before rounding, the function unchanged and nothing left to run (Ashkboos et al. 2024): "
          "the stream between the blocks (r1), the values of each head (r2), or both (hadamard)")
FACTORS = "awq: scale up the weights of large inputs first, the factors folded away as method awq does"


def parts(rotate: Rotate) -> tuple[str, ...]:
    """The parts of `rotate`, none when it is left out."""
    return ("r1", "r2") if rotate == "hadamard" else tuple(rotate or ())
