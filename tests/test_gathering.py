"""Measuring many layers in one pass: what they share, to the bit; where it ends; layers that only seem to share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.test_calibrate import gather as statistics
from tests.twins import tokens, twin
from torch import nn

from llmops import calibrate, gathering
from llmops.models.experts import Routing, split_experts


class Apart(gathering._Pass):
    """As if nobody shared an input and nothing ended before its end."""

    def __init__(self, **_: Any) -> None:
        super().__init__(stop=False, share=False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_what_layers_share_is_to_the_bit_what_each_has_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> tuple[dict[str, torch.Tensor | None], list[str], int]:
        model, ran, added = twin(name, torch.float32)[0], [], []
        split_experts(model)
        for full, layer in model.named_modules():
            layer.register_forward_hook(lambda *_, full=full: ran.append(full))
        monkeypatch.setattr(gathering._Norm, "add", lambda self, x: (added.append(x.shape), add(self, x)))
        return statistics(model, tokens(6, 24), "x_norm", batch_size=4), ran, len(added)

    add = gathering._Norm.add
    monkeypatch.setattr(calibrate, "WHOLE", 0)
    found, ran, added = seen()
    monkeypatch.setattr(gathering, "_Pass", Apart)
    alone, whole, every = seen()
    assert found.keys() == alone.keys() and len(found) > 8
    for key, value in alone.items():
        assert (value is None) == (found[key] is None) and (value is None or torch.equal(found[key], value)), key
    if name == "llama":
        assert (added, every) == (4 * 4 * 2, 7 * 4 * 2)  # four inputs of seven layers, blocks, batches
        last = [sum(full.endswith("mlp.down_proj") for full in those) for those in (ran, whole)]
        assert last == [2 * 3, 2 * 7]  # measuring ends before it; what goes on to the next block of four needs it


class Twofold:
    """A stream of one block of two layers. seen: for every batch what `a` and then `b` are given."""

    def __init__(self, *seen: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        self.a, self.b, self.seen = nn.Linear(4, 2), nn.Linear(4, 2), seen
        self.hidden, self.blocks = list(range(len(seen))), [nn.ModuleList([self.a, self.b])]

    def run(self, index: int, batch: int) -> None:
        for layer, inputs in zip((self.a, self.b), self.seen[batch], strict=True):
            for x in inputs:
                layer(x)

    def norms(self) -> list[torch.Tensor | None]:
        turn = [[("a", self.a)], [("b", self.b)]]
        return gathering.measure(self, 0, turn, gathering._Norm, Routing())  # type: ignore[arg-type]


@torch.no_grad()
def test_layers_that_part_in_a_later_batch_are_measured_apart() -> None:
    x, y, z = (torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    norm = [torch.cat(parts, 1)[0].norm(dim=0) for parts in ([x, y], [x, z], [x])]
    for stream, expected, same in ((Twofold(([x], [x]), ([y], [y])), (norm[0], norm[0]), True),
                                   (Twofold(([x], [x]), ([y], [z])), (norm[0], norm[1]), False),
                                   (Twofold(([x], [x]), ([y], [])), (norm[0], norm[2]), False),
                                   (Twofold(([x], [x.clone()])), (norm[2], norm[2]), False)):
        found = stream.norms()
        assert (found[0] is found[1]) == same
        for value, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(value, exact)
    changed = x.clone()
    stream = Twofold(([changed], [changed]))
    stream.a.register_forward_hook(lambda *_: changed.mul_(2))  # the same memory, another tensor
    torch.testing.assert_close(stream.norms(), [norm[2], 2 * norm[2]])
    assert not any(layer._forward_pre_hooks for layer in (stream.a, stream.b))
