"""ONNX: the variant as a graph, by torch's own exporter (torch.export, then onnxscript's translation of every op).

Token ids of any batch and length in, logits out. Weights are dense float32: ONNX has no op that every runtime knows for
weights in groups of 2 to 4 bits, and a CPU computes in float32 anyway. Left out: a cache of keys and values, so this is
for scoring and for runtimes that bring their own; a step of generation reads the whole text again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llmops.formats.graph import opened
from llmops.formats.source import Source, Written, activations_note, write_beside

__all__ = ["read", "write"]

FILE = "model.onnx"


def write(source: Source, folder: Path) -> Written:
    """model.onnx, its weights in model.onnx.data beside it."""
    model, ids = opened(source)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of torch and onnxscript about each other
        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
        program = torch.onnx.export(model, (ids.repeat(2, 1),), dynamo=True, verbose=False, input_names=["input_ids"],
                                    output_names=["logits"], dynamic_shapes={"input_ids": {0: batch, 1: length}})
        program.save(folder / FILE, external_data=True)
    write_beside(source, folder)
    return Written(["weights in float32" + (", packed ones multiplied out" if source.schemes else ""),
                    *activations_note(source)], exact=not source.rounds_activations)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter logs about packages that it could use and are not there."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
    return "onnxruntime", torch.from_numpy(logits).float()
