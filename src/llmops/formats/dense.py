"""Dense weights in the type the model is stored in; packed ones are multiplied out, (q - z) s, and rounded once."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llmops.formats.source import Source, Written, activations_note, unpacked, write_folder
from llmops.models.plain import plain_logits

__all__ = ["read", "write"]


def write(source: Source, folder: Path) -> Written:
    state = dict(source.rest())
    for name, parts in source.packed():
        weight = unpacked(parts, source.schemes[name], name)
        state[f"{name}.weight"] = weight.dequantize().to(source.dtype)
    write_folder(source, folder, state, None)
    kind = str(source.dtype).removeprefix("torch.")
    notes = [f"packed weights multiplied out and rounded to {kind}"] if source.schemes else []
    return Written([*notes, *activations_note(source)], exact=not source.rounds_activations)


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    return "transformers", plain_logits(folder, ids)
