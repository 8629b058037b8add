"""Greedy answers of a model that is served: its static cache, its recorded step of decode.

What `exact_match.greedy` writes on a cache that grows, written as a GPU will serve it (`models/serving.py`), so that
answers are scored in the runtime they will be given in. A recorded step wants the same shapes each time: the mask
covers the whole room of the cache from the start (keys not written yet lie in the future, which attention cuts off),
and a row that has ended goes on being computed until all have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from llmops.evaluate.live import accepts

if TYPE_CHECKING:
    from llmops.models.serving import Serving

__all__ = ["of", "write"]


def of(model: Any) -> Serving | None:
    """What makes the model fast, None where it is as it was loaded."""
    from llmops.models.serving import serving  # with transformers, whose import takes seconds

    return serving(model)


def write(held: Serving, ids: Tensor, mask: Tensor, *, stops: set[int], max_new_tokens: int,
          choose: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """The continuation of each row, with its stop token where one came within `max_new_tokens`.

    ids, mask: (B, T), padded on the left; choose: the next tokens (B,) from their logits (B, V).
    """
    model = held.model
    cache = held.cache(len(ids), ids.shape[1] + max_new_tokens)
    whole = F.pad(mask, (0, cache.get_max_length() - mask.shape[1]), value=1)  # (B, room)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    extra: dict[str, Any] = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    written: list[list[int]] = [[] for _ in ids]
    forward: Any = model
    for _ in range(max_new_tokens):
        out = forward(input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=cache,
                      use_cache=True, **extra)
        token = choose(out.logits[:, -1])  # (B,)
        for row, chosen in zip(written, token.tolist(), strict=True):
            if not row or row[-1] not in stops:
                row.append(chosen)
        if all(row[-1] in stops for row in written):
            break
        ids, positions, forward = token[:, None], positions[:, -1:] + 1, held.step
    return written
