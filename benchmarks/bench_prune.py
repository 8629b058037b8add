"""Pruners side by side: `python benchmarks/bench_prune.py --peer-python PYTHON --text FOLDER`.

Ours against llm-compressor: the same float32 model, the same calibration tokens, the same sparsity and pattern, one
thread each, and one evaluator for all, which sees nothing but dense weights with zeros. A contender is a process of its
own (`_prune_worker.py`); those of a cell take it in turn, `--repeats` times, so that a machine that slows down slows
all of them; times are medians over repeats, ratios of times have Student's interval over the same turns.

    perplexity   by the protocol of the GPTQ and Wanda papers; pairs with Student's interval over the same windows
    zeros        of the linear layers inside the decoder blocks
    s, CPU s     of the pruning alone, calibration passes included
    MiB          most resident memory over that of the loaded model, in the first cell of a fresh process

    answers      of the model `tiny`: perplexity of its questions' answers; pairs over the same questions
    order        how SparseGPT, Wanda and magnitude stand to each other (`_prune_order.py`), and how uneven the
                 inputs of the layers are, which is what it hangs on

A mask is a choice between scores that may be nearly equal, and what a deep model makes of another choice is in part
chance: `--draws N` repeats every cell on the same function with its channels permuted, and other calibration crops
(`_quantize_draws.py`). Intervals are then of draws and windows both. `--against RESULTS.json...` takes rows of earlier
runs (the peer's, and ours of the same code; without their times), so that draws can be added to those there are.

Models, texts, evaluator and the peer's Python are those of bench_quantize.py, which says how to make them; two models
are of this script alone (`_prune_models.py`): `given`, any of yours (`--model FOLDER`, or a GGUF file), and
`text-outliers`, the text model with outliers put in by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from _prune_draws import CELL, SOURCES, TIMES, apart, every, place, quicker, taken
from _prune_models import given_model, outlier_model
from _prune_order import answer_losses, order_table, orders, uneven, uneven_table
from _quantize_case import Case
from _quantize_draws import code, drawn
from _quantize_models import Scorer, add_options, dense_state, prepared, pretrained_text, put, wanted_models
from _quantize_pairs import alike
from _runner.contender import Contender
from _runner.machine import about, said, versions_there
from _runner.results import Results, add_option, free
from _runner.tables import head, line
from _runner.turns import in_turn, shown

OURS = "llmops"
#: contender -> (method, tool)
CONTENDERS = {
    "magnitude-llmops": ("magnitude", OURS), "global-llmops": ("magnitude, global", OURS),
    "wanda-llmops": ("wanda", OURS), "wanda-llmcompressor": ("wanda", "llm-compressor"),
    "owl-llmops": ("wanda, owl", OURS), "measured-llmops": ("wanda, sensitivity", OURS),
    "sparsegpt-llmops": ("sparsegpt", OURS), "sparsegpt-llmcompressor": ("sparsegpt", "llm-compressor")}
#: those that a pattern leaves nothing to decide
UNSTRUCTURED = ("global-llmops", "owl-llmops", "measured-llmops")
CELLS = ((0.5, "unstructured"), (0.5, "2:4"))


def race(asked: argparse.Namespace, case: Case, model: Any, scorer: Scorer, rows: list[dict[str, Any]],
         keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """A row a contender, cell and draw but for those in `rows`; the first repeat's answer is scored, all are timed.
    model: takes what contenders made; keep: is shown all rows after every cell."""
    names, done, rows = able(asked), set(map(place, rows)), list(rows)
    workers: dict[str, Contender] = {}
    for draw, (sparsity, pattern) in product(range(asked.draws), asked.cells):
        here = [name for name in names if (pattern == "unstructured" or name not in UNSTRUCTURED)
                and (name, sparsity, pattern, draw) not in done]
        differs = drawn(case, draw) if here else {}
        fresh = {name: blank(name, sparsity, pattern, draw) for name in here}
        for repeat, name in in_turn(here, asked.repeats if draw == 0 else 1):
            if name not in workers:
                workers[name] = Contender(name, "_prune_worker.py", case.as_dict(), sys.executable if CONTENDERS[name][
                    1] == OURS else asked.peer_python, asked.logs, threads=case.threads)
            folder = asked.logs / "answer"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            take(fresh[name], workers[name].ask(sparsity=sparsity, pattern=pattern, case=differs,
                                                out=str(folder) if repeat == 0 else ""))
            if repeat == 0 and "failed" not in fresh[name]:
                fresh[name] |= scored(folder, model, scorer if draw == 0 else replace(scorer, questions=None))
                print(f"  draw {draw}: {name} {sparsity} {pattern}: perplexity {fresh[name]['perplexity']:.5g}, "
                      f"{fresh[name]['times'][0]:.1f} s", file=sys.stderr, flush=True)
        rows = ordered([*rows, *fresh.values()], asked.cells)
        keep(rows)
    for worker in workers.values():
        worker.end()
    return rows


def blank(name: str, sparsity: float, pattern: str, draw: int) -> dict[str, Any]:
    """The row of a contender that has not been asked yet. Ours say of which code they are."""
    method, tool = CONTENDERS[name]
    return {"contender": name, "method": method, "tool": tool, "sparsity": sparsity, "pattern": pattern,
            "times": [], "cpu_times": []} | ({"draw": draw} if draw else {}) | (
                {"code": code(SOURCES)} if tool == OURS else {})


def ordered(rows: list[dict[str, Any]], cells: list[tuple[float, str]]) -> list[dict[str, Any]]:
    """Draw by draw, cell by cell as they were asked for, contenders as in `CONTENDERS`: as without earlier rows."""
    return sorted(rows, key=lambda row: (row.get("draw", 0), cells.index((row["sparsity"], row["pattern"])),
                                         list(CONTENDERS).index(row["contender"])))


def able(asked: argparse.Namespace) -> list[str]:
    """The contenders that were asked for and can be run."""
    return [name for name, (_, tool) in CONTENDERS.items()
            if (tool == OURS or asked.peer_python) and name in (asked.contenders or CONTENDERS)]


def take(row: dict[str, Any], found: dict[str, Any]) -> None:
    """Add an answer's times to its row, or why there is none."""
    if "failed" in found:
        row["failed"] = found["failed"]
        return
    row["times"].append(found["seconds"])
    row["cpu_times"].append(found["cpu_seconds"])
    row.setdefault("peak_bytes", found["peak_bytes"])


def scored(folder: Path, model: Any, scorer: Scorer) -> dict[str, Any]:
    """What an answer is worth."""
    put(model, dense_state(folder))
    return {**scorer(model), **answers(model, scorer), "zeros": zeros(model)}


def zeros(model: Any) -> float:
    weights = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def answers(model: Any, scorer: Scorer) -> dict[str, Any]:
    """The losses of the answers of a model that is asked questions; nothing of others."""
    if scorer.questions is None:
        return {}
    losses = answer_losses(model, scorer.tokenizer, scorer.questions)
    return {"answers_perplexity": math.exp(statistics.fmean(losses)), "answer_losses": losses}


def compare(name: str, asked: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All contenders on one model. keep: is shown what there is of it after every cell."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = None
    if name == "given":
        folder = given_model(asked.model, asked.cache)
    elif name == "text-outliers":
        folder = outlier_model(pretrained_text(asked.text, asked.cache, asked.tokens))
    case, scorer, like = prepared(name, asked, folder)
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    like["base"] |= answers(model, scorer)
    like["uneven"] = uneven(model, load_file(case.calibration)["tokens"])
    if name == "given":
        like["name"] = asked.model.name
    earlier = taken([each for path in asked.against for each in json.loads(path.read_text())["results"]], like,
                    [(who, *cell, draw) for who, cell, draw in product(
                        asked.contenders or CONTENDERS, asked.cells, range(asked.draws))], code(SOURCES))
    rows = race(asked, case, model, scorer, earlier, lambda rows: keep({**like, "rows": rows}))
    return {**like, "rows": rows, "orders": orders(like["base"], rows)}


def table(result: dict[str, Any]) -> str:
    """A line a contender and cell, the peer's beside ours; those of a method over the draws that all of it have."""
    base, rows = result["base"], alike(result["rows"], CELL)
    score = f", exact match {base['exact_match']:.1%}" if "exact_match" in base else ""
    lines = [f"{result['model']}: float32 perplexity {base['perplexity']:.5g}{score}; calibrated on "
             f"{result['calibration']['crops']} crops of {result['calibration']['length']} tokens; scored on "
             f"{result['protocol']['windows']} windows of {result['protocol']['context']} tokens", "",
             head(["pattern", "method", "tool", "draws", "perplexity", "exact match", "answers", "zeros", "s", "CPU s",
                   "MiB", "perplexity, ours / theirs", "s, ours / theirs", "CPU s"], "lllrrrrrrrrrrr")]
    for row in rows:
        what = [f"{row['sparsity']:.0%} {row['pattern']}", row["method"], row["tool"]]
        if "perplexity" not in row:
            lines.append(line([*what, f"failed: {row.get('failed')}"]))
            continue
        times = [every(row, key) for key in TIMES]
        lines.append(line([*what, str(len(row["draws"])), spread(row), f"{row['exact_match']:.1%}" if "exact_match" in
                           row else "", f"{row['answers_perplexity']:.4g}" if "answers_perplexity" in row else "",
                           f"{row['zeros']:.1%}", *(f"{statistics.median(some):.1f}" if some else "" for some in times),
                           f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "", *beside(row, rows)]))
    return "\n".join(lines)


def spread(row: dict[str, Any]) -> str:
    """`121.4 (115.2 to 131)`: what the mean loss gives, and the least and most of its draws."""
    each = [draw["perplexity"] for draw in row["draws"].values()]
    return f"{row['perplexity']:.5g}" + (f" ({min(each):.4g} to {max(each):.4g})" if len(each) > 1 else "")


def beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Ours over this row's: perplexity, seconds, CPU seconds; empty where it is ours or ours has no such row."""
    mine = next((each for each in rows if each["tool"] == OURS and "perplexity" in each and all(
        each[key] == row[key] for key in ("method", *CELL))), None)
    ratio = None if mine is None or mine is row else apart(mine, row)
    if mine is None or ratio is None:
        return ["", "", ""]
    times = [quicker(mine, row, key) for key in TIMES]
    return [f"{ratio[0]:.4f} +- {ratio[1]:.4f}", *(shown(each) if each else "" for each in times)]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python with llm-compressor; without it ours run alone")
    add_options(parser, logs="/tmp/bench_prune", tokens=2_560_000, more=("text-outliers", "given"))
    parser.add_argument("--model", type=Path, help="the model `given`: a folder of transformers, or a GGUF file")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="instead of all")
    parser.add_argument("--cells", nargs="+", default=[f"{s}/{p}" for s, p in CELLS], help="SPARSITY/PATTERN")
    parser.add_argument("--repeats", type=int, default=3, help="turns of a cell in draw 0 (%(default)s); "
                        "other draws have one")
    parser.add_argument("--draws", type=int, default=1, help="of the model with its channels in another order and of "
                        "the calibration crops, the first as it is (%(default)s); exact match is taken of that alone")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="results of earlier runs, whose rows are "
                        "not run again")
    add_option(parser, "benchmarks/results/prune-DATE.json, or the next free prune-DATE-N.json")
    asked = parser.parse_args()
    if "given" in asked.models and (asked.model is None or not asked.model.exists()):
        parser.error(f"--models given with --model {asked.model}; expected a model's folder, or a GGUF file")
    asked.cells = [(float(cell.partition("/")[0]), cell.partition("/")[2]) for cell in asked.cells]
    return asked


def main() -> None:
    asked = options()
    torch.set_num_threads(asked.threads)
    record = about(asked, ("torch", "transformers"), threads=asked.threads, named={
        str(asked.peer_python): "PATH"} | {str(path): path.name for path in asked.against})
    if asked.peer_python:
        record["versions"] |= versions_there(asked.peer_python, {"llmcompressor": "llmcompressor"})
    print(said(record))
    file = Results(asked.out or free(f"prune-{record['date']}"), record)
    done: list[dict[str, Any]] = []
    for name in wanted_models(asked):
        done.append(compare(name, asked, lambda more: file.keep(results=[*done, more])))
        print("\n" + table(done[-1]), flush=True)
        print("\nInput norms of the layers\n\n" + uneven_table(done[-1]["uneven"]), flush=True)
        if done[-1]["orders"]:
            print("\nLoss over the dense model's, nats a token\n\n" + order_table(done[-1]["orders"]), flush=True)
    file.end(results=done)


if __name__ == "__main__":
    main()
