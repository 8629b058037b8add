"""Random-weight twins of real architectures go through every step of a recipe, and every folder opens elsewhere."""

import pytest
import torch
from tests.runs import EVERY_STEP, recipe, workplace
from tests.twins import NAMES
from transformers import AutoModelForCausalLM

import llmops
from llmops.models.load import load
from llmops.recipe import parse_recipe


@pytest.mark.parametrize("name", NAMES)
def test_every_step_on(name, tmp_path):
    workplace(tmp_path, name)
    parsed = parse_recipe(recipe(EVERY_STEP), base_dir=tmp_path)
    result = llmops.run(parsed, runs=tmp_path / "runs")
    states = {row["identity"]["variant"]: (row["status"]["state"], row["status"]["reason"]) for row in result.rows}
    assert set(states.values()) == {("ok", None)}, states
    assert result.exit_code == 0 and len(states) == 1 + len(parsed.variants)

    rows = {row["identity"]["variant"]: row for row in result.rows}
    assert rows["healed"]["size"]["sparsity"]["value"] == pytest.approx(0.5, abs=0.001)  # zeros outlive the healing
    assert rows["half"]["size"]["parameters"]["value"] < rows["tuned"]["size"]["parameters"]["value"]
    bits = [rows[v]["size"]["disk_bytes"]["value"] for v in ("tuned", "w8", "w4", "few-w3a16", "few-w2a16")]
    assert bits == sorted(bits, reverse=True)

    ids = torch.arange(5, 37)[None]
    for variant in ("tuned", "full", "half", "student", "wanda"):  # plain transformers, the same logits
        folder = tmp_path / "runs" / "r" / variant
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        ours, _ = load(folder, dtype="stored", device="cpu")
        with torch.inference_mode():
            assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits), variant
