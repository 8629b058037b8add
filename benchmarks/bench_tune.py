"""LoRA fine-tuning, this project beside TRL and transformers: `python benchmarks/bench_tune.py --peer-python PYTHON`.

All contenders train the same weights with the same adapters, optimizer and rows a step (see `_tune_case.py`); each is
a process of its own that stays alive and is told "do k steps now", in turn, round after round, so that a machine that
slows down slows all of them. Figures are medians over the rounds:

    tokens/s      tokens without padding, by the wall clock
    per CPU s     the same tokens by the processor time of the process, which other work on the machine disturbs less
    peak          most memory over what was there before the first step (resident, or allocated on a GPU)
    loss          of the first steps: equal numbers say that the contenders compute the same thing

PYTHON is one that can import trl (1.16) and the same torch, transformers and peft as here. TRL packs by best-fit
decreasing; without flash attention transformers separates its rows by a mask, which is right and costs a score for
every pair of tokens in a pass. Both ways to use it are timed, one pack a pass with accumulation and all at once
(`ours-by-pack` and `ours` are the same two ways here), and the faster one is what the speed is compared with. Gradient
checkpointing is off everywhere.

    python benchmarks/bench_tune.py --peer-python PYTHON [--models builtin:tiny twin60m] [--threads 1]
    python benchmarks/bench_tune.py --peer-python PYTHON --gpu [--dry]

`--gpu` trains an 8B-shaped random model in bfloat16 on packs of 4,096 tokens, TRL with and without Liger, and gives the
model FLOPs of a step as a share of what a large matrix product reaches in the same run; `--dry` runs the same code
with tiny shapes on a CPU, for its sake alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from _runner.contender import Contender
from _runner.machine import about, said, versions_there
from _runner.results import Results, add_option, free
from _runner.tables import head, line
from _runner.turns import in_turn, ratio, shown
from _tune_case import (
    SHAPES,
    Case,
    make_packs,
    padded_tokens_of,
    tokens_of,
    trained_tokens_of,
    vocabulary_of,
)

CPU = ["ours", "ours-by-pack", "ours-padded", "trl-packed", "trl-packed-at-once", "trainer-padded"]
GPU = ["ours", "trl-packed-at-once", "trl-liger"]
PEERS = ("trl", "trainer")  # run by the other Python
TRL = ("trl-packed", "trl-packed-at-once")
WARM_UP = 1  # steps before the first round
PACKAGES = ("torch", "transformers", "peft")


def race(names: list[str], case: Case, rounds: int, steps: int, pythons: dict[str, str], logs: Path
         ) -> dict[str, list[dict[str, Any]]]:
    """Contender -> what it answered: warmed up and then run for `rounds` rounds of `steps` steps, in turns. One that
    fails gives no more than its last answer, which says why."""
    workers, told = {}, {}
    for name in names:  # one starts after the other, so that none is timed while another loads
        worker = workers[name] = Contender(name, "_tune_worker.py", case.as_dict(), pythons[name], logs,
                                           threads=case.threads)
        told[name] = [worker.first if worker.failed else worker.ask(go=WARM_UP)]
        print(f"  {name}: {told[name][0].get('failed', 'ready')}", file=sys.stderr, flush=True)
    for turn, name in in_turn(names, rounds):
        if "failed" not in told[name][-1]:
            told[name].append(workers[name].ask(go=steps))
        if name == names[-1 if turn % 2 == 0 else 0]:
            print(f"  round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.end()
    return told


def summary(name: str, told: list[dict[str, Any]], tokens: list[int]) -> dict[str, Any]:
    """Medians over the rounds. tokens: of each round, the warm-up first."""
    if "failed" in told[-1]:
        return {"name": name, "failed": told[-1]["failed"]}
    timed = list(zip(told, tokens, strict=True))[1:]
    return {"name": name,
            "tokens_per_s": statistics.median(count / found["seconds"] for found, count in timed),
            "tokens_per_cpu_s": statistics.median(count / found["cpu_seconds"] for found, count in timed),
            "rounds_s": [found["seconds"] for found, _ in timed],
            "rounds_cpu_s": [found["cpu_seconds"] for found, _ in timed],
            "peak_bytes": max(found["peak_bytes"] for found in told),
            "losses": [loss for found in told for loss in found["losses"]]}


def best_of(found: list[dict[str, Any]], names: tuple[str, ...], key: str) -> dict[str, Any] | None:
    able = [one for one in found if one["name"] in names and "failed" not in one]
    return max(able, key=lambda one: float(one[key])) if able else None


def model_flops(case: Case, packs: list[list[dict[str, list[int]]]]) -> float:
    """FLOPs that a step needs: the frozen layers forward and back to their inputs (4 a weight and token), the head on
    the trained tokens alone, the adapters with their own gradients (6), and causal attention inside each row."""
    shape = SHAPES[case.model]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    queries, keys = (shape[key] * shape["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    linear = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, inner), (hidden, inner),
              (inner, hidden)]
    per_token = layers * sum(4 * a * b + 6 * case.rank * (a + b) for a, b in linear)
    rows = [len(row["input_ids"]) for pack in packs for row in pack]
    scores = layers * 6 * queries * sum(length**2 for length in rows)  # 4 L^2 D, halved by causality, forward + 2 back
    head = 4 * shape["vocab_size"] * hidden * sum(trained_tokens_of(pack) for pack in packs)
    return float(per_token * sum(rows) + scores + head)


def compare(model: str, asked: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """All contenders on one model: the case, their figures, the ratios."""
    steps = WARM_UP + asked.rounds * asked.steps
    if asked.gpu:
        case = Case(model, steps, packs=asked.packs or 1, pack_length=512 if asked.dry else 4096, longest=2048,
                    median=300, dtype="bfloat16", device="cpu" if asked.dry else "cuda", threads=asked.threads)
        case = Case(**{**case.as_dict(), "longest": min(case.longest, case.pack_length)})
    else:
        case = Case(model, steps, packs=asked.packs or 4, threads=asked.threads)
    names = asked.contenders or (GPU if asked.gpu else CPU)
    names = [name for name in names if asked.peer_python or not name.startswith(PEERS)]
    pythons = {name: asked.peer_python if name.startswith(PEERS) else sys.executable for name in names}
    packs = make_packs(case, vocabulary_of(model))
    by_step = [packs[at:at + case.packs] for at in range(0, len(packs), case.packs)]
    counts = [sum(tokens_of(pack) for pack in step) for step in by_step]
    edges = [0, WARM_UP, *(WARM_UP + asked.steps * (turn + 1) for turn in range(asked.rounds))]
    tokens = [sum(counts[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
    told = race(names, case, asked.rounds, asked.steps, pythons, logs)
    found = [summary(name, told[name], tokens) for name in names]
    result = {"case": case.as_dict(), "tokens_per_step": statistics.mean(counts),
              "rows_per_step": statistics.mean(sum(len(pack) for pack in step) for step in by_step),
              "padded_over_real": sum(padded_tokens_of(step) for step in by_step) / sum(counts),
              "trained_share": sum(trained_tokens_of(pack) for pack in packs) / sum(counts), "contenders": found}
    if asked.gpu:
        add_utilization(result, case, by_step, pythons, logs)
    result["ratios"], result["intervals"] = ratios(found)
    return result


def add_utilization(result: dict[str, Any], case: Case, by_step: list[Any], pythons: dict[str, str], logs: Path
                    ) -> None:
    """Model FLOPs per second of each contender over what a matrix product reached in this run."""
    worker = Contender("ceiling", "_tune_worker.py", case.as_dict(), sys.executable, logs, threads=case.threads)
    result["matmul_flops"] = worker.first.get("flops")
    worker.end()
    per_token = statistics.mean(model_flops(case, step) for step in by_step) / result["tokens_per_step"]
    for one in result["contenders"]:
        if "failed" not in one and result["matmul_flops"]:
            one["model_flops_utilization"] = one["tokens_per_s"] * per_token / result["matmul_flops"]


def ratios(found: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """(ours over the faster TRL and over the padded trainer, in speed; and memory over theirs, as ratios of medians;
    the same speeds over the same rounds, with intervals)."""
    by_name = {one["name"]: one for one in found if "failed" not in one}
    made: dict[str, float] = {}
    over_rounds: dict[str, Any] = {}
    if "ours" not in by_name:
        return made, over_rounds
    for key, rounds, label in (("tokens_per_s", "rounds_s", "speed"),
                               ("tokens_per_cpu_s", "rounds_cpu_s", "speed by CPU time")):
        for others, title in ((TRL, "packed TRL"), (("trainer-padded",), "padded Trainer"), (("trl-liger",), "Liger")):
            best = best_of(found, others, key)
            if best is not None:
                made[f"{label} over {title}"] = by_name["ours"][key] / best[key]
                over_rounds[f"{label} over {title}"] = ratio(best[rounds], by_name["ours"][rounds])
    for name in (*TRL, "trl-liger", "trainer-padded"):
        same = "ours-by-pack" if name == "trl-packed" and "ours-by-pack" in by_name else "ours"
        if name in by_name:
            made[f"peak memory ({same}) over {name}"] = by_name[same]["peak_bytes"] / by_name[name]["peak_bytes"]
    return made, over_rounds


def agreement(found: list[dict[str, Any]]) -> str:
    """How far the losses of the contenders are apart: at the first step, where all have the same weights, and later."""
    losses = [one["losses"] for one in found if "failed" not in one]
    if not losses:
        return "no contender ran"
    apart = [max(step) - min(step) for step in zip(*losses, strict=True)]
    return f"losses of the contenders differ by {apart[0]:.1e} at the first step and at most {max(apart):.1e} later"


def table(result: dict[str, Any]) -> str:
    case = result["case"]
    lines = [f"{case['model']}, {case['dtype']}, {case['device']}, {case['threads']} thread(s); a step: "
             f"{result['rows_per_step']:.1f} rows, {result['tokens_per_step']:.0f} tokens, of which "
             f"{result['trained_share']:.0%} have a loss; padded to the longest: {result['padded_over_real']:.2f} x",
             "", head(["contender", "tokens/s", "per CPU s", "peak MiB", "loss of the first steps"], "lrrrl")]
    for one in result["contenders"]:
        if "failed" in one:
            lines.append(line([one["name"], one["failed"], "", "", ""]))
            continue
        losses = " ".join(f"{loss:.5f}" for loss in one["losses"][:4])
        used = one.get("model_flops_utilization")
        lines.append(line([one["name"], f"{one['tokens_per_s']:,.0f}", f"{one['tokens_per_cpu_s']:,.0f}",
                           f"{one['peak_bytes'] / 2**20:,.0f}", losses + (f"; MFU {used:.1%}" if used else "")]))
    lines += ["", agreement(result["contenders"])]
    for name, value in result["ratios"].items():
        over = result["intervals"].get(name)
        lines.append(f"ours, {name}: {value:.2f}" + (f"; over the same rounds {shown(over)}" if over else ""))
    return "\n".join(lines)


def versions(asked: argparse.Namespace, here: dict[str, str]) -> dict[str, str]:
    """TRL's version in the other Python, whose other versions must be those of this one."""
    if not asked.peer_python:
        return {}
    there = versions_there(asked.peer_python, {name: name for name in (*PACKAGES, "trl")})
    trl = there.pop("trl", None)
    if trl is None or there != here:
        sys.exit(f"{asked.peer_python} has {there} and {f'trl {trl}' if trl else 'no trl'}, this Python {here}; "
                 "expected trl and the same versions, since the comparison is of the trainers; install them there")
    return {"trl": trl}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with trl; without it only ours is timed")
    parser.add_argument("--models", nargs="+", default=["builtin:tiny", "twin60m"])
    parser.add_argument("--contenders", nargs="+", help="instead of all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a round")
    parser.add_argument("--packs", type=int, help="packs of an optimizer step (4; with --gpu 1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dry", action="store_true", help="with --gpu: tiny shapes on the CPU")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/bench_tune"), help="folder for what workers print")
    add_option(parser, "benchmarks/results/tune-DATE.json, or the next free tune-DATE-N.json")
    return parser.parse_args()


def main() -> None:
    asked = options()
    record = about(asked, PACKAGES, threads=asked.threads, named={str(asked.peer_python): "PYTHON"})
    record["versions"] |= versions(asked, dict(record["versions"]))
    print(said(record))
    if asked.dry:
        print("dry run: the code of --gpu on tiny shapes; its figures mean nothing")
    file = Results(asked.out or free(f"tune-{record['date']}"), record)
    done: list[dict[str, Any]] = []
    for model in ["twin8b-dry" if asked.dry else "twin8b"] if asked.gpu else asked.models:
        done.append(compare(model, asked, asked.logs))
        file.keep(results=done)
        print("\n" + table(done[-1]), flush=True)
    file.end()


if __name__ == "__main__":
    main()
