"""Requests that end when the model does: what a real question costs, beside the fixed length that compares fairly.

At a fixed length every model writes the same number of tokens, so joules per token compare cost. A tuned model may
write half as much, which is a saving of another kind. Here real prompts are answered greedily, one at a time, until a
stop token or `most` tokens, in one metered window; joules per request and tokens per request are kept together. It is
not interleaved with the base, so there is no ratio and no verdict.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from llmops.measure.intervals import mean_interval
from llmops.measure.meter import Meter
from llmops.measure.workload import Runner
from llmops.quantity import Quantity

__all__ = ["natural", "stop_tokens"]


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer: of the generation config, and the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {named} if isinstance(named, int) else set(named or ())
    end = getattr(tokenizer, "eos_token_id", None)
    return found | ({end} if end is not None else set())


def natural(model: Any, prompts: Sequence[Sequence[int]], stops: Collection[int], most: int, meter: Meter
            ) -> dict[str, Any]:
    """Quantities as dicts: `joules_per_request`, `tokens_per_request`, `stopped` (the share that ended by itself).

    prompts: token ids, each answered alone; those that leave no room for an answer in the context are cut on the left.
    """
    runner, training = Runner(model, most), model.training
    context = getattr(model.config, "max_position_embeddings", None)
    room = max(1, context - most) if context else None
    counts, ended = [], 0
    model.eval()
    try:
        with torch.inference_mode(), meter.window("natural length", aligned=True) as window:
            for ids in prompts:
                prompt = torch.tensor([list(ids)[-room:] if room else list(ids)], device=runner.device)  # (1, length)
                written, stopped = _answer(runner, prompt, stops, most)
                counts.append(float(written))
                ended += stopped
    finally:
        model.train(training)
    return _figures(window.energy, counts, ended, most)


def _answer(runner: Runner, prompt: torch.Tensor, stops: Collection[int], most: int) -> tuple[int, bool]:
    """(tokens written, the stop token among them; whether it was written)."""
    token, cache = runner.prefill(prompt, most)
    for written in range(1, most):
        if int(token) in stops:
            return written, True
        token, cache = runner.step(token, cache)
    return most, int(token) in stops


def _figures(energy: Quantity, counts: list[float], ended: int, most: int) -> dict[str, Any]:
    n = len(counts)
    mean, interval = mean_interval(counts)
    per = (Quantity.null("J/request", energy.method) if energy.value is None else
           Quantity(energy.value / n, "J/request", energy.provenance,
                    f"whole requests of natural length, {n} prompts in one window; {energy.method}", None, n))
    figures = {
        "joules_per_request": per,
        "tokens_per_request": Quantity.measured(mean, "tokens", f"until a stop token, {most} at most", interval, n),
        "stopped": Quantity.measured(ended / n, "fraction", "requests that ended by themselves", None, n)}
    return {name: figure.as_dict() for name, figure in figures.items()}
