"""Kernels in the place of what a decoder block computes in many small steps: `fuse(model)`.

    RMSNorm      one kernel (torch's own) for the six that its formula takes in PyTorch
    attention    RoPE of queries and keys, quantization and the writing into the cache in one (`kv_rope_append`), where
                 the cache is a `StaticKVCache`; some twenty kernels less a layer

The results differ by rounding alone: what transformers rounds to 16 bits between two steps stays in float32 here. Which
classes compute the formulas is written down below, by name: a class that is not named is left as it is (Gemma's norm
multiplies by 1 + weight, Phi turns a part of a head).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from llmops.models.static_kv import StaticQuantizedLayer, attention

__all__ = ["ATTENTION", "NORMS", "fuse"]

#: x / rms(x) * weight.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
#: q, k, v, norms of q and k where there are any, RoPE over whole heads, attention, o.
ATTENTION = ("LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "Qwen3Attention")


def fuse(model: nn.Module) -> int:
    """Change the modules that are known, in place; returns how many. Twice is once."""
    changed = 0
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS:
            module.forward = partial(_norm, module)
        elif name in ATTENTION and not isinstance(module.forward, partial):
            module.forward = partial(_attend, module, module.forward)
        else:
            continue
        changed += 1
    return changed


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, (hidden_states.shape[-1],), module.weight, module.variance_epsilon)


def _attend(module: Any, otherwise: Any, hidden_states: Tensor, position_embeddings: Any = None,
            attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
    layers = getattr(past_key_values, "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if not isinstance(layer, StaticQuantizedLayer) or position_embeddings[0].shape[-1] != module.head_dim:
        found: tuple[Tensor, None] = otherwise(hidden_states, position_embeddings=position_embeddings,
                                               attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
        return found
    shape = hidden_states.shape[:-1]
    query, key, value = (projection(hidden_states).view(*shape, -1, module.head_dim)
                         for projection in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    turned, keys, values = layer.update_turned(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                                               *position_embeddings)
    y, _ = attention(module, turned, keys, values, attention_mask, scaling=module.scaling, **kwargs)
    return module.o_proj(y.reshape(*shape, -1)), None
