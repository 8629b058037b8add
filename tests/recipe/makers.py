"""Recipes and folders for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path

HEAD = {
    "version": "version: 1",
    "name": "name: trial",
    "model": "model: small",
    "data": "data:\n  train: {source: train.jsonl}\n  test: {source: test.jsonl}\n  calib: {from: train, samples: 2}",
    "evaluate": "evaluate:\n  - exact_match: {data: test}",
    "variants": "variants:\n  tuned: {finetune: {method: lora, data: train}}",
}
CONFIG = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1000, "tie_word_embeddings": True,
    "max_position_embeddings": 512, "dtype": "bfloat16"}


def text(**sections: str) -> str:
    """A whole recipe: the given sections, and a sound one for each that is not given. An empty one is left out."""
    return "\n".join(section for section in (HEAD | sections).values() if section) + "\n"


def folder(place: Path) -> Path:
    """A folder with data, and a model of 6 layers that has everything but weights worth loading."""
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(10)]
    for name, chosen in (("train", rows[:6]), ("test", rows[6:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    (place / "empty.jsonl").write_text("")
    (place / "table.xlsx").write_text("not read")
    for name, extra in (("small", {}), ("packed", {"quantization_config": {"quant_method": "x"}}),
                        ("integers", {"quantization_config": {"quant_method": "gptq", "bits": 4}})):
        model = place / name
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG | extra))
        (model / "model.safetensors").write_bytes(b"weights")
        (model / "tokenizer.json").write_text("{}")
        (model / "chat_template.jinja").write_text("template")
    (place / "bare").mkdir()
    return place
