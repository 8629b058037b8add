"""Token embeddings in 8 bits, and output heads that share their weight with them.

Embeddings are stored as compressed-tensors' ``int-quantized``: `weight` int8 (vocabulary, hidden) and `weight_scale`,
one a token. Not packed: transformers 5.17 builds a packed embedding but cannot initialise it (an embedding without
`weight`), so such a folder would load here alone. A token's row is exact to 1/254 of its largest entry.

A head that shares its weight (`tie_word_embeddings`) is one matrix with two readers. Quantized for both alike it stays
one: the codes are stored once, the head adds its scales (transformers ties the weight, but asks each module for its
scales). Quantized otherwise, or alone, it has to become a matrix of its own: `untie`. `tie_word_embeddings` in
config.json says which of the two it is.

    untie            a head of its own, in place              with_group     the config block with the embedding's group
    embedding_name   full name of the token embedding         without_group  such a block as it was, and what it held
    PackedEmbedding  int8 rows looked up; a tied head's codes are the very ones of its `PackedLinear`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmops.errors import LlmopsError
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.arch import text_config
from llmops.models.packed import PackedLinear
from llmops.ops.bitstream import unpack_bits

__all__ = ["BITS", "GROUP", "PackedEmbedding", "embedding_name", "head_name", "is_tied", "same_weight", "untie",
           "with_group", "without_group"]

BITS = 8
GROUP = "embeddings"  # what the group is called in config_groups


class PackedEmbedding(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """Rows of an 8-bit matrix: ids (...) int64 -> (..., hidden) in the dtype of the scales.

    codes: (vocabulary, hidden) int8; scale: (vocabulary, groups). like: the embedding whose place it takes, for what
    it does beside looking up (Gemma multiplies by `embed_scale`). Raises LlmopsError when that is anything else.
    """

    def __init__(self, codes: Tensor, scale: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape  # as a linear layer would say it: rows are tokens
        self.bits, self.tied = BITS, False
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("weight_scale", scale)
        other = type(like).forward is not nn.Embedding.forward
        if other and not hasattr(like, "embed_scale"):
            raise LlmopsError(f"{type(like).__name__} does more than look rows up; expected a plain embedding, or one "
                              "with embed_scale: leave embeddings out")
        self.register_buffer("embed_scale", like.embed_scale.detach().clone() if other else None, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        codes = F.embedding(ids, self.codes)
        if codes.dtype == torch.int32:  # shared with a head that keeps them packed
            codes = unpack_bits(codes.flatten(0, -2), self.bits, self.in_features).view(*ids.shape, self.in_features)
        scale = F.embedding(ids, self.weight_scale)
        grouped = codes.view(*ids.shape, scale.shape[-1], -1).to(scale.dtype)
        rows = (grouped * scale.unsqueeze(-1)).view(*ids.shape, self.in_features)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)

    def share(self, head: PackedLinear) -> None:
        """Look up in the head's own codes from here on, where its kernel keeps them by rows."""
        if head.codes.shape[0] == self.out_features and head.codes.dtype in (torch.int8, torch.int32):
            self.codes, self.tied = head.codes, True

    def packed_tensors(self) -> dict[str, Tensor]:
        """What lies in memory for the weight."""
        return {"codes": self.codes, "weight_scale": self.weight_scale}

    def dequantized(self) -> Tensor:
        """(vocabulary, hidden), dense, in the dtype of the scales. Nothing here keeps it."""
        codes = (unpack_bits(self.codes, self.bits, self.in_features) if self.codes.dtype == torch.int32
                 else self.codes)
        return QuantizedWeight(codes, self.weight_scale, None, self.bits, -1).dequantize()


def embedding_name(model: nn.Module) -> str:
    """Full name of the token embedding. Raises LlmopsError where the model does not say which it is."""
    return _name_of(model, model.get_input_embeddings(), "token embedding")


def head_name(model: nn.Module) -> str:
    """Full name of the output head. Raises LlmopsError where the model does not say which it is."""
    return _name_of(model, model.get_output_embeddings(), "output head")


def is_tied(model: nn.Module) -> bool:
    """Whether head and embedding are one parameter."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return head is not None and getattr(embedding, "weight", None) is getattr(head, "weight", ())


def untie(model: Any) -> int:
    """Give the head a weight of its own, the same values, in place, and let the config say so. Returns its bytes."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, text_config(model)):
        config.tie_word_embeddings = False
    for module in model.modules():
        if isinstance(getattr(module, "all_tied_weights_keys", None), dict):
            module.all_tied_weights_keys = {}
    return int(head.weight.numel()) * int(head.weight.element_size())


def same_weight(first: object, second: object) -> bool:
    """Whether two weights are the same codes of 8 bits with the same scales."""
    if not isinstance(first, QuantizedWeight) or not isinstance(second, QuantizedWeight):
        return False
    return (first.bits == second.bits and first.symmetric and second.symmetric and first.scale.shape ==
            second.scale.shape and torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale))


def with_group(block: Mapping[str, Any], embedding: str, head: str | None) -> dict[str, Any]:
    """A `quantization_config` with the group of the embedding, first. head: its name where it shares the codes."""
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None,
               "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
               "observer_kwargs": {}}
    group = {"targets": [embedding, *([head] if head else [])], "input_activations": None, "output_activations": None,
             "weights": weights, "format": "int-quantized"}
    groups = {name: {"format": block["format"], **body} for name, body in block["config_groups"].items()}
    return {**block, "format": "mixed-precision", "config_groups": {GROUP: group, **groups}}


def without_group(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the block as it would be without the embedding's group, that group's targets); (block, []) where it has none."""
    groups = dict(block.get("config_groups") or {})
    group = groups.pop(GROUP, None)
    if group is None:
        return dict(block), []
    formats = {body.get("format") for body in groups.values()}
    return {**block, "format": formats.pop() if len(formats) == 1 else block.get("format"),
            "config_groups": groups}, list(group["targets"])


def _name_of(model: nn.Module, wanted: nn.Module | None, what: str) -> str:
    found: list[str] = [name for name, module in model.named_modules() if module is wanted]
    if wanted is None or not found:
        raise LlmopsError(f"{type(model).__name__} names no {what}; expected one that get_input_embeddings and "
                          "get_output_embeddings give")
    return found[0]
