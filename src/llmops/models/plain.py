"""A folder as a stranger opens it: transformers alone, nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmops.errors import ModelError

__all__ = ["gguf_logits", "plain_logits", "plain_model", "state_logits"]

HALVES = (torch.bfloat16, torch.float16)


def plain_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, T, V) float32 logits of `ids` (B, T) from plain `AutoModelForCausalLM.from_pretrained(folder)`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, parameter in model.named_parameters():  # experts that were packed and their routers come as stored
        if (".experts." in name or name.endswith(".gate.weight")) and parameter.dtype in HALVES:
            parameter.data = parameter.data.to(dtype)
    return _logits(model, ids)


def gguf_logits(file: Path, ids: Tensor, described_in: Path | None = None) -> Tensor:
    """The same of a GGUF file. described_in: a folder whose config.json is used instead of the file's own metadata."""
    given = {} if described_in is None else {"config": _dense_config(described_in)}
    return _logits(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **given),
                   ids)


def state_logits(folder: Path, state: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The same of dense weights that another reader decoded, in the model that the folder's config.json describes.

    Raises ModelError when a weight is missing (a tied head apart) or left over.
    """
    model = AutoModelForCausalLM.from_config(_dense_config(folder), dtype=torch.float32)
    told = model.load_state_dict(dict(state), strict=False)
    model.tie_weights()
    head = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if set(told.missing_keys) - head or told.unexpected_keys:
        raise ModelError(f"{folder}: missing {told.missing_keys[:3]}, left over {told.unexpected_keys[:3]}; expected "
                         f"the tensors that {type(model).__name__} and its config describe")
    return _logits(model, ids)


def _dense_config(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits.float()


def plain_model(source: str | Path, device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) by `from_pretrained` and nothing else. Raises ModelError with what transformers said."""
    from llmops.models.load import hush, load_tokenizer, pick_device

    hush()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(pick_device(device))
        return model.eval(), load_tokenizer(source)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"{source}: transformers cannot load it ({error}); expected a folder or hub id of a causal "
                         "language model, and the packages that its format needs") from error
