"""Every way of training adapters, on every twin: what was trained is what is kept."""

import peft
import pytest
import torch
from tests.runs import chat
from tests.twins import NAMES, tokens, twin
from transformers import AutoModelForCausalLM

from llmops.build import Job, apply_step
from llmops.build import lora as build
from llmops.data.options import DataSource
from llmops.data.sources import rows_from
from llmops.errors import StepError
from llmops.methods.finetune.lora import merge_lora
from llmops.models.load import load
from llmops.recipe.schema import STEPS

ROWS = [chat(f"Where does {name} live?", "town" if name < "d" else "lake") for name in "abcdefgh"]
WAYS = {
    "lora": {}, "rslora": {"rslora": True, "lora_plus_ratio": 16.0}, "dora": {"dora": True},
    "pissa": {"init": "pissa", "dropout": 0.1}, "qlora": {"method": "qlora", "merge": "apart"}}


def job(model, tokenizer, chain=(), **more) -> Job:
    return Job(model, tokenizer, model.dtype, list(chain), lambda name: rows_from(name, [dict(row) for row in ROWS]),
               lambda name: DataSource(source="memory"), 0, **more)


def step(model, tokenizer, *, chain=(), base_source="", **options):
    body = {"method": "lora", "data": "rows", "rank": 4, "max_steps": 2, "learning_rate": 5e-3, **options}
    return apply_step("finetune", job(model, tokenizer, chain, base_source=base_source),
                      STEPS["finetune"][body["method"]].model_validate(body))


def logits(model):
    with torch.inference_mode():
        return model(input_ids=tokens(2, 24)).logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_unmerged(name, way, monkeypatch):
    before = {}
    if way == "qlora":
        work = step(*twin(name), **WAYS[way])
        entries = {entry["target"]: entry for entry in work.merge}
        assert entries["apart"]["chosen"] and entries["apart"]["kl_max"]["value"] == 0
        assert entries["dequantized"]["kl_mean"]["value"] < 1e-3 < entries["original"]["kl_mean"]["value"]
        return

    def keep_logits(adapted):
        adapted = adapted.double().eval()  # so that the order of sums does not hide what is looked for
        before["logits"] = logits(adapted)
        return merge_lora(adapted)

    monkeypatch.setattr(build, "merge_lora", keep_logits)
    model, tokenizer = twin(name, torch.float32)
    start = logits(model)
    work = step(model, tokenizer, **WAYS[way])
    torch.testing.assert_close(logits(work.model), before["logits"], rtol=0, atol=1e-5)
    assert float((before["logits"] - start).abs().max()) > 0.01  # and something was learned


def test_pissa_left_apart_fits_the_original_base_in_plain_peft(tmp_path):
    for dora in (False, True):
        model, tokenizer = twin("qwen3", torch.float32)
        folder, base = tmp_path / f"adapter-{dora}", tmp_path / "base"
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        work = step(model, tokenizer, base_source=str(base), init="pissa", rslora=True, dora=dora, merge=False)
        work.save(folder)
        assert work.expected.adapter_rank == 8
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder)
        torch.testing.assert_close(logits(plain.eval()), logits(work.model.eval()), rtol=1e-4, atol=1e-4)
        assert float((logits(plain) - logits(twin("qwen3", torch.float32)[0])).abs().max()) > 0.01


@pytest.mark.parametrize("init", ["pissa", "loftq"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_4_bit_base_with_a_start_is_made_again_from_its_folder(init, dora, tmp_path):
    model, tokenizer = twin("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    work = step(model, tokenizer, method="qlora", init=init, dora=dora, merge="apart", targets=["q_proj", "down_proj"],
                base_source=str(tmp_path / "base"), loftq_iterations=2)
    work.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "base_shift.safetensors").exists()
    again, _ = load(tmp_path / "adapter", dtype="float32", device="cpu")
    assert torch.equal(logits(again), logits(work.model))
    table = {entry["target"]: entry["kl_mean"]["value"] for entry in work.merge}
    assert table["apart"] == 0 and table["dequantized"] < 1e-3


def test_starts_are_taken_off_again_where_the_original_base_is_kept():
    """Before anything is learned, folding into the original base has to give the original model."""
    model, tokenizer = twin("llama", torch.float32)
    start = logits(model)
    for init in ("pissa", "loftq"):
        work = step(twin("llama", torch.float32)[0], tokenizer, method="qlora", init=init, merge="original",
                    learning_rate=1e-12)
        torch.testing.assert_close(logits(work.model), start, rtol=1e-3, atol=1e-4)


def test_held_out_rows_decide_and_their_loss_is_in_the_table():
    work = step(*twin("llama"), method="qlora", merge="dequantized", stop={"holdout": 0.3, "every": 1})
    for entry in work.merge:
        assert "held-out tokens" in entry["kl_mean"]["method"] and entry["held_out_loss"]["value"] > 0
    assert [entry["target"] for entry in work.merge if entry["chosen"]] == ["dequantized"]
    assert sum("KL from what was trained" in event and "held-out loss" in event for event in work.events) == 3
    assert logits(work.model).dtype == torch.float32 and work.expected.dtype == torch.bfloat16


def test_the_rate_of_b_is_the_ratio_times_that_of_a():
    """With Adam the first step of a parameter is about its learning rate, whatever the gradient."""
    moved = {}
    for ratio in (0.0, 8.0):
        model, tokenizer = twin("llama", torch.float32)
        work = step(model, tokenizer, merge=False, max_steps=1, learning_rate=1e-3, warmup=0.0, lora_plus_ratio=ratio)
        moved[ratio] = max(float(value.detach().abs().max()) for name, value in work.model.named_parameters()
                           if "lora_B" in name)
    assert moved[8.0] == pytest.approx(8 * moved[0.0], rel=0.01) == pytest.approx(8e-3, rel=0.01)


def test_what_cannot_be_trained_is_refused_before_it_starts():
    with pytest.raises(StepError, match="use method: qlora, or init: pissa"):
        step(*twin("llama"), init="loftq")
    with pytest.raises(StepError, match="use method: lora, which masks its adapters"):
        step(*twin("llama"), chain=("prune:magnitude",), method="qlora")
