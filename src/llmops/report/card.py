"""The model card of a variant: README.md with the hub's YAML front matter, from its row and those of its run.

The front matter holds what the hub reads (base model and relation, tags, scores, grams of CO2e); what it has no key
for (intervals, energy, provenance, what was not measured) stands in the body. What is not known is left out, never
guessed: no licence, no grams without an energy, no base model that the hub could not resolve. Names and data are
escaped for Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from llmops.report.building import merge_cells
from llmops.report.card_facts import by_group, intended, lineage, record
from llmops.report.details import nulls, quantities
from llmops.report.figures import number, show, told
from llmops.report.groups import worst_lines
from llmops.report.markdown import clean, code, figures, flat, safe, section, table
from llmops.report.reading import (
    Row,
    attempts,
    batches,
    events,
    figure,
    group,
    joules_per_trained_token,
    looks,
    loss_curve,
    merges,
    metric,
    name_of,
    parent_of,
    quantity,
    saving,
    score,
    score_ids,
    state_of,
    status_text,
    told_of_training,
    versus,
)
from llmops.report.teaching import shared_words
from llmops.report.words import healed, what

__all__ = ["card", "front_matter"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TRAINED = ("finetune", "distill")
COSTS_OF_BUILDING = {
    "energy, this step": "energy_j",
    "energy, with all it stands on": "chain_energy_j",
    "time": "wall_s",
    "tokens": "tokens",
    "training compute": "flops",
    "of it the teacher's": "teacher_energy_j",
    "pays for itself after": "break_even_tokens",
    "pays for itself against its teacher after": "break_even_to_teacher_tokens"}
SPEEDS = {
    "decoding": "decode_tokens_per_s",
    "prefill": "prefill_tokens_per_s",
    "first token, median": "first_token_ms_p50",
    "first token, 95th percentile": "first_token_ms_p95",
    "time per token, median": "inter_token_ms_p50",
     "time per token, 95th percentile": "inter_token_ms_p95"}
ENERGIES = {"per token": "joules_per_token", "per request": "joules_per_request",
            "per token, idle power subtracted": "net_joules_per_token"}
SIZES = {"parameters": "parameters", "bits per weight, in memory": "bits_per_weight", "zeros": "sparsity",
         "on disk": "disk_bytes", "weights in memory": "weights_bytes",
         "keys and values, per token": "kv_bytes_per_token", "peak memory": "peak_memory_bytes"}


def card(row: Row, rows: Sequence[Row]) -> str:
    """The README.md of `row`; `rows` are those of its run, itself included (for its ancestors)."""
    import yaml

    head = yaml.safe_dump(front_matter(row), sort_keys=False, allow_unicode=True, width=1000)
    sections = [_title(row), intended(row, rows), _making(row, rows), _scores(row), by_group(row), _sizes(row),
                _speed(row), _energy(row), _built(row), record(row, rows), _trained(row),
                _use(row), _limits(row), _origin(row, rows)]
    return f"---\n{head}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


# -------------------------------------------------------------------------------------------------------- front matter


def front_matter(row: Row) -> dict[str, Any]:
    """What the hub reads, as plain values."""
    identity, found = group(row, "identity"), dict[str, Any]()
    base = str(identity.get("base_model") or "")
    relation = _relation(row)
    if HUB_ID.fullmatch(base):
        found["base_model"] = base
        if relation:
            found["base_model_relation"] = relation
    if terms := group(row, "card").get("license") or identity.get("license"):
        found["license"] = clean(terms)
    found |= {"library_name": "peft" if relation == "adapter" else "transformers", "pipeline_tag": "text-generation",
              "tags": _tags(row)}
    grams = figure(row, "carbon", "building_g")
    if grams.value is not None and group(row, "transform").get("kind"):
        found["co2_eq_emissions"] = _emissions(row, grams.value, f"{grams.provenance}; {grams.method}")
    scores = _model_index(row)
    if scores:
        found["model-index"] = [{"name": clean(name_of(row)), "results": scores}]
    return found


def _relation(row: Row) -> str | None:
    """adapter, quantized or finetune, as the hub names relations; None for the base itself."""
    transform = group(row, "transform")
    chain = [str(step) for step in transform.get("chain") or []]
    if not chain:
        return None
    apart = group(transform, "options").get("merge") in (False, "apart")
    if transform.get("method") in ("lora", "qlora", "dpo") and apart:
        return "adapter"
    return "quantized" if chain[-1].startswith("quantize:") or healed(row) else "finetune"


def _tags(row: Row) -> list[str]:
    chain = [str(step) for step in group(row, "transform").get("chain") or []]
    words = [word for step in chain for word in step.split(":")]
    kept = [tag for word, tag in (("quantize", "compressed-tensors"), ("prune", "pruned"), ("distill", "distilled"))
            if word in words]
    methods = [clean(step.partition(":")[2]) for step in chain]
    return list(dict.fromkeys(["llmops", *kept, *methods,
                clean(state_of(row)) if state_of(row) != "ok" else "llmops"]))


def _emissions(row: Row, grams: float, source: str) -> dict[str, Any]:
    """Grams of CO2e of building it and all it stands on. Place and machine only where the row knows them."""
    machine, chain = group(row, "environment"), group(row, "transform").get("chain") or []
    trained = any(str(step).startswith(TRAINED) for step in chain)
    found: dict[str, Any] = {"emissions": round(grams, 4), "source": clean(source),
                             "training_type": "fine-tuning" if trained else "compression"}
    zone = re.search(r"([^;:(]+ \([A-Z]{3}\)), annual average", figure(row, "carbon", "intensity").method)
    grid = group(row, "carbon").get("grid") or {}
    if zone or grid.get("valid_from"):
        found["geographical_location"] = clean(zone.group(1) if zone else grid["zone"])
    hardware = machine.get("gpu") or machine.get("cpu")
    if hardware:
        found["hardware_used"] = clean(", ".join(map(str, hardware)) if isinstance(hardware, list) else hardware)
    return found


def _model_index(row: Row) -> list[dict[str, Any]]:
    found = []
    for score_id in score_ids([row]):
        value = score(row, score_id)
        if value.value is not None:
            data = clean(score_id.partition(":")[2] or score_id)
            found.append({"task": {"type": "text-generation"}, "dataset": {"name": data, "type": data},
                          "metrics": [{"type": clean(metric(row, score_id)), "value": value.value,
                                       "name": clean(score_id)}]})
    return found


# ---------------------------------------------------------------------------------------------------------------- body


def _title(row: Row) -> str:
    identity = group(row, "identity")
    base = _model(identity)
    lines = [f"# {safe(name_of(row))}", f"{safe(what(row))}, from {code(base)}. Made and measured with llmops "
             f"{safe(identity.get('llmops', ''))}; every figure below comes from the run's ledger."]
    if state_of(row) != "ok":
        lines.append(f"> **Not fit for use: {safe(status_text(row))}**")
    if group(row, "transform").get("simulated"):
        lines.append("> **Simulated compression:** imitated in full precision; size, speed and energy are not those of "
                     "the real thing.")
    return "\n\n".join(lines)


def _model(identity: Mapping[str, Any]) -> str:
    """Name and revision of the base model; of a folder its last part alone, a card tells nobody's home directory."""
    base = str(identity.get("base_model") or "a model that the row does not name")
    shown = PurePath(base).name if base.startswith(("/", "~", ".", "\\")) or base[1:3] == ":\\" else base
    return f"{shown} @ {identity['revision']}" if identity.get("revision") else shown


def _making(row: Row, rows: Sequence[Row]) -> str:
    """The steps from the base to here, each with its options."""
    path = lineage(row, rows)
    steps: list[str] = []
    for each in reversed(path):
        transform = group(each, "transform")
        if not transform.get("kind"):
            continue
        options = ", ".join(f"{key} {value}" for key, value in group(transform, "options").items()
                            if key != "method" and value is not None)
        steps.append(f"{len(steps) + 1}. {safe(name_of(each))}: {safe(transform.get('kind'))} with "
                     f"{safe(transform.get('method'))}{f' ({safe(options)})' if options else ''}")
    transform = group(row, "transform")
    stored = [f"Stored as {safe(transform['storage_dtype'])}" if transform.get("storage_dtype") else "",
              f"computes in {safe(transform['compute_dtype'])}" if transform.get("compute_dtype") else "",
              f"kernel {safe(transform['kernel'])}" if transform.get("kernel") else ""]
    zeros = (f"Its zeros lie in dense tensors and save {safe(transform['sparsity_saves'])}."
             if transform.get("sparsity_saves") else "")
    said = "; ".join(part for part in stored if part)
    made = "\n".join(steps) or "It is the model as it came."
    return section("How it was made", made, f"{said}." if said else "", zeros)


def _scores(row: Row) -> str:
    lines = []
    for score_id in score_ids([row]):
        value = score(row, score_id)
        cells = [safe(score_id), show(value, with_interval=True), str(value.n or "")]
        for other in ("parent", "base"):
            body = versus(row, score_id, other)
            delta = quantity(body.get("delta"), "")
            flips = (f"; {body['gained']} won, {body['lost']} lost"
                     if body.get("gained") is not None and body.get("lost") is not None else "")
            cells.append(show(delta, with_interval=True, difference=True) + flips if delta.value is not None else "-")
        lines.append(cells)
    if not lines:
        return section("Scores", "It was not scored.")
    return section("Scores",
    table(["score",
    "value, 95% interval",
    "n",
    f"against {safe(parent_of(row) or 'parent')} "
    "(parent)",
    "against base"],
    lines),
     "Differences are paired: the same items, answered by both.",
     "\n".join(f"- Worst group of {safe(line)}" for line in worst_lines(row)))


def _sizes(row: Row) -> str:
    return section("Size", figures(row, [(label, ("size", name)) for label, name in SIZES.items()]))


def _speed(row: Row) -> str:
    entries = [(f"{label}, batch {batch}", ("latency", batch, name)) for batch in batches([row])
               for label, name in SPEEDS.items()]
    return section("Speed", figures(row, entries), _workload(row))


def _energy(row: Row) -> str:
    entries = [(f"{label}, batch {batch}", ("energy", batch, name)) for batch in batches([row])
               for label, name in ENERGIES.items()]
    ratios = [(batch, figure(row, "energy", batch, "ratio_to_base")) for batch in batches([row])]
    verdicts = [f"- Batch {batch}: {safe(saving(row, batch))}, {show(ratio, with_interval=True)} of base's energy per "
                "token." for batch, ratio in ratios if ratio.value is not None]
    return section("Energy", figures(row, entries), "\n".join(verdicts))


def _built(row: Row) -> str:
    entries = [(label, ("building", name)) for label, name in COSTS_OF_BUILDING.items()
               if name in group(row, "building") or "teacher" not in name]
    entries += [("carbon of building", ("carbon", "building_g")),
                ("carbon per 1,000 output tokens", ("carbon", "per_1k_tokens_g")), ("grid", ("carbon", "intensity"))]
    spent, count = joules_per_trained_token(row), attempts(row)
    lines = [f"Each token that ran through the model in training took {show(spent)} ({safe(told(spent))})."] \
        if spent.value is not None else []
    if count and count > 1:
        lines.append(f"It took {count} attempts; what those that were cut off spent is counted.")
    lines += [f"Shared with other builds, its cost split among them: {safe(shared_words(entry))}."
              for entry in group(row, "building").get("shared") or []]
    return section("What building it cost", figures(row, entries) if group(row, "building") else "", *lines)


def _trained(row: Row) -> str:
    """How the training went: loss, held-out loss, what happened on the way, and how the adapter was merged."""
    points, held = loss_curve(row), looks(row)
    if not points:
        return ""
    lines = [f"- training loss {number(points[0][1])} to {number(points[-1][1])} in {points[-1][0]:,.0f} steps"]
    if held:
        best = min(held, key=lambda look: look[1])
        lines.append(f"- held-out loss {number(held[0][1])} to {number(held[-1][1])} in {len(held)} looks, lowest "
                     f"{number(best[1])} at step {best[0]:,.0f}")
    lines += [f"- {safe(event)}" for event in told_of_training(row)]
    ways = [[safe(cell) for cell in merge_cells(entry)] for entry in merges(row)]
    merged = table(["merged into", "mean KL", "largest KL", "taken"], ways) if ways else ""
    return section("How the training went", "\n".join(lines), merged)


def _use(row: Row) -> str:
    plain = ("from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
             'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")')
    below = str(group(row, "transform").get("storage_dtype") or "")
    if _relation(row) == "adapter" and below.startswith("adapter on int"):
        plain = ("from peft import PeftConfig, PeftModel\n"
                 "from transformers import AutoModelForCausalLM, CompressedTensorsConfig\n\n"
                 'base = AutoModelForCausalLM.from_pretrained(\n    PeftConfig.from_pretrained(".").'
                 "base_model_name_or_path,\n    quantization_config=CompressedTensorsConfig(dequantize=True))\n"
                 'model = PeftModel.from_pretrained(base, ".")')
    elif _relation(row) == "adapter":
        plain = 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(".")'
    own = "import llmops\n\nmodel, tokenizer = llmops.load(\".\")"
    packed = " (needs `pip install compressed-tensors`)" if _relation(row) == "quantized" else ""
    return section("How to load it", f"In this folder, as any model of its kind{packed}:\n\n```python\n{plain}\n```",
                    f"Or running on its compressed weights, as it was measured:\n\n```python\n{own}\n```")


def _limits(row: Row) -> str:
    lines = [f"- stated: {safe(each)}" for each in group(row, "card").get("limitations") or []]
    lines += [f"- {safe(warning)}" for warning in group(row, "verdict").get("warnings") or []]
    lines += [f"- not measured: {safe(name)}: {safe(reason)}" for name, reason in nulls([row])]
    if any(found.provenance == "estimated" for name, _, found in quantities(row)
           if name in ("energy", "building")):
        lines.append("- energy marked ~ is estimated, not measured")
    lines.append("- scores hold for the data named above; nothing else was tested, safety and bias included")
    return section("Limits, and what was not measured", "\n".join(lines))


def _origin(row: Row, rows: Sequence[Row]) -> str:
    identity, building = group(row, "identity"), group(row, "building")
    facts: list[tuple[str, object]] = [
        (key.replace("_", " "), identity.get(key))
        for key in ("run", "run_id", "variant", "parent", "teacher", "seed", "key", "recipe_sha256", "utc")]
    facts += [(f"data {name} of {name_of(each)}, SHA-256", digest) for each in reversed(lineage(row, rows))
              for name, digest in group(each, "building", "data_sha256").items()]
    facts += [(f"questions of {score_id}, SHA-256 of their items", group(row, "quality", score_id).get("items_sha256"))
              for score_id in score_ids([row])]
    facts += [(f"data, {name}", count) for name, count in group(building, "data").items()]
    facts += [(f"protocol of {score_id}", flat({key: value for key, value in group(
        row, "quality", score_id, "protocol").items() if value is not None})) for score_id in score_ids([row])]
    facts += [(f"environment, {key}", flat(value)) for key, value in group(row, "environment").items()]
    lines = [f"- {safe(key)}: {code(value)}" for key, value in facts if value not in (None, "", [], {})]
    notes = [f"- {safe(event)}" for event in events(row)]
    return section("Where it comes from", "\n".join([*lines, *notes]))


def _workload(row: Row) -> str:
    workload = group(row, "workload")
    if not workload:
        return ""
    return safe(f"Workload: {workload.get('prompt_tokens')} prompt tokens, {workload.get('new_tokens')} new tokens, "
                 f"greedy, {workload.get('repeats')} repeats interleaved with base.")
