"""Pruners side by side: `python benchmarks/bench_prune.py --peer-python PYTHON --text FOLDER`.

Ours against llm-compressor: the same float32 model, the same calibration tokens, the same sparsity and pattern, one
thread each, and one evaluator for all, which sees nothing but dense weights with zeros. A contender is a process of its
own (`_prune_worker.py`); those of a cell take it in turn, `--repeats` times, so that a machine that slows down slows
all of them; times are medians over repeats.

    perplexity   by the protocol of the GPTQ and Wanda papers; pairs with Student's interval over the same windows
    zeros        of the linear layers inside the decoder blocks
    s, CPU s     of the pruning alone, calibration passes included
    MiB          most resident memory over that of the loaded model, in the first cell of a fresh process

Models, texts, evaluator and the peer's Python are those of bench_quantize.py, which says how to make them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from _quantize_case import Case, paired
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


class Worker:
    """One contender's process."""

    def __init__(self, name: str, case: Case, python: str, logs: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), str(HERE.parent / "kernels"), str(HERE)])
        self.log = logs / f"{name}.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen([python, str(HERE / "_prune_worker.py"), name, json.dumps(case.as_dict())],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                            env=environment, cwd=logs)
        self.failed = self.hear().get("failed", "")

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        made: dict[str, Any] = json.loads(line) if line else {"failed": f"its process ended; see {self.log.name}"}
        return made

    def take(self, sparsity: float, pattern: str, out: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return {"failed": self.failed or f"its process ended; see {self.log.name}"}
        self.process.stdin.write(json.dumps({"sparsity": sparsity, "pattern": pattern, "out": out}) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def race(asked: argparse.Namespace, case: Case, scorer: Scorer) -> list[dict[str, Any]]:
    """A row a contender and cell; the first repeat's answer is scored, all are timed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    names = [name for name, (_, tool) in CONTENDERS.items()
             if (tool == OURS or asked.peer_python) and name in (asked.contenders or CONTENDERS)]
    workers = {name: Worker(name, case, sys.executable if CONTENDERS[name][1] == OURS else asked.peer_python,
                            asked.logs) for name in names}
    rows: dict[tuple[str, float, str], dict[str, Any]] = {}
    for sparsity, pattern in asked.cells:
        for repeat in range(asked.repeats):
            for name in names:
                if pattern != "unstructured" and name in UNSTRUCTURED:
                    continue
                place = asked.logs / "answer"
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                found = workers[name].take(sparsity, pattern, str(place) if repeat == 0 else "")
                row = rows.setdefault((name, sparsity, pattern), {
                    "contender": name, "method": CONTENDERS[name][0], "tool": CONTENDERS[name][1],
                    "sparsity": sparsity, "pattern": pattern, "times": [], "cpu_times": []})
                if "failed" in found:
                    row["failed"] = found["failed"]
                    continue
                row["times"].append(found["seconds"])
                row["cpu_times"].append(found["cpu_seconds"])
                row.setdefault("peak_bytes", found["peak_bytes"])
                if repeat == 0:
                    put(model, dense_state(place))
                    row |= scorer(model) | {"zeros": zeros(model)}
                    print(f"  {name} {sparsity} {pattern}: perplexity {row['perplexity']:.5g}, {found['seconds']:.1f} "
                          "s", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.end()
    return list(rows.values())


def zeros(model: Any) -> float:
    weights = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def compare(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one model."""
    from safetensors.torch import save_file
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
    samples = asked.calibration // length
    crops = calibration(rows, tokenizer, samples, length, 0)
    save_file({"tokens": crops}, asked.cache / f"{name}-calibration.safetensors")
    case = Case(str(folder), str(asked.cache / f"{name}-calibration.safetensors"), str(rows), samples, length,
                threads=asked.threads)
    base = scorer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    return {"model": name, "calibration": {"crops": samples, "length": length}, "protocol": scorer.protocol(),
            "base": base, "rows": race(asked, case, scorer)}


def table(result: dict[str, Any]) -> str:
    """A line a contender and cell, the peer's beside ours."""
    base, rows = result["base"], result["rows"]
    score = f", exact match {base['exact_match']:.1%}" if "exact_match" in base else ""
    lines = [f"{result['model']}: float32 perplexity {base['perplexity']:.5g}{score}; calibrated on "
             f"{result['calibration']['crops']} crops of {result['calibration']['length']} tokens; scored on "
             f"{result['protocol']['windows']} windows of {result['protocol']['context']} tokens", "",
             "| pattern | method | tool | perplexity | exact match | zeros | s | CPU s | MiB | perplexity, ours / "
             "theirs | s, ours / theirs | CPU s |", "|-|-|-|-:|-:|-:|-:|-:|-:|-:|-:|-:|"]
    for row in rows:
        if "perplexity" not in row:
            lines.append(f"| {row['sparsity']:.0%} {row['pattern']} | {row['method']} | {row['tool']} | failed: "
                         f"{row.get('failed')} |")
            continue
        exact = f"{row['exact_match']:.1%}" if "exact_match" in row else ""
        mine = next((each for each in rows if each["tool"] == OURS and "perplexity" in each and all(
            each[key] == row[key] for key in ("method", "sparsity", "pattern"))), None)
        beside = " | | |"
        if mine is not None and mine is not row:
            ratio, half = paired(mine["losses"], row["losses"])
            pairs = [statistics.median(a / b for a, b in zip(mine[key], row[key], strict=True))
                     for key in ("times", "cpu_times")]
            beside = f" {ratio:.4f} +- {half:.4f} | {pairs[0]:.2f} | {pairs[1]:.2f} |"
        lines.append(f"| {row['sparsity']:.0%} {row['pattern']} | {row['method']} | {row['tool']} | "
                     f"{row['perplexity']:.5g} | {exact} | {row['zeros']:.1%} | {statistics.median(row['times']):.1f} "
                     f"| {statistics.median(row['cpu_times']):.1f} | {row['peak_bytes'] / 2**20:.0f} |{beside}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python with llm-compressor; without it ours run alone")
    parser.add_argument("--text", type=Path, help="folder with the texts of the second model")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/bench_quantize_cache"), help="where models are kept")
    parser.add_argument("--models", nargs="+", choices=["tiny", "text"], default=["tiny", "text"])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="instead of all")
    parser.add_argument("--cells", nargs="+", default=[f"{s}/{p}" for s, p in CELLS], help="SPARSITY/PATTERN")
    parser.add_argument("--calibration", type=int, default=16_384, help="tokens of it, in crops of 128 (tiny) or 256")
    parser.add_argument("--tokens", type=int, default=2_560_000, help="tokens the second model is pretrained on")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--windows", type=int, default=16, help="of 2,048 tokens, most that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the JSON goes (default benchmarks/results/prune-DATE.json)")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/bench_prune"), help="folder for what workers print")
    asked = parser.parse_args()
    asked.cells = [(float(cell.partition("/")[0]), cell.partition("/")[2]) for cell in asked.cells]
    for folder in (asked.logs, asked.cache):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(asked.threads)
    about = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "cpus": os.cpu_count(),
             "threads": asked.threads, "torch": torch.__version__, "load": os.getloadavg()[0]}
    print(json.dumps(about))
    results = []
    for name in asked.models:
        if name == "text" and asked.text is None:
            print("\ntext: left out, for no --text FOLDER with its texts was given")
            continue
        results.append(compare(name, asked))
        print("\n" + table(results[-1]), flush=True)
    out = asked.out or HERE / "results" / f"prune-{about['date']}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
