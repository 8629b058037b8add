"""A published table in its own protocol: `python benchmarks/bench_published_table.py --text FOLDER`.

The table is that of the README of IST-DASLab/gptq (the code of Frantar et al. 2022, arXiv 2210.17323): perplexity of
LLaMA on WikiText-2, in float, with 4 and 3 bits a weight rounded to nearest and by GPTQ (a grid a row of the weight),
and with 3 bits by GPTQ in groups of 128. What its commands mean, and what is done here in the same way:

    seqlen 2048          the text as one string, tokenized once, windows of 2,048 tokens that do not overlap,
                         the remainder dropped, no BOS, mean loss over the 2,047 tokens that have a predecessor
    (no --sym)           asymmetric grids, absmax, a scale and a zero point a row or group
    --act-order          columns by falling diagonal of H: `order: activation`
    --true-sequential    q, k, v; o; gate, up; down, each seeing what the ones before became: the walk of `method: gptq`
    --percdamp .01, 128 samples of 2,048 tokens

What differs, so that no figure here may be held against a published one: the model, which is the `text` model of
bench_quantize.py; the calibration text, which is what that was trained on (theirs is C4); the test text, which is held
out of WikiText-2's validation part. What must agree is the order of the columns and, roughly, the share of
round-to-nearest's loss that GPTQ wins back; the script says whether they do, and ends with code 1 where the order does
not. The evaluator is held against the loop of the paper's code on the unquantized model, to 1e-6.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from _published import PUBLISHED, table, verdict
from _quantize_case import Case
from _quantize_models import (
    Scorer,
    calibration,
    dense_state,
    pretrained_text,
    put,
    text_lines,
    text_scorer,
)
from _quantize_worker import ours
from _runner.machine import about, said
from _runner.results import Results, parser

RTN: dict[str, Any] = {"method": "rtn", "symmetric": False}
GPTQ: dict[str, Any] = {"method": "gptq", "data": "calib", "symmetric": False, "order": "activation", "clip": "absmax",
                        "damping": 0.01}
#: name -> (step, bits, group size); the first is the model itself.
COLUMNS: dict[str, tuple[dict[str, Any], int, int] | None] = {
    "float": None, "4 bit RTN": (RTN, 4, -1), "4 bit GPTQ": (GPTQ, 4, -1), "3 bit RTN": (RTN, 3, -1),
    "3 bit GPTQ": (GPTQ, 3, -1), "3 bit g128 GPTQ": (GPTQ, 3, 128)}
SEQLEN = 2048


def by_the_papers_loop(model: Any, stream: list[int], context: int) -> float:
    """The evaluation loop of the paper's code, written out: loss x seqlen summed, divided by all tokens."""
    windows = len(stream) // context
    total = 0.0
    with torch.no_grad():
        for i in range(windows):
            batch = torch.tensor([stream[i * context:(i + 1) * context]])
            logits = model(batch).logits[:, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())) * context
    return math.exp(total / (windows * context))


def measured(asked: argparse.Namespace, folder: Path, scorer: Scorer, case: Case, results: Results
             ) -> dict[str, dict[str, Any]]:
    """column -> {perplexity, losses of the windows}; kept in the results column by column."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, dict[str, Any]] = {}
    for name, cell in COLUMNS.items():
        if cell is not None:
            step, bits, group = cell
            fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            answer = asked.cache / "published-answer"
            answer.mkdir(exist_ok=True)
            ours(step)(fresh, case, bits, group)(answer)
            put(model, dense_state(answer))
        found[name] = scorer(model)
        if cell is None:
            loop = by_the_papers_loop(model, scorer.stream[:scorer.perplexity.max_tokens], SEQLEN)
            if abs(loop / found[name]["perplexity"] - 1) > 1e-6:
                sys.exit(f"the paper's loop gives {loop}, the evaluator {found[name]['perplexity']}")
            print(f"evaluator over the paper's loop: {found[name]['perplexity'] / loop - 1:+.1e}", file=sys.stderr)
        results.keep(measured=found)
        print(f"  {name}: {found[name]['perplexity']:.4f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", type=Path, required=True, help="folder with the texts, as for bench_quantize.py")
    options.add_argument("--cache", type=Path, default=Path("/tmp/bench_quantize_cache"), help="where models are kept")
    options.add_argument("--tokens", type=int, default=12_288_000, help="tokens the model is pretrained on")
    options.add_argument("--samples", type=int, default=128, help="calibration crops of 2,048 tokens")
    options.add_argument("--windows", type=int, default=32, help="of 2,048 tokens, most that are scored")
    asked = options.parse_args()
    torch.set_num_threads(1)
    asked.cache.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    record = about(asked, ("torch", "transformers"), threads=1)
    print(said(record))
    folder = pretrained_text(asked.text, asked.cache, asked.tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, crops = asked.cache / "published.jsonl", asked.cache / "published-calibration.safetensors"
    text_lines(asked.text, rows)
    save_file({"tokens": calibration(rows, tokenizer, asked.samples, SEQLEN, 0)}, crops)
    case = Case(str(folder), str(crops), str(rows), asked.samples, SEQLEN)
    scorer = text_scorer(asked.text, tokenizer, asked.windows)
    results = Results(asked.out, {**record, "protocol": scorer.protocol(), "samples": asked.samples,
                                  "tokens": asked.tokens, "published": PUBLISHED})
    found = measured(asked, folder, scorer, case, results)
    mine = {name: float(each["perplexity"]) for name, each in found.items()}
    published = {f"{name}, published": dict(zip(COLUMNS, row, strict=True)) for name, row in PUBLISHED.items()}
    same, said_of_it = verdict(mine, published)
    print(table({f"this model, {scorer.protocol()['windows']} windows": mine, **published}), "", *said_of_it, sep="\n")
    results.end(same_order=same)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
