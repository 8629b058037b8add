"""What a model's `config.json` tells without loading it: the dimensions of a Llama-like decoder.

Read for `builtin:tiny` and for local folders. A hub id is not looked up (planning must not touch the network); its
dimensions are unknown and every estimate and check that needs them says so or stays silent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops.methods.quantize.options import KV_RECORD
from llmops.models.builtin import BUILTIN
from llmops.recipe.schema import ModelSource

__all__ = ["DIVIDED", "LINEARS", "LLAMA_LIKE", "POST_NORMS", "Dims", "bytes_per_weight", "dims_from_config",
           "dims_of_file", "folder_of", "looks_like_hub_id", "read_dims"]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?\Z")
#: Families whose decoder layer holds exactly these linear layers.
LLAMA_LIKE = frozenset(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "granite", "olmo2",
                        "smollm3"))
#: Those whose layers have norms between a branch and the residual stream, past which no rotation can be folded.
POST_NORMS = frozenset(("gemma2", "gemma3_text", "olmo2"))
#: Families whose config transformers refuses unless the hidden size is a multiple of the number of heads.
DIVIDED = frozenset(("llama", "gemma2", "gemma3_text"))
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Config keys that say how many experts a layer has.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Dims:
    """Dimensions of a decoder, in the words of its config.json.

    integers: quantized to integers that are read packed, with nothing done to activations.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context: int | None
    dtype: str
    family: str
    quantized: bool
    bias: bool = False
    integers: bool = False
    caches: frozenset[str] = frozenset()  # what its layers remember, where the config says so
    keys: frozenset[str] = frozenset()  # of its config.json

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """name within a layer -> (out, in)."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [(query, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, query),
                  (self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate)]
        return dict(zip(LINEARS, shapes, strict=True))

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        return sum(out * into for out, into in self.linear_shapes().values())

    @property
    def other_parameters(self) -> int:
        """Norms and biases of one decoder layer. Two norms of `hidden`; a family with more of them has a few more."""
        biases = sum(self.linear_shapes()[name][0] for name in LINEARS[:3]) if self.bias else 0
        return 2 * self.hidden + biases

    @property
    def embedding_parameters(self) -> int:
        """Token embeddings, counted again for an output layer of its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def parameters(self, layers: int | None = None) -> int:
        """All parameters with `layers` decoder layers (default: all): embeddings, layers, final norm."""
        count = self.layers if layers is None else layers
        return self.embedding_parameters + count * (self.linear_parameters + self.other_parameters) + self.hidden


def looks_like_hub_id(text: str) -> bool:
    """`name` or `owner/name` in the letters the hub allows."""
    return bool(_HUB_ID.match(text)) and ".." not in text and "--" not in text


def folder_of(model: ModelSource, base_dir: Path) -> Path | None:
    """The folder behind a model source, or None for a hub id (and for a folder that is not there)."""
    if model.id in BUILTIN:
        return BUILTIN[model.id]
    if model.id.startswith("builtin:"):
        return None
    folder = base_dir / Path(model.id).expanduser()
    return folder if folder.is_dir() else None


def read_dims(model: ModelSource, base_dir: Path) -> tuple[Dims | None, str]:
    """(dimensions, "") or (None, why they are not known)."""
    folder = folder_of(model, base_dir)
    if folder is None:
        return None, f"{model.id} is not on this machine as a folder; planning does not ask the hub"
    return dims_of_file(folder / "config.json")


def dims_of_file(file: Path) -> tuple[Dims | None, str]:
    """(dimensions that a config.json tells, "") or (None, why they are not known)."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        if any(text.get(key) for key in EXPERTS):
            return None, f"{file.parent} is a mixture of experts, whose layers are not counted before it is loaded"
        return dims_from_config(config), ""
    except OSError:
        return None, f"{file.parent} has no config.json"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{file} does not describe a decoder with the usual names ({error!r})"


def dims_from_config(config: dict[str, Any]) -> Dims:
    """Raises KeyError when a dimension is missing."""
    whole, config = config, config.get("text_config", config)
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    dtype = str(config.get("dtype") or config.get("torch_dtype") or whole.get("dtype") or "bfloat16")
    family = str(config.get("model_type", ""))
    return Dims(
        hidden=hidden, intermediate=int(config["intermediate_size"]), layers=int(config["num_hidden_layers"]),
        heads=heads, kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads), vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", whole.get("tie_word_embeddings", family.startswith("gemma")))),
        context=int(config["max_position_embeddings"]) if config.get("max_position_embeddings") else None,
        dtype=dtype if dtype in _BYTES else "bfloat16", family=family,
        quantized="quantization_config" in whole or KV_RECORD in whole,
        bias=bool(config.get("attention_bias", family == "qwen2")),
        integers=_integers(whole.get("quantization_config")),
        caches=frozenset(map(str, config.get("layer_types") or ())) | ({"borrowed keys"} if config.get(
            "num_kv_shared_layers") else set()), keys=frozenset(config))


def _integers(block: Any) -> bool:
    """Whether a `quantization_config` is of integer weights alone, with activations left as they are."""
    if not isinstance(block, dict):
        return False
    packed = block.get("quant_method") == "compressed-tensors" and block.get("format") == "pack-quantized"
    return packed or block.get("quant_method") in ("gptq", "awq")


def bytes_per_weight(runtime_dtype: str, dims: Dims) -> int:
    """Bytes of a 16- or 32-bit weight as this recipe stores it."""
    return _BYTES[dims.dtype if runtime_dtype == "auto" else runtime_dtype]
