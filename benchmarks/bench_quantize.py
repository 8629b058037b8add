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

Peers need not be run again after a change of ours: `--only ours --against RESULTS.json...` takes their cells from
earlier results of the same model, calibration and protocol. Perplexities are the same in every run, so such a table has
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
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    skipped,
    speed_table,
    speeds,
    stored,
    verdict_table,
    verdicts,
)
from _quantize_models import (
    Scorer,
    calibration,
    dense_state,
    pretrained_text,
    put,
    text_rows,
    text_scorer,
    tiny_rows,
    tiny_scorer,
    tuned_tiny,
)

HERE = Path(__file__).parent


class Worker:
    """One contender's process."""

    def __init__(self, name: str, case: Case, python: str, logs: Path) -> None:
        self.name, self.logs = name, logs
        environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "GPTQMODEL_CPU_WORKERS": "2"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), str(HERE.parent / "kernels"), str(HERE)])
        self.log = logs / f"{name}.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen([python, str(HERE / "_quantize_worker.py"), name,
                                             json.dumps(case.as_dict())], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=logs)
        self.failed = self.hear().get("failed", "")

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        made: dict[str, Any] = json.loads(line) if line else {"failed": f"its process ended; see {self.log.name}"}
        return made

    def take(self, bits: int, group: int, out: Path) -> dict[str, Any]:
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return {"failed": self.failed or f"its process ended; see {self.log.name}"}
        self.process.stdin.write(json.dumps({"bits": bits, "group": group, "out": str(out)}) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def cell(worker: Worker, bits: int, group: int, model: Any, scorer: Scorer, place: Path, late: bool) -> dict[str, Any]:
    """One row: what the contender spent, and what its answer is worth."""
    method, tool, _ = CONTENDERS[worker.name]
    row: dict[str, Any] = {"contender": worker.name, "method": method, "tool": tool, "bits": bits, "group": group}
    if why := "not run: out of time" if late else skipped(method, bits):
        return {**row, "failed": why}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    row |= worker.take(bits, group, place)
    if "failed" not in row:
        try:
            put(model, dense_state(place))
            row |= scorer(model)
        except Exception as error:
            row["failed"] = f"its answer cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}"
    shutil.rmtree(place, ignore_errors=True)
    return row


def race(asked: argparse.Namespace, case: Case, scorer: Scorer, pythons: dict[str, str], rows: list[dict[str, Any]],
         keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """All cells but those in `rows`; who follow the same method take each one right after the other. keep: is shown all
    rows after every cell."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    workers: dict[str, Worker] = {}
    done, rows = {(row["contender"], row["bits"], row["group"]) for row in rows}, list(rows)
    for bits in asked.bits:
        for group in asked.groups:
            for name in (name for names in methods_of(pythons).values() for name in names):
                if (name, bits, group) in done:
                    continue
                if name not in workers:
                    workers[name] = Worker(name, case, pythons[name], asked.logs)
                late = time.monotonic() > asked.until
                row = cell(workers[name], bits, group, model, scorer, asked.logs / "answer", late)
                rows.append(row)
                keep(rows)
                told = row.get("failed") or f"{row['perplexity']:.5g} after {row['cpu_seconds']:.1f} CPU s"
                print(f"  {name} {bits} bits, groups of {group}: {told}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.end()
    return rows


def compare(name: str, asked: argparse.Namespace, pythons: dict[str, str],
            keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All contenders on one model: the case, every row, and what they come to. keep: is shown that after every cell."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tuned_tiny(asked.cache) if name == "tiny" else pretrained_text(asked.text, asked.cache, asked.tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = asked.cache / f"{name}.jsonl"
    if name == "tiny":
        tiny_rows(rows)
        scorer, length = tiny_scorer(tokenizer, asked.questions, asked.windows * 8), 128
    else:
        text_rows(asked.text, rows)
        scorer, length = text_scorer(asked.text, tokenizer, asked.windows), 256
    from safetensors.torch import save_file

    samples = asked.calibration // length
    crops = calibration(rows, tokenizer, samples, length, 0)
    save_file({"tokens": crops}, asked.cache / f"{name}-calibration.safetensors")
    case = Case(str(folder), str(asked.cache / f"{name}-calibration.safetensors"), str(rows), samples, length,
                iterations=asked.iterations, threads=asked.threads)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base, scorer = scorer(exact), scorer.beside(exact)
    del exact
    print(f"{name}: perplexity {base['perplexity']:.5g}", file=sys.stderr, flush=True)
    about = {"model": name, "calibration": {"crops": samples, "length": length}, "protocol": scorer.protocol(),
             "iterations": asked.iterations, "base": base}
    names = asked.contenders or list(CONTENDERS)
    taken = [] if asked.make_models else stored(
        [each for path in asked.against for each in json.loads(path.read_text())["results"]], about,
        [(bits, group) for bits in asked.bits for group in asked.groups], names)

    def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
        timed = [] if asked.only or asked.against else speeds(rows)
        return {**about, "rows": rows, "verdicts": verdicts(rows, base["perplexity"]), "speeds": timed}

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
    probe = ("import importlib.util as u, importlib.metadata as m, json, sys; "
             "print(json.dumps({n: m.version(p) for n, p in json.loads(sys.argv[1]).items() if u.find_spec(n)}))")
    found: dict[str, tuple[str, str]] = {}
    for python in asked.peer_python:
        told = subprocess.run([python, "-c", probe, json.dumps({**PACKAGES, "torch": "torch"})], check=True,
                              capture_output=True, text=True).stdout
        versions = json.loads(told)
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


def machine(asked: argparse.Namespace) -> dict[str, Any]:
    import importlib.metadata

    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else []
    paths = {*map(str, asked.peer_python), str(asked.text), str(asked.cache), str(asked.logs), str(asked.out)}
    against = {str(path): path.name for path in asked.against}
    shown = ["PATH" if word in paths else against.get(word, word) for word in sys.argv[1:]]
    return {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "cpus": os.cpu_count(),
            "cpu_model": names[0] if names else platform.processor(), "python": platform.python_version(),
            "threads": asked.threads, "load": os.getloadavg()[0],
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "command": " ".join(["python benchmarks/bench_quantize.py", *shown])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", nargs="+", default=[], help="Pythons with the peers; each is asked for what "
                                                                     "it can import")
    parser.add_argument("--text", type=Path, help="folder with the texts of the second model")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/bench_quantize_cache"), help="where models are kept")
    parser.add_argument("--models", nargs="+", choices=["tiny", "text"], default=["tiny", "text"])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="instead of all")
    parser.add_argument("--only", choices=["ours", "peers"], help="run no others; no times are compared then")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="results of earlier runs: the peers' cells "
                        "that are in them are not run again; no times are compared then")
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 2, 4, 8])
    parser.add_argument("--groups", nargs="+", type=int, default=[128, 32])
    parser.add_argument("--calibration", type=int, default=16_384, help="tokens of it, in crops of 128 (tiny) or 256")
    parser.add_argument("--iterations", type=int, default=200, help="steps of AutoRound")
    parser.add_argument("--tokens", type=int, default=12_288_000, help="tokens the second model is pretrained on")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--windows", type=int, default=16, help="of 2,048 tokens, most that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell is begun after so many, or after an "
                                                                          "interrupt; its row says so")
    parser.add_argument("--make-models", action="store_true", help="make the models, score them, and stop")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default benchmarks/results/quantize-DATE.json)")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/bench_quantize"), help="folder for what workers print")
    asked = parser.parse_args()
    for folder in (asked.logs, asked.cache):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(asked.threads)
    pythons, left, versions = able(asked)
    about = machine(asked)
    about["versions"] |= versions
    print(json.dumps({**about, "left_out": left}))
    out = asked.out or HERE / "results" / f"quantize-{about['date']}.json"
    out.parent.mkdir(exist_ok=True)
    results, began = [], time.monotonic()
    about["left_out"] = left

    def keep(*more: dict[str, Any]) -> None:
        about["minutes"] = round((time.monotonic() - began) / 60, 1)
        scratch = out.with_suffix(".part")
        scratch.write_text(json.dumps({**about, "results": [*results, *more]}, indent=1) + "\n")
        scratch.replace(out)

    asked.until = began + 60 * asked.minutes
    signal.signal(signal.SIGINT, lambda *_: setattr(asked, "until", 0.0))
    for name in asked.models:
        if name == "text" and asked.text is None:
            print("\ntext: left out, for no --text FOLDER with its texts was given")
            continue
        results.append(compare(name, asked, {} if asked.make_models else pythons, keep))
        if not asked.make_models:
            print("\n" + tables(results[-1]), flush=True)
    if asked.make_models:
        return
    keep()
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
