"""A two-layer stand-in for a model: its family, its tokenizer and its quirks, with random weights and little width.

What goes wrong in a pipeline (a template, a mask, a layout, a tied embedding, a key that a config loses) goes wrong on
two narrow layers as it does on eighty wide ones, and there it costs seconds. Kept from the original: the architecture
and everything in its config that is not a size, the ratio of query to key-value heads, tied or untied embeddings,
biases, the vocabulary, and the tokenizer with its chat template. Not kept: the weights, so no score means anything;
and of very many query heads on one key-value head, all but a few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmops.errors import ModelError
from llmops.models.arch import resize_depth
from llmops.models.load import load_tokenizer

__all__ = ["make_twin"]

WIDTH = 256  # hidden size that the twin does not exceed by more than one group of heads needs
STEP = 128  # every width is a multiple of this, so that group-wise methods apply


def make_twin(source: str | Path, folder: Path, *, layers: int = 2, revision: str | None = None,
              trust_remote_code: bool = False, seed: int = 0) -> dict[str, int]:
    """Write the twin of a model (its config and tokenizer are read, its weights are not) into `folder`.

    Returns its sizes: layers, hidden, parameters, vocabulary. Raises ModelError when the family cannot be made small.
    """
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    text = config.get_text_config(decoder=True)
    resize_depth(text, min(layers, text.num_hidden_layers))
    _narrow(text)
    torch.manual_seed(seed)
    stored = getattr(config, "dtype", None) or torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=stored, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise ModelError(f"{source}: no small twin of a {config.model_type} could be made ({error}); expected a "
                         "decoder whose config has hidden_size, num_attention_heads and intermediate_size") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"layers": text.num_hidden_layers, "hidden": text.hidden_size, "vocabulary": text.vocab_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters())}


def _narrow(config: Any) -> None:
    """Smaller sizes in place; a model that is narrow already stays as it is."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if config.hidden_size > WIDTH:
        ratio = min(heads // keys, max(2, WIDTH // size))
        fewer = ratio if keys == 1 else max(1, WIDTH // size // ratio) * ratio
        while fewer * size % STEP:
            fewer, ratio = fewer + ratio, ratio + (ratio if keys == 1 else 0)
        config.num_attention_heads = fewer
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = fewer // ratio
        config.hidden_size = fewer * size
    if getattr(config, "intermediate_size", None):
        config.intermediate_size = min(config.intermediate_size, 2 * config.hidden_size)
    if getattr(config, "moe_intermediate_size", None):
        config.moe_intermediate_size = min(config.moe_intermediate_size, STEP)
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, key, None):
            setattr(config, key, min(getattr(config, key), 4))
    if getattr(config, "num_experts_per_tok", None):
        config.num_experts_per_tok = min(config.num_experts_per_tok, 2)
