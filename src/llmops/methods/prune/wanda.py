"""Wanda: pruning by weights and activations (Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs").

    S_ij = |W_ij| * ||X_j||_2                                                                       (eq. 1)

A weight matters by what it adds to the output, so its size is multiplied by how large its input feature is over the
calibration tokens. Scores are compared within each output row, not over the layer: a row left without weights is an
output lost. Nothing is solved and the weights that stay keep their values. `||X_j||` may be scaled by any constant
(the authors divide by the number of samples) without changing the mask.
"""

from __future__ import annotations

from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.prune.patterns import keep_mask

__all__ = ["wanda_mask"]


def wanda_mask(W: Tensor, x_norm: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """Keep-mask (out, in) by S_ij = |W_ij| * ||X_j||_2, compared within each output row.

    W: (out, in); x_norm: (in,), L2 norm of each input feature over the calibration tokens. Exactly
    round(sparsity * in) entries of every row are False (N of every M neighbours for a pattern); ties go by position.
    Cost: one sort of every row. Raises LlmopsError when x_norm does not fit, or as `keep_mask` does.
    """
    if x_norm.shape != (W.shape[1],):
        raise LlmopsError(f"x_norm is {tuple(x_norm.shape)}; expected ({W.shape[1]},), one norm per input feature")
    S = W.abs().float() * x_norm.float().unsqueeze(0)
    return keep_mask(S, sparsity, pattern)
