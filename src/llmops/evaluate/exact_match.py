"""Exact match: the greedy answer, normalised, is the reference.

Greedy means the argmax of the raw logits: no sampling, and none of the processors that a checkpoint's
generation_config may carry (a repetition penalty of 1.1, as Qwen ships, changes greedy answers). That is why the loop
below is our own and not `generate`; it is also where rows that have ended leave the batch, so that one run-on answer
does not keep 63 finished ones computing. Prompts are padded on the left, with positions counted from each prompt's
first token, so an answer does not depend on its neighbours; in 16 bits the rounding of a matrix product may still vary
with the batch's shape, and a near-tie may fall either way.

Normalisation (Rajpurkar et al. 2016, SQuAD): lower case, punctuation deleted, the articles a/an/the deleted, white
space squeezed. Deliberate differences: a full stop or minus that belongs to a number stays (1.5 is not 15, -3 is not
3), a comma between digits goes, and punctuation means Unicode's. A reference that would normalise to nothing is
compared as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmops.data.render import Prompt, prompts_and_answers
from llmops.data.sources import Rows
from llmops.errors import DataError, LlmopsError
from llmops.evaluate import served
from llmops.evaluate.live import (
    accepts,
    context_limit,
    device_of,
    dtype_name,
    item_id,
    scoring,
    stop_ids,
    tokenizer_sha256,
)
from llmops.evaluate.options import ExactMatch
from llmops.evaluate.score import Item, Score
from llmops.evaluate.slices import labels
from llmops.evaluate.statistics import summarize

__all__ = ["ended_answers", "evaluate", "extracted", "greedy", "normalized", "score_prompts"]


def evaluate(model: Any, tokenizer: Any, rows: Rows, options: ExactMatch, *, id: str, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """rows: of kind `messages` or `prompt_completion`; a row's own `answer` goes before its last turn as the reference,
    and may be a list of which any is right. The seed is not used: nothing is drawn.

    Raises DataError for rows of another kind, no rows, a prompt without room for its answer in the model's context,
    and a reference that `extract` does not match.
    """
    if rows.kind not in ("messages", "prompt_completion"):
        raise DataError(f'{rows.name}: exact_match needs messages or prompt and completion, not "{rows.kind}"; '
                        "name other data, or give columns that map to prompt and completion")
    prompts = prompts_and_answers(rows, tokenizer)
    expected = [rows.rows[prompt.row].get("answer", prompt.answer) for prompt in prompts]
    shown = [rows.rows[prompt.row] for prompt in prompts]
    notes = labels(shown, options.slices, options.cluster, rows.name)
    return [score_prompts(model, tokenizer, prompts, expected, options, id=id, progress=progress, notes=notes)]


def score_prompts(model: Any, tokenizer: Any, prompts: Sequence[Prompt], expected: Sequence[Any], options: ExactMatch,
                  *, id: str, progress: Callable[[int, int], None] | None = None,
                  notes: Sequence[Mapping[str, Any]] | None = None) -> Score:
    """The score of prompts that are rendered already, and the answer expected to each; for a list of answers any of
    them is right. notes: what each item's detail holds besides. Raises as `evaluate`."""
    if not prompts:
        raise DataError(f"{id}: there is no prompt to answer; expected at least one row; look at the data's split")
    pattern = _compiled(options.extract)
    references = [_references(given, pattern, options.extract, id) for given in expected]
    _check_room(model, prompts, options, id)
    answers = [text for text, _ in _answers(model, tokenizer, [prompt.input_ids for prompt in prompts],
                                            options.max_new_tokens, options.batch_size, progress)]
    items = [_item(prompt, answer, reference, pattern, options.normalize, note) for prompt, answer, reference, note
             in zip(prompts, answers, references, notes or [{}] * len(prompts), strict=True)]
    protocol = {"id": "exact_match/greedy", "aggregation": "mean", "max_new_tokens": options.max_new_tokens,
                "normalize": options.normalize, "extract": options.extract,
                "stop_ids": sorted(stop_ids(model, tokenizer)), "dtype": dtype_name(model),
                "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    value, stderr = summarize(items, "mean", "fraction", "greedy answers equal to the reference")
    return Score(id, "exact_match", True, value, stderr, protocol, items)


def normalized(text: str) -> str:
    """The text as answers are compared (see the module's docstring)."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", unicodedata.normalize("NFKC", text).lower())
    text = "".join(character for place, character in enumerate(text) if not _drops(text, place))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def _drops(text: str, place: int) -> bool:
    """Whether the character is punctuation (or a symbol of ASCII's punctuation) outside a number."""
    character = text[place]
    if not unicodedata.category(character).startswith("P") and character not in "$+<=>^`|~":
        return False
    before, after = text[place - 1:place], text[place + 1:place + 2]
    if character == ".":
        return not (before.isdigit() and after.isdigit())
    if character == "-":
        return not (after.isdigit() and not before.isalnum())
    return True


def extracted(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """First group of the first match (the whole match when the pattern has no group); None when there is none."""
    if pattern is None:
        return text.strip()
    match = pattern.search(text)
    return None if match is None else (match.group(1 if pattern.groups else 0) or "").strip()


def _compiled(extract: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(extract) if extract is not None else None
    except re.error as error:
        raise LlmopsError(f"exact_match: extract {extract!r} is not a regular expression ({error}); expected one whose "
                          r"first group is the answer, as '#### (.+)'") from error


def _references(given: Any, pattern: re.Pattern[str] | None, extract: str | None, id: str) -> list[str]:
    texts = [str(text) for text in (given if isinstance(given, list) else [given])]
    found = [extracted(text, pattern) for text in texts]
    matched = [text for text in found if text is not None]
    if not matched:
        raise DataError(f"{id}: extract {extract!r} does not match the reference answer {texts[0][:80]!r}; expected it "
                        "to match every reference; change the expression or the data")
    return matched


def _check_room(model: Any, prompts: Sequence[Prompt], options: ExactMatch, id: str) -> None:
    limit = context_limit(model)
    longest = max(range(len(prompts)), key=lambda place: len(prompts[place].input_ids))
    length = len(prompts[longest].input_ids)
    if limit is not None and length + options.max_new_tokens > limit:
        raise DataError(f"{id}: prompt {longest + 1} of {len(prompts)} has {length} tokens, with max_new_tokens "
                        f"{options.max_new_tokens} too many for the model's {limit} positions; lower max_new_tokens, "
                        "or leave such rows out of the data")


def _item(prompt: Prompt, text: str, references: list[str], pattern: re.Pattern[str] | None, normalize: bool,
          note: Mapping[str, Any]) -> Item:
    answer = extracted(text, pattern) or ""
    correct = any(_same(answer, reference, normalize) for reference in references)
    detail: dict[str, Any] = {"expected": references[0], "correct": correct, **note}
    if pattern is not None:
        detail["text"] = text
    return Item(item_id(prompt.input_ids), float(correct), answer, detail)


def _same(answer: str, reference: str, normalize: bool) -> bool:
    if normalize and normalized(reference):
        return normalized(answer) == normalized(reference)
    return answer == reference


def ended_answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
                  batch_size: int = 128, progress: Callable[[int, int], None] | None = None) -> list[str | None]:
    """The greedy answer to each prompt (ids), None where it had not ended after `max_new_tokens` tokens."""
    answers = _answers(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    return [text if ended else None for text, ended in answers]


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int,
             progress: Callable[[int, int], None] | None) -> list[tuple[str, bool]]:
    """(text, whether it ended) of every answer, in the order of the prompts. Computed longest prompts first: little
    padding, and what does not fit in memory fails at once."""
    stops, pad = stop_ids(model, tokenizer), tokenizer.pad_token_id or 0
    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    done = 0
    with scoring(model):
        for places in _batches(prompts, batch_size):
            batch = greedy(model, [prompts[place] for place in places], stops=stops, pad=pad,
                           max_new_tokens=max_new_tokens)
            for place, ids in zip(places, batch, strict=True):
                ended = bool(ids) and ids[-1] in stops
                text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)
                answers[place] = text, ended
            done += len(places)
            if progress is not None:
                progress(done, len(prompts))
    return answers


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for start in range(0, len(order), size):
        yield order[start:start + size]


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def greedy(model: Any, prompts: Sequence[Sequence[int]], *, stops: set[int], pad: int, max_new_tokens: int,
           choose: Callable[[Tensor], Tensor] = _likeliest) -> list[list[int]]:
    """The argmax continuation of each prompt, with its stop token where one came within `max_new_tokens`.

    choose: another choice of the next tokens (B,) than the likeliest, from their logits (B, V).

    One batch with a KV cache; B: rows still being written, T: longest prompt. Call it under `scoring(model)`. A model
    that is served writes as it will serve (`served.py`).
    """
    ids, mask = _left_padded(prompts, pad, device_of(model))  # (B, T) each
    if (held := served.of(model)) is not None:
        return served.write(held, ids, mask, stops=stops, max_new_tokens=max_new_tokens, choose=choose)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = None
    extra = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    for step in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                    **extra)
        cache, token = out.past_key_values, choose(out.logits[:, -1])  # (B,)
        for row, chosen in zip(rows, token.tolist(), strict=True):
            if not written[row] or written[row][-1] not in stops:
                written[row].append(chosen)
        open_rows = [place for place, row in enumerate(rows) if written[row][-1] not in stops]
        if not open_rows or step + 1 == max_new_tokens:
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if 2 * len(open_rows) <= len(rows):  # by halves, so that all this copying together moves each row about once
            kept = torch.tensor(open_rows, device=ids.device)
            cache.batch_select_indices(kept)
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            rows = [rows[place] for place in open_rows]
    return written


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
