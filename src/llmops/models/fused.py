"""Kernels in the place of what a decoder block computes in many small steps: `fuse(model)`.

    RMSNorm      one kernel (torch's own) for the six that its formula takes in PyTorch
    attention    RoPE of queries and keys, quantization and the writing into the cache in one (`kv_rope_append`), where
                 the cache is a `StaticKVCache`; some twenty kernels less a layer
    codes        where the layers that read a norm are joined and take int8 or fp8 (`FormattedLinear.takes`), the norm
                 gives codes (`rms_norm_quantize`), and the MLP's middle does (`swiglu_quantize`): no activation is
                 written in 16 bits to be read and rounded again
    residual     both additions of a block in the same kernel as the norm that follows (`add_rms_norm`, with codes
                 `add_rms_norm_quantize`): its second norm, and the first of the next block or the model's last

Codes travel in the place of the numbers, as a tensor of the same shape; their scales wait at the joined layer that
reads them (`Joined.given`). What a block returns is the whole sum, as before; the norm of it waits at the module that
would compute it (`Ready`), and is taken if that is asked for the norm of this very tensor: whoever reads what blocks
return (hidden states, hooks) sees no difference, and what takes its place is normed anew. 16-bit models only: others,
and what runs on no kernel, compute as before.

The results differ by rounding alone: what transformers rounds to 16 bits between two steps stays in float32 here. Which
classes compute the formulas is written down below, by name: a class that is not named is left as it is (Gemma's norm
multiplies by 1 + weight, Phi turns a part of a head).
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmops.models.formatted import FormattedLinear
from llmops.models.joined import Joined, Part
from llmops.models.static_kv import StaticQuantizedLayer, attention

__all__ = ["ATTENTION", "BLOCKS", "MLPS", "NORMS", "fuse"]

#: x / rms(x) * weight.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
#: q, k, v, norms of q and k where there are any, RoPE over whole heads, attention, o.
ATTENTION = ("LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "Qwen3Attention")
#: down(act(gate(x)) * up(x)).
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
#: h = x + attention(norm(x)); h + mlp(norm(h)), each norm read by these alone.
BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

HALVES = (torch.float16, torch.bfloat16)
WIDEST = 32768  # columns of a norm that is one program


def fuse(model: nn.Module) -> int:
    """Change the modules that are known, in place; returns how many. Twice is once."""
    changed = 0
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS and not isinstance(module.forward, partial):
            module.forward = partial(_norm, module)
        elif name in ATTENTION and not isinstance(module.forward, partial):
            module.forward = partial(_attend, module, module.forward)
        elif name not in NORMS:
            continue
        changed += 1
    if find_spec("llmops_kernels") is not None:
        for module in model.modules():
            if isinstance(layers := getattr(module, "layers", None), nn.ModuleList) and len(layers):
                for block, following in reversed(list(zip(layers, [*layers[1:], module], strict=True))):
                    if _known(block) and not isinstance(block.forward, partial):
                        _fuse_block(block, _first_norm(following))
    return changed


class Ready:
    """The norm of a sum, computed with the sum; `module` would compute it next, `reader` reads it where it is codes."""

    def __init__(self, module: Any, reader: Joined | None) -> None:
        self.module, self.reader = module, reader
        self.held: tuple[Tensor, Tensor, Tensor | None] | None = None

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x + residual; its norm is ready. x, residual: (..., width), of a type that the kernels take."""
        total, y, scale = _add_norm(self.module, self.reader, x, residual)
        self.held = total, y, scale
        return total

    def take(self, x: Tensor) -> Tensor | None:
        """The norm of x, or its codes whose scale now waits at the reader; None where it was not computed."""
        if self.held is None or self.held[0] is not x:
            return None
        _, y, scale = self.held
        self.held = None
        if self.reader is not None:
            assert scale is not None
            self.reader.given = scale, x.dtype
        return y


def _first_norm(following: Any) -> Ready | None:
    """Of the block that follows (fused already), or of the model after its last one; None where it is not known."""
    block = _known(following)
    norm: Any = following.input_layernorm if block else getattr(following, "norm", None)
    if type(norm).__name__ not in NORMS or norm.weight.shape[0] > WIDEST:
        return None
    ready = Ready(norm, _reader(following.self_attn.q_proj, following.self_attn.v_proj) if block else None)
    norm.forward = partial(_norm_ready, ready, norm.forward)
    return ready


def _known(block: Any) -> bool:
    """Whether all of a block is what is written down above, its norms one program wide."""
    return type(block).__name__ in BLOCKS and all(type(module).__name__ in names for module, names in (
        (block.input_layernorm, NORMS), (block.post_attention_layernorm, NORMS), (block.self_attn, ATTENTION),
        (block.mlp, MLPS))) and block.input_layernorm.weight.shape[0] <= WIDEST


def _fuse_block(block: Any, after: Ready | None) -> None:
    """Norms that give codes, the residual additions in the norms after them, codes in the middle of the MLP."""
    if (reader := _reader(block.self_attn.q_proj, block.self_attn.v_proj)) is not None:
        block.input_layernorm.forward = partial(_norm_codes, block.input_layernorm, reader)
    block.forward = partial(_block, block, _reader(block.mlp.gate_proj, block.mlp.up_proj), after, block.forward)
    down = block.mlp.down_proj
    silu = type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    if silu and isinstance(down, FormattedLinear) and down.takes:
        block.mlp.forward = partial(_gated, block.mlp, block.mlp.forward)


def _reader(first: nn.Module, last: nn.Module) -> Joined | None:
    """The joined layer behind both, where it takes codes."""
    if not isinstance(first, Part) or not isinstance(last, Part) or first.whole is not last.whole:
        return None
    linear = first.whole.linear
    return first.whole if isinstance(linear, FormattedLinear) and linear.takes is not None else None


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, (hidden_states.shape[-1],), module.weight, module.variance_epsilon)


def _norm_codes(module: Any, reader: Joined, hidden_states: Tensor) -> Tensor:
    """Codes for `reader`, in the shape of what they stand for."""
    if not _fit(hidden_states, module):
        return _norm(module, hidden_states)
    from llmops_kernels.rms_norm import rms_norm_quantize

    dtype, group = reader.linear.takes
    codes, scale = rms_norm_quantize(_rows(hidden_states), module.weight, module.variance_epsilon, dtype,
                                     group_size=group)
    reader.given = scale, hidden_states.dtype
    return codes.view(hidden_states.shape)


def _fit(x: Tensor, norm: Any) -> bool:
    return x.dtype in HALVES and norm.weight.dtype in (x.dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _block(module: Any, reader: Joined | None, after: Ready | None, otherwise: Any, hidden_states: Tensor,
           **kwargs: Any) -> Tensor:
    norm = module.post_attention_layernorm
    if not _fit(hidden_states, norm):
        plain: Tensor = otherwise(hidden_states, **kwargs)
        return plain
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
    h, y, scale = _add_norm(norm, reader, attended, hidden_states)
    if reader is not None:
        reader.given = scale, hidden_states.dtype
    made: Tensor = module.mlp(y)
    return h + made if after is None or not _fit(h, after.module) else after.add(made, h)


def _add_norm(norm: Any, reader: Joined | None, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x + residual, its norm or codes for `reader`, their scale), the first two in the shape of x."""
    from llmops_kernels.rms_norm import add_rms_norm, add_rms_norm_quantize

    scale: Tensor | None = None
    if reader is None:
        y, h = add_rms_norm(_rows(x), _rows(residual), norm.weight, norm.variance_epsilon)
    else:
        dtype, group = reader.linear.takes
        y, scale, h = add_rms_norm_quantize(_rows(x), _rows(residual), norm.weight, norm.variance_epsilon, dtype,
                                            group_size=group)
    return h.view(x.shape), y.view(x.shape), scale


def _norm_ready(ready: Ready, otherwise: Any, hidden_states: Tensor) -> Tensor:
    found = ready.take(hidden_states)
    if found is None:
        found = otherwise(hidden_states)
    return found


def _gated(module: Any, otherwise: Any, x: Tensor) -> Tensor:
    """down(silu(gate) * up), the product as codes."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype not in HALVES:
        made: Tensor = module.down_proj(module.act_fn(gate) * up)
        return made
    from llmops_kernels.swiglu_quantize import swiglu_quantize

    dtype, group = module.down_proj.takes
    codes, scale = swiglu_quantize(_rows(gate), _rows(up), dtype, group_size=group)
    y: Tensor = module.down_proj.on_codes(codes.view(*gate.shape), scale, gate.dtype)
    return y


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
