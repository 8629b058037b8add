"""8-bit integers and 4- and 8-bit floats against bfloat16 on this machine: `python benchmarks/bench_number_formats.py`.

    --ops (default)   one linear layer: the ops that run each format here, and others that one might have chosen
    --model           a random Llama in bfloat16 and the same in w8a8: tokens a second of a prompt and of decoding

Every contender is timed in turn, round after round, by the CPU time of the process, so that what else the machine does
hits all alike; figures are medians, ratios are to bfloat16 of the same round's shape (above 1 is faster). Each shape
rotates over copies of its weight, so that a layer does not come from the cache that its last call filled.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench_int_matmul import CACHE_BYTES, machine
from llmops.methods.quantize import rtn
from llmops.methods.quantize.floats import FLOATS
from llmops.models.formatted import KINDS, FormattedLinear
from llmops.models.quantized import pack, parts_of

Calls = dict[str, Callable[[int], Any]]


def weight_of(kind: str, W: Tensor) -> Any:
    return replace(rtn(W, bits=8), activation_bits=8) if kind == "w8a8" else rtn(W, bits=FLOATS[kind])


def ops(rows: int, columns: int, tokens: int, copies: int) -> Calls:
    dense = [(torch.randn(rows, columns) * 0.02).to(torch.bfloat16) for _ in range(copies)]
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    calls: Calls = {"bf16 dense": lambda i: F.linear(x, dense[i % copies])}
    for kind in KINDS:
        for kernel in ("auto", "reference") if kind == "w8a8" else ("auto",):
            layers = [FormattedLinear(parts_of(weight_of(kind, W)), kind, kernel=kernel) for W in dense]
            calls[f"{kind}: {layers[0].kernel}"] = lambda i, layers=layers: layers[i % copies](x)
    codes = [rtn(W, bits=8) for W in dense]
    packed = []
    for made in codes:
        zeros = torch.zeros(rows, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(made.codes, made.scale.double().view(-1), zeros, 0)
        packed.append(torch.ops.quantized.linear_prepack(quantized, None))
    calls["not used: quantized::linear_dynamic (one scale for all tokens)"] = lambda i: (
        torch.ops.quantized.linear_dynamic(x.float(), packed[i % copies], False))
    rounded = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    calls["_int_mm alone"] = lambda i: torch._int_mm(rounded, codes[i % copies].codes.t())
    return calls


def interleaved(calls: Calls, seconds: float) -> dict[str, float]:
    """Median CPU seconds of a call. Turns of ten calls each: within a turn the caches are a contender's own."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)  # warm up
    began, turn = time.process_time(), 0
    while turn < 3 or time.process_time() - began < seconds:
        turn += 1
        for name, call in calls.items():
            for again in range(10):
                start = time.process_time()
                call(again)
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table_of_ops(quick: bool) -> None:
    print("| out x in | tokens | contender | us | x bf16 |\n|-|-|-|-:|-:|")
    shapes = [(256, 256), (1024, 1024), (2048, 2048), (4096, 1024)]
    for rows, columns in shapes[:2] if quick else shapes:
        copies = max(1, min(4, -(-CACHE_BYTES // (rows * columns * 2))))
        for tokens in (1, 32):
            torch.manual_seed(0)
            medians = interleaved(ops(rows, columns, tokens, copies), 0.3 if quick else 2.0)
            for name, median in medians.items():
                print(f"| {rows} x {columns} | {tokens} | {name} | {median * 1e6:.0f} | "
                      f"{medians['bf16 dense'] / median:.2f} |", flush=True)


def table_of_models(hidden: int, layers: int, prompt: int, new: int, rounds: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 128 * 128,
                         num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128,
                         eos_token_id=None, pad_token_id=0, tie_word_embeddings=True)
    dense = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    half = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    half.load_state_dict(dense.state_dict())
    made = {name: weight_of("w8a8", module.weight.data) for name, module in half.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"}
    models = {"bf16": dense, "w8a8": pack(half, made)}
    ids = torch.randint(0, 2048, (1, prompt))
    calls: Calls = {}
    for name, model in models.items():
        calls[f"{name} prompt"] = lambda i, model=model: model(input_ids=ids, use_cache=False)
        calls[f"{name} decode"] = lambda i, model=model: model.generate(
            ids[:, :8], attention_mask=torch.ones(1, 8, dtype=torch.long), max_new_tokens=new, min_new_tokens=new,
            do_sample=False)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call(turn)
            if turn:  # the first warms up
                times[name].append(time.process_time() - start)
    parameters = sum(p.numel() for p in dense.parameters()) / 1e6
    print(f"random Llama of {parameters:.0f} M parameters, hidden {hidden}, {layers} layers; {rounds} rounds\n"
          "| | bf16 tokens/s | w8a8 tokens/s | ratio, median of rounds (smallest, largest) |\n|-|-:|-:|-|")
    for what, tokens in ((f"prompt of {prompt}", prompt), (f"decoding {new}", new)):
        key = what.split(" ")[0].removesuffix("ing").replace("decod", "decode")
        a, b = times[f"bf16 {key}"], times[f"w8a8 {key}"]
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        print(f"| {what} | {tokens / statistics.median(a):.0f} | {tokens / statistics.median(b):.0f} | "
              f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f}) |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="whole models instead of single layers")
    parser.add_argument("--quick", action="store_true", help="small shapes, a third of a second each")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    print(f"{machine('cpu')}; torch {torch.__version__}; {datetime.date.today()}")
    if not asked.model:
        table_of_ops(asked.quick)
    for hidden in asked.hidden if asked.model else ():
        table_of_models(hidden, asked.layers, prompt=128, new=24, rounds=asked.rounds)


if __name__ == "__main__":
    main()
