"""What quantizing holds in memory: one block in float32 and what its solver needs, whatever the number of blocks."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.live import LiveBytes
from torch import Tensor

from llmops import block_stream, shelf
from llmops.build import quantizing
from llmops.build.job import Job
from llmops.build.variant import apply_step
from llmops.methods.quantize import awq_clip, awq_scales, gptq, grid, hqq, slabs
from llmops.methods.quantize.autoround import Tuned
from llmops.methods.quantize.options import Autoround, Awq, Gptq, Hqq, Rtn
from llmops.models.load import load
from llmops.shelf import shelved

BLOCKS, WIDTH, INNER = 4, 128, 384
SCHEME = {"scheme": "w4a16", "group_size": 32}
SEEN = {**SCHEME, "data": "calib"}
#: Most live bytes beside the model, in float32 blocks, where an MLP is three times as wide as the rest and the widest
#: layer a quarter of the block: the block itself and one layer's temporaries; the widest layer's H, once more while it
#: is factorised; H of every input at once; offsets in 16 bits, codes, and one layer's temporaries.
MOST = {"rtn": (Rtn(method="rtn", **SCHEME), 1.2), "hqq": (Hqq(method="hqq", iterations=2, **SCHEME), 2.3),
        "gptq": (Gptq(method="gptq", **SEEN), 2.9), "awq": (Awq(method="awq", grid=2, **SEEN), 3.0),
        "autoround": (Autoround(method="autoround", iterations=2, **SEEN), 3.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four blocks on the disk; its tokenizer is that of the twins."""
    from tests.twins import twin
    from transformers import AutoModelForCausalLM, LlamaConfig

    place = tmp_path_factory.mktemp("four")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=64,
                         tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    twin("llama")[1].save_pretrained(place)
    return place


def mapped(tensor: Tensor) -> bool:
    """Whether the tensor lies in a mapping of a file (Linux)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5) if line.count(" ") > 4 else (line.split()[0], "")
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return path.strip().startswith("/")
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to see what is mapped")
@pytest.mark.parametrize("method", MOST)
def test_four_blocks_take_the_memory_of_one(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_stream, "SHELVED_FROM", 0)
    monkeypatch.setattr(shelf, "LEAST", 4096)
    for solver in (grid, sys.modules[Tuned.__module__]):
        monkeypatch.setattr(solver, "AT_ONCE", 1 << 12)  # numbers, whatever the model's size; the block here is small
    monkeypatch.setattr(slabs, "MOST", 1 << 14)
    monkeypatch.setattr(quantizing, "calibration", lambda *_: torch.arange(32).view(2, 16))
    model, tokenizer = load(folder, dtype="stored", device="cpu")
    block = 2 * sum(parameter.nbytes for parameter in model.model.layers[0].parameters())  # as float32
    options, most = MOST[method]
    left: list[int] = []
    with LiveBytes() as live:
        job = Job(model, tokenizer, model.dtype, [], lambda _: None, lambda _: None, 0)  # type: ignore[arg-type, return-value]
        job.progress = lambda *_: left.append(live.now)
        work: Any = apply_step("quantize", job, options)
    assert len(left) == BLOCKS
    scales = sum(weight.scale.nbytes + (0 if weight.zero_point is None else weight.zero_point.nbytes)
                 for weight in work.packed.values())  # stay in memory
    assert live.peak <= most * block + scales, f"{live.peak / block:.2f} blocks"
    assert left[-1] - left[0] <= scales, "memory grows from block to block"
    layers = [layer.self_attn.q_proj.weight for layer in work.model.model.layers]
    assert all(mapped(weight) for weight in layers)
    assert all(mapped(weight.codes) for weight in work.packed.values())


def test_a_shelved_tensor_is_the_same_and_its_own() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn):
        given = (torch.randn(600, 500) * 10).to(dtype)
        on_shelf = shelved(given.t())
        assert on_shelf.dtype == dtype and torch.equal(on_shelf.float(), given.t().float())
        assert on_shelf.data_ptr() != given.data_ptr()
    again = shelved(on_shelf)
    on_shelf.zero_()  # changes memory, neither the file nor its other readers
    assert torch.equal(again.float(), given.t().float())
    small = torch.zeros(10)
    assert shelved(small) is small


@pytest.mark.parametrize("symmetric", [True, False])
def test_slabs_of_rows_change_no_bit(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows in slabs of 16 and in one, which is what the solvers were without slabs."""
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(300, 64, generator=generator), torch.randn(200, 64, generator=generator)
    H = X.t() @ X / 100
    how: dict[str, Any] = {"bits": 3, "group_size": 32, "symmetric": symmetric}

    def solved() -> list[Tensor]:
        made = [hqq(W, bits=3, group_size=32, iterations=3), awq_clip(W, H, **how), gptq(W, H, **how)[0]]
        zeros = [each.zero_point for each in made if each.zero_point is not None]
        return [*(each.codes for each in made), *(each.scale for each in made), *zeros,
                awq_scales([W], H, **how, steps=3).s]

    few = partial(slabs.slabs, most=1)
    assert [rows.start for rows in few(W)] == list(range(0, 300, 16))
    whole = solved()
    for solver in ("hqq", "awq", "gptq"):
        monkeypatch.setattr(sys.modules[f"llmops.methods.quantize.{solver}"], "slabs", few)
    assert all(map(torch.equal, whole, solved()))
