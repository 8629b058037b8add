"""What quantizing a model of twenty blocks takes beyond the weights that are mapped from the disk, in blocks.

    python benchmarks/bench_quantize_memory.py [--blocks 20] [--width 1024] [--methods rtn gptq ...] [--json FILE]

A random Llama in bfloat16 whose MLP is three times as wide as the rest is written to a temporary folder. Each method
quantizes it to w4a16 in groups of 128 in a process of its own, as a recipe's step does, with 256 calibration tokens, so
that activations are small beside a block. Counted is anonymous memory (RssAnon of /proc/self/status: what no file backs
and the system cannot drop), read every millisecond, over what the process held once the model was open; pages of the
checkpoint and of scratch files are not in it. A block is its weights in float32, in which it is worked on. TMPDIR has
to lie on a disk: in a file system in memory what is put aside is not out of memory. Takes ten minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

from _runner.contender import told_once
from _runner.machine import about, said
from _runner.results import Results, parser
from _runner.worker import give_back

#: method -> options beside the scheme; few steps where more of them take time and no memory
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {}, "hqq": {"iterations": 2}, "gptq": {"data": "calib", "length": 64}, "awq": {"data": "calib", "length": 64,
    "grid": 4}, "autoround": {"data": "calib", "length": 64, "iterations": 4}}
LIMIT = 3.0  # blocks


class Anonymous:
    """Within, `peak` is the most anonymous memory of this process over what it had at first, in bytes."""

    def __enter__(self) -> Anonymous:
        give_back()
        self.first, self.peak, self.done = anonymous(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, anonymous() - self.first)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def anonymous() -> int:
    """Bytes resident that no file backs."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def write(folder: Path, blocks: int, width: int) -> None:
    """The random model, with the tokenizer of the built-in one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from llmops.models.builtin import BUILTIN

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN["builtin:tiny"])
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, head_dim=64,
                         num_hidden_layers=blocks, num_attention_heads=width // 64, num_key_value_heads=width // 64,
                         max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
                         eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one(folder: Path, method: str) -> dict[str, float]:
    """Bytes of a block and of all weights, and the most that the method held beside them."""
    import torch

    from llmops.build import quantizing
    from llmops.build.job import Job
    from llmops.build.variant import apply_step
    from llmops.methods.quantize import options
    from llmops.models.load import load

    torch.set_num_threads(1)
    model, tokenizer = load(folder, dtype="stored", device="cpu")
    tokens = torch.randint(5, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    quantizing.calibration = lambda *_: tokens
    job = Job(model, tokenizer, model.dtype, [], lambda _: None, lambda _: None, 0)  # type: ignore[arg-type, return-value]
    asked = getattr(options, method.capitalize())(method=method, scheme="w4a16", group_size=128, **METHODS[method])
    with Anonymous() as held:
        apply_step("quantize", job, asked)
    return {"block_bytes": sum(4 * each.numel() for each in model.model.layers[0].parameters()),
            "weights_bytes": sum(each.nbytes for each in model.parameters()), "peak_bytes": held.peak}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=20, help="decoder blocks of the model")
    options.add_argument("--width", type=int, default=1024, help="its hidden size, a multiple of 128")
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options.add_argument("--one", nargs=2, metavar=("FOLDER", "METHOD"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.one:
        print(json.dumps(one(Path(asked.one[0]), asked.one[1])))
        return
    record = about(asked, ("torch", "transformers"), threads=1)
    results, lines = Results(asked.out, record), []
    print(said(record))
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), asked.blocks, asked.width)
        print(f"{asked.blocks} blocks, {asked.width} wide\n\n| method | MiB beyond the mapped weights | in blocks | "
              f"at most {LIMIT:g} |\n|-|-:|-:|-|")
        for method in asked.methods:
            found = told_once(Path(__file__).name, ["--one", place, method])
            lines.append({"method": method, **found, "blocks": found["peak_bytes"] / found["block_bytes"]})
            results.keep(model={"blocks": asked.blocks, "width": asked.width}, lines=lines)
            held = "yes" if lines[-1]["blocks"] <= LIMIT else "NO"
            print(f"| {method} | {found['peak_bytes'] / 2**20:.0f} | {lines[-1]['blocks']:.2f} | {held} |", flush=True)
        print(f"\na block is {found['block_bytes'] / 2**20:.0f} MiB in float32, all weights "
              f"{found['weights_bytes'] / 2**20:.0f} MiB in bfloat16")
    results.end()


if __name__ == "__main__":
    main()
