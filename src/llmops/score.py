"""Score one variant: load it from disk, evaluate it, hold it against parent and base, measure it, fill its row.

What is scored is the folder, never the model that was trained. The base stays in memory for the whole run, because
every measurement is interleaved with it; a parent is loaded for its comparison and let go.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.build import source_of
from llmops.data.render import text_stream
from llmops.data.sources import Rows, load_rows
from llmops.evaluate import EVALUATORS
from llmops.evaluate.options import Evaluation, Harness
from llmops.evaluate.score import Item, Score
from llmops.evaluate.slices import sliced
from llmops.evaluate.tokens import compare_tokens
from llmops.grids import known_grid
from llmops.ledger import Ledger
from llmops.measure import memory
from llmops.measure.carbon import carbon, embodied_per_1k
from llmops.measure.cost import break_even, total
from llmops.measure.decode import measure, peak_memory
from llmops.measure.meter import Meter
from llmops.models.kernel_tiles import tiles_used
from llmops.models.kv_cache import attached
from llmops.models.load import load
from llmops.models.parity import count_parameters, sparsity
from llmops.models.serving import as_served, serving
from llmops.pairing import reasoned, references, stored_score
from llmops.quantity import Quantity
from llmops.recipe.energy_estimate import work_of_scoring
from llmops.recipe.plan import Plan, Stage
from llmops.recipe.schema import Recipe
from llmops.store import Store, replace_file
from llmops.train import Progress

__all__ = ["Scorer"]

COMPARED_ROWS, COMPARED_LENGTH = 32, 256  # tokens on which two variants' distributions are compared


@dataclass
class Scorer:
    """Scores the variants of one run; keeps the base, and the rows of data, between them."""

    plan: Plan
    store: Store
    ledger: Ledger
    meter: Meter
    progress: Progress | None = None
    began: float = field(default_factory=lambda: time.time())
    _base: tuple[Any, Any] | None = None
    _rows: dict[str, Rows] = field(default_factory=dict)
    _compared: list[Tensor] | None = None

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    def score(self, stage: Stage, row: dict[str, Any], rows: Mapping[str, dict[str, Any]]) -> dict[str, list[Item]]:
        """Fill the groups of `row` that come from running the variant. `rows`: finished rows of this run, by variant.

        Returns the items of every score, for the ledger.
        """
        model, tokenizer = self._load(stage.variant)
        _sizes(row, model, self._folder(stage.variant))
        scores: list[Score] = []
        kept = [self._kept(stage, number) for number in range(len(self.recipe.evaluate))]
        with self.meter.window(f"evaluate {stage.variant}") as window:
            for number, evaluation in enumerate(self.recipe.evaluate):
                found = kept[number] or self._evaluate(evaluation, model, tokenizer)
                scores += found
                if not kept[number]:
                    self._keep(stage, number, found)
        row["quality"] = {score.id: self._quality(score, stage, rows) for score in scores}
        row["tokens"] = self._token_statistics(stage, model)
        earlier = sum(each is not None for each in kept)
        note = f"; without that of {earlier} of {len(kept)} scores, kept from an earlier try" if earlier else ""
        energy = replace(window.energy, method=window.energy.method + note)
        row["building"]["evaluate_energy_j"] = energy.as_dict()
        row["building"]["evaluate_wall_s"] = Quantity.measured(window.wall_s, "s", "wall clock").as_dict()
        scoring, measuring = (Quantity(flops, "FLOP", "estimated", "2 P T, likely tokens")
                              for flops in work_of_scoring(self.plan, stage))
        if not earlier and scoring.value:
            row["building"]["evaluate_flops"] = scoring.as_dict()
        if self.recipe.measure is not None:
            with self.meter.window(f"measure {stage.variant}") as window:
                self._measure(stage, row, model, tokenizer)
            row["building"]["measure_energy_j"] = window.energy.as_dict()
            row["building"]["measure_wall_s"] = Quantity.measured(window.wall_s, "s", "wall clock").as_dict()
            if measuring.value:
                row["building"]["measure_flops"] = measuring.as_dict()
        return {score.id: score.items for score in scores}

    # ---------------------------------------------------------------------------------------------------- quality

    def _evaluate(self, evaluation: Evaluation, model: Any, tokenizer: Any) -> list[Score]:
        options = evaluation.options
        if isinstance(options, Harness) and options.include is not None:
            options = options.model_copy(update={"include": str(self.recipe.base_dir / options.include)})
        rows = self.rows(options.data) if hasattr(options, "data") else None
        progress = self.progress
        report = (lambda done, total: progress(done, total, evaluation.id)) if progress is not None else None
        return EVALUATORS[evaluation.metric](model, tokenizer, rows, options, id=evaluation.id,
                                             seed=self.recipe.seed, progress=report)

    def _kept(self, stage: Stage, number: int) -> list[Score] | None:
        """The scores of one entry of `evaluate` that a try which was killed has left, items included."""
        try:
            bodies = json.loads((self.store.scoring(stage.score_key) / f"{number}.json").read_text(encoding="utf-8"))
            return [Score.from_dict(body, [Item(**item) for item in body["items"]]) for body in bodies]
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is scored again
            return None

    def _keep(self, stage: Stage, number: int, scores: list[Score]) -> None:
        folder = self.store.scoring(stage.score_key)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{number}.json", json.dumps(
            [{**score.as_dict(), "items": [item.as_dict() for item in score.items]} for score in scores]))

    def _quality(self, score: Score, stage: Stage, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        versus = {}
        for label, name in references(stage.variant, stage.parents, self.recipe).items():
            other = stored_score(self.ledger, rows.get(name), score.id)
            if other is not None:
                versus[label] = {"variant": name, **reasoned(score, other, self.recipe.seed)}
        groups = sliced(score)
        return {**score.as_dict(), "versus": versus, **({"slices": groups} if groups else {})}

    def _token_statistics(self, stage: Stage, model: Any) -> dict[str, Any]:
        if stage.variant == "base":
            return {}
        base, tokenizer = self.base()
        found = {"base": self._compare(model, base, tokenizer)}
        parent = stage.parents[0]
        if parent == "base":
            found["parent"] = found["base"]
        else:
            other, _ = self._load(parent)
            found["parent"] = self._compare(model, other, tokenizer)
            _free(other)
        return found

    def _compare(self, model: Any, reference: Any, tokenizer: Any) -> dict[str, Any]:
        if self._compared is None:
            self._compared = self._compared_tokens(tokenizer, model.config.max_position_embeddings)
        if not self._compared:
            return {}
        figures = compare_tokens(model, reference, self._compared, tokenizer=tokenizer)
        return {name: quantity.as_dict() for name, quantity in figures.items()}

    def _compared_tokens(self, tokenizer: Any, context: int) -> list[Tensor]:
        """Windows of the first evaluated data set that holds text or chats; empty when there is none."""
        for evaluation in self.recipe.evaluate:
            name = getattr(evaluation.options, "data", None)
            if name is None or self.rows(name).kind == "choices":
                continue
            stream = torch.tensor(text_stream(self.rows(name), tokenizer))
            length = min(COMPARED_LENGTH, context, len(stream))
            windows = stream[: length * min(COMPARED_ROWS, len(stream) // length)].view(-1, length)
            return list(windows.split(8))
        return []

    # ------------------------------------------------------------------------------------------------------- cost

    def _measure(self, stage: Stage, row: dict[str, Any], model: Any, tokenizer: Any) -> None:
        options = self.recipe.measure
        assert options is not None
        base = None if stage.variant == "base" else self.base()[0]
        progress = self.progress
        report = (lambda done, total: progress(done, total, "measure")) if progress is not None else None
        done = measure(model, base, tokenizer, options, self.meter, self.recipe.seed, report)
        row["energy"] |= self._natural(model, tokenizer)
        row["size"]["peak_memory_bytes"] = peak_memory(model, tokenizer, options, self.recipe.seed).as_dict()
        row["latency"], row["workload"] = done.latency, done.workload
        row["energy"] |= done.energy
        row["verdict"]["warnings"] += done.warnings
        figures = row["energy"][str(min(options.batch_sizes))]
        per_token = Quantity.from_dict(figures["joules_per_token"])
        built = Quantity.from_dict(row["building"]["chain_energy_j"])
        embodied = None
        if options.embodied_kg is not None:
            speed = row["latency"][str(min(options.batch_sizes))]["decode_tokens_per_s"]["value"]
            embodied = embodied_per_1k(options.embodied_kg, options.lifetime_years, 1 / speed if speed else None)
        grid, source = known_grid(self.recipe, self.began)
        row["carbon"] = {**carbon(built, per_token, grid, embodied), "grid": source}
        if stage.variant != "base":
            ratio = Quantity.from_dict(figures["ratio_to_base"])
            evaluated = Quantity.from_dict(row["building"]["evaluate_energy_j"])
            paid = total([built, evaluated]) if evaluated.value is not None else built
            row["building"]["break_even_tokens"] = break_even(paid, _of_base(per_token, ratio), ratio).as_dict()

    def _natural(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Requests of natural length over the first questions of what is scored; {} where that is not asked for."""
        options = self.recipe.measure
        assert options is not None
        names = [name for entry in self.recipe.evaluate if (name := getattr(entry.options, "data", None)) is not None
                 and self.rows(name).kind not in ("text", "preference")]
        if not options.natural_requests or not names:
            return {}
        from llmops.data.render import prompts_and_answers
        from llmops.measure.natural import natural, stop_tokens

        asked = prompts_and_answers(self.rows(names[0]), tokenizer)[:options.natural_requests]
        found = natural(model, [prompt.input_ids for prompt in asked], stop_tokens(model, tokenizer),
                        options.natural_tokens, self.meter)
        return {f"natural_{name}": figure for name, figure in found.items()}

    # ----------------------------------------------------------------------------------------------------- loading

    def base(self) -> tuple[Any, Any]:
        """The base model, loaded once a run."""
        if self._base is None:
            self._base = self._open("base")
        return self._base

    def rows(self, name: str) -> Rows:
        """The rows of a named source, read once a run."""
        if name not in self._rows:
            self._rows[name] = load_rows(name, self.recipe.data, self.recipe.base_dir, self.recipe.seed)
        return self._rows[name]

    def _load(self, variant: str) -> tuple[Any, Any]:
        return self.base() if variant == "base" else self._open(variant)

    def _open(self, variant: str) -> tuple[Any, Any]:
        runtime, source = self.recipe.runtime, self.recipe.model
        model, tokenizer = load(source_of(variant, self.recipe, self.store, self.plan.keys),
                                base_dir=self.recipe.base_dir, revision=source.revision, dtype=runtime.dtype,
                                device=runtime.device, kernel=runtime.kernel,
                                trust_remote_code=source.trust_remote_code)
        return as_served(model, runtime.kernel), tokenizer

    def _folder(self, variant: str) -> Path | None:
        from llmops.models.builtin import local_folder

        if variant != "base":
            return self.store.build(self.plan.keys[variant])
        return local_folder(self.recipe.model.id, self.recipe.base_dir)


def _sizes(row: dict[str, Any], model: Any, folder: Path | None) -> None:
    size = row["size"]
    parameters = count_parameters(model)
    zeros, linear = sparsity(model)
    resident = memory.weights_bytes(model)
    size["parameters"] = Quantity.measured(parameters, "parameters", "counted in the loaded model").as_dict()
    size["nonzero_parameters"] = Quantity.measured(parameters - zeros, "parameters", "counted in the dense linear "
                                                   "layers of the loaded model").as_dict()
    size["sparsity"] = (Quantity.measured(zeros / linear, "fraction", "zeros among the linear weights") if linear else
                        Quantity.null("fraction", "every linear layer is packed")).as_dict()
    size["weights_bytes"] = resident.as_dict()
    size["kv_bytes_per_token"] = memory.kv_bytes_per_token(model).as_dict()
    if resident.value is not None:
        size["bits_per_weight"] = Quantity.measured(8 * resident.value / parameters, "bits", "resident bytes x 8 / "
                                                    "parameters, scales and embeddings included").as_dict()
    size["disk_bytes"] = (memory.disk_bytes(folder) if folder is not None else
                          Quantity.null("B", "the base lies in the hub's cache")).as_dict()
    row["transform"]["kv_cache"] = attached(model)
    row["transform"]["compute_dtype"] = str(model.dtype).removeprefix("torch.")
    kernels = sorted({module.kernel for module in model.modules() if hasattr(module, "packed_tensors")
                      and hasattr(module, "kernel")})
    row["transform"]["kernel"] = ", ".join(kernels) or "torch"
    if tiles := tiles_used(model):
        row["transform"]["kernel_tiles"] = tiles
    if (held := serving(model)) is not None:
        row["transform"]["served"] = held.describe()


def _of_base(per_token: Quantity, ratio: Quantity) -> Quantity:
    """Joules per token of the base in the same blocks."""
    if per_token.value is None or not ratio.value:
        return Quantity.null("J/token", per_token.method if per_token.value is None else ratio.method)
    return Quantity(per_token.value / ratio.value, "J/token", per_token.provenance, "variant / ratio to base")


def _free(model: Any) -> None:
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
