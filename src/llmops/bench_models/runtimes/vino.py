"""OpenVINO on the CPU. Stateful models (as optimum-intel writes them: `beam_idx` among the inputs) keep their cache
inside; those that take token ids alone (as `llmops export --to openvino` writes them) read the whole text at every
step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmops.bench_models.runtimes import Opened, Wanted
from llmops.bench_models.runtimes.graph_loop import GraphRunning, attended, beside, file_in, positions
from llmops.errors import ModelError

__all__ = ["open"]


def open(wanted: Wanted) -> Opened:  # noqa: A001
    import openvino

    if wanted.device.startswith("cuda"):
        raise ModelError("runtime openvino is driven on the CPU here; give --device cpu")
    file = file_in(wanted.model, "openvino_model.xml", "openvino")
    settings = {"INFERENCE_NUM_THREADS": wanted.threads, "PERFORMANCE_HINT": "LATENCY"}
    try:
        compiled = openvino.Core().compile_model(file, "CPU", settings)
    except RuntimeError as error:
        raise ModelError(f"{file}: OpenVINO cannot open it ({error})") from error
    graph = _Graph(compiled)
    pieces, special, context, size = beside(file)
    note = "keys and values are cached" if graph.cached else "the graph has no cache: every step reads the whole text"
    precision = str(compiled.get_property("INFERENCE_PRECISION_HINT")).strip("<>").rpartition("Type: ")[2].strip("'")
    return Opened(GraphRunning(graph.forward, graph.reset, graph.cached), "cpu", pieces, special, context, None, size,
                  (note, f"computes in {precision}"))


class _Graph:
    """A compiled model and its request; the state lies in the request."""

    def __init__(self, compiled: Any) -> None:
        self.inputs = {name for port in compiled.inputs for name in port.get_names()}
        known = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
        if "input_ids" not in self.inputs and len(compiled.inputs) != 1:
            raise ModelError(f"the model takes {', '.join(sorted(self.inputs))}; expected {', '.join(sorted(known))}")
        self.single = len(compiled.inputs) == 1
        self.cached = "beam_idx" in self.inputs
        self.request = compiled.create_infer_request()

    def reset(self) -> None:
        if self.cached:
            self.request.reset_state()

    def forward(self, ids: Any, past: int) -> Any:
        if self.single:
            feed: Any = [ids]
        else:
            feed = {"input_ids": ids, "attention_mask": attended(ids, past), "position_ids": positions(ids, past),
                    "beam_idx": np.arange(len(ids), dtype=np.int32)}
            feed = {name: value for name, value in feed.items() if name in self.inputs}
        return self.request.infer(feed)[0][:, -1]
