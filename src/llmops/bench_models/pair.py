"""One cell of the matrix: an arm beside the reference, at one batch size and one context.

The protocol is that of `llmops tune` (`measure.decode`): pairs of blocks in random order after a warm-up, prefills and
whole requests metered apart, figures with intervals, the ratio from pairs. The reference's own cell is the reference
against itself: the noise floor.

Prompts are random ids that both vocabularies have, the same for both. Where the two do not split text into the same
tokens, a token of one is not a token of the other: their figures stand alone, and the ratios are null with that reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmops.bench_models.runtimes import Opened
from llmops.errors import LlmopsError
from llmops.measure.decode import Block, block
from llmops.measure.meter import Meter
from llmops.measure.options import MeasureOptions
from llmops.measure.summary import energy_group, latency_group
from llmops.measure.workload import Timing, prompts_sha256
from llmops.quantity import Quantity

__all__ = ["different_tokens", "measure_pair", "refusal", "shared_prompts"]

WARM_TOKENS = 16
RATIOS = (("latency", "speed_ratio_to_base"), ("energy", "ratio_to_base"))


def different_tokens(one: Opened, other: Opened) -> str | None:
    """Why a token of one is not a token of the other; None when they are the same."""
    if one.pieces is None or other.pieces is None:
        return "the tokenizer of one of the two cannot be read, so nobody knows whether they count the same tokens"
    size = min(len(one.pieces), len(other.pieces))
    place = next((place for place in range(size) if one.pieces[place] != other.pieces[place]), None)
    if place is None:
        return None
    return (f"different tokenizers: token {place} is {one.pieces[place]!r} here and {other.pieces[place]!r} there, so "
            "a token is not a token of the other")


def shared_prompts(pair: tuple[Opened, Opened], rows: int, length: int, seed: int) -> Tensor:
    """Seeded random ids (rows, length) that both have and neither keeps for itself.

    Raises LlmopsError when there is none.
    """
    sizes = [len(one.pieces) for one in pair if one.pieces is not None]
    reserved = pair[0].special | pair[1].special
    ordinary = [number for number in range(min(sizes, default=0)) if number not in reserved]
    if not ordinary:
        raise LlmopsError("the two models share no ordinary token, or their tokenizers cannot be read; expected a "
                          "tokenizer.json beside the model")
    draw = random.Random(seed)
    return torch.tensor([[draw.choice(ordinary) for _ in range(length)] for _ in range(rows)], dtype=torch.long)


def refusal(opened: Opened, batch: int, context: int, new_tokens: int) -> str | None:
    """Why a model cannot run a cell; None when it can."""
    if opened.batches is not None and batch > opened.batches:
        return f"batch {batch}: the runtime decodes {opened.batches} at a time"
    if opened.context is not None and context + new_tokens > opened.context:
        return f"{context} + {new_tokens} tokens do not fit its context of {opened.context}"
    return None


def measure_pair(arm: Opened, reference: Opened, options: MeasureOptions, meter: Meter, seed: int,
                 progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """{"latency", "energy", "prompts_sha256", "not_comparable", "blocks"} of one batch size, `options.batch_sizes[0]`.

    arm and reference may be the same object: an A/A cell. progress is called after every block.
    """
    batch, itself = options.batch_sizes[0], arm is reference
    prompts = shared_prompts((arm, reference), batch, options.prompt_tokens, seed)
    order, found = random.Random(seed), list[Block]()
    with torch.inference_mode():
        for one in (reference,) if itself else (reference, arm):
            one.running.request(prompts, min(options.new_tokens, WARM_TOKENS))
            one.running.prefill(prompts)
        for repeat in range(options.repeats):
            for name in order.sample(["base", "variant"], 2):
                runner = (arm if name == "variant" else reference).running
                found.append(block(runner, prompts, options, meter, name, repeat))
                progress()
    mine, other = ([one for one in found if one.arm == name] for name in ("variant", "base"))
    tokens = (options.prompt_tokens, options.new_tokens)
    timed = all(request.steps_s for one in found for request in one.requests)
    latency = latency_group(_stepped(mine), _stepped(other), tokens, itself)
    energy = energy_group(mine, other, tokens, Quantity.null("W", "idle power was not read"), itself)
    body = {"latency": latency if timed else _untimed(latency), "energy": energy,
            "prompts_sha256": prompts_sha256(prompts), "not_comparable": None if itself else
            different_tokens(arm, reference), "blocks": [_block(one) for one in found]}
    return _without_ratios(body) if body["not_comparable"] else body


def _stepped(blocks: list[Block]) -> list[Block]:
    """With the mean step where a runtime does not time single ones."""
    def filled(request: Timing) -> Timing:
        return request if request.steps_s else replace(request, steps_s=[request.decode_s])

    return [replace(one, requests=[filled(request) for request in one.requests]) for one in blocks]


def _untimed(latency: Mapping[str, Any]) -> dict[str, Any]:
    none = Quantity.null("ms", "the runtime does not time single tokens").as_dict()
    return {**latency, "inter_token_ms_p50": none, "inter_token_ms_p95": none}


def _without_ratios(body: dict[str, Any]) -> dict[str, Any]:
    for part, name in RATIOS:
        body[part][name] = Quantity.null("ratio", body["not_comparable"]).as_dict()
    body["energy"]["saving"] = "unmeasured"
    return body


def _block(one: Block) -> dict[str, Any]:
    """Enough to compute every figure again."""
    return {"arm": "arm" if one.arm == "variant" else "reference", "repeat": one.repeat, "wall_s": one.wall_s,
            "energy_j": one.energy.value, "prefills": one.prefills, "prefill_wall_s": one.prefill_wall_s,
            "prefill_energy_j": one.prefill_energy.value,
            "requests": [[request.prefill_s, request.decode_s] for request in one.requests]}
