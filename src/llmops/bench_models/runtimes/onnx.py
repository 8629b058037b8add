"""ONNX Runtime on the CPU. Graphs with `past_key_values.N.key` inputs (as optimum writes them) keep a cache; those that
take token ids alone (as `llmops export --to onnx` writes them) read the whole text at every step."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmops.bench_models.runtimes import Opened, Wanted
from llmops.bench_models.runtimes.graph_loop import GraphRunning, attended, beside, file_in, positions
from llmops.errors import ModelError

__all__ = ["open"]

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": np.float32}


def open(wanted: Wanted) -> Opened:  # noqa: A001
    import onnxruntime

    if wanted.device.startswith("cuda"):
        raise ModelError("runtime onnxruntime is driven on the CPU here; give --device cpu")
    file = file_in(wanted.model, "model.onnx", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = wanted.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it burns the other arm's cores
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common type
        raise ModelError(f"{file}: ONNX Runtime cannot open it ({error})") from error
    graph = _Graph(session)
    pieces, special, context, size = beside(file)
    note = "keys and values are cached" if graph.cached else "the graph has no cache: every step reads the whole text"
    return Opened(GraphRunning(graph.forward, graph.reset, graph.cached), "cpu", pieces, special, context, None, size,
                  (note,))


class _Graph:
    """A session and its cache, by the names of the graph."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {one.name: one for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        unknown = set(self.inputs) - {"input_ids", "attention_mask", "position_ids", "use_cache_branch", *self.past}
        if "input_ids" not in self.inputs or unknown:
            raise ModelError(f"the graph takes {', '.join(self.inputs)}; expected input_ids and, where it has them, "
                             "attention_mask, position_ids, use_cache_branch and past_key_values.N.key and .value")
        self.cached = bool(self.past)
        self.kept: dict[str, Any] = {}

    def reset(self) -> None:
        self.kept = {}

    def forward(self, ids: Any, past: int) -> Any:
        feed = {"input_ids": ids, "attention_mask": attended(ids, past), "position_ids": positions(ids, past),
                "use_cache_branch": np.array([past > 0])}
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        for name in self.past:
            feed[name] = self.kept[name] if past else self._empty(name, len(ids))
        found = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        self.kept = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        logits = found.get("logits", next(iter(found.values())))
        return logits[:, -1]

    def _empty(self, name: str, batch: int) -> Any:
        shape = [size if isinstance(size, int) else batch if place == 0 else 0
                 for place, size in enumerate(self.inputs[name].shape)]
        return np.zeros(shape, dtype=TYPES.get(self.inputs[name].type, np.float32))
