"""A quantized cache of fixed size that a kernel reads as it is stored, and the attention that reads it.

    StaticKVCache   codes and scales of all layers in tensors that never move: a CUDA graph can be made of a step
    attention       what `transformers` calls for attention (AttentionInterface, "llmops_kv"): decode reads codes
                    (`torch.ops.llmops.kv_attention`), a prompt is attended to densely, as it is stored
    use, leave      make `generate` of a model take both, and undo it

Where `kv_cache.QuantizedLayer` grows by the token and hands attention a dense copy of a layer, here `update` writes
codes in place and hands over the codes (`Stored`); nothing dense is made of them at decode. What is computed is the
same: keys and values as they are stored, their own token's too, in the same formats (`methods/quantize/kv.py`).

`generate` makes the cache (its `cache_implementation` is "static"), hands it back between calls of the same size, and
makes the masks of left padding and sliding windows, which attention takes as they come: a window costs memory here, not
time. Refused: heads that are no power of two from 16 to 256, layers that keep something else than keys.

Shapes: B batch, H key-value heads, T new tokens, D numbers a head, N tokens there is room for.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llmops.errors import LlmopsError, ModelError, unknown
from llmops.methods.quantize.options import KV_DTYPES
from llmops.models.arch import text_config

__all__ = ["NAME", "StaticKVCache", "StaticQuantizedLayer", "Stored", "attention", "fits", "leave", "use"]

NAME = "llmops_kv"  # of the attention function in transformers
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
WIDTHS = (16, 32, 64, 128, 256)
ROWS = 64  # queries of a group and new tokens up to which codes are read; above it a prompt is made dense once


class Stored(NamedTuple):
    """Keys or values of a layer as attention gets them. codes: (B, H, N, D) or (B, H, N, D/2); scales: (B, H, N, 1 or
    2); length: (1,), how many tokens there are."""

    codes: Tensor
    scales: Tensor
    length: Tensor
    dtype: str


class StaticQuantizedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed by mypy
    """The keys and values of one layer: room for N tokens, allocated at the first."""

    is_compileable, is_sliding = True, False

    def __init__(self, dtype: str, room: int) -> None:
        super().__init__()
        self.dtype, self.room = dtype, room
        with torch.inference_mode(False):  # it is kept, and changed in whatever mode comes next
            self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self.parts: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # codes, scales of keys; of values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, H, _, D = key_states.shape
        width, numbers = (D // 2, 2) if self.dtype == "int4" else (D, 1)
        with torch.inference_mode(False):
            codes, scales = ([torch.zeros(B, H, self.room, size, dtype=kind, device=key_states.device)
                              for _ in range(2)]
                             for size, kind in ((width, CODES[self.dtype]), (numbers, torch.bfloat16)))
            self.parts = codes[0], scales[0], codes[1], scales[1]
            self.cumulative_length = self.cumulative_length.to(key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Stored, Stored]:
        """Write new keys and values (B, H, T, D); returns all that are held, by reference."""
        from llmops_kernels.kv_append import kv_append

        if self.parts is None:
            self.lazy_initialization(key_states, value_states)
        assert self.parts is not None
        kv_append(key_states, value_states, *self.parts, self.cumulative_length.view(1), self.dtype)
        return self._stored(key_states.shape[-2])

    def update_turned(self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
                      ) -> tuple[Tensor, Stored, Stored]:
        """`update` with RoPE first: (queries turned, keys, values). query (B, H G, T, D), cos, sin (B or 1, T, D)."""
        from llmops_kernels.kv_append import kv_rope_append

        if self.parts is None:
            self.lazy_initialization(key, value)
        assert self.parts is not None
        turned = kv_rope_append(query, key, value, cos, sin, *self.parts, self.cumulative_length.view(1), self.dtype)
        return turned, *self._stored(key.shape[-2])

    def _stored(self, new: int) -> tuple[Stored, Stored]:
        assert self.parts is not None
        length = self.cumulative_length.add_(new).view(1)
        return Stored(*self.parts[:2], length, self.dtype), Stored(*self.parts[2:], length, self.dtype)

    def packed_tensors(self) -> list[Tensor]:
        """Everything that is held."""
        return list(self.parts or ())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.room, 0

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.room

    def reset(self) -> None:
        """Forget all; what was written stays where it is and is not looked at."""
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for part in self.parts or ():
            raw = part.view(torch.int8) if part.dtype == torch.float8_e4m3fn else part
            raw.copy_(raw.index_select(0, beam_idx.to(part.device)))


class StaticKVCache(Cache):  # type: ignore[misc]
    """A cache of one model. Raises LlmopsError for another type, ModelError where its layers or heads do not fit."""

    def __init__(self, config: Any, dtype: str, room: int) -> None:
        if dtype not in KV_DTYPES:
            raise LlmopsError(unknown("type of keys and values", dtype, KV_DTYPES))
        config = config.get_text_config(decoder=True)
        if (reason := _unfit(config)) is not None:
            raise ModelError(f"{config.model_type} has {reason}; take kv_cache without a static cache")
        super().__init__(layers=[StaticQuantizedLayer(dtype, room) for _ in range(config.num_hidden_layers)])
        self.dtype, self.room = dtype, room


def fits(config: Any) -> bool:
    """Whether a model of this config can have the cache."""
    return _unfit(config.get_text_config(decoder=True)) is None


def _unfit(config: Any) -> str | None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width not in WIDTHS:
        return f"heads of {width}; expected {', '.join(map(str, WIDTHS))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"{config.num_kv_shared_layers} layers that borrow their keys from others; expected keys of their own"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"layers of {', '.join(sorted(kinds))}; expected full or sliding attention" if kinds else None


# ------------------------------------------------------------------------------------------------------- attention
def attention(module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:
    """(B, T, heads, D), as every attention function of transformers gives it.

    query: (B, heads, T, D); key, value: `Stored`, or dense where there is no cache; attention_mask: (B, 1, T, N) bool,
    None where a prompt is written into an empty cache, or one token sees all. Raises ModelError for a mask of numbers.
    """
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ModelError(f"attention got a mask of {attention_mask.dtype}; expected bool: positions cannot be weighted "
                         "over a quantized cache")
    scale, softcap = scaling or query.shape[-1] ** -0.5, kwargs.get("softcap") or 0.0
    if not isinstance(key, Stored):
        causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
        return _dense(query, key, value, attention_mask, scale, softcap, causal), None
    group = query.shape[1] // key.codes.shape[1]
    if query.shape[2] == 1 or (query.shape[2] * group <= ROWS and attention_mask is not None):
        from llmops_kernels.kv_attention import kv_attention

        return kv_attention(query, key.codes, key.scales, value.codes, value.scales, key.length, None, attention_mask,
                            scale=scale, softcap=softcap, format=key.dtype), None
    tokens = query.shape[2] if attention_mask is None else attention_mask.shape[-1]
    keys, values = (_numbers(stored, tokens, query.dtype) for stored in (key, value))
    return _dense(query, keys, values, attention_mask, scale, softcap, attention_mask is None), None


def _numbers(stored: Stored, tokens: int, dtype: torch.dtype) -> Tensor:
    from llmops_kernels.reference.kv_append import dequantize

    return dequantize(stored.codes[:, :, :tokens], stored.scales[:, :, :tokens], stored.dtype, dtype)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float,
           causal: bool) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if not softcap:
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, is_causal=causal,
                                           enable_gqa=group > 1)
        return y.transpose(1, 2).contiguous()
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = softcap * torch.tanh((query @ key.transpose(2, 3)).to(wide) * (scale / softcap))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    if mask is not None:  # a token of padding attends to nothing: 0, not NaN, which the next layer would hand on
        weights = torch.where(mask.any(-1, keepdim=True), weights, 0.0)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


# ------------------------------------------------------------------------------------------ a model that uses it
def use(model: Any, dtype: str) -> Any:
    """Make `generate` keep keys and values in `dtype` in a cache of fixed size; returns the model.

    A model that `kv_cache.attach` changed to the same type stays so: where there is no static cache (teacher-forced
    scoring, a dynamic cache), its keys and values are rounded as before. Raises as StaticKVCache.
    """
    from llmops.models.kv_cache import attached, detach

    StaticKVCache(text_config(model), dtype, 1)
    if attached(model) != dtype:
        detach(model)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if not hasattr(model, "_llmops_static"):
        model._llmops_static = (model.config._attn_implementation, model.generation_config.cache_implementation)
    model.set_attn_implementation(NAME)
    model.generation_config.cache_implementation = "static"
    model._llmops_cache = None

    def prepare(self: Any, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any,
                **kwargs: Any) -> StaticKVCache:
        held = self._llmops_cache
        if held is None or held[0] != batch_size or held[1].room < max_cache_len or held[1].dtype != dtype:
            room = -(-max_cache_len // 128) * 128  # whole tiles of keys: nothing has to be cut off
            held = self._llmops_cache = batch_size, StaticKVCache(self.config, dtype, room)
        cache: StaticKVCache = held[1]
        cache.reset()
        return cache

    model._prepare_static_cache = MethodType(prepare, model)
    return model


def leave(model: Any) -> Any:
    """Undo `use`; returns the model."""
    if hasattr(model, "_llmops_static"):
        implementation, cache = model._llmops_static
        model.set_attn_implementation(implementation)
        model.generation_config.cache_implementation = cache
        for name in ("_llmops_static", "_llmops_cache", "_prepare_static_cache"):
            delattr(model, name)
    return model
