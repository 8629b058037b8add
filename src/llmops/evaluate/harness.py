"""Tasks of lm-evaluation-harness on the model as it lies in memory, one Score a task, its items kept for pairing.

lm-eval (extra `harness`) prompts and scores; we choose the metric, keep its samples, and add what it lacks: an
interval, and items that two variants can be paired by. Its own comparison of two models is unpaired and several times
too wide.

Tasks are taken from the `include` folder alone when all of them are defined there: indexing the thousands that lm-eval
ships takes most of a minute. Paths in a local task's `data_files` are read from that folder, and nothing then needs
the network; a named task fetches its data set through `datasets`, unless HF_HUB_OFFLINE is set and it is cached. Left
out: groups' totals (their tasks are scored one by one), tasks that run generated code.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmops.errors import DataError, LlmopsError, unknown
from llmops.evaluate.live import dtype_name, scoring, tokenizer_sha256
from llmops.evaluate.options import Harness
from llmops.evaluate.score import Item, Score
from llmops.evaluate.slices import labels
from llmops.evaluate.statistics import summarize
from llmops.quantity import Quantity

__all__ = ["evaluate", "load_tasks", "quiet", "run_tasks", "sample_id"]

BOOTSTRAP = 1000  # resamples lm-eval may use for the standard error of a metric that is no mean


def evaluate(model: Any, tokenizer: Any, rows: object, options: Harness, *, id: str, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """One Score a task, with id `harness:TASK`; `rows` is not used: tasks bring their data. `seed` is not used either:
    few-shot examples are drawn with lm-eval's own seed, so that figures equal those of its command line.

    Raises LlmopsError when lm-eval is not installed, a folder, task or metric is unknown; DataError when a task's data
    cannot be read.
    """
    with quiet():
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise LlmopsError(f"{id}: harness tasks need lm-evaluation-harness, which is not installed ({error}); "
                              'install it with: pip install "llmops[harness]"') from error
        manager, tasks = load_tasks(options, id)
        if progress is not None:
            progress(0, len(tasks))
        # lm-eval sets padding on the tokenizer it is given, hence the copy
        runner = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=options.batch_size)
        with scoring(model):
            found = run_tasks(runner, manager, tasks, options, BOOTSTRAP)
    common = {"id": "harness/lm-eval", "lm_eval": lm_eval.__version__, "limit": options.limit, "chat": options.chat,
              "dtype": dtype_name(model), "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    scores = [_score(name, task, found, options, common) for name, task in tasks.items()]
    if progress is not None:
        progress(len(tasks), len(tasks))
    return scores


def run_tasks(runner: Any, manager: Any, tasks: Mapping[str, Any], options: Harness, bootstrap: int) -> dict[str, Any]:
    """lm-eval's own walk over the tasks, with its samples; `runner` answers the requests. No global seed is touched."""
    import lm_eval

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=runner, tasks=list(tasks.values()), task_manager=manager, num_fewshot=options.shots,
        limit=options.limit, apply_chat_template=options.chat, log_samples=True, bootstrap_iters=bootstrap,
        random_seed=None, numpy_random_seed=None, torch_random_seed=None)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's log lines and other people's deprecations are not ours to print; its bars are shown on a terminal
    only."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()))
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def load_tasks(options: Harness, id: str) -> tuple[Any, dict[str, Any]]:
    """The task manager, and {name: Task} of every leaf task asked for, with its data read."""
    from lm_eval.tasks import TaskManager

    folder = Path(options.include).expanduser().resolve() if options.include is not None else None
    if folder is not None and not folder.is_dir():
        raise LlmopsError(f"{id}: include {options.include!r} is no folder; expected one with task YAML files, beside "
                          "the recipe")
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder is not None else None
    if manager is None or not set(options.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(folder) if folder is not None else None)
    for name in options.tasks:
        if name not in manager.all_tasks:
            known = sorted(manager.all_tasks)
            raise LlmopsError(f"{id}: " + (unknown("task", name, known) if len(known) <= 20 else
                                           f'unknown task "{name}"; expected one that lm-eval lists (lm-eval ls tasks) '
                                           "or that a YAML file under `include` defines"))
    with chdir(folder) if folder is not None else nullcontext():
        try:
            return manager, dict(manager.load(options.tasks)["tasks"])
        except Exception as error:  # datasets, jinja, yaml and task code all fail in their own ways
            raise DataError(f"{id}: the data of {', '.join(options.tasks)} cannot be read ({type(error).__name__}: "
                            f"{error}); expected data files beside the task's YAML, or a data set that is cached or "
                            "reachable") from error


def _score(name: str, task: Any, found: Mapping[str, Any], options: Harness, common: Mapping[str, Any]) -> Score:
    samples = found["samples"][name]
    kept = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == kept]
    metric = _metric(name, task, samples[0], options.metric)
    aggregation, items = _items(getattr(task.aggregation()[metric], "__name__", "unnamed"), metric, samples)
    notes = labels([sample["doc"] for sample in samples], options.slices, options.cluster, f"harness:{name}")
    items = [replace(item, detail={**item.detail, **note}) for item, note in zip(items, notes, strict=True)]
    unit = _unit(metric, aggregation, items)
    how = f"lm-eval {name}, {metric}"
    figures = found["results"][name]
    if aggregation in ("mean", "exp_mean"):
        value, stderr = summarize(items, aggregation, unit, how)
    else:
        number = float(figures[f"{metric},{kept}"])
        given = figures.get(f"{metric}_stderr,{kept}")
        stderr = float(given) if isinstance(given, int | float) and math.isfinite(given) else None
        value = (Quantity.measured(number, unit, f"{how}, {aggregation}", n=len(items)) if math.isfinite(number) else
                 Quantity.null(unit, f"lm-eval's {aggregation} was not finite"))
    higher = found["higher_is_better"].get(name, {}).get(metric)
    protocol = {**common, "task": name, "version": found["versions"].get(name), "metric": metric, "filter": kept,
                "shots": found["n-shot"].get(name), "aggregation": aggregation}
    higher = aggregation != "exp_mean" if higher is None else bool(higher)
    return Score(f"harness:{name}", metric, higher, value, stderr, protocol, items)


def _metric(name: str, task: Any, sample: Mapping[str, Any], asked: str | None) -> str:
    known = [metric for metric in task.aggregation() if metric in sample["metrics"]]
    if asked is not None and asked not in known:
        raise LlmopsError(f"harness:{name}: {unknown('metric', asked, known)}")
    return asked or known[0]


def _items(aggregation: str, metric: str, samples: Sequence[Mapping[str, Any]]) -> tuple[str, list[Item]]:
    """How the items make the value, in the terms of statistics.AGGREGATIONS where they suffice, and the items."""
    if aggregation in ("weighted_perplexity", "bits_per_byte"):  # (log-likelihood, words or bytes) a document
        scale = math.log(2) if aggregation == "bits_per_byte" else 1.0
        pairs = [sample[metric] for sample in samples]
        return ("mean" if aggregation == "bits_per_byte" else "exp_mean",
                [_item(sample, metric, -total / size / scale, {"weight": size})
                 for sample, (total, size) in zip(samples, pairs, strict=True)])
    if aggregation == "perplexity":  # log-likelihood an item
        return "exp_mean", [_item(sample, metric, -sample[metric], {}) for sample in samples]
    numbers = all(isinstance(sample[metric], int | float) for sample in samples)
    return ("mean" if aggregation == "mean" and numbers else f"lm-eval {aggregation}",
            [_item(sample, metric, float(sample[metric]) if numbers else None, {}) for sample in samples])


def _item(sample: Mapping[str, Any], metric: str, score: float | None, detail: dict[str, Any]) -> Item:
    answer, more = _answer(sample, metric)
    finite = score if score is not None and math.isfinite(score) else None
    return Item(sample_id(sample), finite, answer,
                {"doc_id": sample["doc_id"], "expected": _expected(sample), **more, **detail})


def sample_id(sample: Mapping[str, Any]) -> str:
    """The item's id: 16 hex digits over lm-eval's own hashes of document, prompt and target."""
    shown = "".join(sample[key] for key in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def _answer(sample: Mapping[str, Any], metric: str) -> tuple[str, dict[str, Any]]:
    """What the model said: the text it wrote, or the choice it found most likely, with all log-likelihoods."""
    given = sample["filtered_resps"]
    if isinstance(given[0], str):
        return given[0], {}
    if not isinstance(given[0], list | tuple) or len(given) < 2:
        return "", {}
    choices = [str(arguments[1]).strip() for arguments in sample["arguments"]]  # without the space before a choice
    likelihoods = [float(pair[0]) for pair in given]
    by = [value / max(1, len(choice)) if metric == "acc_norm" else value
          for value, choice in zip(likelihoods, choices, strict=True)]
    finite = [value if math.isfinite(value) else None for value in likelihoods]
    return choices[by.index(max(by))], {"loglikelihoods": finite}


def _expected(sample: Mapping[str, Any]) -> str:
    """The right answer as text; a task of choices names its place among them."""
    target, arguments = sample["target"], sample["arguments"]
    if isinstance(target, int) and 0 <= target < len(arguments) and len(arguments) > 1:
        return str(arguments[target][1]).strip()
    return str(target)


def _unit(metric: str, aggregation: str, items: Sequence[Item]) -> str:
    if aggregation == "exp_mean":
        return "perplexity"
    if metric == "bits_per_byte":
        return "bits/byte"
    return "fraction" if all(item.score is not None and 0 <= item.score <= 1 for item in items) else "score"
