"""The attention of a model in an ordinary forward pass, rows apart, gradients and all.

Fast attention never forms its matrix. So the queries and keys that reach it (after position embeddings) are kept, and
the maps are formed from them afterwards, row by row; whatever implementation the model uses goes on to do its own work.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llmops.errors import ModelError
from llmops.methods.distill.attention import attention_map
from llmops.models.packed_rows import attention_implementation, with_attention

__all__ = ["Attended", "attended"]

RECORDED = "llmops_recorded"


@dataclass
class Attended:
    """Queries (B, H, T, d) and keys (B, G, T, d) of each layer, with the scale and the window of its attention."""

    seen: dict[int, tuple[Tensor, Tensor, float, int | None]] = field(default_factory=dict)

    def maps(self, layer: int, batch: Mapping[str, Any]) -> list[Tensor]:
        """(H, L, L) of every row of the batch, a packed or a right-padded one, padding apart."""
        if layer not in self.seen:
            raise ModelError(f"layer {layer} did not come through the attention interface of transformers; expected a "
                             "family whose every layer attends: leave attention_weight out")
        query, key, scale, window = self.seen[layer]
        starts = batch.get("cu_seq_lens_q")
        if starts is not None:
            ends = starts.tolist()
            spans = [(0, first, last) for first, last in zip(ends, ends[1:], strict=False)]
        else:
            spans = [(row, 0, int(length)) for row, length in enumerate(batch["attention_mask"].sum(-1).tolist())]
        return [attention_map(query[row, :, first:last], key[row, :, first:last], scale, window)
                for row, first, last in spans]


@contextmanager
def attended(model: nn.Module) -> Iterator[Attended]:
    """Inside, each forward pass leaves what `maps` needs; read it before the next one.

    Raises ModelError when the family's attention cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, found = attention_implementation(model), Attended()

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
               scaling: float | None = None, sliding_window: int | None = None, **extra: Any) -> Any:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        found.seen[int(getattr(module, "layer_idx", len(found.seen)))] = query, key, scale, sliding_window
        run = (getattr(inspect.getmodule(type(module)), "eager_attention_forward") if before == "eager"  # noqa: B009
               else ALL_ATTENTION_FUNCTIONS[before])
        return run(module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **extra)

    AttentionInterface.register(RECORDED, record)
    AttentionMaskInterface.register(RECORDED, ALL_MASK_ATTENTION_FUNCTIONS[before])
    with with_attention(model, RECORDED):
        yield found
