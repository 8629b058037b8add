"""One of several processes: trains small models with the others and writes what it saw. Run by test_ranks.py."""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.errors import StoreError
from llmops.models.token_loss import next_token_loss
from llmops.train import Checkpoints, Hooks, Schedule, Stopping, fit, token_rows
from llmops.train.ranks import RankError, hear, rank_and_size, start, stop, tell, together

SCHEDULES = {"rows of different lengths": {"batch_size": 4, "accumulate": 2},
             "a rank without rows": {"batch_size": 1, "accumulate": 3},
             "padded": {"batch_size": 4}}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                        num_attention_heads=2, num_key_value_heads=1))


def rows(count: int = 9, seed: int = 0, packed: bool = True):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 64, (4 + 3 * number,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return token_rows(made, pad_id=0, packed=packed)


def trained(case: str) -> dict:
    """What one training came to: the same in every process, and in one alone."""
    net, packed = model(), case != "padded"
    settings = Schedule(epochs=2, learning_rate=1e-2, optimizer="sgd", warmup=0.0, **SCHEDULES[case])
    done = fit(net, rows(packed=packed), settings, seed=1, held_out=rows(4, 7, packed),
               stopping=Stopping(every=2, share=1.0))
    weights = torch.cat([value.detach().flatten() for value in net.parameters()])
    return {"loss": [value for _, value in done.loss], "looks": done.looks, "tokens": done.tokens,
            "weights": weights.tolist()}


def _failing(kind: str, rank: int):
    def loss(net, batch):
        if rank == 1 and kind == "memory" and len(batch["cu_seq_lens_q"]) - 1 > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        value = next_token_loss(net, batch)
        if rank == 1 and kind == "error":
            raise ValueError("only here")
        return value * float("nan") if rank == 1 and kind == "nan" else value

    return loss


def failures(folder: Path, rank: int) -> dict:
    """What every process says when one of them fails, and that the next training works."""
    said = {}
    for kind in ("memory", "error", "nan", "store"):
        def step(kind: str = kind):
            checkpoints = None
            if kind == "store":
                (folder / "file").write_text("")
                checkpoints = Checkpoints(folder / "file" / "c")
            return fit(model(), rows(), Schedule(batch_size=4), seed=1, loss=_failing(kind, rank),
                       checkpoints=checkpoints)
        try:
            said[kind] = "; ".join(together(step).events)
        except (RankError, ValueError, StoreError) as error:
            said[kind] = f"{type(error).__name__}: {error}"
    return said


class Killed(Exception):
    pass


def resumed(folder: Path) -> list[float]:
    """Losses of a training that all processes leave in its third step and begin again."""
    settings, steps = Schedule(epochs=2, learning_rate=1e-2, batch_size=4), []

    def die() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise Killed

    with contextlib.suppress(Killed):
        fit(model(), rows(), settings, seed=1, checkpoints=Checkpoints(folder, every_steps=1), hooks=Hooks(die))
    done = fit(model(), rows(), settings, seed=1, checkpoints=Checkpoints(folder, every_steps=1))
    assert done.resumed == [2], done.resumed
    undisturbed = fit(model(), rows(), settings, seed=1)
    assert done.loss == undisturbed.loss
    return [value for _, value in done.loss]


def main(folder: Path) -> None:
    start("cpu", timedelta(seconds=120))
    rank, _ = rank_and_size()
    if rank == 0:
        tell("begin")
    heard = "begin" if rank == 0 else hear()
    found = {"heard": heard, "trained": {case: trained(case) for case in SCHEDULES}, "failures": failures(folder, rank),
             "resumed": resumed(folder / "checkpoints")}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
