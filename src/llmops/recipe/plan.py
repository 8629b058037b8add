"""What a run would do: every variant as a stage, parents first, with its key, what is done, and what it will take.

A stage is built when its folder is in the store, and scored when a row of the ledger holds its scores. Reads small
files (manifests, config.json) and hashes; loads no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmops.measure.intervals import LEAST_PAIRS
from llmops.recipe import keys as k
from llmops.recipe.estimate import Estimate, estimate
from llmops.recipe.hashing import FileHashes
from llmops.recipe.healing_checks import quantized_by
from llmops.recipe.model import read_dims
from llmops.recipe.schema import BASE, Recipe
from llmops.recipe.shared_keys import (
    answer_parts,
    signal_parts,
    writer_of,
    written_names,
    written_parts,
    written_print,
)

__all__ = ["Plan", "Stage", "make_plan"]

_SCORED = ("ok", "broken")


@dataclass(frozen=True)
class Stage:
    """One variant to build and score. `kind` and `method` are None for base, which is never built.

    parents: names, the parent first, then a teacher, then who writes data; parent_keys in the same order. scored_here:
    whether the recipe wants it scored. built, scored: whether that is done already. signals: parts of the key of the
    teacher's signals that it reads from the disk; written: the same of data that a teacher writes, answers: of a
    teacher's answers to data, by name.
    """

    variant: str
    kind: str | None
    method: str | None
    parents: tuple[str, ...]
    parent_keys: tuple[str, ...]
    key: str
    key_parts: dict[str, str]
    score_key: str
    scored_here: bool
    built: bool
    scored: bool
    estimate: Estimate
    summary: str = ""
    teacher: str | None = None
    writers: tuple[str, ...] = ()
    signals: dict[str, str] | None = None
    written: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def taught_by(self) -> str | None:
        """The teacher, or the one variant that wrote what is read."""
        return self.teacher or (self.writers[0] if len(set(self.writers)) == 1 else None)

    @property
    def shares(self) -> list[str]:
        """Keys of what it uses that other builds may use, too."""
        return [k.key_of(parts) for parts in (*([self.signals] if self.signals else []), *self.written.values(),
                                              *self.answers.values())]

    def describe(self) -> str:
        """One line: "quantize rtn w4a16 from tuned"."""
        if self.kind is None:
            return self.summary
        teacher = f", taught by {self.teacher}" if self.teacher is not None else ""
        return f"{self.kind} {self.method}{' ' if self.summary else ''}{self.summary} from {self.parents[0]}{teacher}"

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        return self.built and (self.scored or not self.scored_here)

    @property
    def state(self) -> str:
        """"done", "to score" or "to build"."""
        return "done" if self.done else "to score" if self.built else "to build"

    def as_json(self) -> dict[str, Any]:
        return {"variant": self.variant, "kind": self.kind, "method": self.method, "parents": list(self.parents),
                "key": self.key, "score_key": self.score_key, "score": self.scored_here, "built": self.built,
                "scored": self.scored, "state": self.state, "what": self.describe(),
                "estimate": self.estimate.as_dict()}


@dataclass(frozen=True)
class Plan:
    """Stages in the order of building; the first is base. advice: whether margins and savings can be shown."""

    stages: list[Stage]
    recipe: Recipe
    store: Path
    advice: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, str]:
        """Variant -> key."""
        return {stage.variant: stage.key for stage in self.stages}

    def stage(self, variant: str) -> Stage:
        """The stage of that name. KeyError when there is none."""
        found = next((stage for stage in self.stages if stage.variant == variant), None)
        if found is None:
            raise KeyError(variant)
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `llmops plan --json`."""
        return {"name": self.recipe.name, "model": self.recipe.model.id, "revision": self.recipe.model.revision,
                "seed": self.recipe.seed, "recipe_sha256": self.recipe.sha256, "store": str(self.store),
                "to_build": sum(not stage.built for stage in self.stages),
                "to_score": sum(stage.scored_here and not stage.scored for stage in self.stages),
                "advice": list(self.advice), "stages": [stage.as_json() for stage in self.stages]}


def make_plan(recipe: Recipe, store: Path | str, ledger_rows: Iterable[Mapping[str, Any]] = ()) -> Plan:
    """The plan of `recipe` over the builds under `store` and the rows of a ledger (newest or all).

    Raises DataError when data cannot be read for its fingerprint.
    """
    store, known = Path(store), list(ledger_rows)
    scored = {(row["identity"].get("key"), row["identity"].get("score_key")) for row in known
              if row.get("status", {}).get("state") in _SCORED}
    written = {name for name in recipe.data if writer_of(name, recipe.data) is not None}
    prints = k.fingerprints(recipe, (name for name in k.names_of_data(recipe) if name not in written))
    dims, reason = read_dims(recipe.model, recipe.base_dir)
    with FileHashes(k.hash_memory(store)) as hashes:
        parts = k.model_parts(recipe, hashes)
    base, keys = parts, {BASE: k.key_of(parts)}
    stages = [_stage(recipe, BASE, keys, parts, prints, store, scored, estimate(recipe, BASE, dims, reason))]
    for name, variant in recipe.variants.items():
        texts = {each: written_parts(recipe, each, keys, prints, base) for data in variant.data_names()
                 for each in written_names(data, recipe.data)}
        prints |= {data: written_print(data, recipe.data, k.key_of(made)) for data, made in texts.items()}
        parts = k.build_parts(recipe, variant, keys, prints)
        keys[name] = k.key_of(parts)
        stages.append(replace(
            _stage(recipe, name, keys, parts, prints, store, scored, estimate(recipe, name, dims, reason)),
            signals=signal_parts(recipe, variant, keys, prints, base), written=texts,
            answers=answer_parts(recipe, variant, keys, prints, base)))
    return Plan(stages, recipe, store, _advice(recipe, known))


def _advice(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    said: tuple[str, ...] = ()
    if recipe.measure is not None and recipe.measure.repeats < LEAST_PAIRS:
        said = (f"WARNING: measure.repeats: {recipe.measure.repeats}; with fewer than {LEAST_PAIRS} no difference of "
                "speed or energy is said to be shown",)
    if not any(goal.noninferior or goal.max_drop for goal in recipe.goals.quality.values()):
        return said
    from llmops.recipe.sample_size import advice

    return (*said, *advice(recipe, rows))


def _stage(recipe: Recipe, name: str, keys: Mapping[str, str], parts: dict[str, str], prints: Mapping[str, str],
           store: Path, scored: set[tuple[Any, Any]], figures: Estimate) -> Stage:
    variant = recipe.variants.get(name)
    parents = tuple(variant.parents()) if variant is not None else ()
    key = keys[name]
    score = k.score_key(recipe, key, prints)
    return Stage(
        variant=name, kind=variant.kind if variant is not None else None,
        method=variant.method if variant is not None else None, parents=parents,
        parent_keys=tuple(keys[parent] for parent in parents), key=key, key_parts=parts, score_key=score,
        scored_here=variant.score if variant is not None else True,
        built=variant is None or (store / key / "llmops.json").is_file(), scored=(key, score) in scored,
        estimate=figures, summary=_summary(recipe, name), teacher=variant.teacher if variant is not None else None,
        writers=variant.writers if variant is not None else ())


def _summary(recipe: Recipe, name: str) -> str:
    """The options that tell a variant from its like."""
    variant = recipe.variants.get(name)
    if variant is None:
        revision = f"@{recipe.model.revision}" if recipe.model.revision else ""
        return f"the model itself ({recipe.model.id}{revision})"
    options = variant.options
    words = []
    if variant.method == "auto":
        words.append(f"{options.bits:g} bits" if options.bits is not None else f"{options.bytes:,} bytes")
    if hasattr(options, "scheme"):
        plain = getattr(options, "number_format", None) is None
        words.append(options.scheme if plain else options.number_format)
        words += [f"g{options.group}"] if plain and options.group != -1 else []
    if getattr(options, "kv_cache", None):
        words.append(options.kv_cache if variant.method == "kv_cache" else f"kv {options.kv_cache}")
    if hasattr(options, "sparsity"):
        words += [f"{100 * options.sparsity:.4g}%", *([options.pattern] if options.pattern != "unstructured" else [])]
        words += [value for name, plain in (("scope", "layer"), ("ratios", "uniform"))
                  if (value := getattr(options, name, plain)) != plain]
    if variant.method in ("depth", "width"):
        words += _size_words(options)
    if hasattr(options, "rank"):
        words += _adapter_words(options)
    if variant.method == "logits":
        words += _teaching_words(options)
    if hasattr(options, "epochs"):
        epochs = f"{options.epochs:g} epoch{'' if options.epochs == 1 else 's'}"
        words.append(f"{options.max_steps} steps" if options.max_steps else epochs)
    if variant.kind in ("finetune", "distill") and quantized_by(recipe.variants, name) is not None:
        words.append("qat")  # trained through the rounding of its parent, and stored in its bits
    return " ".join(words)


def _teaching_words(options: Any) -> list[str]:
    """Of a distillation, what is not as by default."""
    words = [options.loss] if options.loss != "forward_kl" else []
    if options.student is not None:
        words.append("fresh" if options.student.model is None else options.student.model)
    if options.offline is not None:
        words.append(f"offline top {options.offline.k}")
    return words + ([f"on-policy {options.on_policy.fraction:g}"] if options.on_policy is not None else [])


def _size_words(options: Any) -> list[str]:
    """What a structural step leaves, or what share it is to reach."""
    layers = getattr(options, "layers", None)
    words = [f"{layers if isinstance(layers, int) else len(layers)} layers"] if layers is not None else []
    words += [f"{name} {getattr(options, name)}" for name in ("hidden", "intermediate", "heads", "kv_heads")
              if getattr(options, name, None) is not None]
    words += [f"{getattr(options, name):g}x {name}" for name in ("parameters", "latency", "joules")
              if getattr(options, name) is not None]
    return words + ([f"by {options.choose}"] if getattr(options, "choose", "even") != "even" else [])


def _adapter_words(options: Any) -> list[str]:
    """The same of adapters, of whatever method."""
    words = [f"r{options.rank}" if options.rank is not None else "all weights"]
    words += [name for name in ("rslora", "dora") if getattr(options, name, False)]
    words += [options.init] if getattr(options, "init", "default") != "default" else []
    words += [f"lora+{options.lora_plus_ratio:g}"] if getattr(options, "lora_plus_ratio", 0) else []
    return words + ([options.quant, options.merge] if hasattr(options, "quant") else [] if options.merge else ["apart"])
