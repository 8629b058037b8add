"""llama.cpp through llama-cpp-python: a GGUF file, one sequence at a time (its Python interface decodes no batch)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from llmops.bench_models.runtimes import Opened, Wanted
from llmops.errors import ModelError
from llmops.measure.workload import Timing

__all__ = ["open"]


def open(wanted: Wanted) -> Opened:  # noqa: A001
    import llama_cpp

    file = _file(wanted.model)
    try:
        model = llama_cpp.Llama(str(file), n_ctx=wanted.room, n_batch=wanted.room, n_threads=wanted.threads,
                                n_threads_batch=wanted.threads, verbose=False,
                                n_gpu_layers=-1 if wanted.device.startswith("cuda") else 0)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{file}: llama.cpp cannot open it ({error})") from error
    pieces = [_text(model, number) for number in range(model.n_vocab())]
    special = {number for number in (model.token_bos(), model.token_eos()) if number >= 0}
    trained = int(model.metadata.get(f"{model.metadata.get('general.architecture')}.context_length", 0)) or None
    return Opened(_Running(model), wanted.device if wanted.device.startswith("cuda") else "cpu", pieces, special,
                  trained, 1, file.stat().st_size, ("one sequence at a time",))


def _file(model: str) -> Path:
    given = Path(model).expanduser()
    files = sorted(given.glob("*.gguf")) if given.is_dir() else [given]
    if len(files) != 1 or not files[0].is_file():
        told = ", ".join(path.name for path in files) or "none"
        raise ModelError(f"{model}: runtime llamacpp needs one GGUF file; there is {told}: write one with `llmops "
                         "export --to gguf`, or give the file itself")
    return files[0]


def _text(model: Any, number: int) -> str:
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model._model.model)
    return bytes(llama_cpp.llama_vocab_get_text(vocabulary, number) or b"").decode("utf-8", errors="replace")


class _Running:
    """See `runtimes.Running`. Greedy by `sample(temp=0)`, without a penalty."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def sync(self) -> None:
        """A call returns when it is done."""

    def prefill(self, prompt: Tensor) -> int:
        self.model.reset()
        self.model.eval(prompt[0].tolist())
        return int(self.model.sample(temp=0.0, repeat_penalty=1.0))

    def request(self, prompt: Tensor, new_tokens: int) -> Timing:
        began = time.perf_counter()
        token = self.prefill(prompt)
        marks = [time.perf_counter()]
        for _ in range(new_tokens - 1):
            self.model.eval([token])
            token = int(self.model.sample(temp=0.0, repeat_penalty=1.0))
            marks.append(time.perf_counter())
        return Timing(marks[0] - began, marks[-1] - marks[0],
                      [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)])
