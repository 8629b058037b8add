"""The parity check of adapters and types: each promise that is broken is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_quantized import mixed
from tests.twins import tokens, twin

from llmops.methods.finetune.lora import add_lora
from llmops.models import nf4, parity
from llmops.models.load import load
from llmops.models.quantized import save_quantized
from llmops.models.save import save_adapter, save_dense


@pytest.fixture
def adapter(tmp_path):
    """(folder, snapshot, what is promised, tokenizer) of a small adapter on a 4-bit base."""
    model, tokenizer = twin("llama")
    save_dense(model, tokenizer, tmp_path / "base", torch.bfloat16)
    base = nf4.quantize_base(model, quant="nf4", double_quant=True, compute=torch.float32, device=torch.device("cpu"))
    adapted = add_lora(model, rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = parity.snapshot(adapted.eval(), tokenizer, tokens(2, 16))
    folder = tmp_path / "adapter"
    save_adapter(adapted, tokenizer, folder, base=str(tmp_path / "base"))
    nf4.record(folder, base, {})
    return folder, before, parity.Expected(adapter_rank=4, base=("nf4", True))


def broken(folder, before, expected):
    model, tokenizer = load(folder, dtype="float32", device="cpu")
    found = parity.check(before, model, tokenizer, folder, expected)
    assert found["ok"] == all(entry["ok"] for entry in found["checks"])
    return [entry["name"] for entry in found["checks"] if not entry["ok"]]


def test_what_was_trained_is_what_is_loaded(adapter):
    assert broken(*adapter) == []


def test_an_adapter_that_was_changed_on_disk_is_found(adapter):
    folder, before, expected = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * (3.0 if "lora_B" in name else 1.0) for name, value in weights.items()},
              folder / "adapter_model.safetensors")
    assert broken(folder, before, expected) == ["logits"]


def test_another_rounding_of_the_base_is_found(adapter):
    folder, before, expected = adapter
    body = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(body | {"quant": "fp4"}))
    assert broken(folder, before, expected) == ["logits", "base"]


def test_a_lost_record_is_found(adapter):
    folder, before, expected = adapter
    (folder / "base.json").unlink()  # plain LoRA on the 16-bit base: runs, and is not what was trained
    assert "base" in broken(folder, before, expected)


def test_another_template_another_stop_token_another_type_are_found(tmp_path):
    model, tokenizer = twin("llama")
    before = parity.snapshot(model, tokenizer, tokens(2, 16))
    save_dense(model, tokenizer, tmp_path / "a", torch.bfloat16)
    assert broken(tmp_path / "a", before, parity.Expected(dtype=torch.bfloat16)) == []
    assert broken(tmp_path / "a", before, parity.Expected(dtype=torch.float32)) == ["dtype"]
    template = tmp_path / "a" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "<|human|>") + " ")
    config = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 4]}))
    assert broken(tmp_path / "a", before, parity.Expected()) == ["template", "stop tokens"]


def test_divergence_is_that_of_the_distributions_written_out():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = [sum(a * torch.log(torch.tensor(a / b)) for a, b in zip(x, y, strict=True))
               for x, y in zip(p.tolist(), q.tolist(), strict=True)]
    mean, most = parity.divergence(p.log(), q.log())
    assert mean == pytest.approx(float(sum(by_hand) / 2), rel=1e-5) and most == pytest.approx(float(max(by_hand)))


def test_bits_are_held_against_each_layer(tmp_path):
    model, weights, tokenizer = mixed("llama")
    save_quantized(model, weights, tmp_path / "a", tokenizer)
    before = parity.snapshot(model, tokenizer, tokens())
    promised = {name: weight.bits for name, weight in weights.items()}
    loaded, again = load(tmp_path / "a", dtype="stored", device="cpu")

    def bits(asked):
        checks = parity.check(before, loaded, again, tmp_path / "a", parity.Expected(bits=asked))["checks"]
        return next((entry["ok"], entry["detail"]) for entry in checks if entry["name"] == "bits")

    assert bits(promised) == (True, "2 bits in 6, 3 bits in 9, 4 bits in 10, 8 bits in 3 asked for and on disk")
    name = "model.layers.1.self_attn.o_proj"
    assert bits(promised | {name: 4}) == (False, f"{name}: 4 asked for, 8 on disk")
    assert bits(promised | {"model.x": 4}) == (False, "model.x: 4 asked for, none on disk")
    ok, said = bits(4)
    assert not ok and said.endswith("; and 15 more")
    model, tokenizer = twin("llama")
    dense = parity.check(before, model, tokenizer, tmp_path / "a", parity.Expected(bits=4))["checks"][-1]
    assert (dense["ok"], dense["detail"]) == (False, "4 asked for, no packed layer on disk")
