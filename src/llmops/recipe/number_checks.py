"""What can be wrong with a number format: options it fixes, methods that cannot make it, layers it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmops.recipe.schema import Variant
from llmops.recipe.source import Problems, Trail, shown

if TYPE_CHECKING:
    from llmops.methods.quantize.options import WeightOnly

__all__ = ["check_number_format"]

_FIXED = {"w8a8": "int8 with one scale a row of the weight", "fp8": "8-bit floats with the scales that `scales` says",
          "mxfp4": "4-bit floats in groups of 32", "nvfp4": "4-bit floats in groups of 16"}


def check_number_format(problems: Problems, trail: Trail, variant: Variant, widths: Mapping[str, int]) -> None:
    """widths: inputs of each layer that is quantized, where they are known."""
    options, method, scheme = variant.options, variant.method, variant.options.scheme
    if options.scales is not None and scheme != "fp8":
        problems.add((*trail, "scales"), f"given {options.scales} with scheme: {scheme}, which leaves no choice of "
                                         "scales; expected no `scales`, or scheme: fp8", key=True)
    if options.number_format is None:
        return
    fixed = _FIXED[scheme]
    if options.group_size is not None:
        instead = " (scales: tensor, channel or block)" if scheme == "fp8" else ""
        problems.add((*trail, "group_size"), f"given {options.group_size} with scheme: {scheme}, which is {fixed}; "
                                             f"expected no group_size{instead}, or a scheme of integers such as w4a16",
                     key=True)
    if not options.symmetric and method != "hqq":
        problems.add((*trail, "symmetric"), f"given false with scheme: {scheme}, which has no zero points; expected no "
                                            "`symmetric`, or a scheme of integers such as w4a16", key=True)
    if method == "hqq" or (method == "autoround" and scheme != "w8a8"):
        why = "fits zero points, and a symmetric format has none" if method == "hqq" else \
            "learns to round to evenly spaced numbers"
        problems.add((*trail, "scheme"), f"given {shown(scheme)} with method: {method}, which {why}; expected "
                                         "method: rtn, gptq or awq, or a scheme of integers such as w4a16")
    _check_widths(problems, trail, options, widths)


def _check_widths(problems: Problems, trail: Trail, options: WeightOnly, widths: Mapping[str, int]) -> None:
    bad = {name: width for name, width in widths.items() if options.group != -1 and width % options.group}
    if not bad:
        return
    listed = ", ".join(f"{name} takes {width} inputs" for name, width in bad.items())
    place = "scales" if options.scales == "block" else "scheme"
    given = options.scales if options.scales == "block" else options.scheme
    others = "scales: channel" if options.scales == "block" else "scheme: w4a16 with a group_size that divides them"
    problems.add((*trail, place), f"given {given}, which takes inputs by {options.group}, but {listed}; expected "
                                  f"{others}, or the layer in `ignore`")
