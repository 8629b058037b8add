"""Preferences trained into integers: compared with the very parent, stored in its bits, or apart from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.build.test_healing import folder_of, logits, parts
from tests.twins import twin
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmops.build import Job, apply_step
from llmops.build.job import Work
from llmops.build.preferences import _pairs, answer_log_probs
from llmops.data.options import DataSource
from llmops.data.sources import rows_from
from llmops.methods.finetune.options import Dpo
from llmops.methods.quantize.qat import learned_scale, settle
from llmops.models.load import load
from llmops.models.quantized import load_quantized

ROWS = [{"prompt": f"Where is bridge {number}?", "chosen": "near the sea" + "!" * (number % 3),
         "rejected": "north" + " of the river" * (number % 2)} for number in range(8)]
WAYS: dict[str, dict[str, Any]] = {"whole": {"rank": None, "learning_rate": 5e-3}, "rounded": {},
                                   "apart": {"merge": False}}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folder_of(tmp_path_factory.mktemp("parent"))
    return folder


def job(folder: Path, **more: Any) -> Job:
    model, tokenizer = load(folder, dtype="stored", device="cpu", kernel="reference")
    return Job(model, tokenizer, model.dtype, ["quantize:rtn"], lambda name: rows_from(name, ROWS),
               lambda name: DataSource(source=name), 0, base_source=str(folder), **more)


def options(way: str, **more: Any) -> Dpo:
    return Dpo(**{"method": "dpo", "data": "pairs", "max_steps": 3, "learning_rate": 1e-2, "batch_size": 4, "rank": 4,
                  "schedule": "constant", "warmup": 0.0, **WAYS[way], **more})


def take(folder: Path, way: str, **more: Any) -> tuple[Work, list[dict[str, float]]]:
    told: list[dict[str, float]] = []
    return apply_step("finetune", job(folder, log=lambda _, figures: told.append(dict(figures))),
                      options(way, **more)), told


@pytest.mark.parametrize("way", WAYS)
def test_the_parent_itself_is_the_reference(way: str, parent: Path) -> None:
    """Rounded alike: the margin begins at nothing, and what is said of the pairs is what the packed parent gives."""
    work, told = take(parent, way)
    assert told[0]["reward_margin"] == pytest.approx(0, abs=1e-5) and told[-1]["reward_margin"] > 0
    assert work.data["reward_margin"] > 0 and work.data["pairs_looked_at"] == 8
    given = job(parent)
    pairs = _pairs(given, options(way))
    before, after = (answer_log_probs(model.eval(), pairs, pairs.train) for model in (given.model, work.model))
    margin = 0.1 * ((after - before)[0] - (after - before)[1]).mean()
    assert work.data["reward_margin"] == pytest.approx(float(margin), abs=2e-3)


@pytest.mark.parametrize("way", ["whole", "rounded"])
def test_what_is_stored_is_what_was_trained_in_the_parents_bits(way: str, parent: Path, tmp_path: Path) -> None:
    work, _ = take(parent, way)
    work.save(tmp_path / "child")
    read = load_quantized(tmp_path / "child", kernel="reference")
    assert torch.equal(logits(read), logits(work.model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "child")), logits(work.model))
    old, new = parts(parent), parts(tmp_path / "child")
    assert {name: {part: value.shape for part, value in layer.items()} for name, layer in old.items()} == {
        name: {part: value.shape for part, value in layer.items()} for name, layer in new.items()}
    assert any(not torch.equal(layer["weight_packed"], new[name]["weight_packed"]) for name, layer in old.items())
    again, _ = take(parent, way)
    assert all(torch.equal(weight.codes, again.packed[name].codes) for name, weight in work.packed.items())


def test_an_adapter_apart_leaves_the_integers_alone(parent: Path, tmp_path: Path) -> None:
    before = parts(parent)
    work, _ = take(parent, "apart")
    work.save(tmp_path / "child")
    model, _ = load(tmp_path / "child", dtype="stored", device="cpu", kernel="reference")
    assert torch.allclose(logits(model), logits(work.model), atol=1e-5)
    after = parts(parent)
    assert all(torch.equal(value, after[name][part]) for name, layer in before.items() for part, value in layer.items())
    assert any("packed layers, whose codes and scales stayed" in event for event in work.events)


def test_pruned_weights_stay_zero(tmp_path: Path) -> None:
    model, _ = twin("llama", torch.float32)
    name = "model.layers.1.mlp.up_proj"
    mask = torch.rand(model.get_submodule(name).weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    folder = folder_of(tmp_path / "parent", masks={name: mask})
    given = job(folder)
    given.chain[:0] = ["prune:wanda"]
    work = apply_step("finetune", given, options("rounded"))
    assert not bool(work.model.get_submodule(name).weight[~mask].any())


def test_doras_fold_is_what_was_seen() -> None:
    """Q(m V / ||V||): what a fake-quantized layer multiplies by under DoRA, by hand, and what is folded of it."""
    from llmops.methods.finetune.lora import NAME, adapted_weight, adapters, add_lora
    from llmops.methods.quantize.rtn import rtn
    from llmops.models.fake_quant import adapt, fold_adapters, soften
    from llmops.models.quantized import pack

    model, _ = twin("llama", torch.float32)
    name = "model.layers.0.mlp.gate_proj"
    pack(model, {name: rtn(model.get_submodule(name).weight, bits=3, group_size=32)})
    soften(model, keep={}, near={}, seed=0)
    adapted = add_lora(model, rank=4, alpha=8, targets=["layers.0.mlp.gate_proj"], dora=True)
    (base,) = adapt(adapted)
    layer = adapters(adapted)[name]
    with torch.no_grad():
        layer.lora_B[NAME].weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        layer.lora_magnitude_vector[NAME].weight.mul_(1.2)
        A, B, m = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.lora_magnitude_vector[NAME].weight
        x = torch.eye(128)
        seen: Tensor = layer(x).t()
        wanted = adapted_weight(base.weight, A, B, layer.scaling[NAME], m)
        by_hand = settle(wanted, learned_scale(base.scale, base.log_scale), None, bits=3, group_size=32,
                         dtype=torch.float32).dequantize()
        assert (seen != by_hand).float().mean() < 1e-3  # the order of sums may turn one that lies on a border
        fold_adapters(adapted)
        assert torch.equal(layer(x).t(), seen) and torch.equal(base.settled().dequantize(), seen)
