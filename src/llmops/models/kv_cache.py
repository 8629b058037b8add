"""The quantized cache of keys and values: `attach(model, "int8")`, and everything the model computes goes through it.

    QuantizedLayer   what one decoder layer remembers: codes and scales, never a dense copy between two steps
    KVCache          such a layer for every layer of a model; for who passes a cache of his own
    attach           makes a model use them without being asked: in `generate`, in plain calls, with and without a cache
    restore          the same for a model whose config.json says so (RECORD); what `load` calls

How. Every attention hands its new keys and values to the `past_key_values` that it is given and attends to what comes
back. A hook before each attention sees to it that this is a `QuantizedLayer`: an empty layer of a dynamic cache,
whoever made it, is replaced by one before its first use; where there is no cache (teacher-forced scoring) one stands in
that rounds and remembers nothing. So a key is always attended to as it is stored, by its own token too, and scoring a
text at once gives the logits that writing it token by token gives. The masks are made before and know nothing of it.

What attention gets is dense, a layer at a time and for the time of its call. A kernel that reads codes takes them from
`QuantizedLayer.append`, which is `update` without the last step.

A cache of fixed size that keeps codes itself (`static_kv.py`) passes as it is.

Refused, with the reason: other caches of fixed size, a cache that already holds dense keys, layers that keep a state
instead of keys (linear attention), layers that borrow their keys from others, and attention that takes its cache by
another name. Shapes: B batch, H key-value heads, T tokens, D numbers a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmops.errors import LlmopsError, ModelError, unknown
from llmops.methods.quantize.kv import QuantizedKV, dequantize_kv, quantize_kv, round_kv
from llmops.methods.quantize.options import KV_DTYPES, KV_RECORD
from llmops.models.arch import decoder_layers, text_config

__all__ = ["KVCache", "QuantizedLayer", "attach", "attached", "detach", "restore", "unrounded"]

_MARK = "_llmops_kv"  # attribute of the model: an _Attached


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed by mypy
    """The keys and values of one layer. window: how far a sliding-window layer looks back, None for full attention."""

    is_croppable = True

    def __init__(self, dtype: str, window: int | None = None) -> None:
        self.dtype, self.window = dtype, window
        self.is_sliding = window is not None
        self.is_initialized = False
        self.record_past = False
        self.seen = 0  # tokens, those that fell out of the window included
        self.held: tuple[QuantizedKV, QuantizedKV] | None = None
        self.home: tuple[torch.device, torch.dtype] = torch.device("cpu"), torch.float32

    def append(self, keys: Tensor, values: Tensor) -> tuple[QuantizedKV, QuantizedKV]:
        """Remember the new keys and values (B, H, T, D each); returns all that this call's queries may attend to."""
        new = (quantize_kv(keys, self.dtype), quantize_kv(values, self.dtype))
        whole = new if self.held is None else (_joined(self.held[0], new[0]), _joined(self.held[1], new[1]))
        self.home, self.is_initialized = (keys.device, keys.dtype), True
        self.seen += keys.shape[-2]
        kept = None if self.window is None or self.record_past else self.window - 1
        self.held = whole if kept is None else (_last(whole[0], kept), _last(whole[1], kept))
        return whole

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`append`, and what it returns made dense in the type of the new keys and values."""
        keys, values = self.append(key_states, value_states)
        return _dense(keys, key_states), _dense(values, value_states)

    def packed_tensors(self) -> list[Tensor]:
        """Everything that is held."""
        return [tensor for part in self.held or () for tensor in part.tensors]

    @property
    def keys(self) -> Tensor | None:
        """(B, H, T, D), made when asked for."""
        return None if self.held is None else dequantize_kv(self.held[0], self.home[1])

    @property
    def values(self) -> Tensor | None:
        return None if self.held is None else dequantize_kv(self.held[1], self.home[1])

    # What a transformers cache layer has to answer, as its dense counterparts do.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.append(key_states[..., :0, :], value_states[..., :0, :])

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many keys the next call attends to, the position of the first)."""
        held = self.seen if self.window is None else min(self.seen, self.window - 1)
        return held + query_length, self.seen - held

    def activate_past_recording(self) -> None:
        """Keep what falls out of the window until the next `crop`, which may want it back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; a positive number is the length to be left with, as it used to be.

        Raises LlmopsError when what would come back into the window is gone.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if self.window is not None and self.seen >= self.window and not self.record_past and removed:
            raise LlmopsError(f"{removed} tokens are taken back from a layer that has forgotten what lay more than "
                              f"{self.window - 1} tokens before; expected activate_past_recording() before the first")
        self.seen -= min(removed, self.seen)
        self._each(lambda part: part[..., : max(part.shape[-2] - removed, 0), :])
        if self.window is not None:
            window = self.window
            self._each(lambda part: part[..., max(part.shape[-2] - window + 1, 0):, :].contiguous())

    def reset(self) -> None:
        self.held, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda part: part[indices, ...])

    def offload(self) -> None:
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda part: part.to(self.home[0], non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.held is not None:
            self.held = (self.held[0].each(change), self.held[1].each(change))


class KVCache(DynamicCache):  # type: ignore[misc]
    """A cache for a model of this config. Raises ModelError when some of its layers keep something else than keys."""

    def __init__(self, config: Any, dtype: str) -> None:
        config = config.get_text_config(decoder=True)
        if getattr(config, "num_kv_shared_layers", 0):
            raise ModelError(f"{config.num_kv_shared_layers} layers of {config.model_type} borrow their keys from "
                             "others (num_kv_shared_layers); expected layers with keys of their own, which can be "
                             "quantized: leave kv_cache out")
        super().__init__(config=config)
        for index in range(len(self.layers)):
            _adopt(self, index, dtype)


def _dense(kv: QuantizedKV, new: Tensor) -> Tensor:
    """(B, H, all T, D). Where gradients are taken they pass to `new`, the last tokens, as `round_kv` lets them."""
    dense, first = dequantize_kv(kv, new.dtype), kv.codes.shape[-2] - new.shape[-2]
    if not (new.requires_grad and torch.is_grad_enabled()):
        return dense
    return torch.cat([dense[..., :first, :], new + (dense[..., first:, :] - new).detach()], dim=-2)


def _joined(old: QuantizedKV, new: QuantizedKV) -> QuantizedKV:
    return old.each(lambda before, after: torch.cat([before, after], dim=-2), new)


def _last(kv: QuantizedKV, tokens: int) -> QuantizedKV:
    """The last so many tokens, without a view that would keep the others alive."""
    surplus = kv.codes.shape[-2] - tokens
    return kv if surplus <= 0 else kv.each(lambda part: part[..., surplus:, :].clone())


# ---- a model that uses it


@dataclass(frozen=True)
class _Attached:
    dtype: str
    handles: list[Any]


class _Rounding:
    """Stands for a cache where there is none: what goes in comes back as it would be stored, and is forgotten."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.used = dtype, False

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.used = True
        return round_kv(keys, self.dtype), round_kv(values, self.dtype)


def attach(model: Any, dtype: str) -> Any:
    """Make `model` keep and see its keys and values in int8, fp8 or int4, and say so in its config; returns the model.

    Raises ModelError when its cache cannot be quantized, LlmopsError for another dtype.
    """
    if dtype not in KV_DTYPES:
        raise LlmopsError(unknown("type of keys and values", dtype, KV_DTYPES))
    _check_config(model, dtype)
    attentions = list(_attentions(model))
    detach(model)
    handles = []
    for module in attentions:
        handles.append(module.register_forward_pre_hook(partial(_before, dtype), with_kwargs=True))
        handles.append(module.register_forward_hook(_after, with_kwargs=True))
    setattr(model, _MARK, _Attached(dtype, handles))
    setattr(model.config, KV_RECORD, {"dtype": dtype, "scales": "one for each token and head"})
    return model


def attached(model: Any) -> str | None:
    """The type that a model keeps its keys and values in, None for its own."""
    found = getattr(model, _MARK, None)
    return None if found is None else cast(_Attached, found).dtype


def detach(model: Any) -> Any:
    """Undo `attach`, in the config too; returns the model."""
    found = getattr(model, _MARK, None)
    if found is not None:
        for handle in found.handles:
            handle.remove()
        delattr(model, _MARK)
    if hasattr(model.config, KV_RECORD):
        delattr(model.config, KV_RECORD)
    return model


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """Within, a model that is attached computes with its keys and values as they are; another is left alone."""
    dtype = attached(model)
    detach(model)
    try:
        yield
    finally:
        if dtype is not None:
            attach(model, dtype)


def restore(model: Any) -> Any:
    """`attach` as the model's config says; returns the model. Raises ModelError for a record that is not understood."""
    record = getattr(model.config, KV_RECORD, None)
    if record is None or attached(model):
        return model
    dtype = record.get("dtype") if isinstance(record, Mapping) else record
    if dtype not in KV_DTYPES:
        raise ModelError(f"the model's config.json has {KV_RECORD}: {record!r}; expected a dtype of "
                         f"{', '.join(KV_DTYPES)}: was it made by a newer llmops? Without the key the cache is 16-bit")
    return attach(model, str(dtype))


def _check_config(model: Any, dtype: str) -> None:
    config = text_config(model)
    KVCache(config, dtype)
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if dtype == "int4" and heads % 2:
        raise ModelError(f"{type(model).__name__} has heads of {heads} numbers, which do not fill bytes of two; "
                         "expected an even head_dim for int4: take int8 or fp8")


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    """The attention of every decoder layer."""
    _, blocks = decoder_layers(model)
    for index, block in enumerate(blocks):
        found = [module for name, module in block.named_modules() if name and
                 "past_key_values" in inspect.signature(module.forward).parameters]
        if len(found) != 1 or not isinstance(getattr(found[0], "layer_idx", None), int):
            raise ModelError(f"layer {index} of {type(model).__name__} has {len(found)} modules that take "
                             "past_key_values; expected one attention with a layer_idx: the cache of this architecture "
                             "is not known, leave kv_cache out")
        yield found[0]


def _before(dtype: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    cache = kwargs.get("past_key_values")
    if cache is None:
        return args, {**kwargs, "past_key_values": _Rounding(dtype)}
    _adopt(cache, module.layer_idx, dtype)
    return args, kwargs


def _after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Raises ModelError when the attention did not take its keys from where it was told to."""
    cache = kwargs["past_key_values"]
    if not (cache.used if isinstance(cache, _Rounding) else cache.layers[module.layer_idx].is_initialized):
        raise ModelError(f"{type(module).__name__} did not ask its cache for keys and values; the cache of this "
                         "architecture is not known, leave kv_cache out")


def _adopt(cache: Any, index: int, dtype: str) -> None:
    """Put a `QuantizedLayer` in the place of layer `index` of a dynamic cache, unless there is one."""
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        raise ModelError(f"given a {type(cache).__name__} for keys and values; expected a DynamicCache or KVCache: "
                         f"this model keeps them in {dtype}")
    while cache.layer_class_to_replicate is not None and len(layers) <= index:
        layers.append(cache.layer_class_to_replicate())
    layer = layers[index] if index < len(layers) else None
    kept = getattr(layer, "dtype", None)
    if isinstance(kept, str):  # a QuantizedLayer, or one of a StaticKVCache
        if kept != dtype:
            raise ModelError(f"given a cache in {kept}; expected {dtype}, as this model keeps it")
        return
    if layer is None or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ModelError(f"layer {index} keeps a {type(layer).__name__}; expected keys and values that grow by the "
                         f"token (DynamicLayer, DynamicSlidingWindowLayer), which can be kept in {dtype}: static "
                         "caches and linear attention cannot, leave cache_implementation or kv_cache out")
    if layer.get_seq_length():
        raise ModelError(f"given a cache that holds {layer.get_seq_length()} tokens in full precision; expected an "
                         f"empty one, or one that this model filled: it keeps keys and values in {dtype}")
    made = QuantizedLayer(dtype, getattr(layer, "sliding_window", None))
    made.record_past = getattr(layer, "record_past", False)
    layers[index] = made
