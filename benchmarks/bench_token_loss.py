"""The loss in chunks against full logits and cross entropy.

    python benchmarks/bench_token_loss.py [--quick] [--json FILE]

Forward and backward from the last hidden states (N, D) down to their gradient, with a third of the positions trained;
with a head that is trained, down to its weight as well. The contenders of a shape are timed in turn, round after round,
so that a machine that slows down slows all of them; times are medians, speeds are ratios over the same rounds. Memory
is what one forward and backward adds to the peak resident size of a fresh process that runs nothing else. float32.
Takes ten minutes on one thread and 4 GB; --quick takes one.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _runner.contender import told_once
from _runner.machine import about, said
from _runner.results import Results, parser
from _runner.turns import ratio, shown, timed
from llmops.models.token_loss import sum_log_probs

IGNORED = -100


def full(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Logits of every position, and a cross entropy that passes over those that are not trained."""
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


def full_then_drop(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Logits of every position; those that are not trained are dropped before the softmax."""
    kept = labels != IGNORED
    return F.cross_entropy(head(hidden)[kept].float(), labels[kept], reduction="sum")


def chunked(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """What is not trained is dropped before the head, and the rest goes through it in chunks."""
    kept = labels != IGNORED
    return -sum_log_probs(hidden[kept], labels[kept], head, parameters=list(head.parameters()))


CONTENDERS: dict[str, Callable[[Tensor, Tensor, nn.Linear], Tensor]] = {
    "full": full, "full_then_drop": full_then_drop, "chunked": chunked}


def problem(vocabulary: int, width: int, tokens: int, trained_head: bool) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(trained_head)
    labels = torch.randint(vocabulary, (tokens,)).where(torch.rand(tokens) < 1 / 3, IGNORED)
    return torch.randn(tokens, width, requires_grad=True), labels, head


def step(name: str, hidden: Tensor, labels: Tensor, head: nn.Linear) -> float:
    """The loss of a forward and backward."""
    hidden.grad = head.weight.grad = None
    loss = CONTENDERS[name](hidden, labels, head)
    loss.backward()
    return loss.item()


def peak_mb() -> float:
    """The most that this process has held. The kernel's own count where there is one: the other outlives an exec."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024 ** 2)


def added_mb(name: str, vocabulary: int, width: int, tokens: int, trained_head: bool) -> float:
    sizes = [str(int(size)) for size in (vocabulary, width, tokens, trained_head)]
    return float(told_once(Path(__file__).name, ["--one", name, *sizes]))


def one(name: str, vocabulary: int, width: int, tokens: int, trained_head: bool) -> float:
    step(name, *problem(64, 8, 16, trained_head))  # what the first call of anything loads is not the contender's
    made = problem(vocabulary, width, tokens, trained_head)
    before = peak_mb()
    step(name, *made)
    return peak_mb() - before


def raced(vocabulary: int, width: int, tokens: int, trained_head: bool, rounds: int) -> list[dict[str, Any]]:
    """A line a contender: median time, speed over `full` in the same rounds, memory, loss."""
    made = problem(vocabulary, width, tokens, trained_head)
    losses: dict[str, float] = {}

    def call(name: str) -> Callable[[int], None]:
        return lambda _: losses.update({name: step(name, *made)})

    taken = timed({name: call(name) for name in CONTENDERS}, turns=rounds)
    return [{"vocabulary": vocabulary, "trained_head": trained_head, "contender": name, "median_s": median(times),
             "speed_over_full": ratio(taken["full"], times), "loss": losses[name],
             "added_mb": added_mb(name, vocabulary, width, tokens, trained_head)} for name, times in taken.items()]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="two timed rounds and no 128k vocabulary")
    options.add_argument("--one", nargs=5, metavar=("NAME", "V", "D", "N", "TRAINED"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.one:
        name, *sizes = asked.one
        vocabulary, width, tokens, trained_head = map(int, sizes)
        print(one(name, vocabulary, width, tokens, bool(trained_head)))
        return
    record = about(asked, ("torch", "transformers"), threads=torch.get_num_threads())
    results, lines = Results(asked.out, record), []
    print(said(record))
    width, tokens = 512, 2048
    for trained_head in (False, True):
        print(f"\nD={width} N={tokens}, a third trained; head {'trained' if trained_head else 'frozen'}")
        print(f"{'V':>8} {'contender':>16} {'ms':>9} {'vs full':>20} {'added MB':>9}   loss")
        for vocabulary in (1_500, 32_000, *(() if asked.quick else (128_000,))):
            rounds = 2 if asked.quick or vocabulary > 100_000 else 5
            found = raced(vocabulary, width, tokens, trained_head, rounds)
            lines += found
            results.keep(width=width, tokens=tokens, lines=lines)
            for each in found:
                print(f"{vocabulary:>8} {each['contender']:>16} {1000 * each['median_s']:>9.1f} "
                      f"{shown(each['speed_over_full']):>20} {each['added_mb']:>9.0f}   {each['loss']:.3f}", flush=True)
    results.end()


if __name__ == "__main__":
    main()
