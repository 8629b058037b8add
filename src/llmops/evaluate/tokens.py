"""How far a variant's next-token distributions are from its reference's, token by token.

Scores move in steps of one answer; these move with every rounding, so they show damage long before accuracy does
(llama.cpp prints the same figures for its quantizations: Q8_0 has a mean KL of 0.0002, IQ3_M of 0.07).

    KL(P || Q) = sum_v p_v (log p_v - log q_v)        P: the reference, Q: the variant; nats a token
    same top   = share of tokens where both have the same argmax
    RMS dp     = sqrt(mean (q_y - p_y)^2)             y: the token that really comes next

Both models are live at once, since full distributions are too many to keep (2,048 tokens x 150,000 words are 1.2 GB in
fp32); logits are compared in fp32, a slice of tokens at a time. Tokens of one window depend on each other, so every
interval is over windows: Student's for the means, a bootstrap of windows for the percentile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.evaluate import live
from llmops.evaluate.live import batch_rows, device_of, scoring
from llmops.evaluate.statistics import Interval, weighted_mean
from llmops.quantity import Quantity

__all__ = ["compare_tokens"]

Array = NDArray[np.float64]
RESAMPLES = 500  # of windows, for the percentile's interval


def compare_tokens(model: Any, reference: Any, batches: Iterable[Tensor], *, seed: int = 0, tokenizer: Any = None
                   ) -> dict[str, Quantity]:
    """kl_mean, kl_p99 (nats), same_top (fraction) and rms_delta_p (probability) of `model` against `reference`.

    batches: (windows, length) token ids, without padding; every position but the last of a window is compared.
    tokenizer: of both; where one of them has more logits, those of its tokens are compared. n of each figure is tokens.
    Raises LlmopsError when the vocabularies differ or there is no token to compare.
    """
    columns = live.shared_columns(model, reference, tokenizer)
    found: list[Tensor] = []  # one (3, tokens of the window) each
    with scoring(model, reference):
        for batch in batches:
            rows = batch_rows(len(batch), 2 * batch.shape[1], columns)
            for part in batch.split(rows):
                found += _compare(model, reference, part, columns)
    if not sum(window.shape[1] for window in found):
        raise LlmopsError("there is no token to compare; expected windows of at least two tokens; give more text")
    return _figures([window.numpy() for window in found if window.shape[1]], seed)


def _compare(model: Any, reference: Any, ids: Tensor, columns: int) -> list[Tensor]:
    """(3, length - 1) of KL, same top and delta p for every window; ids: (windows, length)."""
    logits_q = model(input_ids=ids.to(device_of(model)), use_cache=False).logits
    logits_p = reference(input_ids=ids.to(device_of(reference)), use_cache=False).logits
    return [_window(p[:-1, :columns], q[:-1, :columns], row[1:])
            for p, q, row in zip(logits_p, logits_q, ids, strict=True)]


def _window(logits_p: Tensor, logits_q: Tensor, targets: Tensor) -> Tensor:
    """logits: (tokens, vocabulary); targets: (tokens,). A slice of tokens at a time, in fp32. Returns (3, tokens)."""
    rows = max(1, live.SLICE // logits_q.shape[-1])
    parts = []
    for p, q, target in zip(logits_p.split(rows), logits_q.split(rows), targets.split(rows), strict=True):
        log_q = q.float().log_softmax(-1)
        log_p = p.to(log_q.device).float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # below 0 only by rounding
        same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        next_token = target.to(log_q.device)[:, None]
        delta = (log_q.gather(-1, next_token).exp() - log_p.gather(-1, next_token).exp()).squeeze(-1)
        parts.append(torch.stack([kl, same, delta]).double().cpu())
    return torch.cat(parts, dim=1) if parts else torch.empty(3, 0, dtype=torch.float64)


def _figures(windows: Sequence[Array], seed: int) -> dict[str, Quantity]:
    tokens = sum(window.shape[1] for window in windows)
    lost = int(sum((~np.isfinite(window)).any(0).sum() for window in windows))
    if lost:
        reason = f"the distributions were not finite at {lost} of {tokens} tokens"
        return {name: Quantity.null(unit, reason) for name, unit in
                (("kl_mean", "nats"), ("kl_p99", "nats"), ("same_top", "fraction"), ("rms_delta_p", "probability"))}
    weights = [window.shape[1] for window in windows]
    kl, kl_ci = _mean([window[0].mean() for window in windows], weights, 0, np.inf)
    same, same_ci = _mean([window[1].mean() for window in windows], weights, 0, 1)
    square, square_ci = _mean([np.square(window[2]).mean() for window in windows], weights, 0, 1)
    p99, p99_ci = _percentile([window[0] for window in windows], 0.99, seed)
    how = f"{tokens} tokens, interval over {len(windows)} windows"
    return {
        "kl_mean": Quantity.measured(kl, "nats", f"KL(reference || variant), {how}", kl_ci, tokens),
        "kl_p99": Quantity.measured(p99, "nats", f"99th percentile over {how}", p99_ci, tokens),
        "same_top": Quantity.measured(same, "fraction", f"same most likely token, {how}", same_ci, tokens),
        "rms_delta_p": Quantity.measured(
            float(np.sqrt(square)), "probability", f"RMS change of the next token's probability, {how}",
            (float(np.sqrt(square_ci[0])), float(np.sqrt(square_ci[1]))) if square_ci else None, tokens),
    }


def _mean(values: Sequence[float], weights: Sequence[int], low: float, high: float) -> tuple[float, Interval | None]:
    mean, _, interval = weighted_mean(values, np.asarray(weights, dtype=np.float64))
    if interval is None:
        return mean, None
    return mean, (max(low, interval[0]), min(high, interval[1]))


def _percentile(windows: Sequence[Array], level: float, seed: int) -> tuple[float, Interval | None]:
    """The percentile over all tokens, and its 95% percentile-bootstrap interval over windows (None for one window).

    A resample repeats each window k times, so it is the weighted percentile of the values sorted once.
    """
    values = np.concatenate(windows)
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], np.repeat(np.arange(len(windows)), [len(window) for window in windows])[order]
    if len(windows) < 2:
        return float(np.quantile(values, level)), None
    rng = np.random.default_rng(seed)
    share = np.full(len(windows), 1 / len(windows))
    counts = rng.multinomial(len(windows), share, size=RESAMPLES)  # (resamples, windows)
    drawn = np.empty(RESAMPLES)
    for place, repeats in enumerate(counts):
        reached = np.cumsum(repeats[owner])
        drawn[place] = ordered[min(np.searchsorted(reached, level * reached[-1]), len(ordered) - 1)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.quantile(values, level)), (float(low), float(high))
