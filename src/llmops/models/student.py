"""Students that are no variants: fresh ones of a teacher's architecture, and the vocabulary that two models share.

Two models can be compared token by token when an id means the same token to both. Rows that pad a vocabulary to a round
number (Qwen2.5 has 151,936 of them in its small models and 152,064 in its large ones, for one tokenizer) belong to no
token: they are cut off after the ids were found to agree. Models with different tokenizers are refused; their
distributions are over different things.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from llmops.errors import ModelError, nearest
from llmops.models.arch import PER_LAYER, resize_depth, text_config

__all__ = ["agreed_vocabulary", "fresh_student", "vocabulary_rows"]


def fresh_student(teacher: Any, changes: Mapping[str, Any], *, seed: int) -> Any:
    """A model of the teacher's architecture with `changes` in its config, its weights drawn from `seed`, in float32.

    Raises ModelError for a key that the config does not have, another vocabulary, and sizes that do not fit together.
    """
    config = deepcopy(teacher.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            _change(config.get_text_config(decoder=True), changes)
            config.validate()
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, RuntimeError, TypeError, AssertionError, ZeroDivisionError, KeyError,
                StrictDataclassError) as error:
            raise ModelError(f"student.config {dict(changes)}: no {type(teacher).__name__} can be made so "
                             f"({' '.join(str(error).split())}); expected values that it takes and sizes that fit "
                             "together: change them") from error
    model.generation_config = deepcopy(teacher.generation_config)
    return model.eval()


def _change(config: Any, changes: Mapping[str, Any]) -> None:
    known = config.to_dict()
    for key, value in changes.items():
        if key in ("model_type", "architectures"):
            raise ModelError(f"student.config changes {key}; expected the teacher's own architecture: change sizes, or "
                             "name a model")
        if key not in known:
            raise ModelError(f'student.config names "{key}", which the config of {config.model_type} does not have; '
                             f"expected one of its keys, as num_hidden_layers or hidden_size{nearest(key, known)}")
        if key == "vocab_size" and value != config.vocab_size:
            raise ModelError(f"student.config changes vocab_size from {config.vocab_size:,} to {value:,}; expected the "
                             "teacher's: its distribution is over its own tokens")
        if key == "num_hidden_layers":
            _deepen(config, int(value))
        else:
            setattr(config, key, value)
    heads, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if keys and heads % keys:
        raise ModelError(f"student.config leaves {heads} attention heads for {keys} key-value heads; expected a "
                         "multiple: change num_attention_heads or num_key_value_heads")


def _deepen(config: Any, layers: int) -> None:
    """Set the number of layers; entries per layer go on in their pattern where there are more of them."""
    if layers < 1:
        raise ModelError(f"student.config asks for {layers} layers; expected at least 1")
    depth = int(config.num_hidden_layers)
    if layers <= depth:
        resize_depth(config, layers)
        return
    for key in PER_LAYER:
        entries = getattr(config, key, None)
        if isinstance(entries, list | tuple) and len(entries) == depth:
            setattr(config, key, [entries[place % depth] for place in range(layers)])
    config.num_hidden_layers = layers


def vocabulary_rows(model: Any) -> int:
    """Rows of the output matrix, padding included."""
    return int(text_config(model).vocab_size)


def agreed_vocabulary(ours: Any, theirs: Any, name: str) -> int:
    """How many ids the tokenizer `ours` uses, when each is the same token to `theirs`, the tokenizer of `name`.

    Raises ModelError with the reason when it is not.
    """
    mine, other = ours.get_vocab(), theirs.get_vocab()
    wrong = [(token, place) for token, place in mine.items() if other.get(token) != place]
    if wrong:
        token, place = min(wrong, key=lambda pair: pair[1])
        at = {place: token for token, place in other.items()}.get(place)
        said = f'is "{at}"' if at is not None else "is no token"
        raise ModelError(f'{name} has another tokenizer: token {place} is "{token}" to the teacher and {said} to it, '
                         f"and {len(wrong):,} of {len(mine):,} tokens differ; distributions over different tokens "
                         "cannot be compared. Expected a model of the same family; or let the teacher write data "
                         "(`synthesize`), which any model can be trained on")
    return max(int(place) for place in mine.values()) + 1
