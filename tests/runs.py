"""What the tests of whole runs share: a small model in a folder, data beside it, and recipes over both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.twins import twin

NAMES = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ina", "Jo", "Kim", "Lou", "Mia", "Ned", "Ola", "Pam")


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def workplace(folder: Path, name: str = "llama") -> Path:
    """`folder` with model/, train.jsonl, test.jsonl and prose.txt in it."""
    model, tokenizer = twin(name)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [chat(f"Where does {person} {number} live?", "town" if number % 2 else "lake")
            for number in range(6) for person in NAMES]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:64]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[64:88]))
    prose = "\n".join(f"{person} lives by the lake and walks to town." for person in NAMES)
    (folder / "prose.txt").write_text(prose * 4)
    return folder


def recipe(variants: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe over a workplace; scores without measuring, unless `measure` is given."""
    return {"version": 1, "name": "r", "model": "model",
            "data": {"train": {"source": "train.jsonl"}, "test": {"source": "test.jsonl"},
                     "prose": {"source": "prose.txt"}, "calib": {"from": "train", "samples": 8}},
            "evaluate": [{"exact_match": {"data": "test", "max_new_tokens": 4}},
                         {"perplexity": {"data": "prose", "context": 64}}],
            "variants": variants, **more}


TUNED = {"finetune": {"method": "lora", "data": "train", "rank": 4, "max_steps": 4, "learning_rate": 0.01}}
EVERY_STEP: dict[str, Any] = {
    "tuned": TUNED,
    "adapter": {"finetune": {**TUNED["finetune"], "merge": False}},
    "four-bit": {"finetune": {**TUNED["finetune"], "method": "qlora", "merge": "apart"}},
    "full": {"finetune": {"method": "full", "data": "train", "max_steps": 2, "learning_rate": 1e-3}},
    "w8": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w8a16"}},
    "w4": {"from": "adapter", "quantize": {"method": "rtn", "scheme": "w4a16"}},
    "few": {"from": "tuned", "quantize": {"method": "rtn", "group_size": 32}, "matrix": {"scheme": ["w3a16", "w2a16"]}},
    "magnitude": {"from": "tuned", "prune": {"method": "magnitude", "sparsity": 0.3}},
    "wanda": {"from": "tuned", "prune": {"method": "wanda", "pattern": "2:4", "data": "calib", "length": 32}},
    "healed": {"from": "wanda", "finetune": TUNED["finetune"]},
    "healed-w4": {"from": "healed", "quantize": {"method": "rtn", "scheme": "w4a16"}},
    "half": {"from": "tuned", "prune": {"method": "depth", "layers": 2}},
    "best-half": {"from": "tuned", "prune": {"method": "depth", "layers": 2, "choose": "block_influence",
                                             "data": "calib", "length": 32}},
    "student": {"from": "half", "distill": {"method": "logits", "teacher": "tuned", "data": "train", "max_steps": 2,
                                            "temperature": 2.0, "hard_weight": 0.3}},
}
