"""8-bit integers and 4- and 8-bit floats against bfloat16 on this machine: `python benchmarks/bench_number_formats.py`.

    --ops (default)   one linear layer: the ops that run each format here, and others that one might have chosen
    --model           a random Llama in bfloat16 and the same in w8a8: tokens a second of a prompt and of decoding

Every contender is timed in turn, round after round, by the CPU time of the process, so that what else the machine does
hits all alike; times are medians, ratios are to bfloat16 of the same shape in the same rounds (above 1 is faster), with
their interval. Each shape
rotates over copies of its weight, so that a layer does not come from the cache that its last call filled.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _runner.machine import about, said
from _runner.results import Results, parser
from _runner.tables import head, line
from _runner.turns import ratio, shown, timed
from llmops.methods.quantize import rtn
from llmops.methods.quantize.floats import FLOATS
from llmops.models.formatted import KINDS, FormattedLinear
from llmops.models.quantized import pack, parts_of

Calls = dict[str, Callable[[int], Any]]
CACHE_BYTES = 64 << 20


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


def raced_ops(rows: int, columns: int, tokens: int, seconds: float) -> list[dict[str, Any]]:
    """A line a contender of one shape. Turns of ten calls each: within a turn the caches are a contender's own."""
    torch.manual_seed(0)
    calls = ops(rows, columns, tokens, max(1, min(4, -(-CACHE_BYTES // (rows * columns * 2)))))
    times = timed(calls, turns=3, seconds=seconds, each=10, clock=time.process_time)
    return [{"shape": [rows, columns], "tokens": tokens, "contender": name, "median_cpu_s": median(found),
             "speed_over_bf16": ratio(times["bf16 dense"], found)} for name, found in times.items()]


def table_of_ops(quick: bool, results: Results) -> None:
    lines: list[dict[str, Any]] = []
    print(head(["out x in", "tokens", "contender", "us", "x bf16"], "lllrr"))
    shapes = [(256, 256), (1024, 1024), (2048, 2048), (4096, 1024)]
    for rows, columns in shapes[:2] if quick else shapes:
        for tokens in (1, 32):
            found = raced_ops(rows, columns, tokens, 0.3 if quick else 2.0)
            lines += found
            results.keep(ops=lines)
            for one in found:
                print(line([f"{rows} x {columns}", str(tokens), one["contender"], f"{one['median_cpu_s'] * 1e6:.0f}",
                            shown(one["speed_over_bf16"])]), flush=True)


def models(hidden: int, layers: int) -> dict[str, Any]:
    """A random Llama in bfloat16, and the same in w8a8."""
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
    return {"bf16": dense, "w8a8": pack(half, made)}


def table_of_models(hidden: int, layers: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    both = models(hidden, layers)
    ids = torch.randint(0, 2048, (1, prompt))
    calls: Calls = {}
    for name, model in both.items():
        calls[f"{name} prompt"] = lambda i, model=model: model(input_ids=ids, use_cache=False)
        calls[f"{name} decode"] = lambda i, model=model: model.generate(
            ids[:, :8], attention_mask=torch.ones(1, 8, dtype=torch.long), max_new_tokens=new, min_new_tokens=new,
            do_sample=False)
    times = timed(calls, turns=rounds, clock=time.process_time)
    parameters = sum(p.numel() for p in both["bf16"].parameters()) / 1e6
    print(f"random Llama of {parameters:.0f} M parameters, hidden {hidden}, {layers} layers; {rounds} rounds\n"
          + head(["", "bf16 tokens/s", "w8a8 tokens/s", "ratio (interval)"], "lrrl"))
    found: dict[str, Any] = {"hidden": hidden, "layers": layers, "parameters": 1e6 * parameters}
    for key, what, tokens in (("prompt", f"prompt of {prompt}", prompt), ("decode", f"decoding {new}", new)):
        a, b = times[f"bf16 {key}"], times[f"w8a8 {key}"]
        found[key] = {"tokens": tokens, "bf16_cpu_s": a, "w8a8_cpu_s": b, "speed_over_bf16": ratio(a, b)}
        print(line([what, f"{tokens / median(a):.0f}", f"{tokens / median(b):.0f}",
                    shown(found[key]["speed_over_bf16"])]), flush=True)
    return found


@torch.no_grad()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", action="store_true", help="whole models instead of single layers")
    options.add_argument("--quick", action="store_true", help="small shapes, a third of a second each")
    options.add_argument("--hidden", type=int, nargs="+", default=[1024])
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--rounds", type=int, default=7)
    asked = options.parse_args()
    record = about(asked, ("torch", "transformers"), threads=torch.get_num_threads())
    results, lines = Results(asked.out, record), []
    print(said(record))
    if not asked.model:
        table_of_ops(asked.quick, results)
    for hidden in asked.hidden if asked.model else ():
        lines.append(table_of_models(hidden, asked.layers, prompt=128, new=24, rounds=asked.rounds))
        results.keep(models=lines)
    results.end()


if __name__ == "__main__":
    main()
