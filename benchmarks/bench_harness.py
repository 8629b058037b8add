"""The same items as lm-evaluation-harness's own command line: are scores and standard errors identical?

    python benchmarks/bench_harness.py [--model DIR] [--json FILE]

Three local tasks are written to a scratch folder: multiple choice, written answers, rolling perplexity. `lm_eval run`
scores a model folder in a process of its own, `llmops`'s `harness` score does in this one, and every metric of every
task is held side by side. Needs lm-eval (extra `harness`); nothing is downloaded. Default model: `builtin:tiny`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _runner.machine import about, said
from _runner.results import Results, parser
from llmops.data import world
from llmops.evaluate import EVALUATORS
from llmops.evaluate.options import Harness
from llmops.models.builtin import locate
from llmops.models.load import load

DATA = 'dataset_path: json\ndataset_kwargs: {{data_files: {{test: {0}}}}}\ntest_split: test\n'
TASKS = {
    "world_choices": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
                     "doc_to_target: answer\nmetric_list:\n"
                     "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
                     "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n",
    "world_written": 'output_type: generate_until\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}\n'
                     'doc_to_text: "{{start}}"\ndoc_to_target: "{{end}}"\nfilter_list:\n'
                     "  - {name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}\n"
                     "metric_list:\n"
                     "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
    "world_prose": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n'
                   "  - {metric: word_perplexity}\n  - {metric: byte_perplexity}\n  - {metric: bits_per_byte}\n"}
METRICS = {"world_choices": ("acc", "acc_norm"), "world_written": ("exact_match",),
           "world_prose": ("word_perplexity", "bits_per_byte")}


def write(folder: Path, items: int) -> None:
    """The tasks' YAML and data: questions of the built-in world, sentences of its held-out prose cut in two."""
    prose = list(world.documents("test", items))
    halves = [(text.split(". ")[0].rpartition(" ")) for text in prose]
    rows: dict[str, list[dict[str, Any]]] = {
        "world_choices": world.choices("test")[:items],
        "world_written": [{"start": start, "end": end.removesuffix(".")} for start, _, end in halves],
        "world_prose": [{"text": text} for text in prose]}
    for name, body in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{DATA.format(data)}{body}metadata: {{version: 1.0}}\n")


def own(folder: Path, model: str, batch: int) -> dict[str, Any]:
    """What `lm_eval` prints into its results file."""
    out = folder / "out"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
               f"pretrained={model},dtype=float32", "--tasks", *TASKS, "--include_path", str(folder), "--device", "cpu",
               "--batch_size", str(batch), "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, check=False)
    found = sorted(out.rglob("results_*.json"))
    if done.returncode or not found:
        raise SystemExit(f"lm_eval failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(found[-1].read_text())["results"])


def both(model_name: str, items: int, batch: int) -> list[dict[str, Any]]:
    """A line a task and metric: lm-eval's value and standard error, and ours."""
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, items)
        theirs = own(folder, locate(model_name), batch)
        model, tokenizer = load(model_name, dtype="float32", device="cpu")
        for task, metrics in METRICS.items():
            for metric in metrics:
                options = Harness(tasks=[task], include=str(folder), metric=metric, batch_size=batch)
                [score] = EVALUATORS["harness"](model, tokenizer, None, options, id=f"harness:{task}")
                value = next(value for key, value in theirs[task].items() if key.split(",")[0] == metric)
                stderr = next((each for key, each in theirs[task].items()
                               if key.split(",")[0] == f"{metric}_stderr"), None)
                lines.append({"task": task, "metric": metric, "n": len(score.items), "lm_eval": value,
                              "llmops": score.value.value, "stderr_lm_eval": stderr, "stderr_llmops": score.stderr})
    return lines


def same(line: dict[str, Any]) -> bool:
    """Whether value and standard error agree; lm-eval knows no error of some."""
    equal = abs(line["lm_eval"] - line["llmops"]) <= 1e-9 * max(1, abs(line["lm_eval"]))
    error = line["stderr_lm_eval"]
    return bool(equal and (not isinstance(error, float) or abs(error - line["stderr_llmops"]) <= 1e-9))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="builtin:tiny")
    options.add_argument("--items", type=int, default=100)
    options.add_argument("--batch", type=int, default=16)
    asked = options.parse_args()
    record = about(asked, ("lm-eval", "torch", "transformers", "datasets"))
    if "lm-eval" not in record["versions"]:
        sys.exit("lm-eval is not installed; pip install 'llmops[harness]'")
    print(f"{said(record)}; {asked.model}")
    results = Results(asked.out, {**record, "model": asked.model})
    lines = both(asked.model, asked.items, asked.batch)
    for line in lines:
        known = line["stderr_lm_eval"]
        error = format(known, ".12g") if isinstance(known, float) else known
        print(f"{'  ' if same(line) else '! '}{line['task']:14} {line['metric']:16} n {line['n']}  lm-eval "
              f"{line['lm_eval']:.12g} +- {error}  llmops {line['llmops']:.12g} +- {line['stderr_llmops']:.12g}")
    results.end(lines=lines, same=all(map(same, lines)))
    return 0 if all(map(same, lines)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
