"""The quantized cache of fixed size: the same tokens as the cache that grows, and codes all the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.twins import NAMES, tokens, twin
from transformers import LlamaConfig

from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize.options import KV_DTYPES
from llmops.models import static_kv
from llmops.models.kv_cache import attach
from llmops.models.static_kv import StaticKVCache, Stored, attention, fits, leave, use

GENERATE = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True,
            "return_dict_in_generate": True}


def double(name: str = "llama") -> Any:
    """In float64: sums in another order then end on the same codes."""
    return twin(name, torch.float64)[0]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(2, 36), torch.ones(2, 36, dtype=torch.int64)
    mask[0, :7] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gemma2"])
@torch.inference_mode()
def test_generate_writes_what_the_growing_cache_writes(name: str, dtype: str) -> None:
    ids, mask = padded()
    wanted = attach(double(name), dtype).generate(ids, attention_mask=mask, **GENERATE)
    model = use(double(name), dtype)
    found = model.generate(ids, attention_mask=mask, **GENERATE)
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert type(found.past_key_values) is StaticKVCache and found.past_key_values.room == 128
    assert int(found.past_key_values.get_seq_length()) == 36 + 7


@torch.inference_mode()
def test_soft_capped_scores_are_those_of_eager_attention() -> None:
    """transformers' SDPA leaves the cap out; its eager attention keeps it, with a softmax in float32."""
    ids, found = tokens(2, 36), {}
    for cap in (1.0, None):
        eager, ours = attach(double("gemma2"), "int8"), use(double("gemma2"), "int8")
        eager.set_attn_implementation("eager")
        for model in (eager, ours):
            for block in model.model.layers:
                block.self_attn.attn_logit_softcapping = cap
        found[cap] = [torch.stack(model.generate(ids, **GENERATE).logits) for model in (eager, ours)]
    apart = float((found[1.0][0] - found[None][0]).abs().max())
    assert float((found[1.0][1] - found[1.0][0]).abs().max()) < 0.05 * apart


@torch.inference_mode()
def test_decode_reads_codes_and_makes_nothing_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = use(double(), "int4"), tokens(1, 9)
    dense: list[int] = []
    numbers = static_kv._numbers

    def counted(stored: Stored, count: int, dtype: torch.dtype) -> torch.Tensor:
        dense.append(count)
        return numbers(stored, count, dtype)

    monkeypatch.setattr(static_kv, "_numbers", counted)
    model.generate(ids, **GENERATE)
    assert dense == [9] * 8  # keys and values of four layers, for the prompt alone


@torch.inference_mode()
def test_the_cache_is_kept_between_calls_and_tells_what_it_holds() -> None:
    model, ids = use(double(), "int8"), tokens(2, 12)
    first = model.generate(ids, **GENERATE)
    cache = first.past_key_values
    assert torch.equal(model.generate(ids, **GENERATE).sequences, first.sequences)
    again = model.generate(tokens(2, 12, seed=5), **GENERATE)
    assert again.past_key_values is cache and not torch.equal(again.sequences, first.sequences)
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in layer.packed_tensors())
    assert held == 4 * 2 * 2 * 2 * 128 * (64 + 2)  # layers, keys and values, batch, heads, room, a head and its scale
    assert model.generate(ids[:1], **GENERATE).past_key_values is not cache


@torch.inference_mode()
def test_beams_and_leaving() -> None:
    ids, more = tokens(2, 12), {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    wanted = attach(double(), "int8").generate(ids, **more)
    model = use(double(), "int8")
    assert torch.equal(model.generate(ids, **more), wanted)
    assert model.config._attn_implementation == static_kv.NAME
    leave(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(ids, **more), double().generate(ids, **more))


def test_what_does_not_fit_is_refused() -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes)
    assert not fits(config) and fits(LlamaConfig(**sizes | {"hidden_size": 128}))
    with pytest.raises(ModelError, match="heads of 24; expected 16, 32, 64, 128, 256"):
        StaticKVCache(config, "int8", 8)
    with pytest.raises(LlmopsError, match='"int3"'):
        StaticKVCache(LlamaConfig(**sizes | {"hidden_size": 128}), "int3", 8)
    with pytest.raises(ModelError, match="mask of torch.float32"):
        attention(torch.nn.Module(), torch.zeros(1, 1, 1, 16), None, None, torch.zeros(1, 1, 1, 4))
