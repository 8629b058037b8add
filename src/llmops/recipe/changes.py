"""Why a variant would be built again: the parts of its key against those of the last build of that name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmops.recipe.plan import Plan, Stage

__all__ = ["why"]

_WORDS = {
    "seed": "the seed", "dtype": "the runtime's dtype", "model": "the base model (weights or configuration)",
    "tokenizer": "the tokenizer", "template": "the chat template", "code": "the model's own code", "step": "the step",
    "data": "the data of the step (its bytes, split or samples)", "parent": "the parent", "teacher": "the teacher"}
_READABLE = ("seed", "dtype", "step")


def why(variant: str, plan: Plan, rows: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What changed since `variant` was last built.

    rows: rows of the ledger; those of the same run and variant tell which build was the last, else the newest build of
    that run and name in the store does. Returns {"variant", "key", "built", "last_key", "changed": {part: [then, now]},
    "lines": [str]}; `changed` is empty when nothing changed or nothing was built before. Raises KeyError for a variant
    that the plan does not hold.
    """
    stage = plan.stage(variant)
    answer: dict[str, Any] = {"variant": variant, "key": stage.key, "built": stage.built, "last_key": None,
                              "changed": {}, "lines": []}
    if variant == plan.stages[0].variant:
        answer["lines"] = [f"{variant}: the model itself; it is not built, only scored"]
        return answer
    if stage.built:
        answer["last_key"] = stage.key
        answer["lines"] = [f"{variant}: nothing changed; the build {stage.key[:12]} is used"]
        return answer
    last = _last(stage, plan, rows)
    if last is None:
        answer["lines"] = [f"{variant}: never built"]
        return answer
    answer["last_key"] = last.get("key")
    answer["changed"] = _changed(last["key_parts"], stage.key_parts)
    if not answer["changed"]:
        answer["lines"] = [f"{variant}: nothing changed, but its build {str(last.get('key'))[:12]} is gone"]
        return answer
    answer["lines"] = [f"{variant}: changed since {str(last.get('key'))[:12]}"]
    for part, (then, now) in answer["changed"].items():
        answer["lines"].append(f"  {_in_words(part, then, now, stage)}")
        if part in ("parent", "teacher"):
            parent = stage.parents[0 if part == "parent" else 1]
            answer["lines"] += [f"  {line}" for line in why(parent, plan, rows)["lines"]]
    return answer


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, list[str | None]]:
    names = [*now, *(name for name in then if name not in now)]
    return {name: [then.get(name), now.get(name)] for name in names if then.get(name) != now.get(name)}


def _in_words(part: str, then: str | None, now: str | None, stage: Stage) -> str:
    kind, _, name = part.partition(".")
    word = {"option": f"option {name}", "version": f"version of {name}"}.get(kind, _WORDS.get(part, part))
    if part in ("parent", "teacher"):
        word = f'{word} "{stage.parents[0 if part == "parent" else 1]}"'
    if kind in ("option", "version") or part in _READABLE:
        return f"{word}: {then if then is not None else 'none'} -> {now if now is not None else 'none'}"
    return word + (" is new" if then is None else " is gone" if now is None else " changed")


def _last(stage: Stage, plan: Plan, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The manifest of the last build of that name: by the newest row, else by the newest folder."""
    known = [row["identity"].get("key") for row in rows if row.get("identity", {}).get("run") == plan.recipe.name
             and row["identity"].get("variant") == stage.variant]
    for key in reversed(known):
        found = _manifest(plan.store / str(key) / "llmops.json")
        if found is not None:
            return found
    places = sorted(plan.store.glob("*/llmops.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for place in places:
        found = _manifest(place)
        if found is not None and (found.get("recipe"), found.get("variant")) == (plan.recipe.name, stage.variant):
            return found
    return None


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) and isinstance(body.get("key_parts"), dict) else None
