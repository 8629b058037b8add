"""The inference workload: fixed prompts, greedy, exactly N new tokens, prefill and decode timed apart.

It is a loop of our own rather than `generate`: a prefill over the prompt makes the first token, then one forward pass
a token with the key-value cache that the model returned. No stop token ends it early, so that every model writes the
same number of tokens and joules per token compare cost, not verbosity. Prompts are random ids of the ordinary
vocabulary: their content does not matter to the cost of a dense model, and they exist for every tokenizer.

Clocks. On the CPU every step is read off the wall clock. On CUDA the device is synchronized at the two boundaries
(before and after prefill and decode), so first-token time and decode time include launching; single tokens are timed
by CUDA events on the stream, since a synchronization a token would slow down what is measured.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.measure.meter import synchronize

__all__ = ["Runner", "Timing", "check_fits", "make_prompts", "prompts_sha256"]


@dataclass(frozen=True)
class Timing:
    """One batch of requests: seconds of prefill (= to the first token), of all decoding, and of each decoded token."""

    prefill_s: float
    decode_s: float
    steps_s: list[float]


def _vocabulary(models: list[Any], tokenizer: Any) -> list[int]:
    """Ordinary ids that every model can embed: neither special nor added to the tokenizer later."""
    size = min(int(model.get_input_embeddings().weight.shape[0]) for model in models)
    reserved = set(getattr(tokenizer, "all_special_ids", []) or [])
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    reserved |= {int(index) for index in added}
    ordinary = [index for index in range(min(size, len(tokenizer))) if index not in reserved]
    if not ordinary:
        raise LlmopsError(f"the tokenizer has no ordinary tokens within the {size} rows of the embedding; a decoding "
                          "workload needs at least one: check that model and tokenizer belong together")
    return ordinary


def make_prompts(models: list[Any], tokenizer: Any, rows: int, length: int, seed: int) -> Tensor:
    """Seeded random prompts (rows, length), int64, on the CPU; the same for every model in `models`."""
    ordinary = _vocabulary(models, tokenizer)
    draw = random.Random(seed)
    return torch.tensor([[draw.choice(ordinary) for _ in range(length)] for _ in range(rows)], dtype=torch.long)


def prompts_sha256(prompts: Tensor) -> str:
    """SHA-256 over shape and token ids."""
    text = "\n".join(" ".join(map(str, row)) for row in prompts.tolist())
    return hashlib.sha256(text.encode()).hexdigest()


def check_fits(model: Any, prompt_tokens: int, new_tokens: int, name: str) -> None:
    """Raises LlmopsError when prompt and new tokens do not fit the model's context."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise LlmopsError(
            f"measure: {prompt_tokens} prompt_tokens + {new_tokens} new_tokens = {prompt_tokens + new_tokens} do not "
            f"fit the context of {limit} tokens of {name}; lower measure.prompt_tokens or measure.new_tokens")


class Runner:
    """Runs prefill and requests on one model. Use inside `torch.inference_mode()`, with the model in eval mode."""

    def __init__(self, model: Any, new_tokens: int = 1) -> None:
        """new_tokens: the most that a request will ask for: a static cache is made for it at once."""
        from llmops.models.serving import serving

        self.model, self.new_tokens = model, new_tokens
        self.device = next(model.parameters()).device
        # Only the last position's logits are wanted; without this a prefill pays for a matrix of prompt x vocabulary.
        accepts = inspect.signature(model.forward).parameters
        self._serving = serving(model)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def prefill(self, prompt: Tensor, new_tokens: int = 1) -> tuple[Tensor, Any]:
        """prompt: (batch, length) on the device -> the first new token (batch, 1), and the cache.

        A served model (`models/serving.py`) writes into its static cache, with room for new_tokens.
        """
        cache = None if self._serving is None else self._serving.cache(
            len(prompt), prompt.shape[1] + max(new_tokens, self.new_tokens))
        out = self.model(input_ids=prompt, past_key_values=cache, use_cache=True, **self._last_only)
        return out.logits[:, -1:].argmax(dim=-1), out.past_key_values

    def step(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """token: (batch, 1) -> the next token (batch, 1), and the cache."""
        forward = self.model if self._serving is None else self._serving.step
        out = forward(input_ids=token, past_key_values=cache, use_cache=True, **self._last_only)
        return out.logits[:, -1:].argmax(dim=-1), out.past_key_values

    def sync(self) -> None:
        synchronize(str(self.device))

    def request(self, prompt: Tensor, new_tokens: int) -> Timing:
        """One batch: prefill, then new_tokens - 1 decoding steps."""
        self.sync()
        began = time.perf_counter()
        token, cache = self.prefill(prompt, new_tokens)
        self.sync()
        prefilled = time.perf_counter()
        marks = [self._mark()]
        for _ in range(new_tokens - 1):
            token, cache = self.step(token, cache)
            marks.append(self._mark())
        self.sync()
        ended = time.perf_counter()
        return Timing(prefilled - began, ended - prefilled, self._gaps(marks))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _gaps(self, marks: list[Any]) -> list[float]:
        pairs = list(zip(marks, marks[1:], strict=False))
        if self.device.type != "cuda":
            return [later - earlier for earlier, later in pairs]
        return [earlier.elapsed_time(later) / 1000 for earlier, later in pairs]
