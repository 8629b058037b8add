"""From blocks to the figures of a row: speed, latency, joules per token, ratios to the base.

Latency percentiles run over all requests and tokens of the variant's blocks; everything else is one figure a block,
of which the median is given with its interval (`intervals.py`). A ratio pairs the blocks of the same repeat. One block
without energy makes the energy figure null: leaving it out would choose the blocks by what the sensor could see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmops.measure.intervals import LEAST_PAIRS, log_ratio, median_interval
from llmops.quantity import Quantity, weakest

if TYPE_CHECKING:
    from llmops.measure.decode import Block

__all__ = ["energy_group", "latency_group", "noise_floor"]

Tokens = tuple[int, int]  # prompt tokens, new tokens
AA_REASON = "this is the base; its A/A run against itself is in {name}"


def _prefill_speed(block: Block, tokens: Tokens) -> float:
    return block.batch * tokens[0] * len(block.requests) / sum(request.prefill_s for request in block.requests)


def _decode_speed(block: Block, tokens: Tokens) -> float:
    return block.batch * (tokens[1] - 1) * len(block.requests) / sum(request.decode_s for request in block.requests)


def _middle(values: Sequence[float], unit: str, provenance: Any, method: str) -> Quantity:
    value, interval = median_interval(values)
    return Quantity(value, unit, provenance, f"{method}; median of {len(values)} blocks", interval, len(values))


def noise_floor(row: Mapping[str, Any]) -> list[str]:
    """A line a batch size on what the base against itself came to; [] for rows without it."""
    said = []
    for batch, group in (row.get("latency") or {}).items():
        ratios = {"speed": group.get("aa_speed_ratio"),
                  "energy": ((row.get("energy") or {}).get(batch) or {}).get("aa_ratio")}
        told = [f"{what} {_percent(max(ratio['ci95'][1] - 1, 1 - ratio['ci95'][0]))}"
                for what, ratio in ratios.items() if ratio and ratio["ci95"]]
        if told:
            said.append(f"noise floor, batch {batch} (A/A, how far its interval reaches from 1): {', '.join(told)}")
    return said


def _percent(share: float) -> str:
    """Two digits, without an exponent: 0.53 %, 4.1 %, 170 %."""
    rounded = float(f"{100 * share:.2g}")
    return f"{rounded:,.0f} %" if rounded >= 10 else f"{rounded:g} %"


def _percentile(values: Sequence[float], share: float, method: str) -> Quantity:
    """Linear between the two neighbours, in ms."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    value = ordered[below] + (ordered[above] - ordered[below]) * (place - below)
    return Quantity.measured(value * 1000, "ms", method, None, len(ordered))


def latency_group(mine: Sequence[Block], other: Sequence[Block], tokens: Tokens,
                  against_itself: bool) -> dict[str, Any]:
    """Figures of one batch size as dicts. mine, other: blocks of variant and base, in the order of their repeats."""
    firsts = [request.prefill_s for block in mine for request in block.requests]
    gaps = [step for block in mine for request in block.requests for step in request.steps_s]
    first, gap = "wall clock, prefill and argmax", "time between decoded tokens of a sequence"
    value, interval = log_ratio([_decode_speed(block, tokens) for block in mine],
                                [_decode_speed(block, tokens) for block in other])
    ratio = Quantity.measured(value, "ratio", f"decode speed over base, mean log ratio of {len(mine)} interleaved "
                                              "pairs, t interval", interval, len(mine))
    none = Quantity.null("ratio", AA_REASON.format(name="aa_speed_ratio"))
    group = {
        "prefill_tokens_per_s": _middle([_prefill_speed(block, tokens) for block in mine], "tokens/s", "measured",
                                        "prompt tokens of the batch over prefill time"),
        "decode_tokens_per_s": _middle([_decode_speed(block, tokens) for block in mine], "tokens/s", "measured",
                                       "decoded tokens of the batch over decode time"),
        "first_token_ms_p50": _percentile(firsts, 0.50, first), "first_token_ms_p95": _percentile(firsts, 0.95, first),
        "inter_token_ms_p50": _percentile(gaps, 0.50, gap), "inter_token_ms_p95": _percentile(gaps, 0.95, gap),
        "speed_ratio_to_base": none if against_itself else ratio,
    }
    if against_itself:
        group["aa_speed_ratio"] = ratio
    return {name: quantity.as_dict() for name, quantity in group.items()}


def _per_token(block: Block, tokens: Tokens) -> float:
    return (block.energy.value or 0.0) / (len(block.requests) * block.batch * tokens[1])


def _per_request(block: Block, tokens: Tokens) -> float:
    return (block.energy.value or 0.0) / (len(block.requests) * block.batch)


def _prefill_per_token(block: Block, tokens: Tokens) -> float:
    return (block.prefill_energy.value or 0.0) / (block.prefills * block.batch * tokens[0])


def _decode_per_token(block: Block, tokens: Tokens) -> float:
    prefill = _prefill_per_token(block, tokens) * tokens[0]
    return (_per_request(block, tokens) - prefill) / (tokens[1] - 1)


def _figure(blocks: Sequence[Block], tokens: Tokens, of: Callable[[Block, Tokens], float], unit: str, what: str,
            sources: Sequence[str]) -> Quantity:
    """The median of `of` over the blocks; null with the first reason when a window it needs has no energy."""
    windows = [getattr(block, source) for block in blocks for source in sources]
    missing = [window for window in windows if window.value is None]
    if missing:
        return Quantity.null(unit, f"{len(missing)} of {len(windows)} windows have no energy: {missing[0].method}")
    values = [of(block, tokens) for block in blocks]
    if min(values) <= 0:
        return Quantity.null(unit, f"{what}: the difference of two windows is not positive in every block; the windows "
                                   "are too short for this sensor")
    return _middle(values, unit, weakest(window.provenance for window in windows), f"{what}; {windows[0].method}")


def _ratio(mine: Sequence[Block], other: Sequence[Block], tokens: Tokens) -> Quantity:
    windows = [block.energy for block in (*mine, *other)]
    missing = [window for window in windows if window.value is None]
    if missing:
        return Quantity.null("ratio", f"{len(missing)} of {len(windows)} windows have no energy: {missing[0].method}")
    value, interval = log_ratio([_per_token(block, tokens) for block in mine],
                                [_per_token(block, tokens) for block in other])
    return Quantity(value, "ratio", weakest(window.provenance for window in windows),
                    f"joules per output token over base, mean log ratio of {len(mine)} interleaved pairs, t interval; "
                    f"{windows[0].method}", interval, len(mine))


def _net(blocks: Sequence[Block], tokens: Tokens, idle: Quantity) -> Quantity:
    if idle.value is None:
        return Quantity.null("J/token", idle.method)
    missing = [block.energy for block in blocks if block.energy.value is None]
    if missing:
        return Quantity.null("J/token", f"{len(missing)} of {len(blocks)} windows have no energy: {missing[0].method}")
    net = [(block.energy.value or 0.0) - idle.value * block.wall_s for block in blocks]
    values = [joules / (len(block.requests) * block.batch * tokens[1])
              for joules, block in zip(net, blocks, strict=True)]
    return _middle(values, "J/token", weakest([idle.provenance, *(block.energy.provenance for block in blocks)]),
                   f"joules per output token without idle power; {blocks[0].energy.method}")


def _of_part(blocks: Sequence[Block], tokens: Tokens, part: str) -> Quantity:
    found = [block.parts.get(part) for block in blocks]
    known = [window for window in found if window is not None and window.value is not None]
    if len(known) < len(blocks):
        lost = next((window.method for window in found if window is not None and window.value is None), "not read")
        return Quantity.null("J/token", f"{part}: {len(blocks) - len(known)} of {len(blocks)} windows have no energy: "
                                        f"{lost}")
    values = [(window.value or 0.0) / (len(block.requests) * block.batch * tokens[1])
              for window, block in zip(known, blocks, strict=True)]
    return _middle(values, "J/token", weakest(window.provenance for window in known), known[0].method)


def _verdict(ratio: Quantity) -> str:
    if ratio.value is None or ratio.ci95 is None:
        return "unmeasured"
    return "shown" if ratio.ci95[1] < 1 and (ratio.n or 0) >= LEAST_PAIRS else "not shown"


def energy_group(mine: Sequence[Block], other: Sequence[Block], tokens: Tokens, idle: Quantity,
                 against_itself: bool) -> dict[str, Any]:
    """Figures of one batch size as dicts, and the verdict `saving`. Energies are gross, per sequence of the batch."""
    ratio = _ratio(mine, other, tokens)
    none = Quantity.null("ratio", AA_REASON.format(name="aa_ratio"))
    group = {
        "joules_per_token": _figure(mine, tokens, _per_token, "J/token", "whole requests over output tokens",
                                    ["energy"]),
        "joules_per_request": _figure(mine, tokens, _per_request, "J/request", "whole requests", ["energy"]),
        "prefill_joules_per_token": _figure(mine, tokens, _prefill_per_token, "J/token",
                                            "prefills alone over prompt tokens", ["prefill_energy"]),
        "decode_joules_per_token": _figure(mine, tokens, _decode_per_token, "J/token",
                                           "whole requests minus prefills, over decoded tokens",
                                           ["energy", "prefill_energy"]),
        "ratio_to_base": none if against_itself else ratio,
        "net_joules_per_token": _net(mine, tokens, idle),
    }
    if against_itself:
        group["aa_ratio"] = ratio
    parts = sorted({part for block in mine for part in block.parts})
    if len(parts) > 1:  # every GPU for itself, beside their sum
        group |= {f"joules_per_token_{part}": _of_part(mine, tokens, part) for part in parts}
    body: dict[str, Any] = {name: quantity.as_dict() for name, quantity in group.items()}
    # A base saves nothing by definition: where its energy is known the answer is "not shown", whatever the noise says.
    body["saving"] = ("unmeasured" if ratio.value is None else "not shown") if against_itself else _verdict(ratio)
    return body
