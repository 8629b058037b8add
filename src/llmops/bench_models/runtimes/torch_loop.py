"""A torch model behind the interface: `measure.workload.Runner`, with prompts moved to its device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops.measure.workload import Runner, Timing

__all__ = ["TorchRunning"]


class TorchRunning:
    """See `runtimes.Running`. room: the most tokens of prompt and answer."""

    def __init__(self, model: Any, room: int) -> None:
        model.eval()
        self.runner = Runner(model, room)
        self.device = self.runner.device

    def prefill(self, prompt: Tensor) -> Any:
        with torch.inference_mode():
            return self.runner.prefill(prompt.to(self.device))[0]

    def sync(self) -> None:
        self.runner.sync()

    def request(self, prompt: Tensor, new_tokens: int) -> Timing:
        with torch.inference_mode():
            return self.runner.request(prompt.to(self.device), new_tokens)
