from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmops.measure import memory


class Packed(nn.Module):
    """Keeps packed integers outside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = [torch.zeros(100, dtype=torch.uint8)]

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        return {"packed": self.plain[0]}


def test_weights_are_counted_by_storage():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False), Packed())
    model[1].weight = model[0].weight  # tied
    model.register_buffer("scales", torch.zeros(8, dtype=torch.bfloat16))
    model.register_buffer("view", model.scales[:4], persistent=False)
    assert memory.weights_bytes(model).value == 10 * 10 * 4 + 16 + 100
    assert memory.weights_bytes(model).provenance == "measured"


def test_what_was_not_loaded_takes_no_memory():
    assert memory.weights_bytes(nn.Linear(10, 10, device="meta")).value == 0


@pytest.mark.parametrize("resettable", [True, False])
def test_the_peak_sees_what_was_allocated_and_freed(resettable, monkeypatch):
    if not resettable:
        monkeypatch.setattr(memory, "_reset_mark", lambda: False)
    elif not memory._reset_mark():
        pytest.skip("this system does not let a process reset its high-water mark")
    model = nn.Linear(100, 100, bias=False)
    size = 64 << 20
    with memory.peak(model) as found:
        held = torch.ones(size, dtype=torch.uint8)
        if not resettable:
            for _ in range(50):  # long enough for the sampling thread
                held.add_(1)
        del held
    assert found.quantity.value is not None
    assert size - (1 << 20) < found.quantity.value < size + (16 << 20)  # the kernel counts pages in batches
    assert found.quantity.provenance == "estimated"
    assert ("VmHWM" in found.quantity.method) == resettable
    with memory.peak(model) as nothing:
        pass
    assert nothing.quantity.value is not None and nothing.quantity.value >= 40_000  # the weights
    assert nothing.quantity.value is not None and nothing.quantity.value < 8 << 20


def test_a_section_that_fails_has_no_figure():
    with pytest.raises(KeyError), memory.peak(nn.Linear(2, 2)) as found:
        raise KeyError("x")
    assert found.quantity.value is None


def test_disk_bytes(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "llmops.json").write_bytes(b"{}" * 50)
    (tmp_path / "README.md").write_bytes(b"# a card")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "blob").write_bytes(b"y" * 30)
    (tmp_path / "adapter.safetensors").symlink_to(tmp_path / "sub" / "blob")
    assert memory.disk_bytes(tmp_path).value == 1000 + 2 + 30 + 30
    assert memory.disk_bytes(tmp_path, weights_only=True).value == 1030
    assert memory.disk_bytes(tmp_path / "sub", weights_only=True).value is None
    assert memory.disk_bytes(tmp_path / "none").value is None
