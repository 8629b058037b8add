"""Pruning a quantized parent: zeros among its codes, or whole layers fewer; what stays keeps its codes and scales.

The layers are written out in 16 bits, the step is taken on them as on any model, and what it left is looked up again:
a weight that became zero gets the code that stands for zero, a layer that is still there keeps its numbers under the
name it has now. Steps that move weights (SparseGPT) or cut through groups (width) would have to round again, and are
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.build.cutting import depth_step
from llmops.build.job import Job, Work
from llmops.build.masking import magnitude_step, wanda_step
from llmops.errors import LlmopsError
from llmops.methods.quantize import packing
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.expert_names import expert_of
from llmops.models.fake_quant import packed_layers
from llmops.models.packed import PackedLinear
from llmops.models.quantized import save_quantized
from llmops.models.zeros import zero_bits

__all__ = ["ON_INTEGERS", "on_integers", "zeroed_codes"]

#: The pruning methods that leave codes as they are.
ON_INTEGERS: dict[str, Callable[[Job, Any], Work]] = {"magnitude": magnitude_step, "wanda": wanda_step,
                                                      "depth": depth_step}


def on_integers(method: str, job: Job, options: Any) -> Work:
    """Take a pruning step on a model whose linear layers lie in integers. Raises LlmopsError for other formats, for
    mixtures, and for methods that change what is left."""
    if method not in ON_INTEGERS:
        raise LlmopsError(f"prune {method} on a quantized model, whose codes it would have to round again; expected "
                          f"{', '.join(ON_INTEGERS)}, or {method} first and the result quantized")
    held = _written_out(job.model)
    work = ON_INTEGERS[method](job, options)
    weights = {name: zeroed_codes(held[id(module)], module.weight == 0) for name, module in work.model.named_modules()
               if id(module) in held}
    promised = work.expected
    work.packed = {**weights}
    work.save = partial(save_quantized, work.model, weights, tokenizer=job.tokenizer)
    work.expected = replace(promised, sparsity=None, bits={name: weight.bits for name, weight in weights.items()},
                            zeros=zero_bits(work.model) if promised.sparsity is not None else None)
    work.events.append(f"{len(weights)} layers keep their codes and scales")
    return work


def zeroed_codes(weight: QuantizedWeight, zero: Tensor) -> QuantizedWeight:
    """The weight with the code for zero where `zero` (out, in) is True."""
    rows, columns = weight.shape
    if weight.zero_point is None:
        return replace(weight, codes=weight.codes.masked_fill(zero, 0))
    groups = weight.zero_point.shape[1]
    nothing = weight.zero_point.unsqueeze(2).expand(rows, groups, columns // groups).reshape(rows, columns)
    return replace(weight, codes=torch.where(zero, nothing, weight.codes))


def _written_out(model: Any) -> dict[int, QuantizedWeight]:
    """Put an ordinary linear layer in the place of every packed one, in place: {its id: the numbers there were}."""
    for name, module in model.named_modules():
        if hasattr(module, "packed_tensors") and type(module) is not PackedLinear:
            raise LlmopsError(f"{name} is a {type(module).__name__}; expected integer weights of linear layers alone, "
                              "with activations in 16 bit: prune the variant before it and quantize the result")
        if isinstance(module, PackedLinear) and expert_of(name) is not None:
            raise LlmopsError(f"{name} is a quantized expert; expected a model without experts: prune the variant "
                              "before it and quantize the result")
    held = {}
    for name, layer in packed_layers(model).items():
        weight = packing.unpack(layer.stored_tensors(), bits=layer.bits, group_size=layer.group_size, name=name)
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.dequantize().to(model.dtype), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, dense)
        held[id(dense)] = weight
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return held
