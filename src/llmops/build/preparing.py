"""What is done to a model before its weights are rounded: changes of the weights that leave the function as it was.

Each is a function on a block of the calibration walk, in the order in which they are listed; the walk calls them when
the block is in float32 and before it measures anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmops import calibrate
from llmops.build.job import Job
from llmops.build.layer_schemes import Chosen, check_groups, kind_of, scheme
from llmops.errors import LlmopsError
from llmops.methods.quantize.awq import awq_scales
from llmops.methods.quantize.options import Autoround, Awq, Gptq, Smoothquant, WeightOnly
from llmops.methods.quantize.smoothquant import smooth_factors
from llmops.models.fold import find_links, fold
from llmops.models.rotate import find_rotation
from llmops.models.tail import Tail

__all__ = ["Prepared", "awq_factors", "folded", "head_awq_factors", "prepare"]


@dataclass
class Prepared:
    """steps: what a block goes through; looks: what sees it after that and changes nothing; ends: what a head behind
    the blocks goes through; told: one function a step, called after the walk, for the row's events."""

    steps: list[Callable[[calibrate.Block], None]] = field(default_factory=list)
    looks: list[Callable[[calibrate.Block], None]] = field(default_factory=list)
    ends: list[Callable[[Tail], None]] = field(default_factory=list)
    told: list[Callable[[], list[str]]] = field(default_factory=list)

    @property
    def block(self) -> Callable[[calibrate.Block], None] | None:
        """What the walk calls for every block, None when there is nothing to do."""
        return self._all if self.steps else None

    def _all(self, block: calibrate.Block) -> None:
        for step in (*self.steps, *self.looks):
            step(block)

    def tail(self, tail: Tail) -> None:
        """What the walk calls for a head."""
        for end in self.ends:
            end(tail)

    def compute(self, otherwise: torch.dtype | None = None) -> torch.dtype | None:
        """float32 where weights are changed before they are rounded, so that they are rounded once."""
        return torch.float32 if self.steps else otherwise

    def events(self) -> list[str]:
        return [event for tell in self.told for event in tell()]


def prepare(job: Job, options: WeightOnly, chosen: Chosen = None) -> Prepared:
    """What the options ask for before solving: a rotation first, then factors.

    Raises LlmopsError where a layer cannot be divided into the groups of the options.
    """
    if chosen is None:
        check_groups(calibrate.targets(job.model, options.ignore), kind_of(options))
    ready = Prepared()
    if options.rotations:
        _rotated(job, options, ready)
    if isinstance(options, Gptq | Autoround) and options.factors == "awq":
        grid = Awq.model_fields["grid"].default
        _counted(ready, lambda block: awq_factors(block, options, grid, job.storage, chosen)[1],
                 lambda tail: head_awq_factors(tail, options, grid, job.storage, chosen)[1])
    if isinstance(options, Smoothquant):
        _counted(ready, lambda block: _smoothed(block, options.alpha, job.storage),
                 lambda tail: _head_smoothed(tail, options.alpha, job.storage))
    return ready


def _rotated(job: Job, options: WeightOnly, ready: Prepared) -> None:
    """Rotate what lies outside the blocks now, and each block in its turn."""
    if job.keeps_zeros:
        raise LlmopsError(f"rotate: {', '.join(options.rotations)} on a pruned model would fill its zeros; expected no "
                          "rotate after magnitude or wanda, or a model that is not sparse")
    rotation = find_rotation(job.model, options.rotations, job.seed)
    events = rotation.describe() + rotation.begin(job.model)
    ready.steps.append(lambda block: rotation.block(block.index, block.module))
    ready.told.append(lambda: events)


def _counted(ready: Prepared, change: Callable[[calibrate.Block], int], end: Callable[[Tail], int]) -> None:
    """A step that says how many links of a block took factors, the same for the head, and one event about all."""
    found: list[int] = []
    ends: list[int] = []
    ready.steps.append(lambda block: found.append(change(block)))
    ready.ends.append(lambda tail: ends.append(end(tail)))
    ready.told.append(lambda: [folded(found, ends)])


def folded(found: Sequence[int], ends: Sequence[int] = ()) -> str:
    """The event about factors. found: how many links of each block took some; ends: whether that of the head did."""
    return (f"factors folded into {sum(found)} norms and layers of {len(found)} blocks"
            + (", and into the norm before the head" if sum(ends) else ""))


def awq_factors(block: calibrate.Block, options: WeightOnly, grid: int, storage: torch.dtype,
                chosen: Chosen = None) -> tuple[dict[str, Tensor], int]:
    """Fold AWQ's best factors into every link of a block. Returns the Hessians by full name, as they are after that,
    and how many links took factors. grid: exponents tried, 0 for none at all."""
    H = _measured(block, "hessian")
    count = 0
    for link in find_links(block.module, block.run) if grid else []:
        targets = [f"{block.name}.{name}" for name in link.targets]
        quantized = [name for name in targets if name in block.layers]
        if not quantized or not H.keys() >= set(targets):
            continue
        scales = awq_scales([block.layers[name].weight for name in quantized], H[quantized[0]],
                            **scheme(options, chosen, quantized[0]), steps=grid, shared=link.shared, dtype=storage)
        if scales.alpha:
            s = fold(block.module, link, scales.s, storage)
            H.update(dict.fromkeys(targets, H[targets[0]].div_(s).div_(s.unsqueeze(1))))  # in place: it is in^2
            count += 1
    return H, count


def head_awq_factors(tail: Tail, options: WeightOnly, grid: int, storage: torch.dtype,
                     chosen: Chosen = None) -> tuple[Tensor, int]:
    """The same for a head and the final norm: the Hessian of the head's inputs as it is after that, and 1 where factors
    were folded."""
    H = tail.measure("hessian")
    if tail.link is None or not grid:
        return H, 0
    scales = awq_scales([tail.head.weight], H, **scheme(options, chosen, tail.name), steps=grid, dtype=storage)
    if not scales.alpha:
        return H, 0
    s = fold(tail.model, tail.link, scales.s, storage)
    return H / torch.outer(s, s), 1


def _head_smoothed(tail: Tail, alpha: float, storage: torch.dtype) -> int:
    """SmoothQuant's factors of a head and the final norm. Returns 1 where they were folded."""
    if tail.link is None:
        return 0
    s = smooth_factors([tail.head.weight], tail.measure("x_absmax"), alpha=alpha)
    fold(tail.model, tail.link, s, storage)
    return 1


def _smoothed(block: calibrate.Block, alpha: float, storage: torch.dtype) -> int:
    """Fold SmoothQuant's factors into every link of a block. Returns how many there were."""
    x_absmax = _measured(block, "x_absmax")
    count = 0
    for link in find_links(block.module, block.run):
        quantized = [name for target in link.targets if (name := f"{block.name}.{target}") in block.layers]
        if quantized and x_absmax.keys() >= set(quantized):
            s = smooth_factors([block.layers[name].weight for name in quantized], x_absmax[quantized[0]], alpha=alpha,
                               shared=link.shared)
            fold(block.module, link, s, storage)
            count += 1
    return count


def _measured(block: calibrate.Block, statistic: str) -> dict[str, Tensor]:
    """The statistic of every layer of a block by full name, gathered once for those that see one tensor; without those
    of experts that saw too little."""
    turns = block.turns()
    seen = block.measure(statistic, [turn[0] for turn in turns])
    return {name: known for turn in turns for name in turn if (known := seen[turn[0]]) is not None}
