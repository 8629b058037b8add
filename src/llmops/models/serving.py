"""A model made ready to generate fast: layers joined, steps fused, a cache that stays, decode as one CUDA graph.

    serve(model)      all of it, in place
    as_served(model)  the same where it will serve, on a GPU: what `llmops.load` gives and what a run scores
    StepGraph         one step of decode, recorded once and replayed

A step of decode on a GPU is some hundred small kernels, and starting them from Python takes longer than they run. A
CUDA graph starts them all at once. It demands that nothing moves: inputs are copied into tensors of its own, and the
cache is static (`static_kv.StaticKVCache` where the model keeps keys and values in few bits, else transformers'
StaticCache). `generate` is not replaced: it asks the model for a compiled forward where its cache allows one, and gets
the graph.

On a CPU there are no graphs: the same steps run through the same buffers, call by call (`capture=False`), which is what
the tests compare with. What depends on a GPU is `_record` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from llmops.models import static_kv
from llmops.models.arch import text_config
from llmops.models.fused import fuse
from llmops.models.joined import join
from llmops.models.kv_cache import attached
from llmops.models.sparse24 import run_as_pruned

__all__ = ["Serving", "StepGraph", "as_served", "serve", "serving"]

_MARK = "_llmops_serving"  # attribute of the model: a Serving


class StepGraph:
    """forward(**inputs), recorded for the shapes of its first call and replayed for the same ones.

    Tensors among the inputs are copied into buffers that stay; everything else (the cache) must be the object it was.
    The tensors of the result are the graph's own: they are copied before they are handed out.
    """

    def __init__(self, forward: Callable[..., Any], capture: bool) -> None:
        self.forward, self.capture = forward, capture
        self.key: tuple[Any, ...] | None = None
        self.buffers: list[Any] = []
        self.graph: Any = None
        self.result: Any = None
        self.recorded = 0  # how often a graph was made

    def __call__(self, **inputs: Any) -> Any:
        leaves, shape = tree.tree_flatten(inputs)
        key = (shape, *(_kind(leaf) for leaf in leaves))
        if key != self.key:
            self.key, self.graph, self.result = key, None, None
            with torch.inference_mode(False):  # they are kept, and written to in whatever mode comes next
                self.buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for buffer, leaf in zip(self.buffers, leaves, strict=True):
            if isinstance(leaf, Tensor):
                buffer.copy_(leaf)
        held = tree.tree_unflatten(self.buffers, shape)
        if not self.capture:
            return self.forward(**held)
        if self.graph is None:
            self.graph, self.result = _record(self.forward, held)
            self.recorded += 1
        self.graph.replay()
        return tree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.result)


def _kind(leaf: Any) -> Any:
    """What has to stay the same for a graph to hold."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, int | float | str | None) else id(leaf)


def _record(forward: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(graph, result): warmed up on a side stream, the cache put back to where it was before each run."""
    lengths = [layer.cumulative_length for layer in getattr(inputs.get("past_key_values"), "layers", ())]
    before = [length.clone() for length in lengths]

    def rewind() -> None:
        for length, value in zip(lengths, before, strict=True):
            length.copy_(value)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            forward(**inputs)
            rewind()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward(**inputs)
    rewind()
    return graph, result


class Serving:
    """What `serve` made of a model."""

    def __init__(self, model: Any, kv: str | None, step: StepGraph, layers: int) -> None:
        self.model, self.kv, self.step, self.joined = model, kv, step, layers
        self._held: tuple[int, Any] | None = None

    def describe(self) -> str:
        """What was done, for people."""
        return (f"{self.joined} layers joined, static cache, decode "
                + ("as one CUDA graph" if self.step.capture else "step by step"))

    def cache(self, batch: int, room: int) -> Any:
        """An empty static cache; the same one as long as it fits, so that a graph stays valid."""
        if self._held is None or self._held[0] != batch or self._held[1].get_max_length() < room:
            size, config = -(-room // 128) * 128, text_config(self.model)
            self._held = batch, (StaticCache(config, max_cache_len=size) if self.kv is None else
                                 static_kv.StaticKVCache(config, self.kv, size))
        self._held[1].reset()
        return self._held[1]


def as_served(model: Any, kernel: str = "auto") -> Any:
    """The model as it serves on the device it is on, changed in place; returns it.

    On a GPU 2:4 weights are packed and the model is served. Elsewhere it stays as it is, but for kernel "ops", which
    runs all of it on what the kernels are checked against. A model with an adapter apart stays as it is: it is trained.
    """
    if hasattr(model, "peft_config") or (model.device.type != "cuda" and kernel != "ops"):
        return model
    if kernel in ("auto", "triton", "ops"):
        run_as_pruned(model, everywhere=kernel == "ops")
    return serve(model)


def serve(model: Any, *, graph: bool | None = None) -> Any:
    """Make `model` ready to generate fast, in place; returns it. graph: record decode (default: on CUDA).

    A model whose layers or heads fit no static cache keeps the cache it has, and is only joined.
    """
    if serving(model) is not None:
        return model
    model.eval()
    layers, kv = join(model), attached(model)
    fuse(model)
    if not _static(model, kv):
        return model
    if kv is not None:
        static_kv.use(model, kv)
    else:
        model.generation_config.cache_implementation = "static"
    step = StepGraph(model.__call__, model.device.type == "cuda" if graph is None else graph)
    model.get_compiled_call = MethodType(lambda self, compile_config: step, model)
    setattr(model, _MARK, Serving(model, kv, step, layers))
    return model


def _static(model: Any, kv: str | None) -> bool:
    """Whether decode has the same shape at every step: no window that fills up, no state, no expert that is chosen."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return False
    if kv is not None:
        return static_kv.fits(model.config)
    return all(type(layer) is StaticLayer for layer in StaticCache(text_config(model), max_cache_len=1).layers)


def serving(model: Any) -> Serving | None:
    """What `serve` made, None for a model that was not served or has no static cache."""
    found: Serving | None = getattr(model, _MARK, None)
    return found

