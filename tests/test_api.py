"""The calls of a notebook: load a folder, take a step on a model in memory, use a method on tensors."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.runs import chat
from tests.twins import twin

import llmops
from llmops.models.packed import PackedLinear

ROWS = [chat(f"Where is {n}?", "here" if n % 2 else "there") for n in range(24)]
IDS = torch.arange(4, 36)[None]


@pytest.fixture
def pair():
    return twin("llama")


def test_quantize_leaves_only_packed_layers(pair):
    model, tokenizer = pair
    small = llmops.apply(copy.deepcopy(model), tokenizer, {"quantize": {"method": "rtn", "scheme": "w4a16"}})
    packed = [name for name, module in small.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 4 * 7
    assert not [name for name, module in small.named_modules()
                if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")]
    with torch.inference_mode():
        drift = (small(input_ids=IDS).logits - model(input_ids=IDS).logits).float().norm()
        assert 0 < drift < 0.5 * model(input_ids=IDS).logits.float().norm()


def test_prune_then_tune_keeps_the_zeros(pair):
    model, tokenizer = pair
    sparse = llmops.apply(model, tokenizer, {"prune": {"method": "wanda", "sparsity": 0.5, "data": "c", "length": 32}},
                          ROWS)
    zeros = sparse.model.layers[0].mlp.up_proj.weight == 0
    assert float(zeros.float().mean()) == pytest.approx(0.5)
    step = {"finetune": {"method": "lora", "data": "t", "max_steps": 3, "learning_rate": 0.01}}
    healed = llmops.apply(sparse, tokenizer, step, {"t": ROWS})
    weight = healed.model.layers[0].mlp.up_proj.weight
    assert bool((weight[zeros] == 0).all()) and weight.dtype == torch.bfloat16


def test_distill_brings_the_student_to_its_teacher(pair):
    model, tokenizer = pair
    student = llmops.apply(copy.deepcopy(model), tokenizer, {"prune": {"method": "depth", "layers": 2}})
    asked = tokenizer.apply_chat_template(ROWS[0]["messages"], return_tensors="pt")["input_ids"]

    def distance() -> float:
        with torch.inference_mode():
            p, q = (m(input_ids=asked).logits.float().log_softmax(-1) for m in (model, student))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = distance()
    step = {"distill": {"method": "logits", "teacher": "x", "data": "t", "epochs": 8, "learning_rate": 3e-3}}
    student = llmops.apply(student, tokenizer, step, ROWS, teacher=model)
    assert student.config.num_hidden_layers == 2
    assert distance() < before


@pytest.mark.parametrize(("step", "message"), [
    ({"prune": {"method": "wonda", "data": "x"}}, 'did you mean "wanda"'),
    ({"prun": {"method": "wanda"}}, 'did you mean "prune"'),
    ({"prune": {"method": "magnitude", "sparsity": 1.5}}, "sparsity"),
    ({"prune": {"method": "magnitude"}, "quantize": {"method": "rtn"}}, "one key"),
    ({"distill": {"method": "logits", "teacher": "x", "data": "t"}}, "teacher="),
])
def test_a_wrong_step_says_what_is_wrong(pair, step, message):
    with pytest.raises(llmops.LlmopsError, match=message):
        llmops.apply(*pair, step, ROWS)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(llmops.ModelError, match="config.json"):
        llmops.load(tmp_path)
    with pytest.raises(llmops.ModelError, match="builtin:tiny"):
        llmops.load("builtin:tinny")


def test_the_research_example_runs():
    script = Path(__file__).parent.parent / "examples" / "research.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wanda, 50%" in done.stdout and "rtn, 2 bits" in done.stdout
