"""What is done to a model before its weights are rounded: changes of the weights that leave the function as it was.

Each is a function on a block of the calibration walk, in the order in which they are listed; the walk calls them when
the block is in float32 and before it measures anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmops import calibrate
from llmops.build.job import Job
from llmops.build.layer_schemes import Chosen, scheme
from llmops.methods.quantize.awq import awq_scales
from llmops.methods.quantize.options import WeightOnly
from llmops.models.fold import find_links, fold

__all__ = ["Prepared", "awq_factors", "prepare"]


@dataclass
class Prepared:
    """steps: what a block goes through; looks: what sees it after that and changes nothing; told: one function a step,
    called after the walk, for the row's events."""

    steps: list[Callable[[calibrate.Block], None]] = field(default_factory=list)
    looks: list[Callable[[calibrate.Block], None]] = field(default_factory=list)
    told: list[Callable[[], list[str]]] = field(default_factory=list)

    @property
    def block(self) -> Callable[[calibrate.Block], None] | None:
        """What the walk calls for every block, None when there is nothing to do."""
        return self._all if self.steps else None

    def _all(self, block: calibrate.Block) -> None:
        for step in (*self.steps, *self.looks):
            step(block)

    def compute(self, otherwise: torch.dtype | None = None) -> torch.dtype | None:
        """float32 where weights are changed before they are rounded, so that they are rounded once."""
        return torch.float32 if self.steps else otherwise

    def events(self) -> list[str]:
        return [event for tell in self.told for event in tell()]


def prepare(job: Job, options: WeightOnly, chosen: Chosen = None) -> Prepared:
    """What the options ask for before solving."""
    return Prepared()


def awq_factors(block: calibrate.Block, options: WeightOnly, grid: int, storage: torch.dtype,
                chosen: Chosen = None) -> tuple[dict[str, Tensor], int]:
    """Fold AWQ's best factors into every link of a block. Returns the Hessians by full name, as they are after that,
    and how many links took factors. grid: exponents tried, 0 for none at all."""
    turns = block.turns()
    seen = block.measure("hessian", [turn[0] for turn in turns])
    H = {name: seen[turn[0]] for turn in turns for name in turn}
    count = 0
    for link in find_links(block.module, block.run) if grid else []:
        targets = [f"{block.name}.{name}" for name in link.targets]
        quantized = [name for name in targets if name in block.layers]
        if not quantized:
            continue
        scales = awq_scales([block.layers[name].weight for name in quantized], H[quantized[0]],
                            **scheme(options, chosen, quantized[0]), steps=grid, shared=link.shared, dtype=storage)
        if scales.alpha:
            s = fold(block.module, link, scales.s, storage)
            H.update(dict.fromkeys(targets, H[targets[0]] / torch.outer(s, s)))
            count += 1
    return H, count
