"""One contender of bench_prune.py, alive from cell to cell: `python _prune_worker.py CONTENDER CASE_JSON`.

As `_quantize_worker.py`, with which it shares the clock, the loader and the form of an answer; a cell is {"sparsity",
"pattern", "out", "case"}, and the answer is dense weights with zeros in them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from _quantize_case import Case
from _quantize_worker import CLOCK, load, own_job, tokens, write
from _runner.worker import Mouth, serve

Solve = Callable[[Any, Case, float, str], None]  # (model, case, sparsity, pattern): the model is pruned in place


def ours(step: dict[str, Any]) -> Solve:
    """The step as `llmops tune` takes it."""

    def solve(model: Any, case: Case, sparsity: float, pattern: str) -> None:
        from llmops.build import masking
        from llmops.build.variant import apply_step
        from llmops.methods.prune import options

        asked = {**step, "sparsity": sparsity, "pattern": pattern}
        if "data" in step:
            asked["length"] = case.length
        job, ready = own_job(model, case, "data" in step)
        masking.calibration = lambda *given: ready
        CLOCK.start()
        kind = getattr(options, step["method"].capitalize())
        apply_step("prune", job, kind.model_validate(asked))

    return solve


def llmcompressor(method: str) -> Solve:
    """`oneshot` with its own modifier, every option of which is left at its default."""

    def solve(model: Any, case: Case, sparsity: float, pattern: str) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
        from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

        modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
        structure = "0:0" if pattern == "unstructured" else pattern
        crops = tokens(case).tolist()
        data = Dataset.from_dict({"input_ids": crops, "attention_mask": [[1] * case.length] * len(crops)})
        CLOCK.start()
        oneshot(model=model, dataset=data, num_calibration_samples=len(crops), max_seq_length=case.length,
                recipe=[modifier(sparsity=sparsity, mask_structure=structure, ignore=["re:.*lm_head"])],
                shuffle_calibration_samples=False)

    return solve


SOLVERS: dict[str, Solve] = {
    "magnitude-llmops": ours({"method": "magnitude"}),
    "global-llmops": ours({"method": "magnitude", "scope": "global"}),
    "wanda-llmops": ours({"method": "wanda", "data": "calib"}),
    "wanda-llmcompressor": llmcompressor("wanda"),
    "owl-llmops": ours({"method": "wanda", "data": "calib", "ratios": "owl"}),
    "measured-llmops": ours({"method": "wanda", "data": "calib", "ratios": "sensitivity"}),
    "sparsegpt-llmops": ours({"method": "sparsegpt", "data": "calib"}),
    "sparsegpt-llmcompressor": llmcompressor("sparsegpt")}

IMPORTS: dict[str, tuple[str, ...]] = {
    "llmops": ("llmops.build.variant", "llmops.data.sources", "scipy"),
    "llmcompressor": ("llmcompressor", "llmcompressor.modifiers.pruning.wanda", "datasets")}


def main() -> None:
    contender, first = sys.argv[1], Case(**json.loads(sys.argv[2]))
    mouth = Mouth()
    import torch

    torch.set_num_threads(first.threads)

    def answer(cell: dict[str, Any]) -> dict[str, Any]:
        case = replace(first, **cell.get("case", {}))
        model = load(case)
        CLOCK.start()
        SOLVERS[contender](model, case, cell["sparsity"], cell["pattern"])
        found = CLOCK.stop()
        if cell["out"]:
            write(dict(model.named_parameters()), Path(cell["out"]))
        return found

    serve(mouth, ("transformers", "safetensors.torch", *IMPORTS[contender.partition("-")[2]]), answer)


if __name__ == "__main__":
    main()
