"""What a notebook calls: load a variant, or take one step on a model that is already in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from llmops.build import Job, apply_step
from llmops.build.job import MASKING
from llmops.data.options import DataSource
from llmops.data.sources import Rows, rows_from
from llmops.errors import LlmopsError, StepError, unknown
from llmops.models.load import load as load_model
from llmops.models.load import merged
from llmops.models.parity import sparsity
from llmops.models.quantized import pack
from llmops.models.zeros import lost_zeros, zero_bits
from llmops.recipe.schema import STEPS

__all__ = ["apply", "load"]

PRUNED = "llmops_zeros"  # of a model in memory: the zeros to keep, None for all there are
SPARSE = 0.05  # share of zeros from which on a model that came from elsewhere counts as pruned


def load(folder: str | Path, *, dtype: str = "auto", device: str = "auto", kernel: str = "auto",
         fast: bool | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a variant's folder, a hub id or builtin:tiny, ready to generate.

    Packed weights stay packed: an int4 folder takes int4 memory. kernel: "auto", "torch", "reference", "triton", or
    "ops", what the kernels are checked against. fast: layers that read one input run as one, the cache is static and
    decode is recorded as a CUDA graph (`models/serving.py`); by default on a GPU. Such a model generates; to train,
    save or change it, load it with fast=False. Raises ModelError when there is no such model.
    """
    model, tokenizer = load_model(folder, dtype=dtype, device=device, kernel=kernel)
    record = Path(folder) / "llmops.json"
    if record.is_file() and set(json.loads(record.read_text(encoding="utf-8")).get("chain", [])) & set(MASKING):
        setattr(model, PRUNED, None)  # zeros to keep: those there are, found when they are asked for
    if fast or (fast is None and model.device.type == "cuda"):
        from llmops.models.serving import as_served, serve

        as_served(model, kernel) if fast is None else serve(model)
    return model, tokenizer


def apply(model: Any, tokenizer: Any, step: Mapping[str, Mapping[str, Any]],
          data: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]] = (), *, teacher: Any = None,
          seed: int = 0) -> Any:
    """Take one step of a recipe on a model in memory, without recipe and store; returns the model.

    step: as in a recipe, `{"prune": {"method": "wanda", "sparsity": 0.5, "data": "calib"}}`. data: the rows that the
    step's `data:` names, or a mapping from name to rows (`messages`, `prompt` + `completion`, or `text`). teacher: a
    model, for distillation. The given model is changed in place (and quantized layers replaced by packed ones); give
    a deep copy to keep it. Zeros of a pruned model stay zero, also once it is quantized. Raises LlmopsError when the
    step is wrong, StepError when it breaks, or cannot keep them.
    """
    kind, options = _parsed(step)
    if any(type(module).__name__ == "Joined" for module in model.modules()):
        raise LlmopsError("given a model whose layers are joined to generate fast; expected the layers of its "
                          "checkpoint: load it with llmops.load(..., fast=False)")
    named = dict(data) if isinstance(data, Mapping) else {getattr(options, "data", None) or "data": data}

    def rows(name: str) -> Rows:
        if name not in named:
            raise LlmopsError(f'the step reads data "{name}"; give its rows as data={{"{name}": [...]}}')
        return rows_from(name, [dict(row) for row in named[name]])

    job = Job(merged(model), tokenizer, model.dtype, [], rows, lambda _: DataSource(source="memory"),
              seed, lambda _: teacher, zeros=_zeros_of(model))
    if kind == "distill" and teacher is None:
        raise LlmopsError("distillation needs a teacher; give a model as teacher=")
    storage = model.dtype
    work = apply_step(kind, job, options)
    held = work.expected.zeros
    if f"{kind}:{options.method}" in MASKING:
        held = zero_bits(work.model)
    made = pack(work.model, work.packed).eval() if work.packed else work.model.to(storage).eval()
    if held:
        lost, total, first = lost_zeros(made, held)
        if lost:
            raise StepError(f"{kind} {options.method} filled {lost:,} of the {total:,} zeros of a pruned model, "
                            f"{first} first; expected all of them to stay: take another method, or prune after it")
        setattr(made, PRUNED, held)
    return made


def _parsed(step: Mapping[str, Mapping[str, Any]]) -> tuple[str, Any]:
    if len(step) != 1:
        raise LlmopsError(f"a step is a mapping with one key, one of {', '.join(STEPS)}; given {list(step)}")
    ((kind, options),) = step.items()
    if kind not in STEPS:
        raise LlmopsError(unknown("step", kind, STEPS))
    method = options.get("method", "")
    if method not in STEPS[kind]:
        raise LlmopsError(unknown(f"{kind} method", str(method), STEPS[kind]))
    try:
        return kind, STEPS[kind][method].model_validate(options)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise LlmopsError(f"{kind} {method}: " + "; ".join(lines)) from error


def _zeros_of(model: Any) -> dict[str, Tensor] | None:
    """The zeros that a step has to keep: those that an earlier one left, or of a model that is sparse already."""
    known: Any = getattr(model, PRUNED, False)
    if known:
        return dict(known)
    zeros, total = sparsity(model)
    return zero_bits(model) if known is None or (total and zeros / total > SPARSE) else None
