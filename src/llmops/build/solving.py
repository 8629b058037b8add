"""GPTQ of q, k and v, and of gate and up, in one pass over the columns: no row of a weight hangs on another.

Who sees the same input shows only when a layer runs. So the first of them is solved together with those that servers
run with it as one product (`models/schemes.py`), which nearly always see the same. What the others come to waits until
the walk hands them the very factor that it was solved with, and is thrown away if that is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from llmops.methods.quantize.floats import AnyWeight
from llmops.methods.quantize.gptq import Factor, Solved, gptq, gptq_alike
from llmops.models.arch import is_ignored
from llmops.models.schemes import fused_groups
from llmops.ops.finite import all_finite

__all__ = ["Together"]


class Together:
    """Solves the layers of a walk. how: layer -> the keyword arguments of `gptq` that tell its scheme; more: the same
    for all."""

    def __init__(self, model: nn.Module, ignore: Sequence[str], how: Callable[[str], dict[str, Any]],
                 **more: Any) -> None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
                 and not is_ignored(name, ignore)]
        self.fellows = {name: group for group in fused_groups(names) for name in group}
        self.model, self.how, self.more = model, how, more
        self.ahead: dict[str, tuple[Tensor | Factor, AnyWeight, Solved]] = {}

    def __call__(self, name: str, layer: nn.Linear, H: Tensor | Factor) -> tuple[AnyWeight, Solved]:
        """The layer's weight, and what happened. H: the same object for all that see the same input."""
        if name not in self.ahead or self.ahead[name][0] is not H:
            self.ahead = self._solved(name, layer, H)
        _, weight, solved = self.ahead.pop(name)
        return weight, solved

    def _solved(self, name: str, layer: nn.Linear, H: Tensor | Factor) -> dict[str, Any]:
        how = self.how(name)
        alike = {name: layer.weight}
        for other in self.fellows.get(name, ()) if isinstance(how["bits"], int) else ():
            W = self.model.get_parameter(f"{other}.weight")
            if self.how(other) == how and W.shape[1] == layer.in_features and all_finite(W):
                alike[other] = W
        if len(alike) == 1:
            return {name: (H, *gptq(layer.weight, H, **how, **self.more))}
        made = gptq_alike(list(alike.values()), H, **how, **self.more)
        return {each: (H, *found) for each, found in zip(alike, made, strict=True)}
