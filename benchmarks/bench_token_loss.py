"""The loss in chunks against full logits and cross entropy: `python benchmarks/bench_token_loss.py [--quick]`.

Forward and backward from the last hidden states (N, D) down to their gradient, with a third of the positions trained;
with a head that is trained, down to its weight as well. The contenders of a shape are timed in turn, round after round,
so that a machine that slows down slows all of them; times are medians. Memory is what one forward and backward adds to
the peak resident size of a fresh process that runs nothing else. float32. Takes ten minutes on one thread and 4 GB;
--quick takes one.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from llmops.models.token_loss import sum_log_probs

IGNORED = -100


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


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


def step(name: str, hidden: Tensor, labels: Tensor, head: nn.Linear) -> tuple[float, float]:
    """(seconds, loss) of a forward and backward."""
    hidden.grad = head.weight.grad = None
    started = time.perf_counter()
    loss = CONTENDERS[name](hidden, labels, head)
    loss.backward()
    return time.perf_counter() - started, loss.item()


def peak_mb() -> float:
    """The most that this process has held. The kernel's own count where there is one: the other outlives an exec."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024 ** 2)


def added_mb(name: str, vocabulary: int, width: int, tokens: int, trained_head: bool) -> float:
    sizes = [str(int(size)) for size in (vocabulary, width, tokens, trained_head)]
    done = subprocess.run([sys.executable, __file__, "--one", name, *sizes], capture_output=True, text=True, check=True)
    return float(done.stdout)


def one(name: str, vocabulary: int, width: int, tokens: int, trained_head: bool) -> float:
    step(name, *problem(64, 8, 16, trained_head))  # what the first call of anything loads is not the contender's
    made = problem(vocabulary, width, tokens, trained_head)
    before = peak_mb()
    step(name, *made)
    return peak_mb() - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two timed rounds and no 128k vocabulary")
    parser.add_argument("--one", nargs=5, metavar=("NAME", "V", "D", "N", "TRAINED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, *sizes = arguments.one
        vocabulary, width, tokens, trained_head = map(int, sizes)
        print(one(name, vocabulary, width, tokens, bool(trained_head)))
        return
    print(f"{machine()}; {datetime.date.today()}; python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    width, tokens = 512, 2048
    for trained_head in (False, True):
        print(f"\nD={width} N={tokens}, a third trained; head {'trained' if trained_head else 'frozen'}")
        print(f"{'V':>8} {'contender':>16} {'ms':>9} {'vs full':>8} {'added MB':>9}   loss")
        for vocabulary in (1_500, 32_000, *(() if arguments.quick else (128_000,))):
            made = problem(vocabulary, width, tokens, trained_head)
            rounds = 3 if arguments.quick or vocabulary > 100_000 else 6
            taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            losses: dict[str, float] = {}
            for number in range(rounds):  # the first is for warming up
                for name in CONTENDERS:
                    seconds, losses[name] = step(name, *made)
                    taken[name] += [seconds] if number else []
            base = statistics.median(taken["full"])
            for name in CONTENDERS:
                median = statistics.median(taken[name])
                added = added_mb(name, vocabulary, width, tokens, trained_head)
                print(f"{vocabulary:>8} {name:>16} {1000 * median:>9.1f} {base / median:>7.2f}x {added:>9.0f}   "
                      f"{losses[name]:.3f}", flush=True)


if __name__ == "__main__":
    main()
