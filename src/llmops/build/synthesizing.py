"""Data that a teacher writes (Kim & Rush 2016, "Sequence-Level Knowledge Distillation"): answers, filters, a card.

A student that is trained on what its teacher says learns the teacher's likeliest sequences, whatever its own tokenizer
and architecture are, and needs no teacher while it trains. The teacher answers the prompts of other data shard by
shard; then rows that would teach something wrong are left out, each for the first of these reasons, and counted:

    unfinished    not ended within max_new_tokens: would teach to break off
    empty         nothing but white space
    short         fewer than min_tokens tokens
    repetitive    more of its runs of four words said before than max_repetition
    equal, near   as an earlier row, or more like one than max_similarity (`data/duplicates.py`)

What is left lies in `rows.jsonl`, an ordinary data file, with `card.json` and README.md that say how it came to be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmops.build.shared import Shared
from llmops.data.duplicates import first_of_their_kind, repetition
from llmops.data.options import Synthesize
from llmops.data.render import prompts_and_answers, with_answers
from llmops.data.sources import Rows
from llmops.errors import StepError
from llmops.evaluate.exact_match import greedy
from llmops.evaluate.live import context_limit, device_of, scoring, stop_ids

__all__ = ["FILE", "REASONS", "filtered", "synthesize", "write_answers"]

FILE = "rows.jsonl"
REASONS = ("unfinished", "empty", "short", "repetitive", "equal", "near")
SHARD_PROMPTS, BATCH = 512, 128
Answer = tuple[str, int, bool]  # text, tokens, whether it ended


def synthesize(shared: Shared, rows: Rows, how: Synthesize, teacher: Callable[[], Any], tokenizer: Any, *, seed: int,
               progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
    """Write the data into `shared` unless it is there; returns its card. rows: whose prompts are answered.

    Raises StepError when no row is left.
    """
    found = shared.manifest()
    if found is None:
        with shared.making():
            found = shared.manifest() or _write(shared, rows, how, teacher, tokenizer, seed, progress)
    shared.used()
    return found


def _write(shared: Shared, rows: Rows, how: Synthesize, teacher: Callable[[], Any], tokenizer: Any, seed: int,
           progress: Callable[[int, int, str], None] | None) -> dict[str, Any]:
    prompts = [prompt.input_ids for prompt in prompts_and_answers(rows, tokenizer)]
    starts = range(0, len(prompts), SHARD_PROMPTS)
    names = [f"answers-{number:05d}.json" for number, _ in enumerate(starts)]
    for number, (name, first) in enumerate(zip(names, starts, strict=True)):
        shared.shard(name, lambda first=first, number=number: json.dumps(write_answers(  # type: ignore[misc]
            teacher(), tokenizer, prompts[first:first + SHARD_PROMPTS], how, seed=seed * 100_003 + number)).encode())
        if progress is not None:
            progress(min(first + SHARD_PROMPTS, len(prompts)), len(prompts), f"{how.teacher} writes")
    answers = [[(str(text), int(count), bool(ended)) for text, count, ended in one]
               for name in names for one in json.loads((shared.folder / name).read_text(encoding="utf-8"))]
    kept, counts = filtered(rows, answers, how, tokenizer)
    if not kept:
        worst = max(REASONS, key=lambda reason: counts[reason])
        raise StepError(f'data "{rows.name}": {how.teacher} wrote {counts["written"]:,} answers, and no row is left: '
                        f"{counts[worst]:,} were {worst}; expected a teacher that answers such prompts, or looser "
                        "filters (max_new_tokens, min_tokens, max_repetition)")
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode()
    shared.shard(FILE, lambda: body)
    card = {"kind": "written by a teacher", "teacher": how.teacher, "prompts": rows.name,
            "prompts_sha256": rows.sha256, "options": how.model_dump(mode="json"), "counts": counts, "seed": seed,
            "rows_sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
    shared.shard("README.md", lambda: _card(card, shared.parts).encode())
    shared.finish(card)
    return {**card, "parts": dict(shared.parts)}


def write_answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], how: Synthesize, *, seed: int
                  ) -> list[list[Answer]]:
    """For each prompt `how.answers` answers: (text, tokens, whether it ended). The same for the same seed.

    Raises StepError when a prompt leaves no room in the model's context.
    """
    stops, pad = stop_ids(model, tokenizer), tokenizer.pad_token_id or 0
    draw = torch.Generator(device=device_of(model)).manual_seed(seed)
    limit, known = context_limit(model), max(tokenizer.get_vocab().values()) + 1

    def choose(logits: Tensor) -> Tensor:
        if how.temperature == 0:
            return logits.argmax(-1)
        p = (logits[:, :known].float() / how.temperature).softmax(-1)
        return torch.multinomial(p, 1, generator=draw)[:, 0]

    asked = sorted((place for place in range(len(prompts)) for _ in range(how.answers)),
                   key=lambda place: -len(prompts[place]))
    found: list[list[Answer]] = [[] for _ in prompts]
    with scoring(model):
        for at in range(0, len(asked), BATCH):
            places = asked[at:at + BATCH]
            room = how.max_new_tokens if limit is None else min(how.max_new_tokens,
                                                                limit - len(prompts[places[0]]))
            if room < 1:
                raise StepError(f"a prompt of {len(prompts[places[0]]):,} tokens fills the teacher's context of "
                                f"{limit:,}; expected room for an answer: leave such rows out of the prompts")
            batch = greedy(model, [prompts[place] for place in places], stops=stops, pad=pad, max_new_tokens=room,
                           choose=choose)
            for place, ids in zip(places, batch, strict=True):
                ended = bool(ids) and ids[-1] in stops
                said = ids[:-1] if ended else ids
                text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                found[place].append((text, len(said), ended))
    return found


def filtered(rows: Rows, answers: Sequence[Sequence[Answer]], how: Synthesize, tokenizer: Any
             ) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(rows with an answer, counts): what is left, in the order of the prompts, and what became of the others."""
    counts = dict.fromkeys(("prompts", "written", *REASONS, "kept", "tokens"), 0)
    counts["prompts"], counts["written"] = len(rows.rows), sum(map(len, answers))
    good: list[tuple[int, Answer]] = []
    for row, given in enumerate(answers):
        for answer in given:
            reason = _reason(answer, how)
            if reason is None:
                good.append((row, answer))
            else:
                counts[reason] += 1
    made = [with_answers(rows, {row: text}, tokenizer).rows[0] for row, (text, _, _) in good]
    left, counts["equal"], counts["near"] = first_of_their_kind([_words_of(row) for row in made], how.max_similarity)
    counts["kept"], counts["tokens"] = len(left), sum(good[place][1][1] for place in left)
    return [made[place] for place in left], counts


def _reason(answer: Answer, how: Synthesize) -> str | None:
    text, count, ended = answer
    if not ended:
        return "unfinished"
    if not text.strip():
        return "empty"
    if count < how.min_tokens:
        return "short"
    return "repetitive" if repetition(text) > how.max_repetition else None


def _words_of(row: Mapping[str, Any]) -> str:
    """All that a row says, for comparing rows."""
    if "messages" in row:
        return "\n".join(str(turn["content"]) for turn in row["messages"])
    return f"{row['prompt']}\n{row['completion']}"


def _card(card: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    counts = card["counts"]
    lost = ", ".join(f"{counts[reason]:,} {reason}" for reason in REASONS if counts[reason]) or "none"
    options = ", ".join(f"{name} {value}" for name, value in card["options"].items()
                        if name not in ("teacher", "prompts"))
    return "\n".join([
        f"# Data written by {card['teacher']}", "",
        f"Answers of the variant `{card['teacher']}` to the prompts of `{card['prompts']}`: {counts['kept']:,} rows of "
        f"{counts['prompts']:,} prompts, {counts['tokens']:,} tokens of answers. Nobody has checked them: they say "
        "what the teacher says, its mistakes included.", "",
        "| | |", "|-|-|", f"| written | {counts['written']:,} answers |", f"| left out | {lost} |",
        f"| kept | {counts['kept']:,} rows, {card['bytes']:,} bytes |", f"| options | {options} |",
        f"| seed | {card['seed']} |", f"| teacher | build {parts['teacher']} |",
        f"| prompts | sha256 {card['prompts_sha256']} |", f"| rows | sha256 {card['rows_sha256']} |", ""])
