"""The quantized cache inside real architectures: what attention sees, what is held, and what is refused."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.twins import NAMES, tokens, twin
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from llmops.errors import LlmopsError, ModelError
from llmops.measure.memory import kv_bytes_per_token
from llmops.methods.quantize.kv import round_kv
from llmops.methods.quantize.options import KV_DTYPES, KV_RECORD
from llmops.models.kv_cache import KVCache, QuantizedLayer, attach, attached, detach, unrounded
from llmops.models.load import load

HEADS, D, LAYERS = 2, 64, 4  # of the llama twin: key-value heads, numbers a head, layers
BYTES = {"int8": D + 2, "fp8": D + 2, "int4": D // 2 + 4}  # of one key


def double(name: str = "llama") -> Any:
    """A twin in float64: sums in another order then end on the same float32, and so on the same codes."""
    return twin(name, torch.float64)[0]


@torch.inference_mode()
def stepwise(model: Any, ids: Tensor, prompt: int, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of all tokens, those after the prompt computed one by one; and the cache."""
    out = model(ids[:, :prompt], past_key_values=cache, use_cache=True)
    found, cache = [out.logits], out.past_key_values
    for place in range(prompt, ids.shape[1]):
        out = model(ids[:, place:place + 1], past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1), cache


@torch.inference_mode()
def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    found: Tensor = model(ids, use_cache=False, **more).logits
    return found


@pytest.mark.parametrize("dtype", KV_DTYPES)
@torch.no_grad()
def test_attention_is_that_over_rounded_keys_and_values_written_out(dtype: str) -> None:
    model = attach(double(), dtype)
    seen: dict[str, Any] = {}
    module = model.model.layers[0].self_attn
    handle = module.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, out=out[0]),
                                          with_kwargs=True)
    model(tokens(2, 12), use_cache=False)
    handle.remove()
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]

    def heads(layer: Any, turned: bool) -> Tensor:
        split = layer(x).view(2, 12, -1, D).transpose(1, 2)
        if not turned:
            return split
        half = torch.cat([-split[..., D // 2:], split[..., :D // 2]], -1)
        return split * cos[:, None] + half * sin[:, None]

    q, k, v = heads(module.q_proj, True), heads(module.k_proj, True), heads(module.v_proj, False)
    k, v = round_kv(k, dtype), round_kv(v, dtype)
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for t in range(12):
            own = head * HEADS // q.shape[1]  # two query heads share a key-value head
            weights = (k[:, own, :t + 1] @ q[:, head, t, :, None])[..., 0].mul(D ** -0.5).softmax(-1)
            out[:, head, t] = (weights[..., None] * v[:, own, :t + 1]).sum(1)
    wanted = module.o_proj(out.transpose(1, 2).reshape(2, 12, -1))
    assert torch.allclose(seen["out"], wanted, atol=1e-10)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_writing_token_by_token_gives_what_scoring_the_whole_gives(name: str, dtype: str) -> None:
    model, ids = attach(double(name), dtype), tokens(2, 44)  # longer than the windows of 32 of mistral and gemma
    whole = logits(model, ids)
    steps, cache = stepwise(model, ids, prompt=7)
    assert torch.allclose(steps, whole, atol=1e-8)
    assert all(type(layer) is QuantizedLayer for layer in cache.layers) and len(cache.layers) == LAYERS
    assert float((whole - logits(detach(model), ids)).abs().max()) > 1e-3  # it was rounded


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@torch.inference_mode()
def test_generate_writes_what_recomputing_everything_writes(name: str) -> None:
    model, ids = attach(double(name), "int4"), tokens(2, 30)
    written = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    for _ in range(10):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)
    plain = detach(model).generate(tokens(2, 30), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert not torch.equal(written, plain)


@torch.inference_mode()
def test_beams_choose_as_they_do_over_a_dense_cache_of_rounded_keys() -> None:
    model, ids = attach(double(), "int4"), tokens(2, 12)
    found = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    detach(model)
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(lambda _, args, kwargs: (args, {
            **kwargs, "past_key_values": _RoundedDense(kwargs["past_key_values"])}), with_kwargs=True)
    wanted = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)


class _RoundedDense:
    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Any:
        return self.cache.update(round_kv(keys, "int4"), round_kv(values, "int4"), *more, **named)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, ids = attach(double(name), "int4"), tokens(1, 40)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:, :35]], 1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    both = torch.cat([ids, padded])
    alone = logits(model, ids[:, :35])
    assert torch.allclose(logits(model, both, attention_mask=mask, position_ids=positions)[1, 5:], alone[0], atol=1e-8)
    with torch.inference_mode():
        out = model(both[:, :30], attention_mask=mask[:, :30], position_ids=positions[:, :30], use_cache=True)
        for place in range(30, 40):
            out = model(both[:, place:place + 1], attention_mask=mask[:, :place + 1],
                        position_ids=positions[:, place:place + 1], past_key_values=out.past_key_values)
    assert torch.allclose(out.logits[1, -1], alone[0, -1], atol=1e-8)


@torch.inference_mode()
def test_the_loss_is_small_in_8_bits_and_larger_in_4() -> None:
    model, ids = twin("qwen3", torch.float32)[0], tokens(4, 48)
    exact = logits(model, ids).log_softmax(-1)
    lost = {}
    for dtype in KV_DTYPES:
        found = logits(attach(model, dtype), ids).log_softmax(-1)
        lost[dtype] = float((exact.exp() * (exact - found)).sum(-1).mean())
    assert 0 < lost["int8"] < 1e-3 and lost["int8"] < lost["fp8"] < lost["int4"] < 0.05, lost


# ---- what is held


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_bytes_held_are_codes_and_scales(dtype: str) -> None:
    model = attach(twin("llama")[0], dtype)
    _, cache = stepwise(model, tokens(3, 24), prompt=20)
    held = [part for layer in cache.layers for part in layer.packed_tensors()]
    assert sum(part.untyped_storage().nbytes() for part in held) == 2 * LAYERS * 3 * HEADS * 24 * BYTES[dtype]
    dense = kv_bytes_per_token(detach(model)).value
    found = kv_bytes_per_token(attach(model, dtype))
    assert dense == 2 * LAYERS * HEADS * D * 2 and found.provenance == "measured"
    assert found.value == 2 * LAYERS * HEADS * BYTES[dtype] and found.value / dense < {"int4": 0.29}.get(dtype, 0.52)


@torch.inference_mode()
def test_no_dense_copy_outlives_the_call_that_it_was_made_for() -> None:
    model = attach(twin("llama")[0], "int8")
    made: list[weakref.ref[Tensor]] = []
    original = QuantizedLayer.update

    def noted(self: QuantizedLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        dense = original(self, *args, **kwargs)
        made.extend(map(weakref.ref, dense))
        return dense

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedLayer, "update", noted)
        _, cache = stepwise(model, tokens(2, 9), prompt=8)
    assert len(made) == 2 * 2 * LAYERS and all(ref() is None for ref in made)
    kept = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    assert not kept


@pytest.mark.parametrize(("prompt", "length"), [(44, 44), (10, 44), (10, 20)])
def test_a_window_holds_no_more_than_it_needs(prompt: int, length: int) -> None:
    model = attach(twin("mistral")[0], "int8")
    _, cache = stepwise(model, tokens(1, length), prompt)
    layer = cache.layers[0]
    assert layer.is_sliding and layer.get_seq_length() == length and layer.get_max_length() == 32
    held = sum(part.untyped_storage().nbytes() for part in layer.packed_tensors())
    assert held == 2 * HEADS * min(length, 31) * BYTES["int8"]


def dense(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


CHANGES: dict[str, Callable[[Any], None]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0, 2])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "crop": lambda cache: cache.crop(-3)}


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_and_tokens_move_as_in_a_dense_cache(change: str, name: str) -> None:
    config = twin(name)[0].config
    ours, theirs = KVCache(config, "int4"), DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    for cache in (ours, theirs):
        cache.activate_past_recording()
    for count in (30, 6, 1):
        for index in range(LAYERS):
            k, v = (torch.randn(3, HEADS, count, D, generator=generator) for _ in range(2))
            mine = ours.update(k, v, index)
            other = theirs.update(round_kv(k, "int4"), round_kv(v, "int4"), index)
            assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
    CHANGES[change](ours)
    CHANGES[change](theirs)
    for mine, other in zip(dense(ours), dense(theirs), strict=True):
        assert torch.equal(mine, other)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length()
        assert layer.get_mask_sizes(4) == other.get_mask_sizes(4)
    ours.reset()
    assert ours.get_seq_length() == 0 and not any(layer.packed_tensors() for layer in ours.layers)


def test_what_left_the_window_cannot_be_taken_back() -> None:
    cache = KVCache(twin("mistral")[0].config, "int8")
    cache.update(*(torch.randn(1, HEADS, 40, D) for _ in range(2)), 0)
    with pytest.raises(LlmopsError, match="2 tokens are taken back .* expected activate_past_recording"):
        cache.layers[0].crop(-2)


# ---- on disk, and back


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_folder_loads_with_its_cache_and_goes_on_where_it_was(dtype: str, tmp_path: Path) -> None:
    model, tokenizer = twin("qwen2")
    ids = tokens(2, 30)
    attach(model, dtype).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path, dtype="stored", device="cpu")
    assert attached(again) == dtype
    assert json.loads((tmp_path / "config.json").read_text())[KV_RECORD]["dtype"] == dtype
    assert torch.equal(logits(again, ids), logits(model, ids))
    _, cache = stepwise(model, ids, prompt=20)
    _, other = stepwise(again, ids, prompt=20)
    with torch.inference_mode():  # the cache of the model in memory goes on in the reloaded one
        on = [each.generate(torch.cat([ids, ids[:, :1]], 1), past_key_values=held, max_new_tokens=8, do_sample=False,
                            eos_token_id=None) for each, held in ((model, other), (again, cache))]
    assert torch.equal(on[0], on[1])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()  # the record is nothing to transformers
    with unrounded(model):
        assert torch.equal(logits(plain, ids), logits(model, ids))
    assert attached(model) == dtype


@torch.inference_mode()
def test_attaching_is_undone_replaced_and_copied() -> None:
    model, ids = twin("llama", torch.float32)[0], tokens(2, 16)
    before = logits(model, ids)
    attach(model, "int4")
    four = logits(model, ids)
    assert torch.equal(logits(copy.deepcopy(model), ids), four)
    copied = detach(copy.deepcopy(model))
    assert torch.equal(logits(copied, ids), before) and torch.equal(logits(model, ids), four)
    assert torch.equal(logits(attach(attach(model, "int8"), "int4"), ids), four)
    assert torch.equal(logits(detach(model), ids), before) and not hasattr(model.config, KV_RECORD)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_training_through_the_rounding_has_the_gradient_of_what_follows_it() -> None:
    grads = []
    for use_cache in (False, True):
        model = attach(double(), "int4")
        model(tokens(2, 12), labels=tokens(2, 12), use_cache=use_cache).loss.backward()
        grads.append([block.self_attn.k_proj.weight.grad for block in model.model.layers])
    assert all(float(one.abs().max()) > 0 and torch.allclose(one, other) for one, other in zip(*grads, strict=True))


# ---- what is refused


def test_other_caches_are_refused_with_the_reason() -> None:
    model, ids = attach(twin("llama")[0], "int8"), tokens(1, 8)
    full = detach(twin("llama")[0])(ids, use_cache=True).past_key_values
    with pytest.raises(ModelError, match="a cache that holds 8 tokens in full precision; expected an empty one"):
        model(ids, past_key_values=full)
    with pytest.raises(ModelError, match="keeps a StaticLayer; .* static caches and linear attention cannot"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=16))
    with pytest.raises(ModelError, match="given a cache in int4; expected int8"):
        model(ids, past_key_values=KVCache(model.config, "int4"))
    with pytest.raises(LlmopsError, match='unknown type of keys and values "int2"'):
        attach(model, "int2")
    assert attached(model) == "int8"


def test_architectures_whose_cache_is_not_known_are_refused() -> None:
    model = twin("llama")[0]
    model.config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(ModelError, match="layer 1 keeps a LinearAttentionLayer"):
        attach(model, "int8")
    model = twin("llama")[0]
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ModelError, match="2 layers of llama borrow their keys from others"):
        attach(model, "int8")
    model = twin("llama")[0]
    attention = model.model.layers[2].self_attn
    attention.forward = lambda hidden_states, past_key_value=None: (hidden_states, None)
    with pytest.raises(ModelError, match="layer 2 of LlamaForCausalLM has 0 modules that take past_key_values"):
        attach(model, "int8")
    attention.forward = lambda hidden_states, past_key_values=None, **_: (hidden_states, None)
    with pytest.raises(ModelError, match="did not ask its cache for keys and values"):
        attach(model, "int8")(tokens(1, 4))
    assert attached(twin("llama")[0]) is None


def test_a_record_that_is_not_understood_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    model, tokenizer = twin("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), KV_RECORD: {"dtype": "int3"}}))
    with pytest.raises(ModelError, match=f"{KV_RECORD}: .*int3.*expected a dtype of int8, fp8, int4"):
        load(tmp_path)
