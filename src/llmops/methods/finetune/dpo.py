"""Direct preference optimization: learn from pairs of answers, one better than the other (Rafailov et al. 2023,
arXiv 2305.18290, eq. 7), without a reward model and without sampling.

Reinforcement learning from preferences maximizes a reward under a penalty on leaving the reference model. Its optimum
is known in closed form, and turned around it says which reward a model is the optimum of (eq. 5, up to a term of the
prompt alone, which cancels in a pair):

    r(x, y) = beta log( pi(y | x) / pi_ref(y | x) )

Put into the Bradley-Terry model of a preference, p(y_w > y_l) = sigma(r_w - r_l), this gives a loss on the model
itself. With u = log(pi(y_w)/pi_ref(y_w)) - log(pi(y_l)/pi_ref(y_l)), so that beta u is the reward margin:

    sigmoid   -log sigma(beta u)                  Rafailov et al. 2023, eq. 7. With label smoothing e, where a share e
                                                  of the labels may be wrong (cDPO, Mitchell 2023):
                                                  -(1 - e) log sigma(beta u) - e log sigma(-beta u)
    hinge     max(0, 1 - beta u)                  SLiC, Zhao et al. 2023 (arXiv 2305.10425, eq. 2) on rewards, as in
                                                  RSO, Liu et al. 2023 (arXiv 2309.06657): a pair that is told apart
                                                  by the margin 1 pulls no more
    ipo       (u - 1 / (2 beta))^2                Azar et al. 2023 (arXiv 2310.12036, eq. 17): pulls u towards a
                                                  finite target, also where every label agrees and a sigmoid would
                                                  never be satisfied

Paper -> here: pi -> chosen, rejected (log-probabilities of the answers, summed over their tokens), pi_ref ->
reference_chosen, reference_rejected, epsilon -> label_smoothing. The loss of IPO is in units of u squared, which grows
with the length of the answers; its authors' experiments use the mean over tokens (as TRL does), so give it averages.

Cost: eight numbers a pair. The forward passes are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from llmops.errors import StepError, unknown

__all__ = ["LOSSES", "dpo_loss", "reward_margin"]


def _sigmoid(u: Tensor, beta: float, smoothing: float) -> Tensor:
    right = -F.logsigmoid(beta * u)
    return right if smoothing == 0 else (1 - smoothing) * right - smoothing * F.logsigmoid(-beta * u)


def _hinge(u: Tensor, beta: float, smoothing: float) -> Tensor:
    return F.relu(1 - beta * u)


def _ipo(u: Tensor, beta: float, smoothing: float) -> Tensor:
    return (u - 1 / (2 * beta)).square()


LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo}


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float,
             kind: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """(pairs,): the loss of each pair. All four: (pairs,) log-probabilities of the answers, in nats.

    Raises StepError for a kind that is not in LOSSES, a beta that is not above 0, and a label_smoothing outside
    [0, 0.5) or given to another kind than sigmoid.
    """
    if kind not in LOSSES:
        raise StepError(unknown("preference loss", kind, LOSSES))
    if not beta > 0:
        raise StepError(f"beta is {beta:g}; expected a number above 0, 0.1 being usual: at 0 the answers would not "
                        "matter, and below it the worse one would be preferred")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "sigmoid"):
        raise StepError(f"label_smoothing is {label_smoothing:g} with the loss {kind}; expected a share of wrong "
                        "labels from 0 to below 0.5, with the loss sigmoid")
    u = (chosen - reference_chosen) - (rejected - reference_rejected)
    return LOSSES[kind](u, beta, label_smoothing)


def reward_margin(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *,
                  beta: float) -> Tensor:
    """(pairs,): by how much the chosen answer is rewarded above the other, r_w - r_l = beta u. 0 at the start."""
    return beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
