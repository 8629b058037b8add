"""Who can run a model here: one file a runtime, each an `open` that returns an `Opened`.

All are asked for the same: a prefill over a prompt of given token ids, and whole requests of exactly so many new
tokens, greedy, no stop token. A runtime is imported when it is named and at no other time; one that is not installed is
refused before anything is loaded, with what to install.

    llmops          `llmops.load`: the compressed weights in our own layers and kernels
    transformers    plain `AutoModelForCausalLM.from_pretrained`, as a stranger would load the folder
    onnxruntime     a folder with model.onnx, with a cache of keys and values where the graph has one
    openvino        a folder with openvino_model.xml, stateful or not
    llamacpp        a GGUF file, by llama-cpp-python
    vllm            a folder or hub id, by vLLM's offline engine
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from llmops.errors import LlmopsError, unknown
from llmops.measure.workload import Timing

__all__ = ["RUNTIMES", "Opened", "Running", "Wanted", "check", "opened", "version_of"]


class _Home(NamedTuple):
    module: str  # of this folder
    needs: str  # what must be importable
    install: str


RUNTIMES = {
    "llmops": _Home("own", "torch", "llmops"),
    "transformers": _Home("plain", "transformers", "transformers"),
    "onnxruntime": _Home("onnx", "onnxruntime", "onnxruntime"),
    "openvino": _Home("vino", "openvino", "openvino"),
    "llamacpp": _Home("llama", "llama_cpp", "llama-cpp-python"),
    "vllm": _Home("vllm_engine", "vllm", "vllm")}


class Running(Protocol):
    """A model in a runtime. prompt: (batch, length) token ids, int64, on the CPU."""

    def prefill(self, prompt: Tensor) -> Any: ...

    def sync(self) -> None: ...

    def request(self, prompt: Tensor, new_tokens: int) -> Timing:
        """Exactly new_tokens a sequence. `steps_s` may be empty: the runtime does not time single tokens."""


@dataclass
class Opened:
    """A running model, and what has to be known of it.

    pieces: text of every token id, to tell whether two models count the same tokens; None where it cannot be read.
    special: ids that no prompt holds. context: most tokens of prompt and answer, None: not told. batches: the largest
    batch, None: any. weights_bytes: None where the runtime does not tell. notes: what a reader must know.
    """

    running: Running
    device: str
    pieces: list[str] | None
    special: set[int]
    context: int | None = None
    batches: int | None = None
    weights_bytes: int | None = None
    notes: tuple[str, ...] = ()


class Wanted(NamedTuple):
    """How an arm is to be opened; room: the most tokens of prompt and answer that will be asked for."""

    model: str
    device: str
    threads: int
    room: int
    kernel: str = "auto"


def check(name: str) -> None:
    """Raises LlmopsError when there is no such runtime, or it is not installed."""
    if name not in RUNTIMES:
        raise LlmopsError(unknown("runtime", name, RUNTIMES))
    if find_spec(RUNTIMES[name].needs) is None:
        raise LlmopsError(f"runtime {name}: the package {RUNTIMES[name].needs} is not installed; install it with "
                          f"`pip install {RUNTIMES[name].install}`, or leave its models out")


def opened(name: str, wanted: Wanted) -> Opened:
    """The model in the runtime. Raises LlmopsError (ModelError) when it cannot be opened."""
    check(name)
    found: Opened = import_module(f"{__name__}.{RUNTIMES[name].module}").open(wanted)
    return found


def version_of(name: str) -> str:
    try:
        return version(RUNTIMES[name].install)
    except PackageNotFoundError:
        return "unknown"
