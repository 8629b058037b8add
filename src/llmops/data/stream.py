"""The stream that perplexity reads, with the row that each of its tokens is from.

A stream runs across documents, and a window of it may hold several; to say which document lost how much, every token
needs its owner. A token belongs to the row that its last character is in; what stands between two texts (an empty line,
the end token) belongs to the one before it, and a BOS to the first. The ids are those of `render.text_stream`, token
for token.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from llmops.data.render import joined_texts, sequences, text_stream
from llmops.data.sources import Rows

__all__ = ["owned_stream"]


def owned_stream(rows: Rows, tokenizer: Any, separator: str = "blank_line") -> tuple[list[int], list[int] | None]:
    """(ids, index of the row of each); None in place of the owners where a slow tokenizer does not tell which
    characters a token stands for. Raises DataError as `text_stream`."""
    if rows.kind != "text":
        found = sequences(rows, tokenizer)
        return ([token for ids in found for token in ids],
                [index for index, ids in enumerate(found) for _ in ids])
    if not getattr(tokenizer, "is_fast", False):
        return text_stream(rows, tokenizer, separator), None
    joined = joined_texts(rows, tokenizer, separator)
    texts = [row["text"] for row in rows.rows]
    between = (len(joined) - sum(map(len, texts))) // max(1, len(texts) - 1)
    starts = list(accumulate((len(text) + between for text in texts[:-1]), initial=0))
    out = tokenizer(joined, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    owners, last = [], 0
    for begin, end in out["offset_mapping"]:
        last = max(last, bisect_right(starts, max(begin, end - 1)) - 1)  # a token of no width stays with what precedes
        owners.append(last)
    return list(out["input_ids"]), owners
