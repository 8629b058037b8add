"""SparseGPT: zero column by column, and let the columns still to come make up for it (Frantar and Alistarh 2023).

The squared error of a layer's output over the calibration inputs X is a quadratic form with the Hessian H = 2 X X^T.
Optimal Brain Surgeon zeroes one weight and moves all others to where the form is least again; SparseGPT does so in one
fixed order of columns for all rows at once, so that one factorisation serves every row (arXiv 2301.00774, algorithm 1):

    U      upper triangular, H^-1 = U^T U; its row j holds what OBS needs once columns before j are done
    S_j    = (W_:j / U_jj)^2                       what zeroing costs: the mask is chosen by it, block by block
    E_j    = W_:j / U_jj where zeroed, else 0
    W_:k   <- W_:k - E_j U_jk                      for every k > j (the OBS update, which stays in the result)

    paper   here            paper        here
    W       W, w_t          Bs           block
    B       block           lambda       damping * mean(diag H)

Unstructured: at the start of each block of 128 columns the lowest scores of all its rows together are dropped, so rows
may lose more or less than others. N:M: at the start of each group of M columns, within each row. Both choose from
weights that hold every update so far. Updates are lazy on two levels: within a step of at most 32 columns one at a
time, to the rest of the block as one matrix product a step, to the rest of W as one a block.

Deliberate differences: exactly `round(sparsity * entries)` of every block are dropped, whatever the ties; U comes from
one Cholesky factorisation (`quantize.gptq.inverse_factor`); damping that is too small for it is multiplied by 10, up to
1, and reported, never replaced by plain magnitude; a column whose input was always zero costs nothing and goes first;
zeros of a pruned parent stay zero, and the others make up for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.prune.patterns import check_sparsity, drop_lowest, silenced_rows
from llmops.methods.quantize.gptq import inverse_factor

__all__ = ["Factor", "Pruned", "sparsegpt"]

Factor = tuple[Tensor, float, tuple[float, ...]]  # as `inverse_factor` gives it
_STEP = 32  # columns updated one by one


@dataclass(frozen=True)
class Pruned:
    """What happened. mask: (out, in), True where a weight stayed; damping: that the factorisation took; failed: those
    tried before it; dead: input features that were always zero; loss: 1/2 sum E^2, the rise of 1/2 tr(dW H dW^T);
    silenced: rows that kept no weight."""

    mask: Tensor
    damping: float
    failed: tuple[float, ...]
    dead: int
    loss: float
    silenced: int


@torch.no_grad()  # type: ignore[untyped-decorator]
def sparsegpt(W: Tensor, H: Tensor, sparsity: float, pattern: str = "unstructured", *, damping: float = 0.01,
              block: int = 128, factor: Factor | None = None) -> tuple[Tensor, Pruned]:
    """(the pruned weight, float32, (out, in); what happened).

    W: (out, in); H: (in, in), 2/N X X^T, any constant factor does; damping: added to its diagonal, as a fraction of
    the mean of it; block: columns that share a threshold; factor: `inverse_factor(H, damping)` where it is known, for
    layers with the same inputs. Cost: in^3 + out in^2 multiplications. Raises LlmopsError as
    `check_sparsity` and `silenced_rows` do, or when H does not fit W or holds NaN; StepError when H cannot be
    factorised with damping up to 1.
    """
    shape = check_sparsity(sparsity, pattern, W.shape[1])
    if H.shape != (W.shape[1], W.shape[1]):
        raise LlmopsError(f"H is {tuple(H.shape)}; expected {(W.shape[1], W.shape[1])}, one row per input feature")
    if not bool(torch.isfinite(H).all()) or not bool(torch.isfinite(W).all()):
        raise LlmopsError("the Hessian or the weight holds NaN or infinity; expected finite calibration activations")
    U, used, failed = inverse_factor(H, damping) if factor is None else factor
    live = (H.diagonal() > 0).to(W.device)
    every = shape[1] if shape is not None else 1
    made = _Pass(W, U, live, sparsity, shape)
    loss = made.solve(max(every, block // every * every), max(every, _STEP // every * every))
    mask = made.keep_t.t().contiguous()
    return made.w_t.t().contiguous(), Pruned(mask, used, failed, int((~live).sum()), loss, silenced_rows(W, mask))


class _Pass:
    """One pass over the columns. Everything is transposed, (in, out), so that a column is contiguous."""

    def __init__(self, W: Tensor, U: Tensor, live: Tensor, sparsity: float, shape: tuple[int, int] | None) -> None:
        self.w_t = W.t().float().contiguous()
        self.held_t = self.w_t == 0 if bool((W == 0).any()) else None  # zeros that have to stay
        self.keep_t = torch.ones_like(self.w_t, dtype=torch.bool)
        self.U, self.live, self.sparsity, self.shape = U, live, sparsity, shape

    def solve(self, block: int, step: int) -> float:
        n, U, loss = len(self.w_t), self.U, 0.0
        for start in range(0, n, block):
            stop = min(start + block, n)
            if self.shape is None:
                self._choose(start, stop)
            E = torch.empty_like(self.w_t[start:stop])
            for first in range(start, stop, step):
                last = min(first + step, stop)
                self._columns(first, last, E[first - start:last - start])
                if last < stop:
                    self.w_t[last:stop].addmm_(U[first:last, last:stop].t(), E[first - start:last - start], alpha=-1)
            if stop < n:
                self.w_t[stop:].addmm_(U[start:stop, stop:].t(), E, alpha=-1)
            loss += float(E.square().sum()) / 2
        return loss

    def _scores(self, first: int, last: int) -> Tensor:
        """(last - first, out): what zeroing each weight costs now; below 0 where it is held at zero already."""
        S = (self.w_t[first:last] / self.U.diagonal()[first:last].unsqueeze(1)).square_()
        S *= self.live[first:last].unsqueeze(1)
        return S if self.held_t is None else S.masked_fill_(self.held_t[first:last], -1.0)

    def _choose(self, first: int, last: int) -> None:
        """The mask of columns first..last: the lowest scores of all rows together, or N of these M columns a row."""
        S = self._scores(first, last)
        if self.shape is None:
            count = round(self.sparsity * S.numel())
            if self.held_t is not None:
                count = max(count, int(self.held_t[first:last].sum()))
            keep = drop_lowest(S.t().reshape(1, -1), count).view(S.shape[1], S.shape[0]).t()
        else:
            keep = drop_lowest(S.t(), self.shape[0]).t()
            if self.held_t is not None:
                keep = keep & ~self.held_t[first:last]
        self.keep_t[first:last] = keep

    def _columns(self, first: int, last: int, E: Tensor) -> None:
        """Zero columns first..last one by one; E (last - first, out) takes their errors."""
        part = self.U[first:last, first:last]
        diagonal = part.diagonal().tolist()
        for i, j in enumerate(range(first, last)):
            if self.shape is not None and j % self.shape[1] == 0:
                self._choose(j, j + self.shape[1])
            w, keep = self.w_t[j], self.keep_t[j]
            torch.div(w, diagonal[i], out=E[i]).masked_fill_(keep, 0.0)
            w.masked_fill_(~keep, 0.0)  # not multiplied: -0.0 would be another number on disk
            if j + 1 < last:
                self.w_t[j + 1:last].addr_(part[i, i + 1:], E[i], alpha=-1)
