"""NEFTune: uniform noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914, algorithm 1).

    x' = x + (alpha / sqrt(L d)) eps          eps ~ U(-1, 1), (L, d) for a row of L tokens

The noise regularizes short fine-tunings on conversations; it is off in evaluation. Where rows are packed into one
sequence, L is the length of the row a token stands in, not of the sequence. Paper -> here: alpha -> alpha, X_emb -> x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["noisy_embeddings", "row_lengths", "with_noise"]


def with_noise(x: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """x (B, T, d) plus the paper's noise. lengths: (B, T), tokens of the row that each token stands in."""
    size = alpha / (lengths.to(x.dtype) * x.shape[-1]).sqrt()
    return x + (2 * torch.rand_like(x) - 1) * size.unsqueeze(-1)


def row_lengths(batch: Mapping[str, Any]) -> Tensor:
    """(B, T): for each position the tokens of its row, of a padded or a packed batch."""
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff()
        return lengths.repeat_interleave(lengths).unsqueeze(0)
    mask = batch["attention_mask"]
    return mask.sum(dim=1, keepdim=True).clamp(min=1).expand_as(mask)


class _Noise:
    """Adds the noise while it is entered. `see` is told each batch before its forward pass."""

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.embedding, self.alpha = embedding, alpha
        self.lengths: Tensor | None = None

    def see(self, batch: Mapping[str, Any]) -> None:
        self.lengths = row_lengths(batch)

    def __enter__(self) -> _Noise:
        self.handle = self.embedding.register_forward_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training or self.lengths is None or self.lengths.shape != output.shape[:-1]:
            return output
        return with_noise(output, self.lengths, self.alpha)


def noisy_embeddings(model: Any, alpha: float) -> _Noise | None:
    """A context in which the model's embeddings are noisy while it trains; None for alpha 0."""
    return _Noise(model.get_input_embeddings(), alpha) if alpha > 0 else None
