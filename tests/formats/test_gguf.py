"""GGUF files, read by transformers through the `gguf` package, and by llama.cpp itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_quantized import mixed, quantized
from tests.twins import TEMPLATE, twin

from llmops.errors import LlmopsError
from llmops.formats import check
from llmops.formats.gguf_vocab import RULES, splitting_rule
from llmops.formats.source import Source
from llmops.formats.table import FORMATS
from llmops.models.load import load
from llmops.models.quantized import save_quantized

gguf = pytest.importorskip("gguf")


def made(place: Path, name: str, bits: int, group: int = 32, symmetric: bool = True) -> Source:
    if bits == 16:
        model, tokenizer = twin(name)
        model.save_pretrained(place / "source")
        tokenizer.save_pretrained(place / "source")
    else:
        model, weights, tokenizer = quantized(name, bits, group, symmetric) if bits else mixed(name)
        save_quantized(model, weights, place / "source", tokenizer)
    return Source.of(place / "source")


def exported(source: Source, name: str) -> tuple[dict[str, Any], Any]:
    out = source.folder.parent / name
    out.mkdir()
    record = check.held_against(source, out, name, FORMATS[name].write(source, out))
    return record, gguf.GGUFReader(out / "model.gguf")


@pytest.mark.parametrize(("name", "bits", "group", "symmetric", "kind"), [
    ("llama", 4, 32, True, "Q4_0"), ("qwen3", 3, -1, True, "Q4_0"), ("llama-untied-bias", 2, 128, True, "Q4_0"),
    ("qwen2", 4, 32, False, "Q8_0"), ("mistral", 8, -1, True, "Q8_0")])
def test_codes_and_scales_go_over_exactly(name: str, bits: int, group: int, symmetric: bool, kind: str,
                                          tmp_path: Path) -> None:
    record, file = exported(made(tmp_path, name, bits, group, symmetric), "gguf")
    assert record["exact"] and f"linear layers: 28 in {kind}, codes and scales as they were" in record["notes"]
    assert record["max_logit_difference"]["value"] < 1e-4
    if name == "mistral":
        assert record["notes"][0].startswith("the file has no sliding window: beyond 32 tokens")
    assert record["reader"].endswith("config of the source") == (name in ("qwen3", "llama-untied-bias"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert kinds["blk.1.ffn_up.weight"] == kind and kinds["token_embd.weight"] == "F16"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert ("output.weight" in kinds) == (name in ("llama-untied-bias", "mistral"))


def test_each_layer_of_a_mixture_takes_the_smallest_type_that_holds_it(tmp_path: Path) -> None:
    record, file = exported(made(tmp_path, "llama", 0), "gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert record["notes"] == ["linear layers: 22 in Q4_0, 6 in Q8_0, codes and scales as they were"]
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_output.weight"],
            kinds["blk.3.ffn_down.weight"]) == ("Q4_0", "Q8_0", "Q8_0", "Q4_0")
    assert record["max_logit_difference"]["value"] < 1e-4


def test_dense_goes_to_f16_and_is_rounded_again_on_request(tmp_path: Path) -> None:
    source = made(tmp_path, "llama", 16)
    records = {name: exported(source, name)[0] for name in ("gguf", "gguf-q8_0", "gguf-q4_0")}
    kl = [record["kl_mean"]["value"] for record in records.values()]
    size = [record["bytes"]["value"] for record in records.values()]
    assert kl[0] < 1e-6 and kl[0] < kl[1] < kl[2] and size[0] > size[1] > size[2]
    assert [record["exact"] for record in records.values()] == [True, False, False]
    assert records["gguf-q4_0"]["notes"] == ["linear layers: 28 in Q4_0, 28 of them rounded again"]


def test_what_no_block_can_hold_is_dense(tmp_path: Path) -> None:
    record, _ = exported(made(tmp_path, "llama", 8, 32, False), "gguf")  # steps of up to 255 from the zero point
    assert record["exact"] and record["kl_mean"]["value"] < 1e-5
    assert record["notes"] == ["linear layers: 28 in F16, 28 of them rounded again"] or "F16" in record["notes"][0]


def test_the_file_carries_tokenizer_and_template(tmp_path: Path) -> None:
    source = made(tmp_path, "llama", 4)
    _, file = exported(source, "gguf")
    said = {name: field.contents() for name, field in file.fields.items()}
    tokenizer = load(source.folder)[1]
    vocabulary = tokenizer.get_vocab()
    assert said["tokenizer.chat_template"] == TEMPLATE and said["tokenizer.ggml.pre"] == "gpt-2"
    tokens = said["tokenizer.ggml.tokens"]
    assert len(tokens) == 512 and all(tokens[index] == token for token, index in vocabulary.items())
    assert tokens[len(vocabulary):] == [f"[PAD{index}]" for index in range(len(vocabulary), 512)]
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert said["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]
    assert said["tokenizer.ggml.merges"][0] == " ".join(json.loads(
        (source.folder / "tokenizer.json").read_text())["model"]["merges"][0])
    assert said["llama.attention.key_length"] == 64 and said["llama.rope.freq_base"] == 10000.0


def test_what_the_file_could_not_say_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path, "gemma3", 4)
    with pytest.raises(LlmopsError, match="a gemma3_text model; GGUF is written for llama, mistral, qwen2, qwen3"):
        FORMATS["gguf"].write(source, tmp_path)
    scaled = Source(source.folder, {**source.config, "model_type": "llama", "rope_parameters": {"rope_type": "yarn"}},
                    source.schemes)
    with pytest.raises(LlmopsError, match="rotary frequencies scaled by 'yarn'"):
        FORMATS["gguf"].write(scaled, tmp_path)


def test_splitting_rules_by_name() -> None:
    def body(pattern: str, **last: Any) -> dict[str, Any]:
        split = {"type": "Split", "pattern": {"Regex": pattern}}
        return {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, **last}]}}

    assert {splitting_rule(body(pattern)) for pattern in RULES} == {"qwen2", "llama-bpe"}
    with pytest.raises(LlmopsError, match="for which llama.cpp has no name known here"):
        splitting_rule(body(r"\w+"))
    with pytest.raises(LlmopsError, match="byte-level BPE without a prefix space"):
        splitting_rule(body(next(iter(RULES)), add_prefix_space=True))
    with pytest.raises(LlmopsError, match="a tokenizer of type Unigram"):
        splitting_rule({"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace"}})


@pytest.mark.parametrize(("name", "bits", "kind", "limit"), [
    ("llama", 16, "gguf", 0.02), ("qwen2", 4, "gguf", 0.1), ("llama", 16, "gguf-q4_k_m", 0.1)])
def test_llama_cpp_reads_the_same_tokens_and_says_the_same(name: str, bits: int, kind: str, limit: float,
                                                           tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """limit: of a log-probability; llama.cpp rounds activations to 8 bits before it multiplies by few bits."""
    engine = pytest.importorskip("xllamacpp")
    source = made(tmp_path, name, bits)
    exported(source, kind)
    given = engine.CommonParams()
    given.model.path, given.n_ctx, given.warmup, given.n_parallel = str(tmp_path / kind / "model.gguf"), 64, False, 1
    server = engine.Server(given)
    model, tokenizer = load(source.folder, dtype="float32", device="cpu", kernel="reference")
    if kind == "gguf-q4_k_m":  # rounded again: held against what the file says, as transformers reads it
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, gguf_file="model.gguf", dtype=torch.float32)
    text = "Every bridge's clock counts to 12345,  don't it?\n\nThe old"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    answer = server.handle_completions({"prompt": text, "n_predict": 1, "temperature": 0, "n_probs": 8})
    body = json.loads(answer) if isinstance(answer, str) else answer
    assert body["usage"]["prompt_tokens"] == ids.shape[1]
    top = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert top[0]["id"] == int(expected.argmax())
    assert max(abs(entry["logprob"] - float(expected[entry["id"]])) for entry in top) < limit


@pytest.mark.parametrize(("name", "bits", "kind", "limit"), [
    ("llama", 16, "gguf-f16", 1e-5), ("qwen3", 16, "gguf-f16", 1e-5), ("qwen2", 8, "gguf", 1e-3),
    ("llama", 4, "gguf", 1e-3), ("llama", 16, "gguf-q4_k", 1e-3)])
def test_llama_cpps_python_binding_computes_the_same_logits(name: str, bits: int, kind: str, limit: float,
                                                            tmp_path: Path) -> None:
    """Of every token of a text, over the whole vocabulary; llama-cpp-python, where it is installed. limit: of the mean
    KL; it rounds activations to float16, and to 8 bits before it multiplies by few."""
    engine = pytest.importorskip("llama_cpp")
    from transformers import AutoModelForCausalLM

    source = made(tmp_path, name, bits)
    exported(source, kind)
    model, tokenizer = load(source.folder, dtype="float32", device="cpu", kernel="reference")
    if kind == "gguf-q4_k":  # rounded again: held against what the file says, as transformers reads it
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, gguf_file="model.gguf", dtype=torch.float32)
    text = "Every bridge's clock counts to 12345,  don't it?\n\nThe old"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    llama = engine.Llama(str(tmp_path / kind / "model.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
    assert llama.metadata["tokenizer.chat_template"] == TEMPLATE
    llama.eval(ids)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    given = torch.from_numpy(llama.scores[:len(ids)].copy()).log_softmax(-1)
    llama.close()
    assert float((expected.exp() * (expected - given)).sum(-1).mean()) < limit
