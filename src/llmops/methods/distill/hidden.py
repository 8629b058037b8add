"""Matching hidden states (Romero et al. 2014, "FitNets"; for transformers Jiao et al. 2019, "TinyBERT", eq. 8).

Logits tell a student what to say; hidden states tell it, at every depth and every token, what to have worked out by
then. A student that was cut out of its teacher still speaks the teacher's inner language, so the states can be compared
as they are; one of another width is compared through a matrix W, learned with it and thrown away afterwards:

    L_hidden = 1/|pairs| sum_(i, j) ||W_i s_i - t_j||^2 / ||t_j||^2          both norms over all tokens and features

Paper -> here: H^S -> student, H^T -> teacher, W_h -> projections. Deliberate differences: relative to the size of the
teacher's states, because residual streams grow with depth by orders of magnitude and the last pair would otherwise be
the only one that counts; a matrix for each pair rather than one for all, since the layers of a student that was not cut
out of its teacher share no language.

Which teacher layer a student layer answers for: the one after the same share of the depth (TinyBERT's uniform mapping).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["hidden_loss", "projections", "uniform_pairs"]


def uniform_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), from 0: layer i of S is held against layer round((i + 1) L / S) - 1 of L.

    Of 3 and 6 layers: (0, 1), (1, 3), (2, 5). A deeper student leaves teacher layers matched more than once. Raises
    LlmopsError without layers.
    """
    if student < 1 or teacher < 1:
        raise LlmopsError(f"a student of {student} layers and a teacher of {teacher}; expected at least one each")
    return [(layer, max(0, (2 * (layer + 1) * teacher + student) // (2 * student) - 1)) for layer in range(student)]


def projections(pairs: int, student: int, teacher: int, seed: int) -> list[Tensor]:
    """One matrix W (teacher width, student width) for each pair, drawn with orthonormal columns or rows."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.init.orthogonal_(torch.empty(teacher, student), generator=draw) for _ in range(pairs)]


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], projected: Sequence[Tensor] | None = None
                ) -> Tensor:
    """Mean over the pairs of ||W s - t||^2 / ||t||^2, a number without a unit. student, teacher: (N, D) each, in pairs.

    projected: W of each pair, (D of the teacher, D of the student); None where the widths are equal. Raises LlmopsError
    for states of unlike shape, or as many of one as not of the other.
    """
    if projected is not None:
        student = [s.float() @ W.float().T for s, W in zip(student, projected, strict=True)]
    if not student or [s.shape for s in student] != [t.shape for t in teacher]:
        raise LlmopsError(f"hidden states {[tuple(s.shape) for s in student][:3]} of the student against "
                          f"{[tuple(t.shape) for t in teacher][:3]} of the teacher; expected pairs of one shape: give "
                          "a student of its teacher's hidden size, projections, or hidden_weight: 0")
    parts = [(s.float() - t.float()).square().sum() / t.float().square().sum().clamp_min(1e-12)
             for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()
