"""What can be wrong with bitsandbytes' schemes: options that they fix, and theirs beside other schemes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmops.methods.quantize.options import BITSANDBYTES
from llmops.recipe.source import Problems, Trail

if TYPE_CHECKING:
    from llmops.methods.quantize.options import Rtn

__all__ = ["check_bitsandbytes"]

_FIXED = {"nf4": "blocks of 64 weights with one scale each", "llm_int8": "one scale a row"}


def check_bitsandbytes(problems: Problems, trail: Trail, options: Rtn) -> None:
    scheme, group = options.scheme, options.group_size
    for name, owner in (("double_quant", "nf4"), ("threshold", "llm_int8")):
        if scheme != owner and name in options.model_fields_set and getattr(options, name) not in (False, None):
            problems.add((*trail, name), f"given {name} with scheme: {scheme}, which has none; expected scheme: "
                                         f"{owner} beside it, or no {name}", key=True)
    if scheme not in BITSANDBYTES:
        return
    if group is not None and group != options.model_copy(update={"group_size": None}).group:
        problems.add((*trail, "group_size"), f"given {group} with scheme: {scheme}, which is {_FIXED[scheme]}; "
                                             "expected no group_size, or scheme: w4a16 or w8a16")
    if not options.symmetric:
        problems.add((*trail, "symmetric"), f"given false with scheme: {scheme}, which has no zero points; expected no "
                                            "`symmetric`, or scheme: w4a16 or w8a16")
    if options.clip != "absmax":
        problems.add((*trail, "clip"), f"given {options.clip} with scheme: {scheme}, whose range bitsandbytes takes "
                                       "from the largest weight; expected no clip, or scheme: w4a16 or w8a16")
    if options.rotations:
        problems.add((*trail, "rotate"), f"given rotate with scheme: {scheme}, which was not tried together; expected "
                                         "no rotate, or scheme: w4a16 or w8a16")
    if options.embeddings:
        problems.add((*trail, "embeddings"), f"given true with scheme: {scheme}, which bitsandbytes has for linear "
                                             "layers alone; expected no embeddings, or scheme: w4a16 or w8a16")
