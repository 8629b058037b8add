"""Quantizers side by side: `python benchmarks/bench_quantize.py --peer-python PYTHON... --text FOLDER`.

Ours against llm-compressor, GPTQModel, AutoRound, HQQ and torchao: the same float32 model, the same calibration tokens,
the same widths and groups, one thread each, and one evaluator for all, which sees nothing but dense weights as each
tool's own dequantization gives them. A contender is a process of its own (`_quantize_worker.py`); those of one method
take its cells in turn, one after the other, so that a machine that slows down slows all of them.

    perplexity   by the protocol of the GPTQ and Wanda papers; pairs with Student's interval over the same windows
    exact match  of the tuned built-in model, in parentheses
    divergence   KL from the float32 model to the quantized one on the first windows, nats a token: no chance lowers it
    s, CPU s     of the quantization alone; medians over the cells of a method, and of ours / theirs cell by cell
    MiB          most resident memory over that of the loaded model, in the first cell of a fresh process

What a small model says of one rounding is in part chance: `--draws N` repeats every cell on the same function with its
channels permuted, and other calibration crops (`_quantize_draws.py`). Ratios are then of the means over draws, their
intervals of draws and windows both (`_quantize_pairs.py`).

Peers need not be run again after a change of ours: `--only ours --against RESULTS.json...` takes their cells from
earlier results of the same model, calibration and protocol (and ours of the same code, so that a run that was cut off
goes on with `--against` its own file). Perplexities are the same in every run, so such a table has
them; it has no times, which are compared within one run alone. `--only peers` makes the other half. The file is written
after every cell.

The peers' Pythons (a peer that none of them can import is left out, with the reason in the table):

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers==5.17.0 datasets==5.2.0 \\
        llmcompressor==0.14.0.1 auto-round==0.15.1 hqq==0.2.8.post1 torchao==0.18.0
    python -m venv gptqmodel && gptqmodel/bin/pip install torch==2.13.0 transformers==5.17.0 gptqmodel==7.6.0

    python benchmarks/bench_quantize.py --peer-python peers/bin/python gptqmodel/bin/python --text FOLDER

FOLDER holds wikitext2-valid.txt, state-union.txt, inaugural.txt and tinyshakespeare.txt (public texts, not part of this
project); without it the second model is left out. Models are made once and kept in `--cache`. What is deliberately the
same: symmetric grids but for HQQ, whose zero point is what it fits (theirs is a float, which no integer format stores;
ours is stored in the bits of a weight); `lm_head` dense; every other option of a tool at its default, the steps of
AutoRound aside (`--iterations`, for both).

Combinations that no peer has stand for themselves and count among ours of all methods: GPTQ and AutoRound (as many
steps) after AWQ's factors, the latter with a `distill` child, 4 epochs over the same calibration tokens, and with bits
and groups chosen layer by layer (`auto`), as many bits a weight on average as the cell has with its scales of 16 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from _quantize_case import (
    CONTENDERS,
    OURS,
    PACKAGES,
    Case,
    divergence_table,
    methods_of,
    perplexity_table,
    picked,
    place,
    skipped,
    speed_table,
    speeds,
    stored,
    verdict_table,
    verdicts,
)
from _quantize_draws import code, drawn
from _quantize_models import Scorer, add_options, dense_state, prepared, put, wanted_models
from _runner.contender import Contender
from _runner.machine import about, said, versions_there
from _runner.results import Results, add_option, free


def cell(worker: Contender, bits: int, group: int, differs: dict[str, Any], model: Any, scorer: Scorer, folder: Path,
         late: bool) -> dict[str, Any]:
    """One row: what the contender spent, and what its answer is worth. differs: the draw's part of the case."""
    method, tool, _ = CONTENDERS[worker.name]
    row: dict[str, Any] = {"contender": worker.name, "method": method, "tool": tool, "bits": bits, "group": group}
    if differs:
        row["draw"] = differs["seed"]
    if tool == OURS:
        row["code"] = code()
    if why := "not run: out of time" if late else skipped(method, bits):
        return {**row, "failed": why}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row |= worker.ask(bits=bits, group=group, out=str(folder), case=differs)
    if "failed" not in row:
        try:
            put(model, dense_state(folder))
            row |= scorer(model)
        except Exception as error:
            row["failed"] = f"its answer cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}"
    shutil.rmtree(folder, ignore_errors=True)
    return row


def race(asked: argparse.Namespace, case: Case, scorer: Scorer, pythons: dict[str, str], rows: list[dict[str, Any]],
         keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """All cells but those in `rows`; who follow the same method take each one right after the other. keep: is shown all
    rows after every cell."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    scorers = (scorer.beside(model), replace(scorer.beside(model), questions=None))
    workers: dict[str, Contender] = {}
    done, rows = set(map(place, rows)), list(rows)
    names = [name for names in methods_of(pythons).values() for name in names]
    differs: dict[int, dict[str, Any]] = {}
    for draw, bits, group, name in product(range(0 if asked.gather else asked.draws), asked.bits, asked.groups, names):
        if (name, bits, group, draw) in done:
            continue
        if draw not in differs:
            differs[draw] = drawn(case, draw)
        if name not in workers:
            workers[name] = Contender(name, "_quantize_worker.py", case.as_dict(), pythons[name], asked.logs,
                                      threads=case.threads, GPTQMODEL_CPU_WORKERS="2")
        late = time.monotonic() > asked.until
        row = cell(workers[name], bits, group, differs[draw], model, scorers[draw > 0], asked.logs / "answer", late)
        rows.append(row)
        keep(rows)
        told = row.get("failed") or f"{row['perplexity']:.5g} after {row['cpu_seconds']:.1f} CPU s"
        print(f"  draw {draw}: {name} {bits} bits, groups of {group}: {told}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.end()
    return rows


def compare(name: str, asked: argparse.Namespace, pythons: dict[str, str],
            keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All contenders on one model: the case, every row, and what they come to. keep: is shown that after every cell."""
    case, scorer, like = prepared(name, asked, iterations=asked.iterations)
    like["iterations"] = asked.iterations
    taken = [] if asked.make_models else stored(
        [each for path in asked.against for each in json.loads(path.read_text())["results"]], like,
        [(bits, group) for bits in asked.bits for group in asked.groups], asked.contenders or list(CONTENDERS),
        range(asked.draws), [code(), *asked.codes])

    def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
        timed = [] if asked.only or asked.against else speeds(rows)
        return {**like, "rows": rows, "verdicts": verdicts(rows, like["base"]["perplexity"]), "speeds": timed}

    return summed(race(asked, case, scorer, pythons, taken, lambda rows: keep(summed(rows))))


def tables(result: dict[str, Any]) -> str:
    score = f", exact match {result['base']['exact_match']:.1%}" if "exact_match" in result["base"] else ""
    failed = {(row["contender"], row["failed"]) for row in result["rows"] if "failed" in row}
    told = [f"{name}: {why}" for name, why in sorted(failed) if not why.startswith("not run")]
    return "\n".join([f"{result['model']}: float32 perplexity {result['base']['perplexity']:.5g}{score}; calibrated on "
                      f"{result['calibration']['crops']} crops of {result['calibration']['length']} tokens; scored on "
                      f"{result['protocol']['windows']} windows of {result['protocol']['context']} tokens", "",
                      perplexity_table(result["rows"], result["base"]), "", divergence_table(result["rows"]), "",
                      verdict_table(result["verdicts"]),
                      *(["", speed_table(result["speeds"])] if result["speeds"] else []),
                      *(["", *told] if told else [])])


def able(asked: argparse.Namespace) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """(contender -> its Python, contender -> why it is left out, package -> version)."""
    found: dict[str, tuple[str, str]] = {}
    for python in asked.peer_python:
        versions = versions_there(python, {**PACKAGES, "torch": "torch"})
        if versions.pop("torch").split("+")[0] != torch.__version__.split("+")[0]:
            sys.exit(f"{python} has another torch than this Python ({torch.__version__}); expected the same version")
        for module, version in versions.items():
            found.setdefault(module, (python, version))
    pythons = {name: sys.executable if tool == OURS else found[module][0]
               for name, (_, tool, module) in CONTENDERS.items() if tool == OURS or module in found}
    left = {name: f"none of the given Pythons can import {module}" for name, (_, tool, module) in CONTENDERS.items()
            if name not in pythons}
    wanted = picked(asked.contenders or list(CONTENDERS), asked.only)
    return ({name: python for name, python in pythons.items() if name in wanted}, left,
            {PACKAGES[module]: version for module, (_, version) in found.items()})


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", nargs="+", default=[], help="Pythons with the peers; each is asked for what "
                                                                     "it can import")
    add_options(parser, logs="/tmp/bench_quantize", tokens=12_288_000)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="instead of all")
    parser.add_argument("--only", choices=["ours", "peers"], help="run no others; no times are compared then")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="results of earlier runs: the peers' cells "
                        "that are in them are not run again, nor ours of the very same code; no times are compared")
    parser.add_argument("--codes", nargs="+", default=[], help="of ours in earlier results (key code) whose answers "
                        "are known to be those of this code, to the bit")
    parser.add_argument("--gather", action="store_true", help="run nothing: one file of what --against holds")
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 2, 4, 8])
    parser.add_argument("--groups", nargs="+", type=int, default=[128, 32])
    parser.add_argument("--draws", type=int, default=1, help="of the model with its channels in another order and of "
                        "the calibration crops, the first as it is (%(default)s); exact match is taken of that alone")
    parser.add_argument("--iterations", type=int, default=200, help="steps of AutoRound")
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell is begun after so many, or after an "
                                                                          "interrupt; its row says so")
    parser.add_argument("--make-models", action="store_true", help="make the models, score them, and stop")
    add_option(parser, "benchmarks/results/quantize-DATE.json, or the next free quantize-DATE-N.json")
    return parser.parse_args()


def main() -> None:
    asked = options()
    torch.set_num_threads(asked.threads)
    pythons, left, versions = able(asked)
    names = dict.fromkeys(asked.peer_python, "PATH") | {str(path): path.name for path in asked.against}
    record = about(asked, ("torch", "transformers"), threads=asked.threads, named=names)
    record["versions"] |= versions
    print(said(record), *(f"left out: {name}: {why}" for name, why in left.items()), sep="\n")
    file = Results(asked.out or free(f"quantize-{record['date']}"), {**record, "left_out": left})
    done: list[dict[str, Any]] = []
    asked.until = file.began + 60 * asked.minutes
    signal.signal(signal.SIGINT, lambda *_: setattr(asked, "until", 0.0))
    for name in wanted_models(asked):
        done.append(compare(name, asked, {} if asked.make_models else pythons,
                            lambda more: file.keep(results=[*done, more])))
        if not asked.make_models:
            print("\n" + tables(done[-1]), flush=True)
    if not asked.make_models:
        file.end(results=done)


if __name__ == "__main__":
    main()
