"""GPTQ: round column by column, and let the columns still to come make up for each error (Frantar et al. 2022).

The squared error of a layer's output over the calibration inputs X is a quadratic form in the weights with the Hessian
H = 2 X X^T. Optimal Brain Quantization rounds one weight and moves the others to where the quadratic form is least
again; GPTQ does so in one fixed order of columns for all rows at once (arXiv 2210.17323, section 3):

    U      upper triangular, H^-1 = U^T U; its row j holds what OBQ needs once columns before j are done
    E_j    = (W_:j - quant(W_:j)) / U_jj                          (eq. 2, error in units of the inverse's diagonal)
    W_:k   <- W_:k - E_j U_jk          for every k > j            (eq. 3)

    paper   here        paper      here
    W       W, w_t      B          block
    Q       steps       lambda     damping * mean(diag H)
    E       E / diag U

`w_t` is W transposed, so that a column is contiguous, with the rows of all layers that are solved together beside each
other; a column that is done holds its steps. The rows of U are divided by their diagonal once, and errors by nothing.
Updates are lazy on two levels: within a step of at most 16 columns one at a time, to the rest of the block of 128 as
one matrix product a step, to the rest of W as one a block. What H alone decides (`Factor`) is made once for all layers
that share an input.

Deliberate differences from the paper and from others:

- U comes from one Cholesky factorisation: of H with both axes reversed, whose factor, reversed back, is R with
  H = R R^T upper triangular, and U = R^-1. The inverse of H is never formed; float32 is enough. Factor and inverse are
  made together, by halves, in matrix products.
- order "groups" takes group after group by falling mean of diag(H), and the columns of a group by falling diag(H):
  large errors come early, while many columns can still make up for them, and a group's columns stay together. Order
  "activation" takes all columns by falling diag(H), with the grids of groups fixed beforehand on the original columns.
  Neither needs an index of groups in the stored form.
- in the orders "groups" and "none" a group's grid is computed when its first column is reached, from weights that hold
  every update so far, also when groups are smaller than a block or larger than it.
- the searched clip counts an error in column j by 1 / [H^-1]_jj, what it costs once the others have made up for it, not
  by diag(H), which lets the few largest inputs alone decide a group's range.
- a column whose input was always zero is rounded to nearest and gets no say: nothing tells that it stays unused.
- damping is 0.05 of the mean diagonal, five times the paper's: H comes from a few thousand tokens, and is further from
  the truth than that. It is what other text likes best at 3 and 2 bits (LOG.md), and costs nothing at 4.
- above 4 bits (`usual`) it is the paper's 0.01, and the order "activation": no weight moves by more than a few small
  steps, so that a range taken when its group is reached is the one fixed beforehand, and nothing is lost by taking all
  columns by their size, large errors first.
- damping that is too small for the factorisation is multiplied by 10, up to 1, and reported. There is no silent return
  to plain rounding: when all fails the step fails.
- weights that are zero stay zero, so a pruned parent keeps its mask; the others make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from llmops.errors import LlmopsError, StepError, unknown
from llmops.methods.quantize.floats import FloatFormat, FloatWeight, bound
from llmops.methods.quantize.grid import TURNED, AnyGrid, Grid, Kind, check, fit, group_of, grouped
from llmops.methods.quantize.slabs import slabs
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.ops.finite import all_finite
from llmops.ops.float32 import Products

__all__ = ["MOST_DAMPING", "ORDERS", "Factor", "Solved", "factorize", "gptq", "gptq_alike", "inverse_factor", "usual"]

ORDERS = ("activation", "groups", "none")
MOST_DAMPING = 1.0
_STEP = 16  # columns updated one by one
_SMALL = 96  # rows of a matrix that LAPACK factorises


@dataclass(frozen=True)
class Solved:
    """What happened. damping: that the factorisation took; failed: those tried before it, smallest first;
    dead: input features that were always zero; loss: 1/2 sum E^2, the rise of 1/2 tr(dW H dW^T)."""

    damping: float
    failed: tuple[float, ...]
    dead: int
    loss: float


@dataclass(frozen=True)
class Factor:
    """All that the solver needs of H (in, in). U: unit upper triangular, its row j divided by U_jj, in the order `perm`
    of the columns; diagonal: (in,) U_jj; importance: (in,) 1 / [H^-1]_jj, columns in their own order; order, size: what
    `perm` was made for; damping, failed, dead: as in `Solved`."""

    U: Tensor
    diagonal: Tensor
    perm: Tensor
    importance: Tensor
    order: str
    size: int
    damping: float
    failed: tuple[float, ...]
    dead: int


def usual(bits: Kind) -> tuple[str, float]:
    """(order, damping) where nothing else is asked for."""
    return ("activation", 0.01) if isinstance(bits, int) and bits > TURNED else ("groups", 0.05)


def factorize(H: Tensor, *, group_size: int = -1, damping: float = 0.05, order: str = "groups") -> Factor:
    """What `gptq` makes of H first, for groups of `group_size` columns (-1: all).

    Nothing of the size of H but the factor is allocated. Cost: in^3. Raises as `gptq`.
    """
    _check_hessian(H, order)
    diagonal = H.diagonal().float().clone()
    size = grouped(diagonal.unsqueeze(0), group_size).shape[-1]
    perm = _order(diagonal, order, size)
    U, used, failed = inverse_factor(H, damping, perm)
    importance = torch.empty_like(diagonal)
    importance[perm] = _squares(U).reciprocal_()
    scale = U.diagonal().clone()
    return Factor(U.div_(scale.unsqueeze(1)), scale, perm, importance, order, size, used, failed,
                  int((diagonal <= 0).sum()))


@overload
def gptq(W: Tensor, H: Tensor | Factor, *, bits: int, group_size: int = ..., symmetric: bool = ...,
         damping: float = ..., block: int = ..., order: str = ..., clip: str = ...,
         dtype: torch.dtype | None = ...) -> tuple[QuantizedWeight, Solved]: ...


@overload
def gptq(W: Tensor, H: Tensor | Factor, *, bits: FloatFormat, group_size: int = ..., symmetric: bool = ...,
         damping: float = ..., block: int = ..., order: str = ..., clip: str = ...,
         dtype: torch.dtype | None = ...) -> tuple[FloatWeight, Solved]: ...


def gptq(W: Tensor, H: Tensor | Factor, *, bits: Kind, group_size: int = -1, symmetric: bool = True,
         damping: float = 0.05, block: int = 128, order: str = "groups", clip: str = "absmax",
         dtype: torch.dtype | None = None) -> tuple[QuantizedWeight | FloatWeight, Solved]:
    """Quantize `W` (out, in) so that the layer's output on the inputs behind `H` changes least.

    bits: as `rtn`; H: (in, in), 2/N X X^T, any constant factor does, or its `factorize` for these groups, which has
    then decided damping and order; damping: added to its diagonal, as a fraction of the mean of it; order: one of
    ORDERS; clip: as `rtn`, "mse" weighs column j by 1 / [H^-1]_jj; dtype: of the scale. Cost: in^3 + out in^2
    multiplications. Raises LlmopsError as `rtn` does, or when H does not fit W or holds NaN; StepError when H cannot be
    factorised with damping up to 1.
    """
    weight, factor, loss = _solved([W], H, bits, group_size, symmetric, damping, block, order, clip, dtype)
    return weight, _told(factor, loss)


def gptq_alike(weights: Sequence[Tensor], H: Tensor | Factor, *, bits: int, group_size: int = -1,
               symmetric: bool = True, damping: float = 0.05, block: int = 128, order: str = "groups",
               clip: str = "absmax", dtype: torch.dtype | None = None) -> list[tuple[QuantizedWeight, Solved]]:
    """`gptq` of each of `weights`, (out, in) all of one dtype, that see the inputs behind `H`.

    All rows go through one pass over the columns, since none hangs on another. Raises as `gptq`.
    """
    made, factor, loss = _solved(weights, H, bits, group_size, symmetric, damping, block, order, clip, dtype)
    assert isinstance(made, QuantizedWeight)

    def each(rows: Tensor) -> list[Tensor]:
        return [part.clone() for part in rows.split([len(W) for W in weights])]

    zeros = each(made.zero_point) if made.zero_point is not None else [None] * len(weights)
    return [(replace(made, codes=codes, scale=scale, zero_point=zero), _told(factor, part)) for codes, scale, zero, part
            in zip(each(made.codes), each(made.scale), zeros, each(loss), strict=True)]


def _solved(weights: Sequence[Tensor], H: Tensor | Factor, bits: Kind, group_size: int, symmetric: bool, damping: float,
            block: int, order: str, clip: str, dtype: torch.dtype | None
            ) -> tuple[QuantizedWeight | FloatWeight, Factor, Tensor]:
    """(the quantized weights, one under the other, the factor they were solved with, the loss of each row)."""
    first, inputs = weights[0], len(H.U) if isinstance(H, Factor) else len(H)
    for W in weights:
        check(W, bits)
        if inputs != W.shape[1]:
            raise LlmopsError(f"H is {inputs, inputs}; expected {W.shape[1], W.shape[1]}, one row per input feature")
    kind = bound(bits, first)
    _, groups, size = grouped(first, group_of(bits, group_size)).shape
    factor = H if isinstance(H, Factor) else factorize(H, group_size=size, damping=damping, order=order)
    if factor.size != size:
        raise LlmopsError(f"H was factorised for groups of {factor.size}; expected groups of {size}, as the weight has")

    def fitted(part: Tensor, importance: Tensor) -> AnyGrid:
        """The grid of groups `part` (out, some, group) whose columns have this importance (some, group)."""
        return fit(part, kind, symmetric, dtype or first.dtype, clip, importance, quick=True)

    if factor.order != "activation" and groups > 1:  # each group's grid is made when it is reached
        work = _Pass(weights, factor, [None] * groups, fitted)
    else:
        whole = fitted(grouped(torch.cat([W.detach() for W in weights]), size).float(),
                       factor.importance.view(-1, size))
        work = _Pass(weights, factor, [whole.part(g) for g in range(groups)], None)
    loss = work.solve(block)
    return work.weight(group_size), factor, loss


def _told(factor: Factor, loss: Tensor) -> Solved:
    return Solved(factor.damping, factor.failed, factor.dead, float(loss.sum()))


def inverse_factor(H: Tensor, damping: float, perm: Tensor | None = None) -> tuple[Tensor, float, tuple[float, ...]]:
    """(U, damping used, dampings that failed): upper triangular U, float32, with (H + damping mean(diag) I)^-1 = U^T U.

    H is taken in the order `perm`; features whose diagonal is 0 get the mean of the others. Raises StepError.
    """
    order = (torch.arange(len(H), device=H.device) if perm is None else perm).flip(0)
    diagonal = H.diagonal().float()[order]
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    diagonal = torch.where(live, diagonal, mean)
    failed: list[float] = []
    while damping <= MOST_DAMPING * (1 + 1e-6):
        A = _reordered(H, order)  # anew for every try, so that it can be solved in place
        A.diagonal().copy_(diagonal + damping * mean)
        with Products():
            solved = _invert_factor(A)
        if solved:
            return _turned(A.tril_()), damping, tuple(failed)
        failed.append(damping)
        damping *= 10
    raise StepError(f"the Hessian of the layer's inputs could not be factorised with damping "
                    f"{', '.join(f'{value:g}' for value in failed)}; expected a positive definite matrix: give more "
                    "calibration tokens, or use another method for this layer (ignore)")


def _squares(U: Tensor, rows: int = 64) -> Tensor:
    """Sum of squares of each column; torch's norm along the rows of a matrix takes eight times as long."""
    total = torch.zeros_like(U[0])
    for part in U.split(rows):
        total += part.square().sum(0)
    return total


def _reordered(H: Tensor, order: Tensor, rows: int = 64) -> Tensor:
    """H with rows and columns in another order, float32; a few rows at a time, for nothing of its size beside it."""
    A = torch.empty_like(H, dtype=torch.float32, memory_format=torch.contiguous_format)
    for some, part in zip(order.split(rows), A.split(rows), strict=True):
        part.copy_(H.index_select(0, some).index_select(1, order))
    return A


def _invert_factor(A: Tensor) -> bool:
    """Put L^-1, A = L L^T, into the lower triangle of A (above it, nothing of use); whether A is positive definite.

    By halves: L21 = A21 L11^-T, A22 <- A22 - L21 L21^T, and -L22^-1 L21 L11^-1 under the inverted halves; all but the
    smallest blocks are matrix products. Only the lower triangle is read, and the quarter above it holds what is
    between two products.
    """
    n = len(A)
    if n <= _SMALL:
        L, info = torch.linalg.cholesky_ex(A)
        A.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=A.dtype, device=A.device), upper=False))
        return int(info) == 0 and bool(torch.isfinite(A.diagonal()).all())
    half = n // 2
    upper, below, lower, room = A[:half, :half], A[half:, :half], A[half:, half:], A[:half, half:].t()
    if not _invert_factor(upper):
        return False
    below.copy_(torch.mm(below, upper.tril_().t(), out=room))
    lower.addmm_(below, below.t(), alpha=-1)
    if not _invert_factor(lower):
        return False
    torch.mm(lower.tril_(), below, out=room)
    torch.mm(room, upper, out=below).neg_()
    return True


def _turned(X: Tensor, rows: int = 16) -> Tensor:
    """X with both axes reversed, in its own place, some rows at a time."""
    n = len(X)
    for first in range(0, n // 2, rows):
        last = min(first + rows, n // 2)
        above, below = X[first:last].flip(0, 1), X[n - last:n - first].flip(0, 1)
        X[first:last], X[n - last:n - first] = below, above
    if n % 2:
        X[n // 2] = X[n // 2].flip(0)
    return X


class _Pass:
    """One pass over the columns. Everything is transposed, (in, out) and (groups, out), and in the order of solving."""

    def __init__(self, weights: Sequence[Tensor], factor: Factor, grids: list[Any],
                 fresh: Callable[[Tensor, Tensor], AnyGrid] | None) -> None:
        self.factor, self.size, self.grids, self.fresh = factor, factor.size, grids, fresh
        rows = [len(W) for W in weights]
        self.w_t = torch.empty(len(factor.perm), sum(rows), device=factor.perm.device)  # columns that are done: steps
        for W, part in zip(weights, self.w_t.split(rows, 1), strict=True):
            part.copy_(W.detach().float().t().contiguous().index_select(0, factor.perm))
        zeros = any(not bool(part.abs().amin()) for part in self.w_t.split(64))  # a sixth of the time of == and any
        self.keep_t = self.w_t != 0 if zeros else None
        self.group_of = (factor.perm // self.size).tolist()
        self.importance = factor.importance[factor.perm]
        self.room = self.w_t.new_empty(3, _STEP, sum(rows)).unbind()  # weights, steps, errors of the columns of a step
        self.among = self.w_t.new_empty(_STEP, _STEP)  # U between these columns
        self.rows = [part.unbind() for part in (self.among, *self.room)]  # views are dear where a step is a microsecond

    def solve(self, block: int) -> Tensor:
        """Turn weights into steps and return the loss of each row. Cost: rows in^2 multiplications, nearly all in
        matrix products."""
        n, U = len(self.w_t), self.factor.U
        step = next(s for s in range(min(_STEP, self.size), 0, -1) if self.size % s == 0) if self.fresh else _STEP
        unit = max(self.size, step) if self.fresh else step  # whole groups in a block: their weights are up to date
        block = -(-block // unit) * unit
        loss = self.w_t.new_zeros(self.w_t.shape[1])
        for start in range(0, n, block):
            stop = min(start + block, n)
            E = torch.empty_like(self.w_t[start:stop])
            for first in range(start, stop, step):
                last = min(first + step, stop)
                if self.fresh is not None and first % self.size == 0:
                    end = first + self.size
                    self.grids[self.group_of[first]] = self.fresh(self.w_t[first:end].t().unsqueeze(1),
                                                                  self.importance[first:end].unsqueeze(0))
                errors = E[first - start:last - start]
                self._columns(first, last, errors)
                if last < stop:
                    self.w_t[last:stop].addmm_(U[first:last, last:stop].t(), errors, alpha=-1)
            if stop < n:
                with Products():
                    self.w_t[stop:].addmm_(U[start:stop, stop:].t(), E, alpha=-1)
            loss += E.div_(self.factor.diagonal[start:stop].unsqueeze(1)).square_().sum(0)
        return loss / 2

    def _columns(self, first: int, last: int, E: Tensor) -> None:
        """Round columns first..last one by one; E (last - first, out) takes their errors.

        Where all are of one group they are counted in its steps meanwhile: a division for all in place of one for each.
        """
        W, steps, errors = (part[:last - first] for part in self.room)
        groups = self.group_of[first:last]
        grids = {g: (self.grids[g].scale[:, 0].float(), self.grids[g].rounder()) for g in set(groups)}
        alone = grids[groups[0]][0] if len(grids) == 1 else None
        torch.div(self.w_t[first:last], 1.0 if alone is None else alone, out=W)
        self.among[:last - first, :last - first] = self.factor.U[first:last, first:last]
        among = self.among[:, :last - first].unbind() if last - first < _STEP else self.rows[0]
        for i, (g, row, w, q, error) in enumerate(zip(groups, among, *self.rows[1:], strict=False)):
            scale, rounded = grids[g]
            rounded(w if alone is not None else w / scale, q)
            if self.keep_t is not None:
                q *= self.keep_t[first + i]
            if alone is not None:
                torch.sub(w, q, out=error)
            else:
                torch.addcmul(w, q, scale, value=-1, out=error)
            W.addr_(row, error, alpha=-1)  # nothing to those that are done; a slice would take longer
        self.w_t[first:last] = steps
        torch.mul(errors, 1.0 if alone is None else alone, out=E)

    def weight(self, group_size: int) -> QuantizedWeight | FloatWeight:
        """The result, its columns in their own order."""
        whole: AnyGrid = self.grids[0].joined(self.grids)
        shape = self.w_t.shape[1], len(self.grids), self.size
        if isinstance(whole, Grid):
            codes = torch.empty(shape[0], len(self.w_t), dtype=torch.int8, device=self.w_t.device)
            for rows in slabs(codes):
                steps = torch.empty_like(self.w_t[:, rows])
                steps[self.factor.perm] = self.w_t[:, rows]
                codes[rows] = whole.of(rows).weight(steps.t().reshape(-1, *shape[1:]), group_size).codes
            return QuantizedWeight(codes, whole.scale, whole.zero, whole.bits, group_size)
        steps = torch.empty_like(self.w_t)
        steps[self.factor.perm] = self.w_t
        self.w_t = steps  # the other one goes: they are large
        return whole.weight(steps.t().reshape(shape), group_size)


def _order(diagonal: Tensor, order: str, size: int) -> Tensor:
    """The columns in the order in which they are solved."""
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    within = torch.argsort(diagonal.view(-1, size), descending=True, stable=True)
    firsts = torch.arange(0, len(diagonal), size, device=diagonal.device)
    largest = torch.argsort(diagonal.view(-1, size).mean(1), descending=True, stable=True)
    return (within + firsts.unsqueeze(1))[largest].flatten()


def _check_hessian(H: Tensor, order: str) -> None:
    if order not in ORDERS:
        raise LlmopsError(unknown("order", order, ORDERS))
    if H.dim() != 2 or H.shape[0] != H.shape[1]:
        raise LlmopsError(f"H is {tuple(H.shape)}; expected (in, in), one row per input feature")
    if not all_finite(H):
        raise LlmopsError("the Hessian holds NaN or infinity; expected finite calibration activations")
