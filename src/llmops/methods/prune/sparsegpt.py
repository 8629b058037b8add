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
    E       E / diag U

The rows of U are divided by their diagonal once: what is taken off a column is then the column itself where it is
zeroed, and those after it get a multiple of that. What H alone decides (`Factor`) is made once
for all layers that share an input.

Unstructured: at the start of each block of 128 columns the lowest scores of all its rows together are dropped, so rows
may lose more or less than others. N:M: at the start of each group of M columns, within each row. Both choose from
weights that hold every update so far. Updates are lazy on three levels: one at a time within a few columns (the M of a
pattern), to the rest of their step of 32, of the block and of W as one matrix product each.

Deliberate differences:

- with order "activation" the groups of M columns that a pattern compares (single columns where there is none) are
  taken by falling mean of diag(H), not from left to right: those whose errors cost most come while many others can
  still make up for them. "auto" is that for patterns, and left to right without one, where columns of one size in a
  block would all have to lose the same share.
- exactly `round(sparsity * entries)` of every block are dropped, whatever the ties.
- U comes from one Cholesky factorisation (`quantize.gptq.inverse_factor`); damping that is too small for it is
  multiplied by 10, up to 1, and reported, never replaced by plain magnitude.
- a column whose input was always zero costs nothing and goes first.
- zeros of a pruned parent stay zero, and the others make up for them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from llmops.errors import LlmopsError, unknown
from llmops.methods.prune.patterns import check_sparsity, drop_lowest, silenced_rows
from llmops.methods.quantize.gptq import inverse_factor
from llmops.ops.finite import all_finite

__all__ = ["ORDERS", "Factor", "Pruned", "factorize", "sparsegpt"]

ORDERS = ("auto", "activation", "none")
_STEP = 32  # columns that are updated together, the rest of their block after them
_FEW = 8  # columns updated one by one


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


@dataclass(frozen=True)
class Factor:
    """All that the solver needs of H (in, in). U: unit upper triangular, its row j divided by U_jj, in the order `perm`
    of the columns, None for their own; diagonal: (in,) U_jj; live: (in,) False for inputs that were always zero, in the
    same order; pattern: what `perm` was made for; damping, failed: as in `Pruned`."""

    U: Tensor
    diagonal: Tensor
    live: Tensor
    perm: Tensor | None
    pattern: str
    damping: float
    failed: tuple[float, ...]


def factorize(H: Tensor, pattern: str = "unstructured", *, damping: float = 0.01, order: str = "auto") -> Factor:
    """What `sparsegpt` makes of H first. Cost: in^3. Raises as `sparsegpt`."""
    if order not in ORDERS:
        raise LlmopsError(unknown("order", order, ORDERS))
    if not all_finite(H):
        raise LlmopsError("the Hessian holds NaN or infinity; expected finite calibration activations")
    importance = H.diagonal().float().clone()
    live, perm = importance > 0, None
    if order == "activation" or (order == "auto" and pattern != "unstructured"):
        every = _every(pattern)
        if len(H) % every:
            raise LlmopsError(f"{len(H)} input features; expected a multiple of {every} for pattern {pattern}")
        groups = torch.argsort(importance.view(-1, every).mean(1), descending=True, stable=True)
        perm = (groups.unsqueeze(1) * every + torch.arange(every, device=H.device)).flatten()
        live = live[perm]
    U, used, failed = inverse_factor(H, damping, perm)
    diagonal = U.diagonal().clone()
    return Factor(U.div_(diagonal.unsqueeze(1)), diagonal, live, perm, pattern, used, failed)


@torch.no_grad()  # type: ignore[untyped-decorator]
def sparsegpt(W: Tensor, H: Tensor | Factor, sparsity: float, pattern: str = "unstructured", *,
              damping: float = 0.01, block: int = 128, order: str = "auto") -> tuple[Tensor, Pruned]:
    """(the pruned weight, float32, (out, in); what happened).

    W: (out, in); H: (in, in), 2/N X X^T, any constant factor does, or its `factorize` for this pattern, which has then
    decided damping and order; damping: added to its diagonal, as a fraction of the mean of it; block: columns that
    share a threshold; order: one of ORDERS. Cost: in^3 + out in^2 multiplications. Raises LlmopsError as
    `check_sparsity` and `silenced_rows` do, or when H does not fit W or holds NaN; StepError when H cannot be
    factorised with damping up to 1.
    """
    shape = check_sparsity(sparsity, pattern, W.shape[1])
    inputs = len(H.U) if isinstance(H, Factor) else len(H)
    if inputs != W.shape[1]:
        raise LlmopsError(f"H is {(inputs, inputs)}; expected {(W.shape[1], W.shape[1])}, one row per input feature")
    if not all_finite(W):
        raise LlmopsError("the weight holds NaN or infinity; expected finite weights")
    factor = H if isinstance(H, Factor) else factorize(H, pattern, damping=damping, order=order)
    if factor.pattern != pattern:
        raise LlmopsError(f"H was factorised for pattern {factor.pattern}; expected {pattern}")
    every = shape[1] if shape is not None else 1
    made = _Pass(W, factor, sparsity, shape)
    loss = made.solve(max(every, block // every * every), max(every, _STEP // every * every))
    weight, mask = made.result()
    return weight, Pruned(mask, factor.damping, factor.failed, int((~factor.live).sum()), loss, silenced_rows(W, mask))


class _Pass:
    """One pass over the columns. Everything is transposed, (in, out), so that a column is contiguous, and in the order
    of solving."""

    def __init__(self, W: Tensor, factor: Factor, sparsity: float, shape: tuple[int, int] | None) -> None:
        self.factor, self.sparsity = factor, sparsity
        self.w_t = (W.t() if factor.perm is None else W.t()[factor.perm]).float().contiguous()
        self.held_t = self.w_t == 0 if bool((W == 0).any()) else None  # zeros that have to stay
        self.keep_t = torch.ones_like(self.w_t, dtype=torch.bool)
        # what a column's score is its squared weight times: 1 / U_jj^2, 0 for inputs that were always zero
        self.cost = (factor.diagonal**-2 * factor.live).unsqueeze(1)
        self.groups = None if shape is None else _Groups(factor.U, *shape, held=self.held_t is not None)

    def solve(self, block: int, step: int) -> float:
        n, U, loss = len(self.w_t), self.factor.U, torch.zeros(())
        for start in range(0, n, block):
            stop = min(start + block, n)
            drop = self._choose(start, stop) if self.groups is None else torch.empty_like(self.w_t[start:stop])
            E = torch.empty_like(drop)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                part = slice(first - start, last - start)
                self._columns(first, last, drop[part], E[part])
                if last < stop:
                    self.w_t[last:stop].addmm_(U[first:last, last:stop].t(), E[part], alpha=-1)
            if stop < n:
                self.w_t[stop:].addmm_(U[start:stop, stop:].t(), E, alpha=-1)
            torch.eq(drop, 0, out=self.keep_t[start:stop])
            loss = loss + E.div_(self.factor.diagonal[start:stop].unsqueeze(1)).square_().sum().cpu() / 2
        return float(loss)

    def result(self) -> tuple[Tensor, Tensor]:
        """(weight, mask), (out, in), the columns in their own order."""
        weight, keep, perm = self.w_t.masked_fill_(~self.keep_t, 0.0), self.keep_t, self.factor.perm
        if perm is not None:
            place = torch.argsort(perm)
            weight, keep = weight[place], keep[place]
        return weight.t().contiguous(), keep.t().contiguous()

    def _choose(self, first: int, last: int) -> Tensor:
        """1.0 for the lowest scores of columns first..last, all rows together; 0.0 where a weight stays."""
        S = self.w_t[first:last].square().mul_(self.cost[first:last])  # (last - first, out)
        count = round(self.sparsity * S.numel())
        if self.held_t is not None:
            held = self.held_t[first:last]
            S.masked_fill_(held, -1.0)
            count = max(count, int(held.sum()))
        keep = drop_lowest(S.t().reshape(1, -1), count).view(S.shape[1], S.shape[0]).t()
        return (~keep).float()

    def _columns(self, first: int, last: int, drop: Tensor, E: Tensor) -> None:
        """Solve for columns first..last: E takes what they lose, drop what is chosen in passing, both (columns, out).
        What is lost is not taken off them: nobody looks at them again before `result` does."""
        U, W = self.factor.U[first:last, first:last], self.w_t[first:last]
        few = _FEW if self.groups is None else self.groups.every
        held = itertools.repeat(None) if self.held_t is None else self.held_t[first:last].split(few)
        parts = zip(W.split(few), drop.split(few), E.split(few), self.cost[first:last].split(few), held, strict=False)
        for here, (some, chosen, lost, cost, stay) in zip(range(0, len(W), few), parts, strict=True):
            stop = here + len(some)
            if self.groups is None:
                for i in range(len(some)):
                    torch.mul(some[i], chosen[i], out=lost[i])
                    if i + 1 < len(some):
                        some[i + 1:].addr_(U[here + i, here + i + 1:stop], lost[i], alpha=-1)
            else:
                self.groups.choose(some, cost, stay, chosen)
                self.groups.lose((first + here) // few, some, chosen, lost)
            if stop < len(W):
                W[stop:].addmm_(U[here:stop, stop:].t(), lost, alpha=-1)


class _Groups:
    """The M columns of an N:M pattern, as few operations as it takes: there are in / M of them one after the other.

    The place of an entry among those of its row, of equals the first before, is a sum over pairs: of i < j, i comes
    first where S_i <= S_j, which adds one to the place of j; where it does not, it adds one to that of i.

    What is lost, E = D (W - V E) with D the drops of a row and V = (U - 1)^T below the diagonal, is found by putting in
    what the right side gives: nothing comes before the first that is dropped, so after N rounds it is exact.
    """

    def __init__(self, U: Tensor, zeros: int, every: int, held: bool) -> None:
        self.zeros, self.every = zeros, every
        self.rounds = (every if held else zeros) - 1  # with zeros that stay, more than N may be dropped
        self.before, self.after = torch.triu_indices(every, every, 1, device=U.device)
        one = torch.eye(every, device=U.device)
        self.sign = (one[self.after] - one[self.before]).t().contiguous()  # (every, pairs)
        self.start = one[self.before].sum(0).unsqueeze(1)
        groups = len(U) // every
        inside = U.view(groups, every, groups, every).diagonal(dim1=0, dim2=2)  # (every, every, groups)
        self.below = (inside.permute(2, 1, 0) - one).contiguous().unbind()

    def choose(self, W: Tensor, cost: Tensor, held: Tensor | None, drop: Tensor) -> None:
        """drop (every, out) becomes 1.0 for the N lowest scores of each row, and for those that are held; else 0.0."""
        S = W.square().mul_(cost)
        if held is not None:
            S.masked_fill_(held, -1.0)
        first = S.index_select(0, self.before) <= S.index_select(0, self.after)
        torch.lt(torch.addmm(self.start, self.sign, first.float()), self.zeros, out=drop)
        if held is not None:
            drop.masked_fill_(held, 1.0)

    def lose(self, group: int, W: Tensor, drop: Tensor, E: Tensor) -> None:
        """E (every, out) becomes what the columns W of a group lose; those that stay make up for those before them."""
        torch.mul(W, drop, out=E)
        for _ in range(self.rounds):
            torch.mul(torch.addmm(W, self.below[group], E, alpha=-1), drop, out=E)
        W.addmm_(self.below[group], E, alpha=-1)


def _every(pattern: str) -> int:
    """Columns that are compared with each other at a time: M of N:M, else 1."""
    return 1 if pattern == "unstructured" else int(pattern.partition(":")[2])
