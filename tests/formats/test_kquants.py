"""K-quants: bytes that `gguf` reads as the numbers that were meant, near what could be, mixed as llama.cpp does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.formats.test_gguf import exported, made
from tests.twins import COMMON, tokenizer

from llmops.errors import LlmopsError
from llmops.formats import kquants
from llmops.formats.kquants import KQUANTS, mixture, q4_k, q6_k
from llmops.formats.options import with_type
from llmops.formats.source import Source

gguf = pytest.importorskip("gguf")
BITS = {"Q4_K": 144 * 8 / 256, "Q6_K": 210 * 8 / 256}


def read(data: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


def weights(rows: int = 24, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator) * 0.02
    W[0], W[1, :300], W[2] = 0, 0, W[2].abs()  # nothing, half nothing, nothing below zero
    W[3, 7], W[4] = 3.0, -W[4].abs()
    return W


def test_the_foreign_reader_sees_the_very_numbers_that_were_fitted() -> None:
    X = weights().reshape(-1, 256)
    d, dmin, sc, m, codes = kquants._fit_q4(X)
    meant = d.float()[..., None] * sc[..., None] * codes - (dmin.float() * m).unsqueeze(-1)
    assert torch.equal(read(kquants._packed_q4(d, dmin, sc, m, codes), "Q4_K"), meant.reshape(-1, 256))
    d, sc, codes = kquants._fit_q6(X)
    meant = (d.float() * sc).unsqueeze(-1) * codes
    assert torch.equal(read(kquants._packed_q6(d, sc, codes), "Q6_K"), meant.reshape(-1, 256))


def test_random_fields_of_every_size_are_packed_where_they_belong() -> None:
    generator = torch.Generator().manual_seed(1)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    d, dmin = torch.rand(7, 1, generator=generator).half(), torch.rand(7, 1, generator=generator).half()
    sc, m, codes = whole(0, 63, 7, 8), whole(0, 63, 7, 8), whole(0, 15, 7, 8, 32)
    expected = d.float().unsqueeze(-1) * sc.unsqueeze(-1) * codes - (dmin.float() * m).unsqueeze(-1)
    assert torch.equal(read(kquants._packed_q4(d, dmin, sc, m, codes), "Q4_K"), expected.reshape(7, 256))
    sc, codes = whole(-128, 127, 7, 16), whole(-32, 31, 7, 16, 16)
    expected = (d.float() * sc).unsqueeze(-1) * codes
    assert torch.equal(read(kquants._packed_q6(d, sc, codes), "Q6_K"), expected.reshape(7, 256))


@pytest.mark.parametrize("kind", KQUANTS)
def test_the_error_is_below_that_of_plainer_types_and_twice_is_the_same(kind: str) -> None:
    W = weights()
    data = KQUANTS[kind](W)
    assert data.shape == (24, 512 * BITS[kind] / 8) and data.dtype == np.uint8
    assert np.array_equal(data, KQUANTS[kind](W)) and np.array_equal(data[5:6], KQUANTS[kind](W[5:6]))
    R = read(data, kind)
    assert torch.all(R[0] == 0) and torch.all(R[1, :256] == 0)
    rival = "Q4_1" if kind == "Q4_K" else "Q5_0"  # 5 bits a weight against 4.5; 5.5 against 6.6
    plain = read(gguf.quants.quantize(W.numpy(), gguf.GGMLQuantizationType[rival]), rival)
    rows = [row for row in range(5, 24)]
    assert float((R - W)[rows].norm()) < float((plain - W)[rows].norm()) * (0.95 if kind == "Q4_K" else 0.45)
    assert float((R - W)[3, 256:].norm() / W[3, 256:].norm()) < (0.09 if kind == "Q4_K" else 0.03)


def test_no_grid_of_one_block_is_much_better() -> None:
    """Brute force over ranges of single blocks with real scales and offsets: what quantizing those to 6 bits costs."""
    W = torch.randn(2, 256, generator=torch.Generator().manual_seed(3))
    found = float((read(q4_k(W), "Q4_K") - W).square().sum())
    best = 0.0
    for block in W.view(-1, 32):
        low, high = float(block.min()), float(block.max())
        errors = []
        for bottom in np.linspace(0.6, 1.1, 41):
            for top in np.linspace(0.6, 1.1, 41):
                scale, offset = (high * top - low * bottom) / 15, -low * bottom
                codes = torch.round((block + offset) / scale).clamp(0, 15)
                errors.append(float((codes * scale - offset - block).square().sum()))
        best += min(errors)
    assert best * 0.9 < found < 1.12 * best


def test_the_mixture_is_llama_cpps() -> None:
    six = [layer for layer in range(32) if mixture(f"model.layers.{layer}.mlp.down_proj.weight", 32, False) == "Q6_K"]
    assert six == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert [mixture(f"model.layers.{layer}.self_attn.v_proj.weight", 32, False) for layer in (0, 4)] == ["Q6_K", "Q4_K"]
    assert mixture("model.layers.0.self_attn.q_proj.weight", 32, False) == "Q4_K"
    assert [mixture(name, 32, tied) for name, tied in (("lm_head.weight", False), ("model.embed_tokens.weight", False),
                                                       ("model.embed_tokens.weight", True))] == ["Q6_K", "Q4_K", "Q6_K"]


def wide(place: Path, tied: bool) -> Source:
    """A llama whose rows are multiples of 256, but for those that o_proj reads."""
    import transformers as t

    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**COMMON | {
        "hidden_size": 256, "intermediate_size": 512, "head_dim": 32,
        "tie_word_embeddings": tied}), dtype=torch.bfloat16)
    model.save_pretrained(place / "source")
    tokenizer().save_pretrained(place / "source")
    return Source.of(place / "source")


@pytest.mark.parametrize("tied", [True, False])
def test_files_are_read_back_and_say_what_is_in_them(tied: bool, tmp_path: Path) -> None:
    source = wide(tmp_path, tied)
    records = {name: exported(source, name) for name in ("gguf-q4_0", "gguf-q4_k", "gguf-q4_k_m", "gguf-q6_k")}
    kl = {name: record["kl_mean"]["value"] for name, (record, _) in records.items()}
    assert kl["gguf-q6_k"] < 0.25 * kl["gguf-q4_k"] and kl["gguf-q4_k"] < kl["gguf-q4_0"]
    record, file = records["gguf-q4_k"]
    assert record["notes"] == ["linear layers: 24 in Q4_K, 4 in Q5_0, 28 of them rounded again",
                               "4 linear layers have rows that are no multiple of 256: they took the type that "
                               "llama.cpp falls back to (Q5_0 for Q4_K, Q8_0 for Q6_K)"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert kinds["blk.0.attn_output.weight"] == "Q5_0" and kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["token_embd.weight"] == "F16" and not record["exact"]
    record, file = records["gguf-q4_k_m"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert [kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert kinds["token_embd.weight"] == ("Q6_K" if tied else "Q4_K") and kinds.get("output.weight") == (
        None if tied else "Q6_K")
    assert file.fields["general.file_type"].contents() == 15
    assert record["notes"][1] == ("embedding and head: 1 in Q6_K" if tied else
                                  "embedding and head: 1 in Q4_K, 1 in Q6_K")
    size = {name: record["bytes"]["value"] for name, (record, _) in records.items()}
    assert size["gguf-q4_k_m"] < size["gguf-q4_k"] < size["gguf-q6_k"]


def test_a_packed_variant_is_rounded_again(tmp_path: Path) -> None:
    record, file = exported(made(tmp_path, "mistral", 4), "gguf-q4_k")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K" and kinds["blk.0.ffn_up.weight"] == "Q5_0"  # 256 and 128 inputs
    assert record["kl_mean"]["value"] < 0.1 and not record["exact"]


def test_types_by_name() -> None:
    assert with_type("gguf", "Q4_K_M") == "gguf-q4_k_m" and with_type("dense", None) == "dense"
    with pytest.raises(LlmopsError, match='did you mean "q4_k"'):
        with_type("gguf", "q4k")
    with pytest.raises(LlmopsError, match="a type .Q4_K. of format awq, which has none"):
        with_type("awq", "Q4_K")


def test_columns_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"W is \(2, 128\); expected columns in a multiple of 256"):
        q6_k(torch.zeros(2, 128))
