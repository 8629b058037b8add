"""Is what a foreign reader computes from an export what the variant computes?

Both run in float32 on a CPU on the same seeded token ids. A format that rounds nothing must agree to rounding; one that
does says how far it is, and nobody has to believe the format's name.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.errors import StepError
from llmops.formats.source import Source, Written
from llmops.formats.table import FORMATS
from llmops.models.kv_cache import attached, detach
from llmops.models.load import load
from llmops.models.parity import KL_MEAN_LIMIT, divergence
from llmops.quantity import Quantity

__all__ = ["held_against", "probe"]

ROWS, LENGTH = 4, 48
CACHE_NOTE = "keys and values in {} are not part of the format: set the like of it where it is served"


def probe(vocabulary: int, context: int, seed: int = 0) -> Tensor:
    """(rows, length) token ids, a seeded draw from the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (ROWS, min(LENGTH, context)), generator=generator)


def held_against(source: Source, folder: Path, name: str, written: Written) -> dict[str, Any]:
    """What the export in `folder` is: {"format", "reader", "max_logit_difference", "kl_mean", "bytes", "notes"}.

    Raises StepError when it was written without rounding and still reads back as something else.
    """
    model, tokenizer = load(source.folder, dtype="float32", device="cpu", kernel="reference")
    kept = attached(model)
    detach(model)  # an export is the weights; what its reader keeps of keys and values is the reader's to choose
    window = getattr(model.config, "sliding_window", None) or LENGTH  # within it, having none is the same
    ids = probe(min(len(tokenizer), model.config.vocab_size), min(window, model.config.max_position_embeddings))
    with torch.no_grad():
        ours = model(input_ids=ids).logits.float()
    del model
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):  # readers draw bars and talk
        reader, theirs = FORMATS[name].read(folder, ids, source)
    theirs = theirs[..., :ours.shape[-1]]
    difference = float((ours - theirs).abs().max())
    mean, _ = divergence(*(logits.flatten(0, 1).log_softmax(-1) for logits in (ours, theirs)))
    if written.exact and not mean <= KL_MEAN_LIMIT:
        raise StepError(f"{name}: read back by {reader}, it is not what was exported: KL(variant || export) is "
                        f"{mean:.2e} nats a token, expected at most {KL_MEAN_LIMIT}; nothing was kept. Another format "
                        "may hold the model: dense does")
    how = f"{reader}, {ids.numel()} seeded tokens, both in float32"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"format": name, "reader": reader,
            "max_logit_difference": Quantity.measured(difference, "logits", how, n=ids.numel()).as_dict(),
            "kl_mean": Quantity.measured(mean, "nats", f"KL(variant || export): {how}", n=ids.numel()).as_dict(),
            "bytes": Quantity.measured(size, "B", "sum over the files of the folder").as_dict(),
            "exact": written.exact,
            "notes": [*written.notes, *([] if kept is None else [CACHE_NOTE.format(kept)])]}
