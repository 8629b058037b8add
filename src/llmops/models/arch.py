"""Per-architecture facts, as data: where a model keeps its decoder layers, and what must change when some are left out.

Nothing here branches on an architecture's name. The decoder layers are *the* list of modules as long as the config says
the model is deep; what a config stores per layer is listed in the tables below, by the key's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from llmops.errors import LlmopsError, ModelError, unknown

__all__ = ["DIVIDED", "FFN_KEYS", "PRODUCERS", "ROUTERS", "TIED", "TRANSPOSED", "WIDTHS", "decoder_layers",
           "is_ignored", "linear_layers", "renumber_layers", "resize_depth", "routers", "text_config"]

#: Config keys that hold one entry per layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "attn_layer_types", "no_rope_layers", "layers_block_type", "block_types")
#: Config keys that hold a number of layers from the front: "the first n layers are different".
FROM_FRONT = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
#: Config keys that hold a list of layer indices.
INDICES = ("mlp_only_layers", "full_attn_idxs", "global_attn_indexes", "attn_layer_indices")
#: Config keys that tie a layer to its place in a way that no subset can keep, with the values that mean "not used".
POSITIONAL: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (None, 0, 1), "num_kv_shared_layers": (None, 0),
                                          "cross_attention_layers": (None, [])}

#: A layer's name -> its sibling whose output features reach its input one by one (up to attention, and a gate that
#: multiplies): a factor taken from one can be given to the other.
PRODUCERS = {"down_proj": "up_proj", "o_proj": "v_proj"}

#: The end of a layer's name -> what runs along (out, in) of its weight, a bias running along out. H hidden features, F
#: FFN channels, Q query heads, K KV heads, A queries, keys and values one after the other, I the three of each head
#: side by side, V what no width is of. With A or I the heads together are as wide as the hidden features: no config key
#: says otherwise.
WIDTHS = {"q_proj": "QH", "k_proj": "KH", "v_proj": "KH", "o_proj": "HQ", "gate_proj": "FH", "up_proj": "FH",
          "down_proj": "HF", "embed_tokens": "VH", "lm_head": "VH", "gate": "VH", "shared_expert_gate": "VH",
          # GPT-2
          "wte": "VH", "wpe": "VH", "attn.c_attn": "AH", "attn.c_proj": "HQ", "mlp.c_fc": "FH", "mlp.c_proj": "HF",
          # GPT-NeoX
          "embed_in": "VH", "embed_out": "VH", "attention.query_key_value": "IH", "attention.dense": "HQ",
          "mlp.dense_h_to_4h": "FH", "mlp.dense_4h_to_h": "HF"}
#: Architectures, beside those with A or I, whose norm over all heads is made as wide as the hidden features.
TIED = ("olmoe",)
#: Architectures whose config transformers refuses unless the hidden size is a multiple of the number of heads, although
#: each head has a size of its own.
DIVIDED = ("llama", "gemma2", "gemma3_text")
#: Classes of layers whose weight is kept as (in, out).
TRANSPOSED = ("Conv1D",)
#: FFN channels of dense layers, of experts (E) and of a shared expert (S) -> the config key that counts them, the first
#: that is there.
FFN_KEYS = {"F": ("intermediate_size", "n_inner"), "E": ("moe_intermediate_size", "intermediate_size"),
            "S": ("shared_expert_intermediate_size",)}

#: Names of what chooses experts, or weighs a shared one, where it stands beside `experts`: always left in 16 bit.
ROUTERS = ("gate", "router", "shared_expert_gate")


def text_config(model: nn.Module) -> Any:
    """The config of the language model (the model's own, or the text part of a multimodal one)."""
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(dotted path, list) of the decoder layers: the module list with `config.num_hidden_layers` entries.

    Of several, the one nearest to the root wins. Raises ModelError when there is none.
    """
    depth = int(text_config(model).num_hidden_layers)
    root: nn.Module = model
    if hasattr(model, "get_decoder"):
        root = model.get_decoder()  # keeps a vision tower of the same depth out of the choice
    inside = {id(module) for module in root.modules()}
    found = [(path, module) for path, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == depth and id(module) in inside]
    if not found:
        raise ModelError(f"no list of {depth} decoder layers in {type(model).__name__}; expected one nn.ModuleList as "
                         f"long as num_hidden_layers inside what get_decoder() gives (models/arch.py, decoder_layers, "
                         "is where another place would have to be named)")
    return min(found, key=lambda item: item[0].count("."))


def linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name inside the block, layer) of every plain linear layer, in the order in which they were made."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def routers(model: nn.Module) -> list[str]:
    """Full names of the modules that choose experts or weigh a shared one."""
    return [f"{name}.{child}" if name else child for name, module in model.named_modules()
            if "experts" in module._modules for child in ROUTERS if module._modules.get(child) is not None]


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a layer's full name is one of `ignore`, or ends with one: `down_proj`, `layers.0.mlp.up_proj`."""
    return any(name == end or name.endswith("." + end) for end in ignore)


def check_ignore(names: Sequence[str], ignore: Sequence[str]) -> None:
    """Raises LlmopsError when an entry of `ignore` names no layer. `lm_head` may be missing: it is the default."""
    for end in ignore:
        if end != "lm_head" and not any(is_ignored(name, [end]) for name in names):
            raise LlmopsError(unknown("layer to ignore", end, sorted({name.rsplit(".", 1)[-1] for name in names})))


def renumber_layers(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """Leave only the decoder layers `keep` (ascending indices) in the model, in place, and make its config say so.

    Every `layer_idx` is set anew (the key-value cache is addressed by it), `num_hidden_layers` and whatever the
    config keeps per layer follow. The result saves and reloads as an ordinary model of its class. Returns the model.
    Raises LlmopsError when `keep` is empty, not ascending or out of range, or the architecture ties layers to places.
    """
    path, layers = decoder_layers(model)
    config = text_config(model)
    depth = len(layers)
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= depth:
        raise LlmopsError(f"layers to keep {list(keep)}; expected ascending indices within 0..{depth - 1}")
    _check_positional(config)
    _slice_config(config, keep, depth)
    kept = nn.ModuleList(layers[i] for i in keep)
    for place, block in enumerate(kept):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, kept)
    return model


def resize_depth(config: Any, layers: int) -> None:
    """Make a config say that only the first `layers` decoder layers are there, per-layer entries included."""
    _slice_config(config, list(range(layers)), int(config.num_hidden_layers))


def _check_positional(config: Any) -> None:
    for key, unused in POSITIONAL.items():
        value = getattr(config, key, None)
        if value not in unused:
            raise LlmopsError(f"{type(config).__name__} has {key}={value!r}, which ties layers to their places; "
                              f"expected an architecture whose layers can be left out one by one")


def _slice_config(config: Any, keep: Sequence[int], depth: int) -> None:
    for key in PER_LAYER:
        entries = getattr(config, key, None)
        if isinstance(entries, (list, tuple)) and len(entries) == depth:
            setattr(config, key, [entries[i] for i in keep])
    for key in FROM_FRONT:
        count = getattr(config, key, None)
        if isinstance(count, int):
            setattr(config, key, sum(1 for i in keep if i < count))
    for key in INDICES:
        indices = getattr(config, key, None)
        if isinstance(indices, (list, tuple)) and indices:
            setattr(config, key, [place for place, i in enumerate(keep) if i in indices])
    config.num_hidden_layers = len(keep)
