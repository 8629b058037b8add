"""llmops itself: packed weights in our layers, by the loop that `llmops tune` measures with."""

from __future__ import annotations

from typing import Any

import torch

from llmops.bench_models.runtimes import Opened, Wanted
from llmops.bench_models.runtimes.torch_loop import TorchRunning
from llmops.measure import memory
from llmops.models.load import hush, load

__all__ = ["in_torch", "open"]


def open(wanted: Wanted) -> Opened:  # noqa: A001  # each runtime's file has one
    hush()
    torch.set_num_threads(wanted.threads)
    model, tokenizer = load(wanted.model, device=wanted.device, kernel=wanted.kernel)
    return in_torch(model, tokenizer, wanted)


def in_torch(model: Any, tokenizer: Any, wanted: Wanted) -> Opened:
    """What a torch model tells of itself."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    size = int(model.get_input_embeddings().weight.shape[0])
    running = TorchRunning(model, wanted.room)
    kernels = sorted({str(module.kernel) for module in model.modules() if hasattr(module, "packed_tensors")
                      and hasattr(module, "kernel")})
    return Opened(running, str(running.device), tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer))))),
                  {int(one) for one in tokenizer.all_special_ids},
                  getattr(config, "max_position_embeddings", None), None, _bytes(model),
                  (f"computes in {str(model.dtype).removeprefix('torch.')}",
                   *([f"kernels {', '.join(kernels)}"] if kernels else [])))


def _bytes(model: Any) -> int | None:
    found = memory.weights_bytes(model).value
    return None if found is None else int(found)
