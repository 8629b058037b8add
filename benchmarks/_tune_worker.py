"""One contender of bench_tune.py, alive between rounds: it trains, and after every round waits to be told to go on.

    python _tune_worker.py CONTENDER CASE_JSON

Messages are JSON lines: "go" comes in on stdin as {"go": steps}; out on stdout, which nothing else may write to, go
{"ready": ...} before the first step and {"seconds": ..., "cpu_seconds": ..., "peak_bytes": ..., "losses": [...]} after
each round. The last step of a round ends inside the training loop, in a hook that comes right after the optimizer
step, so that set-up and tear-down are not timed and what a trainer does between two steps is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from _runner.worker import Mouth, peak_bytes, questions, reset_peak, why
from _tune_case import PAD, Case, load_model, make_packs, trained_tokens_of, vocabulary_of


class Done(Exception):
    """The parent wants no more steps."""


class Gate:
    """Between a training loop and the parent: counts steps, reports a round, waits for the next."""

    def __init__(self, mouth: Mouth, device: str) -> None:
        self.mouth, self.device = mouth, device
        self.questions = questions()
        self.left = 0
        self.losses: list[float] = []

    def open(self) -> None:
        """Wait for the first round. Memory is counted from here."""
        reset_peak(self.device)
        self.before = peak_bytes(self.device)
        self.mouth.say(ready=True, before_bytes=self.before)
        self._wait()

    def step(self, loss: float) -> None:
        """Called after every optimizer step."""
        self.losses.append(loss)
        self.left -= 1
        if self.left:
            return
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.mouth.say(seconds=time.perf_counter() - self.began, cpu_seconds=time.process_time() - self.began_cpu,
                 peak_bytes=peak_bytes(self.device) - self.before, losses=self.losses)
        self.losses = []
        self._wait()

    def _wait(self) -> None:
        self.left = next(self.questions, {"go": 0})["go"]
        if not self.left:
            raise Done
        self.began, self.began_cpu = time.perf_counter(), time.process_time()


# ---------------------------------------------------------------------------------------------------------- ours


def ours(case: Case, gate: Gate, *, packed: bool = True, at_once: bool = True, fused: bool = True) -> None:
    """`llmops.train.fit` with LoRA from `add_lora`. One row of its training set is a pack, so that steps are given.

    at_once: all packs of a step in one pass; otherwise one by one, accumulated. fused: `fuse` over PEFT's layers.
    """
    from llmops.data.render import collate
    from llmops.methods.finetune.fused_lora import fuse
    from llmops.methods.finetune.lora import add_lora
    from llmops.models.packed_rows import pack
    from llmops.train import Hooks, Schedule, TrainingSet, fit
    from llmops.train.rows import IGNORED, order

    packs = make_packs(case, vocabulary_of(case.model))
    model = load_model(case)
    adapted = add_lora(model, rank=case.rank, alpha=case.alpha, seed=case.seed)
    if fused:
        fuse(adapted)
    schedule = Schedule(epochs=1.0, learning_rate=case.learning_rate, schedule="constant", warmup=0.0,
                        batch_size=case.packs if at_once else 1, accumulate=1 if at_once else case.packs)

    def batch(indices: Sequence[int]) -> dict[str, Any]:
        rows = [row for index in indices for row in packs[place[index]]]
        if packed:
            return pack(rows)
        padded = collate(rows, PAD)
        padded["labels"][:, 0] = IGNORED
        return padded

    lengths = [case.pack_length] * len(packs)
    drawn = order(TrainingSet(lengths, lengths, batch, packed), schedule, case.seed)
    place = {index: wanted for wanted, index in enumerate(index for step in drawn for one in step for index in one)}
    weights = [trained_tokens_of(packs[place[index]]) for index in range(len(packs))]
    rows = TrainingSet(lengths, weights, batch, packed)
    gate.open()
    fit(adapted, rows, schedule, seed=case.seed, hooks=Hooks(log=lambda step, figures: gate.step(figures["loss"])))


# --------------------------------------------------------------------------------------------------------- others


def _lora(case: Case) -> Any:
    import peft

    return peft.LoraConfig(r=case.rank, lora_alpha=case.alpha, lora_dropout=0.0, task_type="CAUSAL_LM", bias="none",
                           target_modules="all-linear")


def _arguments(case: Case, rows: int, accumulate: int) -> dict[str, Any]:
    """What both trainers are told: the optimizer and schedule that ours has, and nothing that costs time."""
    return {"output_dir": os.devnull + "-unused", "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulate, "num_train_epochs": 1, "learning_rate": case.learning_rate,
            "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "weight_decay": 0.0, "max_grad_norm": 1.0,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": case.device == "cpu",
            "logging_steps": 1_000_000, "bf16": case.device == "cuda", "seed": case.seed, "dataloader_num_workers": 0,
            "dataloader_pin_memory": case.device == "cuda", "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False, "remove_unused_columns": False}


def _gated(trainer: type) -> type:
    """The trainer with its losses, as it computes them itself, told to the gate after every optimizer step."""
    from transformers import TrainerCallback

    class Gated(trainer):  # type: ignore[misc]
        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            self.parts.append(loss)
            return loss

        def behind(self, gate: Gate) -> Any:
            self.parts: list[Any] = []
            parts = self.parts

            class Tell(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                    total = float(sum(parts))
                    parts.clear()
                    gate.step(total)

            self.add_callback(Tell())
            return self

    return Gated


def trainer_padded(case: Case, gate: Gate) -> None:
    """transformers' `Trainer`, rows padded to the longest of the step, in the order of the data."""
    import peft
    import torch
    from transformers import Trainer, TrainingArguments

    from llmops.data.render import collate

    packs = make_packs(case, vocabulary_of(case.model))
    model = load_model(case)
    torch.manual_seed(case.seed)
    adapted = peft.get_peft_model(model, _lora(case))

    def together(chosen: Sequence[list[Any]]) -> dict[str, Any]:
        return collate([row for pack in chosen for row in pack], PAD)

    trainer = _gated(Trainer)(model=adapted, args=TrainingArguments(**_arguments(case, case.packs, 1)),
                              train_dataset=packs, data_collator=together).behind(gate)
    gate.open()
    trainer.train()


def trl(case: Case, gate: Gate, *, at_once: bool, liger: bool = False) -> None:
    """TRL's `SFTTrainer` on packs, padding-free, as its `packing_strategy="bfd"` leaves them.

    at_once: all packs of a step in one pass; otherwise one by one with gradient accumulation. Flash attention where it
    is installed, else torch's own, for which transformers builds the mask between rows from the position ids.
    """
    import importlib.util

    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from llmops.models.builtin import locate

    packs = make_packs(case, vocabulary_of(case.model))
    flash = case.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    model = load_model(case, "flash_attention_2" if flash else "sdpa")
    torch.manual_seed(case.seed)
    adapted = peft.get_peft_model(model, _lora(case))
    data = Dataset.from_list([{"input_ids": [i for row in pack for i in row["input_ids"]],
                               "labels": [i for row in pack for i in row["labels"]],
                               "seq_lengths": [len(row["input_ids"]) for row in pack]} for pack in packs])
    arguments = _arguments(case, case.packs if at_once else 1, 1 if at_once else case.packs)
    config = SFTConfig(**arguments, packing=True, packing_strategy="bfd", max_length=case.pack_length,
                       dataset_kwargs={"skip_prepare_dataset": True}, use_liger_kernel=liger)
    tokenizer = AutoTokenizer.from_pretrained(locate("builtin:tiny"))
    trainer = _gated(SFTTrainer)(model=adapted, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.behind(gate)
    gate.open()
    trainer.train()


CONTENDERS: dict[str, Callable[[Case, Gate], None]] = {
    "ours": ours,
    "ours-by-pack": lambda case, gate: ours(case, gate, at_once=False),
    "ours-by-peft": lambda case, gate: ours(case, gate, fused=False),
    "ours-padded": lambda case, gate: ours(case, gate, packed=False),
    "trl-packed": lambda case, gate: trl(case, gate, at_once=False),
    "trl-packed-at-once": lambda case, gate: trl(case, gate, at_once=True),
    "trl-liger": lambda case, gate: trl(case, gate, at_once=True, liger=True),
    "trainer-padded": trainer_padded}


def ceiling(case: Case) -> float:
    """FLOP/s of a square matrix product in the case's type: what a model could at best do here."""
    import torch

    size = 8192 if case.device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=case.device, dtype=getattr(torch, case.dtype)) for _ in "ab")
    best = 0.0
    for _ in range(10):
        _synchronize(case.device)
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        _synchronize(case.device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - began))
    return best


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def main() -> None:
    contender, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    mouth = Mouth()
    import torch

    torch.set_num_threads(case.threads)
    if contender == "ceiling":
        mouth.say(flops=ceiling(case))
        return
    try:
        CONTENDERS[contender](case, Gate(mouth, case.device))
    except Done:
        return
    except Exception as error:  # a contender that cannot run here is a row of the table, not the end of it
        mouth.say(failed=why(error))
        raise


if __name__ == "__main__":
    main()
