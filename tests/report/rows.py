"""Rows as the ledger would hold them, made up for tests: twelve variants, some failed, broken or without scores.

The figures are inventions that have the right shape; they belong in no report.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from llmops.measure.cost import break_even, total
from llmops.quantity import Quantity

EVIL = '<script>alert(1)</script>'
EVIL_ATTRIBUTE = '"onload="alert(1)'
METHOD = "CodeCarbon model: load x TDP + RAM constant"


def q(value: float | None, unit: str, provenance: str = "measured", method: str = "counted",
      ci95: tuple[float, float] | None = None, n: int | None = None) -> dict[str, Any]:
    """A Quantity as a row holds it."""
    return {"value": value, "unit": unit, "provenance": provenance if value is not None else "null", "method": method,
            "ci95": list(ci95) if ci95 else None, "n": n}


def null(unit: str, reason: str) -> dict[str, Any]:
    return q(None, unit, method=reason)


def _paired(delta: float, half: float, n: int, unit: str, variant: str) -> dict[str, Any]:
    lost, gained = max(0, round(-delta * n)) + 2, max(0, round(delta * n)) + 2
    return {"variant": variant, "delta": q(delta, unit, method="paired bootstrap over items, percentile",
                                           ci95=(delta - half, delta + half), n=n),
            "mcnemar_p": 0.04 if abs(delta) > half else 0.6, "gained": gained, "lost": lost,
            "changed_answers": gained + lost + 3, "n": n}


def _quality(exact: float, perplexity: float, name: str, parent: str | None, scores: dict[str, tuple[float, float]],
             ) -> dict[str, Any]:
    n, versus_exact, versus_ppl = 300, {}, {}
    for label, other in (("parent", parent), ("base", "base")):
        if other in scores and other != name:
            versus_exact[label] = _paired(exact - scores[other][0], 0.02, n, "fraction", other)
            versus_ppl[label] = _paired(perplexity - scores[other][1], 0.4, 60, "perplexity", other)
    half = 1.96 * math.sqrt(max(exact * (1 - exact), 0.003) / n)
    common = {"dtype": "bfloat16", "tokenizer_sha256": "ab" * 32}
    return {
        "exact_match:test": {
            "id": "exact_match:test", "metric": "exact_match", "higher_is_better": True, "stderr": half / 1.96, "n": n,
            "value": q(exact, "fraction", method="greedy answers equal to the reference; Wilson",
                       ci95=(max(0.0, exact - half), min(1.0, exact + half)), n=n),
            "protocol": {"id": "exact_match/greedy", "aggregation": "mean", "max_new_tokens": 16,
                         "normalize": True, **common},
            "versus": versus_exact},
        "perplexity:heldout": {
            "id": "perplexity:heldout", "metric": "perplexity", "higher_is_better": False, "stderr": 0.1, "n": 60,
            "value": q(perplexity, "perplexity", method="perplexity/gptq, context 256, stride 256",
                       ci95=(perplexity * 0.96, perplexity * 1.04), n=60),
            "protocol": {"id": "perplexity/gptq", "aggregation": "exp_mean", "context": 256, "stride": 256, **common},
            "versus": versus_ppl}}


def _costs(row: dict[str, Any], speed: float, joules: float, bits: float, is_base: bool) -> None:
    parameters = 7_900_000 * (0.55 if "depth" in str(row["transform"]["chain"]) else 1.0)
    size = parameters * bits / 8
    row["size"] = {
        "parameters": q(parameters, "parameters"), "nonzero_parameters": q(parameters * 0.98, "parameters"),
        "sparsity": q(0.02, "fraction"), "bits_per_weight": q(bits, "bits", method="resident bytes x 8 / parameters"),
        "disk_bytes": q(size + 260_000, "B", method="sum of the files"), "weights_bytes": q(size, "B"),
        "peak_memory_bytes": q(size * 1.6 + 3e7, "B", "estimated", "weights and growth of the resident set")}
    latency, energy = {}, {}
    for batch, gain in (("1", 1.0), ("8", 5.0)):
        rate = speed * gain
        latency[batch] = {
            "prefill_tokens_per_s": q(rate * 9, "tokens/s", n=5), "decode_tokens_per_s": q(
                rate, "tokens/s", method="decode phase, 5 blocks", ci95=(rate * 0.97, rate * 1.03), n=5),
            "first_token_ms_p50": q(2400 / speed, "ms", ci95=(2300 / speed, 2500 / speed), n=5),
            "first_token_ms_p95": q(2900 / speed, "ms", n=5),
            "inter_token_ms_p50": q(1000 / speed, "ms", ci95=(970 / speed, 1040 / speed), n=5),
            "inter_token_ms_p95": q(1300 / speed, "ms", n=5),
            "speed_ratio_to_base": null("ratio", "this is the base") if is_base else q(
                speed / 420, "ratio", ci95=(speed / 435, speed / 405), n=5)}
        each, ratio = joules / gain, joules / 0.061
        energy[batch] = {
            "joules_per_token": q(each, "J/token", "estimated", METHOD, (each * 0.96, each * 1.04), 5),
            "joules_per_request": q(each * 64, "J/request", "estimated", METHOD, n=5),
            "prefill_joules_per_token": q(each / 9, "J/token", "estimated", METHOD, n=5),
            "decode_joules_per_token": q(each, "J/token", "estimated", METHOD, n=5),
            "net_joules_per_token": null("J/token", "idle power was not read: idle_s is 0"),
            "ratio_to_base": null("ratio", "this is the base") if is_base else q(
                ratio, "ratio", "estimated", f"{METHOD}; t-interval on the log", (ratio * 0.95, ratio * 1.05), 5),
            "saving": "unmeasured" if is_base else ("shown" if ratio * 1.05 < 1 else "not shown")}
    row["latency"] = latency
    row["energy"] = {**energy, "idle_watts": null("W", "idle_s is 0")}
    row["workload"] = {"prompt_tokens": 64, "new_tokens": 64, "batch_sizes": [1, 8], "repeats": 5, "order_seed": 0,
                       "prompts_sha256": "cd" * 32}


def _loss(start: float, end: float, steps: int = 120) -> list[list[float]]:
    return [[step, end + (start - end) * math.exp(-step / 25) + 0.05 * math.sin(step * 1.7)]
                          for step in range(1, steps + 1)]


def _building(row: dict[str, Any], joules: float, chain: float, loss: list[list[float]]) -> None:
    base = row["identity"]["variant"] == "base"
    row["building"] = {
        "wall_s": null("s", "nothing is built") if base else q(joules / 28, "s", method="wall clock of the step"),
        "energy_j": null("J", "nothing is built") if base else q(joules, "J", "estimated", METHOD),
        "tokens": q(len(loss) * 4096, "tokens", method="tokens run through the model"),
        "flops": q(6.0 * 7.9e6 * len(loss) * 4096, "FLOP", "estimated", "6 x parameters x tokens") if loss
        else null("FLOP", "nothing was trained"),
        "chain_energy_j": q(chain, "J", "constant", "nothing is built: this is the model as it came") if base
        else q(chain, "J", "estimated", f"sum over builds; {METHOD}"),
        "break_even_tokens": null("tokens", "joules per token were not measured"),
        "evaluate_energy_j": q(210.0, "J", "estimated", METHOD), "evaluate_wall_s": q(7.5, "s"),
        "loss": loss, "data": {"rows": 1800, "dropped": 0, "truncated": 2, "tokens": 51234} if loss else {},
        "data_sha256": {"train": "ef" * 32} if loss else {}}
    row["carbon"] = {
        "intensity": q(475.0, "gCO2e/kWh", "constant", "world average; no zone given (CodeCarbon 3.3.2)"),
        "building_g": q(chain / 3.6e6 * 475, "gCO2e", "estimated", "operational: energy x intensity"),
        "per_1k_tokens_g": q(0.0061, "gCO2e", "estimated", "operational: energy x intensity"),
        "embodied_g": null("gCO2e", "embodied carbon of the hardware is not known: none was given"),
        "sci_g_per_1k_tokens": null("gCO2e", "no SCI: embodied carbon of the hardware is not known")}


def _pays_back(row: dict[str, Any]) -> None:
    built, each, ratio = (Quantity.from_dict(body) for body in (
        row["building"]["chain_energy_j"], row["energy"]["1"]["joules_per_token"], row["energy"]["1"]["ratio_to_base"]))
    base = Quantity(each.value / ratio.value, "J/token", each.provenance, each.method)
    paid = total([built, Quantity.from_dict(row["building"]["evaluate_energy_j"])])
    row["building"]["break_even_tokens"] = break_even(paid, base, ratio).as_dict()


def _rtn(bits: int) -> dict[str, Any]:
    return {"scheme": f"w{bits}a16", "group_size": None if bits == 8 else 128, "symmetric": True}


def _lora(epochs: float) -> dict[str, Any]:
    return {"data": "train", "rank": 16, "alpha": 32.0, "epochs": epochs}


HALF = {"sparsity": 0.5, "pattern": "unstructured"}
#: variant, parent, kind, method, options, exact match, perplexity, tokens/s, J/token, bits, J of building
SPECS: list[tuple[Any, ...]] = [
    ("base", None, None, None, {}, 0.01, 9.4, 420, 0.061, 16.0, 0),
    ("tuned", "base", "finetune", "lora", _lora(3.0), 0.94, 6.1, 418, 0.0612, 16.0, 3900),
    ("tuned-w8", "tuned", "quantize", "rtn", _rtn(8), 0.94, 6.1, 520, 0.047, 8.6, 21),
    ("tuned-w4", "tuned", "quantize", "rtn", _rtn(4), 0.913, 6.5, 610, 0.041, 5.1, 23),
    ("tuned-w3", "tuned", "quantize", "rtn", _rtn(3), 0.61, 9.9, 350, 0.072, 4.2, 24),
    ("tuned-w2", "tuned", "quantize", "rtn", _rtn(2), 0.0, 870.0, 360, 0.07, 3.3, 22),
    ("magnitude", "tuned", "prune", "magnitude", HALF, 0.28, 31.0, 421, 0.061, 16.0, 25),
    ("wanda", "tuned", "prune", "wanda", {"data": "calib", **HALF}, 0.71, 10.2, 419, 0.0611, 16.0, 140),
    ("healed", "wanda", "finetune", "lora", _lora(1.0), 0.9, 6.6, 420, 0.061, 16.0, 1400),
    ("half", "tuned", "prune", "depth", {"layers": 4, "choose": "even"}, 0.03, 55.0, 790, 0.033, 16.0, 12),
    ("student", "half", "distill", "logits", {"teacher": "tuned", "data": "train", "loss": "forward_kl", "epochs": 2.0},
     0.86, 7.4, 785, 0.0331, 16.0, 2900),
    ("healed-w4", "healed", "quantize", "rtn", _rtn(4), 0.0, 0.0, 0, 0.0, 5.1, 20),
]


def make_rows() -> list[dict[str, Any]]:
    """Twelve variants: "tuned-w2" broken, "healed-w4" failed, "half" built and not scored, the rest whole."""
    scores = {spec[0]: (spec[5], spec[6]) for spec in SPECS}
    chains: dict[str, tuple[list[str], float]] = {}
    rows = []
    for name, parent, kind, method, options, exact, perplexity, speed, joules, bits, built in SPECS:
        before, spent = chains.get(parent, ([], 0.0))
        chains[name] = ([*before, *([f"{kind}:{method}"] if kind else [])], spent + built)
        row = _identity(name, parent, kind, method, options, chains[name][0])
        if name == "healed-w4":
            row["status"] = {"state": "failed", "reason": "layer model.layers.3.mlp.down_proj: scale is not finite; "
                                                          "expected finite weights"}
        else:
            _building(row, built, chains[name][1], _loss(4.2, 0.3) if kind in ("finetune", "distill") else [])
            if name != "half":
                row["quality"] = _quality(exact, perplexity, name, parent, scores)
                row["tokens"] = {"base": {"kl_mean": q(0.9, "nats", n=2000), "same_top": q(0.61, "fraction", n=2000)}}
                _costs(row, speed, joules, bits, name == "base")
                if name != "base":
                    _pays_back(row)
        _judge(row, exact)
        rows.append(row)
    rows[5]["status"] = {
    "state": "broken",
     "reason": "not what was built, read back from disk: logits: max KL 3.1 nats"}
    rows[5]["parity"] = {"ok": False, "kl_mean": q(0.8, "nats"), "kl_max": q(3.1, "nats"),
                         "checks": [{"name": "logits", "ok": False, "detail": "max KL 3.1 nats"}]}
    return rows


def _identity(name: str, parent: str | None, kind: str | None, method: str | None, options: dict[str, Any],
              chain: list[str]) -> dict[str, Any]:
    zeros = any(step in ("prune:magnitude", "prune:wanda") for step in chain)
    return {
        "schema": 1, "row_id": len(name), "goals": {
            "quality": {"exact_match:test": {"max_drop": 0.03, "against": "tuned"}}, "costs": {},
            "prefer": "joules_per_token"},
        "identity": {"run": "demo", "run_id": "20260102-030405-ab12", "variant": name, "parent": parent,
                     "teacher": options.get("teacher"), "key": hashlib.sha256(name.encode()).hexdigest(),
                     "parent_key": None,
                     "base_model": "builtin:tiny", "revision": None, "recipe_sha256": "12" * 32, "seed": 0,
                     "utc": "2026-01-02T03:04:05Z", "llmops": "0.1.0", "folder": "store/12ab"},
        "status": {"state": "ok", "reason": None},
        "transform": {"kind": kind, "method": method, "chain": chain,
                      "options": {"method": method, **options} if method else {},
                      "simulated": False, "storage_dtype": "int4 g128 symmetric" if method == "rtn" else "bfloat16",
                      "compute_dtype": "bfloat16", "kernel": "torch:int4pack" if method == "rtn" else "torch",
                      "sparsity_saves": "bytes only when compressed, no time" if zeros else None},
        "parity": {"ok": True, "kl_mean": q(1e-6, "nats"), "kl_max": q(2e-5, "nats"), "checks": [
            {"name": "logits", "ok": True, "detail": "max KL 2e-5 nats"}]} if kind else None,
        "environment": {"device": "cpu", "cpu": "Example CPU", "cores": 2, "ram_bytes": 8_000_000_000, "gpu": [],
                        "driver": None,
                        "threads": 2, "os": "Linux", "python": "3.12.1", "torch": "2.13.0", "sensor": "codecarbon",
                        "sensors_skipped": {"nvml": "no NVIDIA driver", "rapl": "not readable"},
                        "versions": {"torch": "2.13.0", "transformers": "5.17.0"}},
        "log": {"events": [f"{name}: 1,024 parameters trained"] if kind == "finetune" else []}}


def _judge(row: dict[str, Any], exact: float) -> None:
    scored, name = "quality" in row, row["identity"]["variant"]
    met = exact >= 0.91 if scored else None
    row["verdict"] = {"pareto": None, "winner": name == "tuned-w4", "warnings": [
        "energy is an estimate that follows time"] if scored else [], "goals": [
        {"goal": "exact_match:test max_drop 0.03 against tuned", "met": met,
         "detail": f"drop {0.94 - exact:.3f}" if scored else "not scored"}]}


def many(count: int) -> list[dict[str, Any]]:
    """A run of `count` variants: the twelve, then numbered copies of the quantized one with figures of their own."""
    import copy

    rows = make_rows()
    for number in range(count - len(rows)):
        row = copy.deepcopy(rows[3])
        row["identity"]["variant"] = f"tuned-w4-{number:03d}"
        row["verdict"]["winner"] = False
        _costs(row, 400 + number * 3, 0.06 - number * 2e-4, 5 + number / 20, False)
        value = row["quality"]["exact_match:test"]["value"]
        value["value"] = 0.5 + 0.4 * ((number * 37) % 100) / 100
        value["ci95"] = [value["value"] - 0.04, value["value"] + 0.04]
        rows.append(row)
    return rows
