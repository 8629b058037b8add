"""One contender of bench_prune.py, alive from cell to cell: `python _prune_worker.py CONTENDER CASE_JSON`.

As `_quantize_worker.py`, with which it shares the clock, the loader and the form of an answer; a cell is {"sparsity",
"pattern", "out"}, and the answer is dense weights with zeros in them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from _quantize_case import Case
from _quantize_worker import CLOCK, load, tokenizer, tokens, write

Solve = Callable[[Any, Case, float, str], None]  # (model, case, sparsity, pattern): the model is pruned in place


def ours(step: dict[str, Any]) -> Solve:
    """The step as `llmops tune` takes it. Reading and tokenizing is on nobody's clock; that the tokens are those the
    others get is made sure of."""

    def solve(model: Any, case: Case, sparsity: float, pattern: str) -> None:
        import torch

        from llmops.build import masking
        from llmops.build.job import Job, calibration
        from llmops.build.variant import apply_step
        from llmops.data.options import DataSource
        from llmops.data.sources import load_rows
        from llmops.methods.prune import options

        asked: dict[str, Any] = {**step, "sparsity": sparsity, "pattern": pattern}
        source = DataSource(source=case.rows, samples=None)
        job = Job(model, tokenizer(case), model.dtype, [],
                  lambda name: load_rows(name, {name: source}, Path(case.rows).parent, case.seed),
                  lambda name: DataSource(source="memory", samples=case.samples), case.seed)
        ready = calibration(job, "calib", case.length) if "data" in step else None
        if ready is not None:
            asked["length"] = case.length
            if not torch.equal(ready, tokens(case)):
                raise ValueError("the calibration tokens differ from those the others get")
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
    contender, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    import torch

    torch.set_num_threads(case.threads)

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        for module in ("transformers", "safetensors.torch", *IMPORTS[contender.partition("-")[2]]):
            import_module(module)
    except Exception as error:
        say(failed=f"{type(error).__name__}: {error}"[:300])
        raise
    say(ready=True)
    for line in sys.stdin:
        cell = json.loads(line)
        try:
            model = load(case)
            CLOCK.start()
            SOLVERS[contender](model, case, cell["sparsity"], cell["pattern"])
            found = CLOCK.stop()
            if cell["out"]:
                write(dict(model.named_parameters()), Path(cell["out"]))
            say(**found)
        except Exception as error:  # a contender that cannot do this cell is a row of the table, not the end of it
            import traceback

            traceback.print_exc()
            told = str(error).strip().splitlines()
            say(failed=f"{type(error).__name__}: {told[0] if told else ''}"[:300])


if __name__ == "__main__":
    main()
