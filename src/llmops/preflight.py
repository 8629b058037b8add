"""Everything that can be refused before a weight is loaded, once a run has work to do.

The recipe has been validated by then; this reads the data itself: rows that cannot be read, training rows that stand in
a scored split or in the held-out data, held-out rows that stand in a scored split, a template that drops the
terminator, rows with nothing to train on, rows of one answer for a step that compares two, signals of another teacher;
calibration data that does not fill one crop; of a model on the hub, whose config.json is not read before, what its
dimensions do not allow.
Found here they cost a second (exit 2, nothing done); found by the step they would cost the steps before it.
`preflight_report` is the same proof as figures, for each data and length that a step trains on or holds out.

It takes the tokenizer, and with it transformers and torch (`AutoTokenizer` imports both), but no weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmops.data.sources import Rows, SourceError, load_rows
from llmops.errors import DataError, ModelError
from llmops.methods.finetune.options import Training
from llmops.models.builtin import locate
from llmops.recipe.cache_checks import check_caches
from llmops.recipe.checks import check_steps
from llmops.recipe.model import Dims, dims_of_file, folder_of, read_dims
from llmops.recipe.plan import Plan
from llmops.recipe.schema import Recipe
from llmops.recipe.shared_keys import writer_of
from llmops.recipe.source import Problems, from_values, parse

__all__ = ["KINDS", "preflight", "preflight_report", "report_text", "rows_of"]

#: the kinds of rows each score can read
KINDS = {"exact_match": ("messages", "prompt_completion"), "multiple_choice": ("choices",),
         "preference_accuracy": ("preference",)}
#: the kinds of rows a training step can read, one whose teacher answers, one whose student does, one that compares two
TRAINED = ("messages", "prompt_completion", "text")
ANSWERED = ("messages", "prompt_completion", "prompts")
TALKED = ("messages", "prompt_completion")
COMPARED = ("preference",)


@dataclass(frozen=True)
class _Use:
    """Data as steps train on it: once for each length and each way of training (kinds: of the rows it can read)."""

    data: str
    max_length: int
    kinds: tuple[str, ...]
    variants: tuple[str, ...]


#: Whether a terminator is trained, for people; None where the teacher answers, whose answers end by themselves.
_ENDS = {True: "yes", False: "NO", None: "as the teacher ends its answers"}


def preflight(plan: Plan) -> list[str]:
    """Check the data of every stage that is not done; returns a line for each training set, for the log.

    Raises DataError, RecipeError for signals of another teacher or data and for steps that the model's dimensions do
    not allow, ModelError when the tokenizer cannot be loaded.
    """
    check_caches(plan)
    dims = _dimensions(plan.recipe)
    _check_calibration(plan.recipe, {stage.variant for stage in plan.stages if not stage.built}, dims)
    found = _check(plan, {stage.variant for stage in plan.stages if not stage.built})
    return [f"data {use.data}: " + ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in report.items()
                                             if count and what != "longest") for use, _, report, _ in found]


def preflight_report(plan: Plan) -> list[dict[str, Any]]:
    """Figures of every data set that a step of the plan trains on, whether or not the step is done.

    data, kind, variants, max_length, rows, examples (or pairs), tokens, trained_tokens, dropped, truncated, longest
    (tokens of the longest row, before any cut), terminator_trained (every example that was not cut ends its trained
    part with a token that ends a turn), template_hash, and what else `encode` counts. Raises as `preflight`.
    """
    entries: list[dict[str, Any]] = []
    for use, rows, report, proof in _check(plan, {stage.variant for stage in plan.stages}):
        counts = {"trained_tokens" if key == "trainable_tokens" else key: count for key, count in report.items()}
        entries.append({"data": use.data, "kind": rows.kind, "variants": list(use.variants),
                        "max_length": use.max_length, **counts, **proof})
    return entries


def report_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """`preflight_report` for a terminal: a line for each data set and two indented ones."""
    lines: list[str] = []
    for entry in entries:
        made = "pairs" if "pairs" in entry else "examples"
        share = entry["trained_tokens"] / entry["tokens"] if entry["tokens"] else 0.0
        lines += [f"data {entry['data']} ({entry['kind']}) for {', '.join(entry['variants'])}: {entry['rows']:,} rows, "
                  f"{entry[made]:,} {made}, {entry['tokens']:,} tokens, {entry['trained_tokens']:,} trained "
                  f"({share:.1%})",
                  f"  longest row {entry['longest']:,} tokens (max_length {entry['max_length']:,}); "
                  f"{entry['dropped']:,} dropped, {entry['truncated']:,} truncated"
                  + "".join(f", {entry[key]:,} {key.replace('_', ' ')}" for key in
                            ("identical", "same_after_cut", "answers_cut", "turn_by_turn", "system_folded")
                            if entry.get(key)),
                  f"  terminator trained: {_ENDS[entry['terminator_trained']]}; "
                  f"template {entry['template_hash'][:12]}"]
    return "\n".join(lines) if lines else "no step trains on data"


def rows_of(recipe: Recipe, name: str) -> Rows:
    """The rows of a recipe's data; what its own line has wrong is told with the line and column of the recipe."""
    try:
        return load_rows(name, recipe.data, recipe.base_dir, recipe.seed)
    except SourceError as error:
        place: Any = recipe.file
        if recipe.text:
            place = parse(recipe.text, recipe.file).place(("data", error.name, error.key))
        raise DataError(f"{place}: data.{error.name}.{error.key}: {error}") from error


def _check(plan: Plan, variants: set[str]) -> list[tuple[_Use, Rows, dict[str, int], dict[str, Any]]]:
    """(use, rows, what encoding counted, what it proved) of the data that `variants` train on."""
    recipe, loaded = plan.recipe, dict[str, Rows]()

    def rows(name: str) -> Rows:
        if name not in loaded:
            loaded[name] = rows_of(recipe, name)
        return loaded[name]

    scored = []
    for entry in recipe.evaluate:
        name = getattr(entry.options, "data", None)
        if name is None:
            continue
        scored.append(rows(name))
        kinds = KINDS.get(entry.metric)
        if kinds is not None and rows(name).kind not in kinds:
            raise DataError(f'{entry.id}: data "{name}" holds rows of kind {rows(name).kind}; {entry.metric} needs '
                            f"{' or '.join(kinds)}; rename its columns with `columns:`, or name other data")
        if getattr(entry.options, "slices", None) or getattr(entry.options, "cluster", None):
            from llmops.evaluate.slices import labels

            labels(rows(name).rows, entry.options.slices, entry.options.cluster, f"{entry.id} (data {name})")
    uses = _uses(recipe, variants)
    if not uses:
        return []
    from llmops.data.leak import check_leak
    from llmops.models.load import load_tokenizer

    for use in uses:
        _check_kind(use, rows(use.data))
    for train in dict.fromkeys(use.data for use in uses):
        for test in scored:
            check_leak(rows(train), test)
    for name in sorted(variants):
        for held in recipe.variants[name].held_names() if name in recipe.variants else ():
            for train in recipe.variants[name].read_names():
                asked, written = _asked(recipe, train)
                if not written or asked != _asked(recipe, held)[0]:  # ranges of what one variant writes do not overlap
                    check_leak(rows(asked), rows(_asked(recipe, held)[0]))
    tokenizer = load_tokenizer(locate(recipe.model.id, recipe.base_dir), revision=recipe.model.revision,
                               trust_remote_code=recipe.model.trust_remote_code)
    for name in sorted(variants):
        _check_student(recipe, name, tokenizer)
    return [(use, rows(use.data), *_proved(use, rows(use.data), recipe, tokenizer)) for use in uses]


def _dimensions(recipe: Recipe) -> Dims | None:
    """The model's dimensions, where they are known. Raises RecipeError, with file and line, for steps of a hub model
    that they do not allow: of folders and built-in models reading the recipe has told them."""
    if folder_of(recipe.model, recipe.base_dir) is not None:
        return read_dims(recipe.model, recipe.base_dir)[0]
    from llmops.models.load import hub_config

    file = hub_config(recipe.model.id, recipe.model.revision)
    dims = dims_of_file(file)[0] if file is not None else None
    if dims is not None:
        problems = Problems(parse(recipe.text, recipe.file) if recipe.text else from_values({}, recipe.file))
        check_steps(problems, recipe.variants, recipe.data, list(recipe.data), dims)
        problems.raise_if_any()
    return dims


def _check_calibration(recipe: Recipe, variants: set[str], dims: Dims | None) -> None:
    """Raise DataError where a step calibrates on data that does not fill one of its crops, cut to the context."""
    needs: dict[str, dict[int, str]] = {}
    for name, variant in recipe.variants.items():
        length, data = getattr(variant.options, "length", None), getattr(variant.options, "data", None)
        if name in variants and length is not None and isinstance(data, str) and not _asked(recipe, data)[1]:
            needs.setdefault(data, {})[length] = name
    if dims is None or dims.context is None or not needs:
        return
    from llmops.data.render import check_crop
    from llmops.models.load import load_tokenizer

    tokenizer = load_tokenizer(locate(recipe.model.id, recipe.base_dir), revision=recipe.model.revision,
                               trust_remote_code=recipe.model.trust_remote_code)
    for data, lengths in needs.items():
        rows = rows_of(recipe, data)
        for length, name in lengths.items():
            try:
                check_crop(rows, tokenizer, min(length, dims.context))
            except DataError as error:
                raise DataError(f"variant {name}: {error}") from error


def _check_student(recipe: Recipe, name: str, tokenizer: Any) -> None:
    """Raise ModelError when a pretrained student knows other tokens than its teacher."""
    variant = recipe.variants.get(name)
    student = getattr(variant.options, "student", None) if variant is not None else None
    if student is None or student.model is None:
        return
    from llmops.models.load import load_tokenizer
    from llmops.models.student import agreed_vocabulary

    theirs = load_tokenizer(locate(student.model, recipe.base_dir), revision=student.revision,
                            trust_remote_code=recipe.model.trust_remote_code)
    try:
        agreed_vocabulary(tokenizer, theirs, student.model)
    except ModelError as error:
        raise ModelError(f"variant {name}: {error}") from error


def _uses(recipe: Recipe, variants: set[str]) -> list[_Use]:
    """What `variants` train on and hold out, in the order of the recipe."""
    found: dict[tuple[str, int, tuple[str, ...]], list[str]] = {}
    for name, variant in recipe.variants.items():
        options = variant.options
        if name in variants and isinstance(options, Training):
            kinds = (COMPARED if getattr(options, "method", None) == "dpo" else
                     ANSWERED if getattr(options, "answers", "data") == "teacher" else
                     TALKED if getattr(options, "on_policy", None) is not None else TRAINED)
            for data in (*variant.read_names(), *variant.held_names()):
                asked, written = _asked(recipe, data)
                who = name if data in variant.read_names() else f"{name} (held out)"
                found.setdefault((asked, options.max_length, ANSWERED if written else kinds), []).append(who)
    return [_Use(*key, variants=tuple(names)) for key, names in found.items()]


def _asked(recipe: Recipe, data: str) -> tuple[str, bool]:
    """(data that is there before anything is built, whether a variant answers its prompts): the prompts behind rows
    that a variant writes, else the data itself."""
    written = False
    while (how := writer_of(data, recipe.data)) is not None:
        data, written = how.prompts, True
    return data, written


def _check_kind(use: _Use, rows: Rows) -> None:
    """Raise DataError when the rows are not what the steps train on."""
    if rows.kind in use.kinds:
        return
    needs = "preference (prompt, chosen, rejected)" if use.kinds is COMPARED else " or ".join(use.kinds)
    cure = ("train on the chosen answers with `columns: {prompt: prompt, completion: chosen}`, or use method dpo"
            if rows.kind == "preference" else "let a teacher answer them (`answers: teacher` of a distill step, or "
            "`synthesize`), or name other data" if rows.kind == "prompts" else
            "rename its columns with `columns:`, or name other data")
    raise DataError(f'variant {", ".join(use.variants)}: data "{use.data}" holds rows of kind {rows.kind}; the step '
                    f"trains on {needs}; {cure}")


def _proved(use: _Use, rows: Rows, recipe: Recipe, tokenizer: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """What encoding counts, and what of the masks is proved."""
    from llmops.data.chat import template_hash, terminators
    from llmops.data.pairs import encode_pairs
    from llmops.data.render import IGNORED, encode, prompts_and_answers

    limits = recipe.data[use.data].limits
    if use.kinds is ANSWERED:
        asked = [len(prompt.input_ids) for prompt in prompts_and_answers(rows, tokenizer)]
        return ({"rows": len(rows.rows), "examples": len(asked), "dropped": 0, "truncated": 0, "tokens": sum(asked),
                 "trainable_tokens": 0, "longest": max(asked)},
                {"terminator_trained": None, "template_hash": template_hash(tokenizer)})
    if use.kinds is COMPARED:
        pairs = encode_pairs(rows, tokenizer, max_length=use.max_length, limits=limits)
        report, examples = pairs.report, [*pairs.chosen, *pairs.rejected]
    else:
        encoded = encode(rows, tokenizer, max_length=use.max_length, limits=limits)
        report, examples = encoded.report, encoded.examples
    stops = terminators(tokenizer)
    last = [next(label for label in reversed(example["labels"]) if label != IGNORED) for example in examples
            if len(example["input_ids"]) < use.max_length]
    return report, {"terminator_trained": bool(last) and all(token in stops for token in last),
                    "template_hash": template_hash(tokenizer)}
