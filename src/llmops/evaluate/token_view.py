"""Two models on the same tokens: at which token of an answer they part, and what each would have said there.

    KL(P || Q) = sum_v p_v (log p_v - log q_v) at every position that predicts a token of the answer, in nats
    P: the reference, Q: the variant

The answer is the reference's own. Where it was written greedily its tokens are the reference's most likely ones, so the
first token at which the variant's differ is where its answer begins to be another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmops.evaluate.live import accepts, device_of, scoring, shared_columns

__all__ = ["Shown", "TokenView", "answer_log_probabilities", "view"]

Shown = tuple[Sequence[int], Sequence[int]]  # prompt ids, ids of the reference's answer


@dataclass(frozen=True)
class TokenView:
    """One token of an answer: its text, KL there, each model's probability of it, how its log-probability changed
    (log q - log p, nats), each model's own choice."""

    token: str
    kl: float
    p: float
    q: float
    delta_logp: float
    says: str
    says_variant: str


def answer_log_probabilities(model: Any, shown: Shown, columns: int | None = None) -> Tensor:
    """(tokens of the answer, vocabulary) log-probabilities in fp32 on the CPU; call it under `scoring(model)`.

    columns: logits that count, the first ones; None: all.
    """
    prompt, answer = shown
    ids = torch.tensor([[*prompt, *answer][:-1]], device=device_of(model))
    keep = {"logits_to_keep": len(answer)} if accepts(model, "logits_to_keep") else {}
    logits = model(input_ids=ids, use_cache=False, **keep).logits[0, -len(answer):, :columns]
    found: Tensor = logits.float().log_softmax(-1).cpu()
    return found


def view(variant: Any, reference: Any, tokenizer: Any, shown: Sequence[Shown]) -> list[list[TokenView]]:
    """Every token of every answer. Raises LlmopsError when the two have not one vocabulary (`live.shared_columns`)."""
    columns = shared_columns(variant, reference, tokenizer)
    found = []
    with scoring(variant, reference):
        for each in shown:
            log_q, log_p = (answer_log_probabilities(model, each, columns) for model in (variant, reference))
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
            found.append([_token(token, kl[place], log_p[place], log_q[place], tokenizer)
                          for place, token in enumerate(each[1])])
    return found


def _token(token: int, kl: Tensor, log_p: Tensor, log_q: Tensor, tokenizer: Any) -> TokenView:
    """log_p, log_q: (vocabulary,) at the position that predicts the token."""
    return TokenView(_text(tokenizer, token), float(kl), float(log_p[token].exp()), float(log_q[token].exp()),
                     float(log_q[token] - log_p[token]), _text(tokenizer, int(log_p.argmax())),
                     _text(tokenizer, int(log_q.argmax())))


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))
