"""From a file to a Recipe: text, secrets, `--set`, matrix, blocks, then what only the whole shows.

Nothing stops at the first mistake: each part notes its own in `Problems`, and one RecipeError carries them all in the
order of the file. A part that could not be read is left out of what follows, so that one mistake is not told twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from llmops.data.options import DataSource
from llmops.errors import RecipeError, nearest
from llmops.evaluate.options import EVALUATIONS, Evaluation
from llmops.measure.options import MeasureOptions
from llmops.models.builtin import BUILTIN
from llmops.options import Options
from llmops.recipe import checks, data_checks
from llmops.recipe.blocks import mapping, read, unknown_keys
from llmops.recipe.budget_checks import check_grid, read_budget
from llmops.recipe.model import Dims, folder_of, looks_like_hub_id, read_dims
from llmops.recipe.names import check_name, refer
from llmops.recipe.schema import (
    BASE,
    COSTS,
    STEPS,
    TRACKERS,
    Card,
    Goal,
    Goals,
    Kind,
    ModelSource,
    Recipe,
    Runtime,
    Tracking,
    Variant,
)
from llmops.recipe.secret import CURE, secret_keys, secret_spans
from llmops.recipe.shared_keys import writers_of
from llmops.recipe.source import Document, Place, Problems, Trail, from_values, parse, shown
from llmops.recipe.tree import apply_sets, build_order, expand_matrices

__all__ = ["load_recipe", "parse_recipe"]

_KEYS = ("version", "name", "seed", "model", "runtime", "data", "evaluate", "measure", "variants", "goals",
         "report_to", "tracking", "budget", "card")
_VARIANT_KEYS = ("from", *STEPS, "matrix", "score")
_MOST_SEED = 2**32 - 1
_MOST_VARIANTS = 500


@dataclass
class _Parts:
    """What has been read so far. `names`: every variant that is written, sound or not; likewise `data_names`."""

    problems: Problems
    base_dir: Path
    data: dict[str, DataSource] = field(default_factory=dict)
    data_names: list[str] | None = field(default_factory=list)  # None: not known, since `data` could not be read
    evaluate: dict[int, Evaluation] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)
    names: dict[str, bool] = field(default_factory=dict)  # name -> scored
    matrices: dict[str, list[str]] = field(default_factory=dict)
    dims: Dims | None = None


def load_recipe(path: Path | str, sets: Sequence[str] = ()) -> Recipe:
    """Read the recipe file `path`, with `sets` ("a.b.c=value") laid over it.

    Paths in the recipe are relative to its folder. Raises RecipeError with every problem, each with file:line:column.
    """
    file = Path(path)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "not there"
        near = "" if file.is_dir() or not file.parent.is_dir() else nearest(
            file.name, [entry.name for entry in file.parent.iterdir()])
        raise RecipeError(f"{file}: given a recipe that is {what}; expected a YAML file{near}")
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise RecipeError(f"{file}:{line}:{column}: given a byte that is not UTF-8; expected UTF-8 text: save the file "
                          "in that encoding") from None
    return parse_recipe(text, file=str(path), base_dir=file.resolve().parent, sets=sets)


def parse_recipe(source: str | Mapping[str, Any], *, file: str = "<recipe>", base_dir: Path | None = None,
                 sets: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text, or from Python values. `base_dir` (default: the current folder) resolves its paths.

    Raises RecipeError with every problem.
    """
    document = parse(source, file) if isinstance(source, str) else from_values(source, file)
    problems = Problems(document)
    if not isinstance(document.value, dict):
        problems.add((), f"given {shown(document.value)} at the top; expected a mapping with {', '.join(_KEYS)}")
        problems.raise_if_any()
    apply_sets(document, sets, problems)
    _refuse_secrets(document, problems)
    parts = _Parts(problems, (base_dir or Path.cwd()).resolve())
    canonical = json.dumps(document.value, sort_keys=True, ensure_ascii=False)
    recipe = _assemble(document, parts)
    problems.raise_if_any()
    assert recipe is not None
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Recipe(**recipe, sha256=digest, text=document.text, file=file, base_dir=parts.base_dir)


def _refuse_secrets(document: Document, problems: Problems) -> None:
    """Raises RecipeError when there is a secret: no other problem is looked for, so that no message can repeat it."""
    for line, column in secret_spans(document.text):
        problems.at(Place(0, line, column, f"{document.file}:{line}:{column}"),
                    f"given what looks like a secret (hidden); expected none: {CURE}")
    for trail, by_name in secret_keys(document.value):
        if by_name:
            problems.add(trail, f"given a key that names a secret (value hidden); expected none: {CURE}", key=True)
        elif not document.text or document.place(trail).order:  # what stands in the text has been found there
            problems.add(trail, f"given what looks like a secret (hidden); expected none: {CURE}")
    problems.raise_if_any()


def _assemble(document: Document, parts: _Parts) -> dict[str, Any] | None:
    """The fields of a Recipe, or None where a needed one could not be read."""
    top: dict[str, Any] = document.value
    problems = parts.problems
    unknown_keys(problems, (), top, _KEYS, "a recipe")
    _version(problems, top)
    name = _name(problems, top)
    seed = _seed(problems, top)
    model = _model(problems, top, parts.base_dir)
    runtime = read(problems, ("runtime",), top.get("runtime") or {}, Runtime, "runtime")
    if model is not None:
        parts.dims = read_dims(model, parts.base_dir)[0]
    _read_data(parts, top.get("data"))
    _read_evaluate(parts, top.get("evaluate"))
    measure = None
    if top.get("measure") is not None:
        measure = read(problems, ("measure",), top["measure"], MeasureOptions, "measure")
        if measure is not None:
            data_checks.check_measure(problems, measure, parts.dims)
            check_grid(problems, measure, parts.base_dir)
    budget = read_budget(problems, top.get("budget"), measure)
    _read_variants(document, parts)
    report_to = _report_to(problems, top.get("report_to"))
    tracking = read(problems, ("tracking",), top.get("tracking") or {}, Tracking, "tracking")
    card = read(problems, ("card",), top.get("card") or {}, Card, "card")
    goals = _read_goals(parts, top.get("goals"))
    if name is None or seed is None or model is None or runtime is None or goals is None or tracking is None:
        return None
    if problems:
        return None
    order = build_order({each: variant.parents() for each, variant in parts.variants.items()})
    return {"version": 1, "name": name, "seed": seed, "model": model, "runtime": runtime, "data": parts.data,
            "evaluate": list(parts.evaluate.values()), "measure": measure, "goals": goals,
            "report_to": report_to, "tracking": tracking, "budget": budget, "card": card,
            "variants": {each: parts.variants[each] for each in order}}


def _version(problems: Problems, top: dict[str, Any]) -> None:
    if "version" not in top:
        problems.add((), 'missing key "version"; expected version: 1 (the format of the recipe): add it at the top')
    elif top["version"] != 1 or isinstance(top["version"], bool | float | str):
        problems.add(("version",), f"given {shown(top['version'])}; expected 1, the only format there is")


def _name(problems: Problems, top: dict[str, Any]) -> str | None:
    if "name" not in top:
        problems.add((), 'missing key "name"; expected the name of the run: add name: my-run')
        return None
    name = top["name"]
    if not isinstance(name, str):
        problems.add(("name",), f'given {shown(name)}; expected text: put quotes around it')
        return None
    return name if check_name(problems, ("name",), name, "a run", key=False) else None


def _seed(problems: Problems, top: dict[str, Any]) -> int | None:
    seed = top.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MOST_SEED:
        problems.add(("seed",), f"given {shown(seed)}; expected a whole number from 0 to {_MOST_SEED}")
        return None
    return seed


def _model(problems: Problems, top: dict[str, Any], base_dir: Path) -> ModelSource | None:
    wanted = "a hub id (with @revision if you like), a folder, or builtin:tiny"
    if "model" not in top:
        problems.add((), f'missing key "model"; expected {wanted}: add model: builtin:tiny')
        return None
    value = top["model"]
    trail: Trail = ("model",)
    if isinstance(value, str):
        name, sign, revision = value.partition("@") if not (base_dir / value).is_dir() else (value, "", "")
        if sign and not revision:
            problems.add(trail, f"given {shown(value)}, with nothing after the @; expected a branch, tag or commit")
            return None
        value = {"id": name, **({"revision": revision} if sign else {})}
    elif isinstance(value, dict):
        trail = ("model", "id")
    else:
        problems.add(trail, f"given {shown(value)}; expected {wanted}, or a mapping with id, revision, "
                            "trust_remote_code")
        return None
    model = read(problems, ("model",), value, ModelSource, "model")
    if model is None:
        return None
    return model if _check_model(problems, trail, model, base_dir) else None


def _check_model(problems: Problems, trail: Trail, model: ModelSource, base_dir: Path) -> bool:
    folder = folder_of(model, base_dir)
    local = folder is not None
    if folder is None:
        path = base_dir / Path(model.id).expanduser()
        if model.id.startswith("builtin:"):
            problems.add(trail, f"unknown model {shown(model.id)}; expected one of {', '.join(BUILTIN)}"
                                f"{nearest(model.id, BUILTIN)}")
            return False
        if model.id.startswith((".", "/", "~")) or path.exists() or not looks_like_hub_id(model.id):
            what = "a file" if path.is_file() else "not there"
            problems.add(trail, f"given {shown(model.id)}, which is {what} ({path}){data_checks.near_files(path)}; "
                                "expected a model folder, a hub id (owner/name), or builtin:tiny")
            return False
    elif model.id not in BUILTIN and not (folder / "config.json").is_file():
        problems.add(trail, f"given {shown(model.id)}, a folder without config.json ({folder}); expected a folder that "
                            "transformers can load")
        return False
    if local and model.revision is not None:
        problems.add(trail, f"given the revision {shown(model.revision)} of a folder; expected a revision only with a "
                            "hub id: remove it")
        return False
    return True


def _report_to(problems: Problems, value: Any) -> tuple[str, ...]:
    """The trackers that are named, each once."""
    if value is None:
        return ()
    if not isinstance(value, list):
        cure = f": write [{value}]" if value in TRACKERS else ""
        problems.add(("report_to",), f"given {shown(value)}; expected a list of {', '.join(TRACKERS)}{cure}")
        return ()
    for index, name in enumerate(value):
        if name not in TRACKERS:
            near = nearest(name, TRACKERS) if isinstance(name, str) else ""
            problems.add(("report_to", index), f"unknown tracker {shown(name)}; expected one of {', '.join(TRACKERS)}"
                                               f"{near}")
    return tuple(dict.fromkeys(name for name in value if name in TRACKERS))


def _read_data(parts: _Parts, value: Any) -> None:
    if value is None:
        return
    body = mapping(parts.problems, ("data",), value, "a mapping of name: source, as train: {source: train.jsonl}")
    parts.data_names = list(body) if body is not None else None
    for name, entry in (body or {}).items():
        check_name(parts.problems, ("data", name), name, "data")
        if isinstance(entry, str):
            entry = {"source": entry}
        source = read(parts.problems, ("data", name), entry, DataSource, f'data "{name}"')
        if source is not None:
            parts.data[name] = source
    data_checks.check_data(parts.problems, parts.data, parts.data_names, parts.base_dir)


def _read_evaluate(parts: _Parts, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        parts.problems.add(("evaluate",), f"given {shown(value)}; expected a list of scores, each a line that begins "
                                          "with a dash: - exact_match: {data: test}", key=value is None)
        return
    for index, entry in enumerate(value):
        trail: Trail = ("evaluate", index)
        wanted = f"a mapping with one key, the score: {', '.join(EVALUATIONS)}"
        if not isinstance(entry, dict) or len(entry) != 1:
            given = f"{len(entry)} keys ({', '.join(entry)})" if isinstance(entry, dict) and entry else shown(entry)
            cure = ": begin a new entry with a dash" if isinstance(entry, dict) and len(entry) > 1 else ""
            parts.problems.add(trail, f"given {given}; expected {wanted}{cure}")
            continue
        (metric, options), = entry.items()
        if metric not in EVALUATIONS:
            unknown_keys(parts.problems, trail, [metric], EVALUATIONS, "evaluate")
            continue
        found = read(parts.problems, (*trail, metric), options, EVALUATIONS[metric], metric)
        if found is not None:
            parts.evaluate[index] = Evaluation(metric, found)
    data_checks.check_evaluate(parts.problems, parts.evaluate, parts.data, parts.data_names, parts.base_dir)


def _read_variants(document: Document, parts: _Parts) -> None:
    problems, top = parts.problems, document.value
    example = "variants such as tuned: {finetune: {method: lora, data: train}}"
    if "variants" not in top:
        problems.add((), f'missing key "variants"; expected {example}')
        return
    alone = top["variants"] == {} and parts.dims is not None and parts.dims.quantized  # scored, and nothing follows it
    if not isinstance(top["variants"], dict) or not (top["variants"] or alone):
        problems.add(("variants",), f"given {shown(top['variants'])}; expected {example}", key=True)
        return
    for name in top["variants"]:
        check_name(problems, ("variants", name), name, "a variant")
    parts.matrices = expand_matrices(document, STEPS, problems)
    variants = document.value["variants"]
    if len(variants) > _MOST_VARIANTS:
        problems.add(("variants",), f"given {len(variants)} variants; expected at most {_MOST_VARIANTS}", key=True)
        return
    parts.names = {name: not (isinstance(body, dict) and body.get("score") is False) for name, body in variants.items()}
    for name, body in variants.items():
        variant = _read_variant(parts, name, body)
        if variant is not None and name != BASE:
            parts.variants[name] = variant
    parts.variants = {name: replace(variant, writers=tuple(writer for data in variant.data_names()
                                                           for writer in writers_of(data, parts.data)))
                      for name, variant in parts.variants.items()}
    data_checks.check_written(problems, parts.data, parts.data_names, [BASE, *parts.names], parts.matrices)
    if checks.check_links(problems, parts.variants, list(parts.names), parts.matrices):
        checks.check_steps(problems, parts.variants, parts.data, parts.data_names, parts.dims)
        for variant in parts.variants.values():
            if variant.kind == "distill":
                from llmops.recipe.distill_checks import check_distill

                check_distill(problems, variant, parts.dims, parts.base_dir)


def _read_variant(parts: _Parts, name: str, value: Any) -> Variant | None:
    problems = parts.problems
    trail: Trail = ("variants", name)
    wanted = f"`from` and one step of {', '.join(STEPS)}"
    if not isinstance(value, dict) or not value:
        problems.add(trail, f"given {shown(value)}; expected {wanted}, as {{finetune: {{method: lora, data: train}}}}",
                     key=True)
        return None
    unknown_keys(problems, trail, value, _VARIANT_KEYS, f'variant "{name}"')
    parent, score = value.get("from", BASE), value.get("score", True)
    if not isinstance(parent, str):
        problems.add((*trail, "from"), f"given {shown(parent)}; expected the name of a variant, or no `from` for base")
    if not isinstance(score, bool):
        problems.add((*trail, "score"), f"given {shown(score)}; expected true or false (false builds without scoring)")
    steps = [key for key in value if key in STEPS]
    if len(steps) != 1:
        given = f"the steps {' and '.join(steps)}" if steps else "no step"
        cure = (f': make {steps[1]} a variant of its own, with from: {name}' if steps else ": add one")
        problems.add((*trail, *steps[1:2]), f"given {given} in one variant; expected exactly one of {', '.join(STEPS)}"
                     f"{cure}", key=True)
    read_steps = [_read_step(problems, (*trail, step), value[step], step) for step in steps]
    if len(steps) != 1 or not isinstance(parent, str) or not isinstance(score, bool):
        return None
    if read_steps[0] is None:
        if parent not in (BASE, *parts.names):
            refer(problems, (*trail, "from"), parent, [BASE, *parts.names], "a variant", parts.matrices)
        return None
    return Variant(name, parent, cast(Kind, steps[0]), read_steps[0], score)


def _read_step(problems: Problems, trail: Trail, value: Any, step: str) -> Options | None:
    methods = STEPS[step]
    body = mapping(problems, trail, value, f"a mapping with method ({', '.join(methods)}) and its options")
    if body is None:
        return None
    if "method" not in body:
        problems.add(trail, f'missing key "method" in {step}; expected one of {", ".join(methods)}: add method: '
                            f"{next(iter(methods))}", key=True)
        return None
    method = body["method"]
    if not isinstance(method, str) or method not in methods:
        known = ", ".join(methods)
        hint = ""
        if isinstance(method, str):
            other = next((kind for kind, names in STEPS.items() if method in names), None)
            hint = nearest(method, methods) + (f"; {method} is a method of {other}" if other else "")
        problems.add((*trail, "method"), f"unknown method {shown(method)} of {step}; expected one of {known}{hint}")
        return None
    return read(problems, trail, body, methods[method], f"{step} {method}")


def _read_goals(parts: _Parts, value: Any) -> Goals | None:
    problems = parts.problems
    if value is None:
        return Goals({}, {})
    body = mapping(problems, ("goals",), value, "a mapping of score or cost: bounds")
    if body is None:
        return None
    prefer = body.pop("prefer", None)
    if prefer is not None and not isinstance(prefer, str):
        problems.add(("goals", "prefer"), f"given {shown(prefer)}; expected a score or a cost: {', '.join(COSTS)}")
        prefer = None
    goals = {key: read(problems, ("goals", key), entry, Goal, f'goal "{key}"') for key, entry in body.items()}
    quality = {key: goal for key, goal in goals.items() if key not in COSTS and goal is not None}
    costs = {key: goal for key, goal in goals.items() if key in COSTS and goal is not None}
    return data_checks.check_goals(problems, Goals(quality, costs, prefer), list(parts.evaluate.values()),
                                   parts.names, parts.matrices)
