"""AWQ: before rounding, make the weights of large inputs larger (Lin et al. 2023, arXiv 2306.00978).

A few input features carry most of a layer's output, and the error of a weight counts with the size of its input. A
weight column times s > 1, its input divided by s, is the same function, but the column's rounding error counts 1/s as
much as long as the group's scale stays what it was (section 3.2). The factors come from the inputs alone, one exponent
for all layers that share an input (eq. 5):

    s = s_X^alpha,    alpha* = argmin over a grid of  || Q(W diag(s)) diag(s)^-1 X - W X ||^2

and are folded into whatever makes the input (a norm, the layer before), so nothing is left to compute at run time: see
`llmops.models.fold`. Then the range of every group is clipped where that lowers the output error further.

    paper   here                       paper   here
    s       s                          X       only through H = 2/N X X^T
    s_X     input_size(H)              Q       `fit` and `nearest` of grid.py

Deliberate differences: the loss is the output error of the layers that share the input, summed, over all calibration
tokens: ||D X||^2 = N/2 tr(D H D^T), exactly, so no token is sampled away and no forward pass is needed for a
candidate. s_X is the root mean square of an input instead of the mean of its size, for H holds it. alpha = 0 is the
identity and is tried first; so the search is never worse than round-to-nearest. The clip is accepted row by row on
the same loss of the whole row, for every layer, queries and keys too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize.floats import FloatFormat, FloatWeight, bound
from llmops.methods.quantize.grid import AnyGrid, Grid, Kind, both_ways, check, fit, grid_between, group_of, grouped
from llmops.methods.quantize.slabs import slabs
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["CLIPS", "Scales", "awq_clip", "awq_scales", "input_size", "output_error"]

#: Fractions of a group's range that the clip search tries beside the whole.
CLIPS = tuple(1 - step / 40 for step in range(1, 25))


@dataclass(frozen=True)
class Scales:
    """s: (in,), what weight columns are multiplied by, all ones when nothing was better; alpha: its exponent;
    loss and identity_loss: tr(D H D^T) summed over the layers, with s and without."""

    s: Tensor
    alpha: float
    loss: float
    identity_loss: float


def awq_scales(Ws: Sequence[Tensor], H: Tensor, *, bits: Kind, group_size: int = -1, symmetric: bool = True,
               steps: int = 20, shared: Callable[[Tensor], Tensor] | None = None,
               dtype: torch.dtype | None = None) -> Scales:
    """The factors for layers `Ws`, each (out, in), that share the input behind H (in, in).

    steps: candidates alpha = i / steps; 0 leaves the identity. shared: gives features that must have one factor (heads
    that share a value head) the same size, (in,) -> (in,). Cost: `steps` times rounding and a product W H. Raises
    LlmopsError as `rtn` does.
    """
    for W in Ws:
        check(W, bits)
    wide = [W.float() for W in Ws]
    stored = dtype or Ws[0].dtype
    x = input_size(H)
    x = x if shared is None else shared(x)
    best = Scales(torch.ones_like(x), 0.0, 0.0, 0.0)
    room = x.new_empty(2, max(W.numel() for W in wide))
    for step in range(steps + 1):
        s = _normalised(x.pow(step / steps)) if step else torch.ones_like(x)
        loss = 0.0
        for W in wide:
            D, product = (part[:W.numel()].view_as(W) for part in room)
            for rows in slabs(W) if isinstance(bits, int) else [slice(None)]:
                G = grouped(W[rows] * s, group_of(bits, group_size))
                rounded = fit(G, bound(bits, G), symmetric, stored).nearest(G).flatten(1).div_(s)
                torch.sub(rounded, W[rows], out=D[rows])
            loss += float(output_error(D, H, product).sum())
        if step == 0:
            best = Scales(s, 0.0, loss, loss)
        elif loss < best.loss:
            best = Scales(s, step / steps, loss, best.identity_loss)
    return best


@overload
def awq_clip(W: Tensor, H: Tensor, *, bits: int, group_size: int = ..., symmetric: bool = ...,
             dtype: torch.dtype | None = ...) -> QuantizedWeight: ...


@overload
def awq_clip(W: Tensor, H: Tensor, *, bits: FloatFormat, group_size: int = ..., symmetric: bool = ...,
             dtype: torch.dtype | None = ...) -> FloatWeight: ...


def awq_clip(W: Tensor, H: Tensor, *, bits: Kind, group_size: int = -1, symmetric: bool = True,
             dtype: torch.dtype | None = None) -> QuantizedWeight | FloatWeight:
    """Round `W` (out, in) with the range of every group clipped where the layer's output error falls.

    A group's range is chosen by its own share tr(D_g H_gg D_g^T); a row keeps the choice only if its whole error falls.
    Cost: len(CLIPS) times rounding and the products with the blocks H_gg. Raises LlmopsError as `rtn` does.
    """
    check(W, bits)
    G = grouped(W, group_of(bits, group_size)).float()
    stored = dtype or W.dtype
    size = G.shape[-1]
    blocks = torch.stack([H[i:i + size, i:i + size] for i in range(0, H.shape[0], size)]).float()  # (groups, g, g)
    low, high = G.amin(-1), G.amax(-1)
    kind = bound(bits, W)
    whole = fit(G, kind, symmetric, stored)
    chosen: Any = whole
    D, room = torch.empty_like(G), G.new_empty(G.shape[1], len(G), size)  # taken once for all that is tried
    least = whole.pooled(_group_error(_change(whole, G, D), blocks, room))
    for p in (1.0, *CLIPS):
        for tried in both_ways(grid_between(low * p, high * p, kind, symmetric, stored)):
            error = tried.pooled(_group_error(_change(tried, G, D), blocks, room))
            chosen, least = tried.where(error < least, chosen), torch.minimum(error, least)
    before, after = (whole.pooled(output_error(_change(grid, G, D).flatten(1), H, room.view_as(W)).unsqueeze(1)
                                  .expand_as(least)) for grid in (whole, chosen))
    del D, room
    chosen = chosen.where(after < before, whole)
    return chosen.weight(chosen.steps(G), group_size)  # type: ignore[no-any-return]


def input_size(H: Tensor) -> Tensor:
    """(in,) root mean square of every input feature, positive; features never seen count as the smallest seen."""
    x = (H.diagonal().float() / 2).clamp(min=0).sqrt()
    if not bool((x > 0).any()):
        raise LlmopsError("every input of the layer was zero; expected calibration data that reaches it")
    return x.clamp(min=max(float(x[x > 0].min()), 1e-4 * float(x.max())))


def output_error(D: Tensor, H: Tensor, out: Tensor | None = None) -> Tensor:
    """(out,) D_i H D_i^T: what a change D (out, in) of the weight does to each output, squared; times 2/N.

    out: (out, in) float32, for what is between.
    """
    return torch.mm(D, H.float(), out=out).mul_(D).sum(1)


def _change(grid: AnyGrid, G: Tensor, out: Tensor) -> Tensor:
    """What rounding changes of G (out, groups, group), written to `out`."""
    if not isinstance(grid, Grid):
        return torch.sub(grid.nearest(G), G, out=out)
    for rows in slabs(G):
        torch.sub(grid.of(rows).nearest(G[rows]), G[rows], out=out[rows])
    return out


def _group_error(D: Tensor, blocks: Tensor, room: Tensor) -> Tensor:
    """(out, groups) from D (out, groups, group) and the diagonal blocks (groups, group, group) of H.

    room: (groups, out, group), for what is between.
    """
    D = D.transpose(0, 1)  # (groups, out, group)
    return torch.bmm(D, blocks, out=room).mul_(D).sum(-1).t()


def _normalised(s: Tensor) -> Tensor:
    return s / (s.max() * s.min()).sqrt()
