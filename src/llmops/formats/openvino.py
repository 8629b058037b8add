"""OpenVINO's intermediate representation, by OpenVINO's own converter.

Token ids of any batch and length in, logits out; weights in float16, which OpenVINO computes with as its device likes.
Left out: a cache of keys and values (a step of generation reads the whole text again), and packed weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from llmops.formats.graph import opened
from llmops.formats.source import Source, Written, activations_note, write_beside

__all__ = ["read", "write"]

FILE = "openvino_model.xml"


def write(source: Source, folder: Path) -> Written:
    """openvino_model.xml and openvino_model.bin."""
    import openvino

    model, ids = opened(source)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
        program = torch.export.export(model, (ids.repeat(2, 1),),
                                      dynamic_shapes={"input_ids": {0: batch, 1: length}})
        graph = openvino.convert_model(program)
        openvino.save_model(graph, folder / FILE, compress_to_fp16=True)
    write_beside(source, folder)
    return Written(["weights in float16" + (", packed ones multiplied out" if source.schemes else ""),
                    *activations_note(source)], exact=not source.rounds_activations)


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    import openvino

    model = openvino.Core().compile_model(folder / FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return "openvino", torch.from_numpy(model([ids.numpy()])[0]).float()
