"""Rehearse a recipe: its own data, tokenizer, methods and options, on a two-layer twin of its model, in two steps each.

The twin has random weights, so no score means anything; what is looked at is whether every stage goes through: the
rows and their masks, training, a kill after the first checkpoint and the way on from there, merging, pruning,
distilling, quantizing, saving, reading back, and opening the folder with plain transformers. A stage that the recipe
does not have is rehearsed with a small step of the doctor's own, so that the list is always whole.

Beside it stands what the twin cannot show: the memory that the longest batch needs on the real model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops.doctor.checklist import Check, Checklist
from llmops.methods.distill.options import Logits
from llmops.methods.finetune.options import Training
from llmops.recipe import load_recipe
from llmops.recipe.schema import BASE, Recipe, Variant
from llmops.recipe.shared_keys import writer_of

__all__ = ["rehearse", "rehearsed"]

STEPS = 2
ROWS = 24  # of every data source
LENGTH = 128
MOST_VARIANTS = 10
_TERMINATOR = {True: "trained", False: "not trained", None: "as the teacher's answers end"}
OWN = "doctor-"  # what the doctor's own variants begin with


def rehearse(path: str, sets: Sequence[str] = (), say: Callable[[Check], None] | None = None) -> list[Check]:
    """Rehearse the recipe at `path`. Raises RecipeError when it is not valid; what fails after that is in the list."""
    recipe = load_recipe(path, sets)
    found = Checklist(say)
    found.add("recipe", "ok", f"{recipe.name}: {len(recipe.variants)} variants")
    with tempfile.TemporaryDirectory(prefix="llmops-doctor-") as scratch:
        place = Path(scratch)
        lengths: dict[str, list[int]] = {}
        with found.trying("data"):
            lengths = _look_at_data(recipe, found)
        with found.trying("twin", "run `llmops tune` with `max_steps: 2` on the model itself instead"):
            _twin(recipe, place / "twin", found)
            body = rehearsed(recipe, place / "twin")
            for name in (name for name in _chosen(recipe) if _answered(recipe.variants[name])):
                found.add(f"answers ({name})", "note", "rehearsed on labelled rows: a twin of random weights ends no "
                                                       "answer", "answers of the real teacher that do not end are "
                                                                 "counted in the row")
            undisturbed: list[float] = []
            with found.trying("stages"):
                undisturbed = _stages(body, place, found)
            with found.trying("kill and resume"):
                _survive(body, place, undisturbed, found)
        with found.trying("longest batch"):
            _longest(recipe, lengths, found)
    return found.checks


def _look_at_data(recipe: Recipe, found: Checklist) -> dict[str, list[int]]:
    """A check per training data; the lengths of its rows by the variant that trains on it."""
    from llmops.data.pairs import encode_pairs
    from llmops.data.render import encode, prompts_and_answers
    from llmops.models.builtin import locate
    from llmops.models.load import load_tokenizer
    from llmops.preflight import preflight_report, rows_of
    from llmops.runner import plan

    for entry in preflight_report(plan(recipe, runs=recipe.base_dir / "no-such-runs")):
        found.add(f"data {entry['data']}", "note" if entry["terminator_trained"] is False else "ok",
                  f"{entry['rows']:,} rows, {entry['tokens']:,} tokens, {entry['trained_tokens']:,} trained, "
                  f"{entry['dropped']:,} dropped, {entry['truncated']:,} cut; terminator "
                  f"{_TERMINATOR[entry['terminator_trained']]}, template "
                  f"{entry['template_hash'][:12]}", "a model tuned on text without an end never stops by itself")
    tokenizer = load_tokenizer(locate(recipe.model.id, recipe.base_dir), revision=recipe.model.revision,
                               trust_remote_code=recipe.model.trust_remote_code)
    lengths: dict[str, list[int]] = {}
    seen: dict[tuple[str, int, str], list[int]] = {}
    for name, variant in recipe.variants.items():
        options = variant.options
        if not isinstance(options, Training):
            continue
        for data in options.mixed:
            answer = options.max_new_tokens if isinstance(options, Logits) and _answered(variant) else 0
            key = data, options.max_length, f"{variant.method} {answer}"
            if (how := writer_of(data, recipe.data)) is not None:
                answer, data = how.max_new_tokens, how.prompts
            if key not in seen:
                rows, limits = rows_of(recipe, data), recipe.data[data].limits
                if answer:
                    examples = [{"input_ids": prompt.input_ids + [0] * answer}
                                for prompt in prompts_and_answers(rows, tokenizer)]
                elif variant.method == "dpo":
                    pairs = encode_pairs(rows, tokenizer, max_length=options.max_length, limits=limits)
                    examples = [{"input_ids": better["input_ids"] + worse["input_ids"]}
                                for better, worse in zip(pairs.chosen, pairs.rejected, strict=True)]
                else:
                    examples = encode(rows, tokenizer, max_length=options.max_length, limits=limits).examples
                seen[key] = [len(example["input_ids"]) for example in examples]
            lengths.setdefault(name, []).extend(seen[key])
    return lengths


def _twin(recipe: Recipe, folder: Path, found: Checklist) -> None:
    from llmops.models.builtin import locate
    from llmops.models.twin import make_twin

    sizes = make_twin(locate(recipe.model.id, recipe.base_dir), folder, revision=recipe.model.revision,
                      trust_remote_code=recipe.model.trust_remote_code)
    found.add("twin", "ok", f"{sizes['layers']} layers, {sizes['hidden']} wide, {sizes['parameters'] / 1e6:.1f} M "
                            f"random weights, vocabulary {sizes['vocabulary']:,}")


# -------------------------------------------------------------------------------------------- the rehearsed recipe


def rehearsed(recipe: Recipe, twin: Path) -> dict[str, Any]:
    """The recipe as it is rehearsed: the twin for its model, few rows, two steps, and a variant for every stage."""
    chosen = _chosen(recipe)
    variants = {name: _step(recipe.variants[name]) for name in chosen}
    data = {name: _source(source, recipe.base_dir) for name, source in recipe.data.items() if source.synthesize is None}
    written = {name: {"source": "builtin:facts", "split": "train", "samples": ROWS} for name in recipe.data
               if writer_of(name, recipe.data) is not None}  # random weights write nothing that passes a filter
    data |= written
    train = next((variant.options.mixed[0] for variant in recipe.variants.values()
                  if isinstance(variant.options, Training) and variant.method != "dpo"
                  and not _answered(variant)), None)
    if train is None:
        data[train := f"{OWN}facts"] = {"source": "builtin:facts", "split": "train", "samples": ROWS}
    data[f"{OWN}text"] = {"source": "builtin:world", "split": "test", "samples": 8}
    for name in chosen:
        if _answered(recipe.variants[name]):
            _on_labels(variants[name][recipe.variants[name].kind], train)
    variants |= _own({(v.kind, v.method) for v in map(recipe.variants.__getitem__, chosen)}, train)
    return {"version": 1, "name": "doctor", "seed": recipe.seed, "model": str(twin), "data": data,
            "runtime": recipe.runtime.model_dump(exclude_defaults=True),
            "evaluate": [{"perplexity": {"data": f"{OWN}text", "context": 32, "max_tokens": 128}}],
            "variants": variants}


def _answered(variant: Variant) -> bool:
    """Whether the teacher is to write the answers."""
    return getattr(variant.options, "answers", "data") == "teacher"


def _on_labels(step: dict[str, Any], train: str) -> None:
    """Rehearse on labelled rows what learns from its teacher's answers: random weights end no answer."""
    step["data"] = train
    step.pop("answers")
    step.pop("stop", None)


def _chosen(recipe: Recipe) -> list[str]:
    """A variant of every step and method (and parent's step), with those it stands on, in building order.

    The longest chains come first: what they stand on shows most steps at once.
    """
    def kind(name: str) -> tuple[str, ...]:
        variant = recipe.variants[name]
        parent = recipe.variants.get(variant.parent)
        return variant.kind, variant.method, parent.kind if parent else BASE

    wanted: set[str] = set()
    kinds: set[tuple[str, ...]] = set()
    for name in sorted(recipe.variants, key=lambda name: -len(recipe.chain(name))):
        family, open_names = {name}, [name]
        while open_names:
            above = {parent for parent in recipe.variants[open_names.pop()].parents() if parent != BASE} - family
            family |= above
            open_names += above
        if kind(name) not in kinds and len(wanted | family) <= MOST_VARIANTS:
            kinds |= {kind(member) for member in family}
            wanted |= family
    return [name for name in recipe.variants if name in wanted]


def _step(variant: Variant) -> dict[str, Any]:
    """A variant with what takes long made short."""
    options = variant.options.model_dump(mode="json", exclude_defaults=True)
    options["method"] = variant.method
    if isinstance(variant.options, Training):
        options |= {"max_steps": STEPS, "batch_size": min(2, variant.options.batch_size), "accumulate": 1,
                    "warmup": 0.0, "max_length": min(LENGTH, variant.options.max_length)}
        options.pop("batch_tokens", None)
        if variant.options.learning_rate == "auto":
            options["learning_rate"] = 1e-4
        if variant.options.stop is not None:
            options["stop"] |= {"every": 1}
        if options.get("offline") is not None:
            options["offline"].pop("cache", None)
        if options.get("on_policy") is not None:
            options["on_policy"]["max_new_tokens"] = 4
        if (options.get("student") or {}).get("model") is not None:  # the twin has another vocabulary
            options["student"] = {"config": {"num_hidden_layers": 1}}
        if options.get("rank") is not None:  # null: every weight is trained
            options["rank"] = min(8, options["rank"])
    if "length" in type(variant.options).model_fields:
        options["length"] = min(64, variant.options.length)
    if variant.kind == "prune" and variant.method == "depth":
        options["layers"] = 1
    if "ignore" in options:
        options["ignore"] = [name for name in options["ignore"] if ".layers." not in name]
    return {"from": variant.parent, variant.kind: options}


def _source(source: Any, base_dir: Path) -> dict[str, Any]:
    """A data source with few rows, its path made absolute, nothing refused for being cut."""
    body: dict[str, Any] = source.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    given = body.get("source", "")
    if given and not given.startswith("builtin:") and (base_dir / given).exists():
        body["source"] = str((base_dir / given).absolute())
    return body | {"samples": min(ROWS, source.samples or ROWS), "limits": {"truncated": 1.0, "dropped": 1.0}}


def _own(there: set[tuple[str, str]], train: str) -> dict[str, Any]:
    """The doctor's own variants, for the stages that the recipe lacks."""
    short = {"data": train, "max_steps": STEPS, "batch_size": 2, "max_length": LENGTH, "warmup": 0.0}
    kinds = {kind for kind, _ in there}
    own: dict[str, Any] = {
        "lora": {"finetune": {"method": "lora", "rank": 4, **short}},
        "adapter": {"finetune": {"method": "lora", "rank": 4, "merge": False, **short}}}
    if "prune" not in kinds:
        own["wanda"] = {"prune": {"method": "wanda", "sparsity": 0.5, "data": train, "length": 32}}
    if ("prune", "depth") not in there:
        own["half"] = {"prune": {"method": "depth", "layers": 1}}
    if "distill" not in kinds:
        own["student"] = {"from": f"{OWN}half" if "half" in own else BASE,
                          "distill": {"method": "logits", "teacher": f"{OWN}lora", **short}}
    if "quantize" not in kinds:
        own["w4"] = {"from": f"{OWN}lora", "quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}}
    return {OWN + name: body for name, body in own.items()}


# ------------------------------------------------------------------------------------------------------ the stages


def _survive(body: Mapping[str, Any], place: Path, undisturbed: list[float], found: Checklist) -> None:
    """Kill a training after its first checkpoint, go on, and hold it against the same one that nobody disturbed."""
    from llmops.runner import run

    one = {**body, "evaluate": [], "variants": {"killed": body["variants"][f"{OWN}lora"]}}
    (place / "killed.json").write_text(json.dumps(one), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "llmops.doctor.killed", str(place / "killed.json"),
                           str(place / "killed")], capture_output=True, text=True, check=False)
    if done.returncode != -9:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        found.add("kill and resume", "fail", f"the training ended by itself before its first checkpoint: {last}")
        return
    row = next(row for row in run(one, runs=place / "killed").rows if row["identity"]["variant"] == "killed")
    if row["status"]["state"] != "ok":
        found.add("kill and resume", "fail", f"after the kill: {row['status']['reason']}")
        return
    losses = [value for _, value in row["building"]["loss"]]
    resumed = any("went on from the checkpoint" in event for event in row["log"]["events"])
    same = losses == undisturbed
    found.add("kill and resume", "ok" if same and resumed else "fail",
              f"killed after step 1, {'went on from its checkpoint' if resumed else 'started again'}; losses "
              f"{'equal to the last bit' if same else f'differ: {losses} and {undisturbed}'}")


def _stages(body: Mapping[str, Any], place: Path, found: Checklist) -> list[float]:
    """Every stage of the rehearsal; returns the losses of the doctor's own training."""
    from llmops.runner import run

    result = run(body, runs=place / "runs")
    for row in result.rows:
        name, transform = row["identity"]["variant"], row["transform"]
        title = f"{transform['kind']} {transform['method']}" if transform["kind"] else "base"
        if row["status"]["state"] != "ok":
            found.add(f"{title} ({name})", "fail", f"{row['status']['state']}: {row['status']['reason']}")
            continue
        parity = row.get("parity") or {}
        checks = ", ".join(check["name"] for check in parity.get("checks", []))
        loss = row["building"].get("loss") or []
        trained = f"loss {loss[0][1]:.2f} -> {loss[-1][1]:.2f}; " if loss else ""
        found.add(f"{title} ({name})", "ok", f"{trained}saved, read back" + (f" ({checks})" if checks else ""))
    _exports(result, found)
    own = next(row for row in result.rows if row["identity"]["variant"] == f"{OWN}lora")
    return [value for _, value in own["building"].get("loss") or []]


_ROUNDED = "; activations are rounded, by each reader to its own last bit"


def _rounds_activations(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    return any(group.get("input_activations") for group in groups.values())


def _exports(result: Any, found: Checklist) -> None:
    """Folders of ours, opened by plain transformers: the same logits."""
    import torch

    from llmops.models.load import hush, load
    from llmops.models.plain import plain_logits

    hush()
    opened: set[str] = set()
    for row in result.rows:
        kind, name = row["transform"]["kind"], row["identity"]["variant"]
        if kind not in ("finetune", "quantize") or row["status"]["state"] != "ok" or kind in opened:
            continue
        folder = result.folder / name
        if (folder / "adapter_config.json").exists():
            continue
        opened.add(kind)
        with found.trying(f"export ({name})"):
            ids = torch.arange(3, 35).unsqueeze(0)
            theirs = plain_logits(folder, ids)
            model, _ = load(folder, dtype="float32", device="cpu", kernel="reference")
            with torch.no_grad():
                ours = model(input_ids=ids).logits.float()
            gap = float((ours - theirs).abs().max())
            why = _ROUNDED if _rounds_activations(folder) else ""
            found.add(f"export ({name})", "ok" if gap < 1e-3 else "note" if why and gap < 0.1 else "fail",
                      f"plain transformers opens it; largest difference of a logit {gap:.1e}{why}")


# --------------------------------------------------------------------------------------------------- memory


def _longest(recipe: Recipe, lengths: Mapping[str, list[int]], found: Checklist) -> None:
    """What the heaviest forward pass of each training needs on the real model, beside what is free."""
    import psutil
    import torch

    from llmops.models.load import pick_device
    from llmops.recipe.estimate import training_memory
    from llmops.recipe.model import read_dims

    dims, why = read_dims(recipe.model, recipe.base_dir)
    device = pick_device(recipe.runtime.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    for name, rows in lengths.items():
        options = recipe.variants[name].options
        longest = sorted(rows, reverse=True)[:options.batch_size]
        tokens = options.batch_tokens or sum(longest)
        text = f"{len(longest)} longest rows, {sum(longest):,} tokens, the longest {longest[0]:,}"
        if dims is None:
            found.add(f"longest batch ({name})", "note", f"{text}; its memory is not known: {why}")
            continue
        need = training_memory(recipe, recipe.variants[name], dims, tokens)
        fits = need < free
        found.add(f"longest batch ({name})", "ok" if fits else "note",
                  f"{text}; about {need / 1e9:.2f} GB with weights, gradients and optimizer, {free / 1e9:.1f} GB free",
                  "the batch will be halved when memory runs out; smaller: batch_size, max_length, "
                  "gradient_checkpointing: true, or method: qlora")
