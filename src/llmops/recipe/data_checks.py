"""What can be wrong with data, scores, the workload and the goals although every field has the right type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmops.data.options import BUILTIN, DataSource
from llmops.data.readers import READERS
from llmops.data.splits import parse_split
from llmops.errors import nearest
from llmops.evaluate.options import Evaluation
from llmops.measure.options import MeasureOptions
from llmops.recipe.model import Dims, looks_like_hub_id
from llmops.recipe.names import refer
from llmops.recipe.schema import BASE, BOUNDS, COSTS, Goal, Goals, score_ids
from llmops.recipe.source import Problems, Trail, shown
from llmops.recipe.tree import cycle

if TYPE_CHECKING:
    from llmops.evaluate.options import Harness

__all__ = ["check_data", "check_evaluate", "check_goals", "check_measure", "check_written", "is_local", "near_files"]

_OTHER_SUFFIXES = (".xlsx", ".xls", ".arrow", ".pkl", ".pickle", ".pt", ".zip", ".gz", ".zst", ".tar",
                   ".md", ".docx", ".pdf", ".yaml", ".yml", ".xml", ".html", ".db")
_BUILTIN_SPLITS = {"builtin:facts": ("train", "validation", "test"), "builtin:choices": ("train", "validation", "test"),
                   "builtin:study": ("train",), "builtin:world": ("train", "validation", "test"),
                   "builtin:preferences": ("train", "validation", "test")}


def is_local(source: str, base_dir: Path) -> bool:
    """Whether a source names a file or folder here, and not a hub data set or a builtin."""
    if source.startswith("builtin:"):
        return False
    return (source.startswith((".", "/", "~")) or source.lower().endswith(tuple(READERS) + _OTHER_SUFFIXES)
            or (base_dir / source).exists() or not looks_like_hub_id(source))


def check_data(problems: Problems, data: Mapping[str, DataSource], names: Sequence[str] | None, base_dir: Path) -> None:
    """Sources that are there, `from` that leads somewhere, splits that can be read. `names`: all, sound or not."""
    for name, source in data.items():
        trail: Trail = ("data", name)
        if source.from_ is not None:
            refer(problems, (*trail, "from"), source.from_, names, "other data")
        if source.source is not None:
            _check_source(problems, (*trail, "source"), source.source, base_dir)
        if source.split is not None:
            _check_split(problems, (*trail, "split"), source, base_dir)
    graph = {name: [source.from_] for name, source in data.items() if source.from_ is not None}
    while found := cycle(graph):
        problems.add(("data", found[0], "from"), f"given a circle: {' -> '.join(found)}; expected `from` to end at "
                                                 "data with a source: give one of them a source")
        del graph[found[0]]


def check_written(problems: Problems, data: Mapping[str, DataSource], names: Sequence[str] | None,
                  variants: Sequence[str], matrices: dict[str, list[str]]) -> None:
    """Data that a variant writes: a variant that is there, and prompts that do not lead back to the data itself."""
    graph: dict[str, list[str]] = {}
    for name, source in data.items():
        trail: Trail = ("data", name, "synthesize")
        if source.synthesize is not None:
            refer(problems, (*trail, "teacher"), source.synthesize.teacher, variants, "a variant", matrices)
            refer(problems, (*trail, "prompts"), source.synthesize.prompts, names, "data")
        asked = source.from_ if source.synthesize is None else source.synthesize.prompts
        graph[name] = [asked] if asked is not None else []
    while found := cycle(graph):
        inside = next((name for name in found if data[name].synthesize is not None), None)
        if inside is not None:  # a circle of `from` alone has been told
            problems.add(("data", inside, "synthesize", "prompts"),
                         f"given a circle: {' -> '.join(found)}; expected prompts that end at data with a source")
        graph[found[0]] = []


def _check_source(problems: Problems, trail: Trail, source: str, base_dir: Path) -> None:
    if source.startswith("builtin:"):
        if source not in BUILTIN:
            problems.add(trail, f"unknown data {shown(source)}; expected one of {', '.join(BUILTIN)}"
                                f"{nearest(source, BUILTIN)}")
        return
    if not is_local(source, base_dir):
        return
    path = base_dir / Path(source).expanduser()
    if not path.exists():
        problems.add(trail, f"given {shown(source)}, which is not there ({path}){near_files(path)}; expected a jsonl, "
                            "csv, parquet or txt file, a folder, a hub data set id, or builtin:NAME")
    elif path.is_file() and path.suffix.lower() not in tuple(READERS):
        problems.add(trail, f"given {shown(source)}, a file of a kind that is not read; expected one of "
                            f"{', '.join(tuple(READERS))}: convert it, one row a line in jsonl")
    elif path.is_file() and path.stat().st_size == 0:
        problems.add(trail, f"given {shown(source)}, an empty file ({path}); expected at least one row")


def near_files(path: Path) -> str:
    """`; did you mean "train.jsonl"?`, or what the folder holds, or that the folder is not there either."""
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} is not there either"
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    listed = f"; {folder} holds {', '.join(there[:8])}" if there else f"; {folder} is empty"
    return nearest(path.name, there) or listed


def _check_split(problems: Problems, trail: Trail, source: DataSource, base_dir: Path) -> None:
    """The name of a split, where the names are known; the model has read the syntax already."""
    split = parse_split(source.split)
    (start, start_percent), (stop, stop_percent) = split.start or (0.0, False), split.stop or (0.0, False)
    if split.start and split.stop and start_percent == stop_percent and (start < 0) == (stop < 0) and start >= stop:
        problems.add(trail, f"given {shown(source.split)}, an empty range; expected the first number below the second")
    known = _BUILTIN_SPLITS.get(source.source or "")
    if known and split.name and split.name not in known:
        problems.add(trail, f"given {shown(source.split)}; expected a split of {source.source}: {', '.join(known)}"
                            f"{nearest(split.name, known)}")
    if source.source is not None and split.name not in (None, "train") and (base_dir / source.source).is_file():
        problems.add(trail, f"given {shown(source.split)} of a single file, which has no split of that name; expected "
                            'a range of it, as "[:90%]", or a folder with a file a split')


def check_evaluate(problems: Problems, entries: Mapping[int, Evaluation], data: Mapping[str, DataSource],
                   names: Sequence[str] | None, base_dir: Path) -> None:
    """Data that exist and fit, ids that differ. `entries` by their place in the list."""
    seen: dict[str, int] = {}
    for index, entry in entries.items():
        options = entry.options
        trail: Trail = ("evaluate", index, entry.metric)
        for score in score_ids(entry):
            if score in seen:
                problems.add(trail, f'given the score "{score}" twice (also entry {seen[score]}); expected it once: '
                                    "remove one, or give the data a second name with `from`", key=True)
            seen.setdefault(score, index)
        if getattr(options, "slices", None) or getattr(options, "cluster", None):
            from llmops.recipe.slice_checks import check_slices

            check_slices(problems, trail, entry, data, base_dir)
        if entry.metric == "harness":
            _check_include(problems, trail, options, base_dir)
            continue
        if refer(problems, (*trail, "data"), options.data, names, "data"):
            _check_kind(problems, trail, entry, data)
        extract = options.extract if entry.metric == "exact_match" else None
        if extract is not None and not re.compile(extract).groups:
            problems.add((*trail, "extract"), f"given {shown(extract)}, which has no group; expected one around the "
                                              f"answer, as '({extract})'")
        if getattr(options, "stride", None) is not None and options.stride > options.context:
            problems.add((*trail, "stride"), f"given {options.stride}; expected at most the context "
                                             f"({options.context}), or tokens between the windows go unscored")


def _check_include(problems: Problems, trail: Trail, options: Harness, base_dir: Path) -> None:
    if options.include is not None and not (base_dir / Path(options.include).expanduser()).is_dir():
        path = base_dir / Path(options.include).expanduser()
        problems.add((*trail, "include"), f"given {shown(options.include)}, which is no folder ({path})"
                     f"{near_files(path)}; expected a folder with task YAML files")


def _check_kind(problems: Problems, trail: Trail, entry: Evaluation, data: Mapping[str, DataSource]) -> None:
    """Builtin data are known to be questions, choices, preferences or text."""
    root, hops = data.get(entry.options.data), 0
    while root is not None and root.from_ is not None and hops < len(data):
        root, hops = data.get(root.from_), hops + 1
    if root is not None and root.synthesize is not None:
        problems.add((*trail, "data"), f"given {shown(entry.options.data)}, which {root.synthesize.teacher} writes: a "
                     "score against a teacher's own words says nothing of what is right; expected data with answers of "
                     "its own")
        return
    source = root.source if root is not None else None
    if source not in BUILTIN:
        return
    fits = {"exact_match": "builtin:facts", "multiple_choice": "builtin:choices",
            "preference_accuracy": "builtin:preferences"}.get(entry.metric)
    if fits is not None and source != fits and (fits, source) != ("builtin:facts", "builtin:study"):
        problems.add((*trail, "data"), f"given {shown(entry.options.data)}, which is {source}; expected data "
                                       f"for {trail[-1]}, such as {fits}")


def check_measure(problems: Problems, options: MeasureOptions, dims: Dims | None) -> None:
    """A workload that fits the model."""
    total = options.prompt_tokens + options.new_tokens
    if dims is not None and dims.context is not None and total > dims.context:
        key = "new_tokens" if options.prompt_tokens < dims.context else "prompt_tokens"
        problems.add(("measure", key), f"given {options.prompt_tokens} prompt and {options.new_tokens} new tokens; "
                                       f"expected at most {dims.context} together, the model's context")


def check_goals(problems: Problems, goals: Goals, evaluate: Sequence[Evaluation], variants: Mapping[str, bool],
                matrices: dict[str, list[str]]) -> Goals:
    """Goals on what is measured, against what is scored; bare metric names become score ids.

    variants: name -> whether it is scored.
    """
    ids = [score for entry in evaluate for score in score_ids(entry)]
    quality: dict[str, Goal] = {}
    for key, goal in goals.quality.items():
        trail: Trail = ("goals", key)
        score = _resolve(problems, trail, key, ids)
        if score is not None:
            if score in quality:
                problems.add(trail, f'given a second goal for "{score}"; expected one: merge the two', key=True)
            quality[score] = goal
            _check_score_goal(problems, trail, goal, score, evaluate)
        _check_goal(problems, trail, goal, variants, matrices)
    for key, goal in goals.costs.items():
        for bound in ("noninferior", "max_gap"):
            if getattr(goal, bound) is not None:
                problems.add(("goals", key, bound), f"given {bound} of the cost {shown(key)}; expected it of a score; "
                                                    "bound a cost by max_ratio, min or max")
        _check_goal(problems, ("goals", key), goal, variants, matrices)
    prefer = goals.prefer
    if prefer is not None and prefer not in COSTS:
        prefer = _resolve(problems, ("goals", "prefer"), prefer, ids, key=False)
    return Goals(quality, dict(goals.costs), prefer)


def _resolve(problems: Problems, trail: Trail, given: str, ids: Sequence[str], *, key: bool = True) -> str | None:
    if given in ids:
        return given
    matching = [score for score in ids if score.split(":")[0] == given]
    if len(matching) == 1:
        return matching[0]
    if matching:
        problems.add(trail, f"given {shown(given)}, which several scores share; expected one of {', '.join(matching)}",
                     key=key)
        return None
    metrics = [score.split(":")[0] for score in ids]
    bare = [metric for metric in dict.fromkeys(metrics) if metrics.count(metric) == 1]
    known = [*ids, *bare, *COSTS]
    scored = ", ".join(ids) if ids else "none: add it to `evaluate`"
    problems.add(trail, f"given {shown(given)}, which nothing scores; expected a score of this recipe ({scored}) or a "
                        f"cost ({', '.join(COSTS)}){nearest(given, known)}", key=key)
    return None


def _check_score_goal(problems: Problems, trail: Trail, goal: Goal, score: str, evaluate: Sequence[Evaluation]) -> None:
    """Groups where a goal is about groups, and a margin that a share can have."""
    entry = next(entry for entry in evaluate if score in score_ids(entry))
    if goal.max_gap is not None and not getattr(entry.options, "slices", None):
        problems.add((*trail, "max_gap"), f'given max_gap of "{score}", which has no groups; expected a score with '
                                          "`slices`: name columns of its data there, as slices: [topic]")
    if goal.noninferior is not None and goal.noninferior >= 1 and entry.metric not in ("perplexity", "harness"):
        problems.add((*trail, "noninferior"), f"given {goal.noninferior:g}; expected a share below 1, as 0.02 for two "
                                              "points")


def _check_goal(problems: Problems, trail: Trail, goal: Goal, variants: Mapping[str, bool],
                matrices: dict[str, list[str]]) -> None:
    given = goal.bounds()
    if not given:
        problems.add(trail, f"given a goal without a bound; expected at least one of {', '.join(BOUNDS)}", key=True)
    if goal.min is not None and goal.max is not None and goal.min > goal.max:
        problems.add((*trail, "min"), f"given {goal.min:g}, above max ({goal.max:g}); expected min <= max")
    if goal.against is None:
        return
    if given and goal.reference is None:
        problems.add((*trail, "against"), "given `against` without max_drop, noninferior, max_gap or max_ratio; "
                                          "expected one of them, or no `against`", key=True)
    if refer(problems, (*trail, "against"), goal.against, [BASE, *variants], "a variant", matrices) \
            and not variants.get(goal.against, True):
        problems.add((*trail, "against"), f"given {shown(goal.against)}, which has score: false; expected a variant "
                                          "that is scored: remove its score: false")
