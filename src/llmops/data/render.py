"""Rows to tokens: training examples with their labels, prompts to answer, streams for perplexity and calibration.

A training example is a list of ids and a list of labels; a label is the id itself where the loss stands and -100
where it does not. The loss stands on

    messages            every assistant turn with its terminator, and on nothing else
    prompt_completion   the same, as one user and one assistant turn; without a chat template: the completion and eos
    text                everything

Text is tokenized whole, so that the tokens are those the model meets when it is used, and a token is trained when one
of its characters is. A chat is tokenized without the tokenizer's own special tokens (the template has written them);
plain text gets BOS exactly when the tokenizer itself would put it there, and EOS at its end. Text longer than
`max_length` becomes several windows without overlap; a longer chat is cut at its end and counted. Left out: packing
several rows into one example.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmops.data.budget import enforce
from llmops.data.chat import (
    Rendered,
    begins_with_bos,
    conversation_text,
    has_template,
    prompt_text,
    render_chat,
    terminators,
)
from llmops.data.leak import check_leak
from llmops.data.masks import IGNORED, Offsets, chat_labels, framed, plain_labels, refuse_double_bos, tokenize
from llmops.data.options import Limits
from llmops.data.sources import Rows
from llmops.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Encoded", "IGNORED", "Prompt", "answer_crops", "calibration_tokens", "check_crop", "check_leak",
           "choice_examples", "collate", "encode", "joined_texts", "prompts_and_answers", "sequences",
           "text_stream", "with_answers"]


@dataclass(frozen=True)
class Encoded:
    """Training examples and what became of the rows.

    examples: {"input_ids": [...], "labels": [...]}, of equal length. report: rows, examples, dropped (nothing to
    train on), truncated (cut to max_length), tokens, trainable_tokens, turn_by_turn (rows cut into one example a
    turn), system_folded (rows whose system text stands in the user's turn), longest (tokens of the longest row, before
    any cut). origin: for each example the index of its row.
    """

    examples: list[dict[str, list[int]]]
    report: dict[str, int]
    origin: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked. `input_ids` and `text` end where the answer begins; `row` is the index of the row."""

    input_ids: list[int]
    text: str
    answer: str
    row: int


@dataclass(frozen=True)
class _Draft:
    """Text with the characters that are trained. `plain`: no template wrote its special tokens, so we add them."""

    row: int
    rendered: Rendered
    plain: bool


def encode(rows: Rows, tokenizer: Any, *, max_length: int, limits: Limits,
           progress: Callable[[int, int, str], None] | None = None) -> Encoded:
    """Tokenize rows for training, with labels on what is to be learned (see above).

    max_length: tokens an example may have. progress: called with rows done, rows in all and a word. Raises DataError
    when a template drops the terminator of a turn, when a text begins with two BOS, when nothing at all is left to
    train on, and when more rows are dropped or cut than `limits` allows.
    """
    _refuse_kind(rows)
    stops, bos = terminators(tokenizer), begins_with_bos(tokenizer)
    pieces: Counter[int] = Counter()
    examples: list[dict[str, list[int]]] = []
    origin: list[int] = []
    longer: dict[int, int] = {}  # row -> its tokens
    longest, folded = 0, set[int]()
    for draft, ids, offsets in _tokenized(rows, tokenizer, progress):
        pieces[draft.row] += 1
        place = rows.place(draft.row)
        if draft.rendered.folded:
            folded.add(draft.row)
        labels = plain_labels(draft.rendered.spans, ids, offsets) if draft.plain else chat_labels(
            draft.rendered, ids, offsets, stops, tokenizer, place)
        if draft.plain:
            ids, labels = framed(ids, labels, bos, tokenizer, rows.name)
        refuse_double_bos(ids, tokenizer, place)
        longest = max(longest, len(ids))
        if rows.kind != "text" and len(ids) > max_length:
            longer[draft.row] = len(ids)
        for window in _windows(ids, labels, max_length, every=rows.kind == "text"):
            examples.append(window)
            origin.append(draft.row)
    report = {"rows": len(rows.rows), "examples": len(examples), "dropped": len(rows.rows) - len(set(origin)),
              "truncated": len(longer), "tokens": sum(len(example["input_ids"]) for example in examples),
              "trainable_tokens": sum(label != IGNORED for example in examples for label in example["labels"]),
              "turn_by_turn": sum(count > 1 for count in pieces.values()), "system_folded": len(folded),
              "longest": longest}
    kept = set(origin)
    enforce(rows, [index for index in range(len(rows.rows)) if index not in kept], longer, limits, max_length)
    return Encoded(examples, report, origin)


def _refuse_kind(rows: Rows) -> None:
    if rows.kind == "choices":
        raise DataError(f"{rows.name}: its rows have question, choices and answer, which can be scored but not "
                        "trained on; expected messages, prompt+completion or text; map them, as "
                        "`columns: {prompt: question, completion: answer}`")
    if rows.kind == "prompts":
        raise DataError(f"{rows.name}: its rows are prompts without answers, which only a distillation trains on whose "
                        "teacher answers them (`answers: teacher`); expected messages, prompt+completion or text")
    if rows.kind == "preference":
        raise DataError(f"{rows.name}: its rows are preferences (prompt, chosen, rejected), which only method dpo "
                        "trains on; expected messages, prompt+completion or text; use method dpo, or train on the "
                        "chosen answers alone, as `columns: {prompt: prompt, completion: chosen}`")


def _tokenized(rows: Rows, tokenizer: Any, progress: Callable[[int, int, str], None] | None,
               chunk: int = 512) -> Iterable[tuple[_Draft, list[int], Offsets]]:
    """Rendered and tokenized row by row, in batches of `chunk` rows."""
    for start in range(0, len(rows.rows), chunk):
        stop = min(start + chunk, len(rows.rows))
        drafts = [draft for index in range(start, stop) for draft in _drafts(rows, index, tokenizer)]
        batch = tokenize([draft.rendered.text for draft in drafts], tokenizer)
        for draft, (ids, offsets) in zip(drafts, batch, strict=True):
            yield draft, ids, offsets
        if progress is not None:
            progress(stop, len(rows.rows), "tokenized")


def _drafts(rows: Rows, index: int, tokenizer: Any) -> list[_Draft]:
    row, place = rows.rows[index], rows.place(index)
    if rows.kind == "text":
        return [_Draft(index, Rendered(row["text"], ((0, len(row["text"])),)), plain=True)]
    if rows.kind == "messages" or has_template(tokenizer):
        return [_Draft(index, rendered, plain=False)
                for rendered in render_chat(_messages(rows, row, tokenizer), tokenizer, place, _tools(rows, row))]
    prompt, answer = _pair(row)
    text = prompt + answer
    return [_Draft(index, Rendered(text, ((len(prompt), len(text)),)), plain=True)]


def _pair(row: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a row of strings: kind prompt_completion, choices or preference."""
    if "choices" in row and "completion" not in row:
        return row["question"], row["choices"][row["answer"]]
    return row["prompt"], row["chosen"] if "chosen" in row and "completion" not in row else row.get("completion", "")


def _messages(rows: Rows, row: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    if rows.kind == "prompts" and isinstance(row["prompt"], str):
        return [{"role": "user", "content": row["prompt"]}]
    if not _conversations(rows, row):
        prompt, answer = _pair(row)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if not has_template(tokenizer):
        raise no_template(rows)
    messages: list[dict[str, Any]] = row["messages"] if rows.kind == "messages" else [*row["prompt"],
                                                                                      *row.get("chosen", ())]
    return messages


def _tools(rows: Rows, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a conversation; a column of that name means nothing to rows of another kind."""
    return row.get("tools") if _conversations(rows, row) else None


def _conversations(rows: Rows, row: Mapping[str, Any]) -> bool:
    return rows.kind == "messages" or (rows.kind in ("preference", "prompts") and not isinstance(row["prompt"], str))


def no_template(rows: Rows) -> DataError:
    """The error for conversations where the model's tokenizer has no chat template."""
    return DataError(f"{rows.name}: its rows are conversations, and the model's tokenizer has no chat template; "
                     "expected a chat model; use one, or map the rows to prompt and completion")


def _windows(ids: list[int], labels: list[int], max_length: int, every: bool) -> Iterable[dict[str, list[int]]]:
    """The first window, or every one; windows without a trained token are left out."""
    for start in range(0, len(ids) if every else 1, max_length):
        window = {"input_ids": ids[start:start + max_length],
                  "labels": [IGNORED, *labels[start + 1:start + max_length]]}
        if any(label != IGNORED for label in window["labels"]):
            yield window


def prompts_and_answers(rows: Rows, tokenizer: Any) -> list[Prompt]:
    """For every row what a model is asked and what it should say: the last assistant turn, the completion, the right
    choice; nothing, where the rows are prompts alone.

    A conversation's prompt ends with the template's generation prompt. Raises DataError for rows of text, and as
    `encode`.
    """
    if rows.kind in ("text", "preference"):
        what = "plain text, which holds no question to answer" if rows.kind == "text" else (
            "preferences, which have two answers and no right one")
        raise DataError(f"{rows.name}: its rows are {what}; expected messages, prompt+completion or "
                        "question+choices+answer; score text with `perplexity`")
    chat = rows.kind == "messages" or has_template(tokenizer)
    texts: list[str] = []
    answers: list[str] = []
    for index, row in enumerate(rows.rows):
        if chat:
            turns = _messages(rows, row, tokenizer)
            *before, last = turns if rows.kind != "prompts" else [*turns, {"content": ""}]
            if last.get("tool_calls"):
                raise DataError(f"{rows.place(index)}: the conversation ends with tool calls, and no text to compare "
                                "an answer with; expected the assistant's words last; add the turns up to them, or "
                                "take the row out of what is scored")
            texts.append(prompt_text(before, tokenizer, rows.place(index), _tools(rows, row)))
            answers.append(last["content"])
        else:
            prompt, answer = _pair(row)
            texts.append(prompt)
            answers.append(answer)
    bos = [] if chat else begins_with_bos(tokenizer)
    prompts: list[Prompt] = []
    for index, (ids, _) in enumerate(tokenize(texts, tokenizer)):
        prompts.append(Prompt([*bos, *ids], texts[index], answers[index], index))
        refuse_double_bos(prompts[-1].input_ids, tokenizer, rows.place(index))
    return prompts


def with_answers(rows: Rows, answers: Mapping[int, str], tokenizer: Any) -> Rows:
    """The rows of `answers` (by index) with these answers in place of their own, where there was one."""
    kept = sorted(answers)
    if rows.kind == "messages" or has_template(tokenizer):
        turns = [_messages(rows, rows.rows[index], tokenizer) for index in kept]
        asked = turns if rows.kind == "prompts" else [messages[:-1] for messages in turns]
        said: list[dict[str, Any]] = [{"messages": [*before, {"role": "assistant", "content": answers[index]}],
                                       **({"tools": tools} if (tools := _tools(rows, rows.rows[index])) else {})}
                                      for before, index in zip(asked, kept, strict=True)]
    else:
        said = [{"prompt": _pair(rows.rows[index])[0], "completion": answers[index]} for index in kept]
    return replace(rows, kind="messages" if "messages" in said[0] else "prompt_completion", rows=said,
                   places=[rows.place(index) for index in kept])


def choice_examples(rows: Rows, tokenizer: Any) -> list[list[dict[str, list[int]]]]:
    """For every row one example a choice, the question answered with it: labels stand on the choice's own tokens.

    The terminator is not labelled, so that the sum of the labelled log-probabilities is that of the choice's text.
    Without a chat template question and choice are put together with a space. Raises DataError for rows without
    choices.
    """
    if rows.kind != "choices":
        raise DataError(f"{rows.name}: its rows are {rows.kind}; expected question, choices, answer")
    glue = "" if has_template(tokenizer) else " "
    flat = [{"prompt": row["question"], "completion": glue + choice} for row in rows.rows for choice in row["choices"]]
    owner = [index for index, row in enumerate(rows.rows) for _ in row["choices"]]
    pairs = replace(rows, kind="prompt_completion", rows=flat, places=[rows.place(index) for index in owner])
    encoded = encode(pairs, tokenizer, max_length=10**9, limits=Limits())
    stops = terminators(tokenizer)
    result: list[list[dict[str, list[int]]]] = [[] for _ in rows.rows]
    for example, origin in zip(encoded.examples, encoded.origin, strict=True):
        last = max(i for i, label in enumerate(example["labels"]) if label != IGNORED)
        labels = [IGNORED if i == last and label in stops else label for i, label in enumerate(example["labels"])]
        result[owner[origin]].append({"input_ids": example["input_ids"], "labels": labels})
    return result


def text_stream(rows: Rows, tokenizer: Any, separator: str = "blank_line") -> list[int]:
    """One long list of ids for perplexity: all texts joined by an empty line and tokenized once, BOS at the very
    start if the tokenizer puts it there (the protocol of the GPTQ and Wanda papers). Conversations stand one after
    the other as the template writes them.

    separator: as `joined_texts`, which says what is raised. Whose tokens are whose: `llmops.data.stream`.
    """
    if rows.kind == "text":
        ids: list[int] = tokenizer(joined_texts(rows, tokenizer, separator), verbose=False)["input_ids"]
        return ids
    return [token for ids in sequences(rows, tokenizer) for token in ids]


def joined_texts(rows: Rows, tokenizer: Any, separator: str) -> str:
    """All texts as one. separator: "blank_line", or "eos": the tokenizer's end token between texts, for a model that
    was pretrained so. Raises DataError for "eos" with a tokenizer that has none."""
    if separator == "eos" and not tokenizer.eos_token:
        raise DataError(f"{rows.name}: separator eos was asked for, but the tokenizer has no end token; expected "
                        "blank_line")
    return str("\n\n" if separator == "blank_line" else tokenizer.eos_token).join(row["text"] for row in rows.rows)


def sequences(rows: Rows, tokenizer: Any) -> list[list[int]]:
    """Every row as the ids a model meets it in; of a preference the chosen side."""
    if rows.kind != "text" and (has_template(tokenizer) or any(_conversations(rows, row) for row in rows.rows)):
        texts = [conversation_text(_messages(rows, row, tokenizer), tokenizer, rows.place(index), _tools(rows, row))
                 for index, row in enumerate(rows.rows)]
        return [ids for ids, _ in tokenize(texts, tokenizer)]
    texts = [row["text"] if rows.kind == "text" else "".join(_pair(row)) for row in rows.rows]
    bos = begins_with_bos(tokenizer)
    return [framed(ids, ids, bos, tokenizer, rows.name)[0] for ids, _ in tokenize(texts, tokenizer)]


def calibration_tokens(rows: Rows, tokenizer: Any, *, samples: int, length: int, seed: int,
                       note: Callable[[str], None] | None = None) -> Tensor:
    """(samples, length) ids: seeded random crops of all rows packed one after the other, without padding.

    BOS and EOS stay where the rows have them. Crops do not overlap. Where there are fewer than samples * length tokens
    they are the fewest that hold all of them, evenly spaced, and `note` hears of it: to run the same words again says
    nothing new and takes its time. Raises DataError when there are fewer than `length` tokens.
    """
    import torch

    stream = [token for ids in sequences(rows, tokenizer) for token in ids]
    spare = len(stream) - samples * length
    if len(stream) < length:
        raise _no_crop(rows, len(stream), length)
    draw = random.Random(seed)
    if spare >= 0:  # gaps of random size between crops, then the crops in random order
        gaps = sorted(draw.randint(0, spare) for _ in range(samples))
        starts = [gap + number * length for number, gap in enumerate(gaps)]
        draw.shuffle(starts)
    else:
        count = -(-len(stream) // length)
        starts = [number * (len(stream) - length) // max(count - 1, 1) for number in range(count)]
        draw.shuffle(starts)
        if note is not None:
            note(f"{rows.name} has {len(stream)} tokens, fewer than the {samples} crops of {length} asked for: "
                 f"{count} crops hold all of them")
    tokens = torch.tensor(stream, dtype=torch.long)
    return torch.stack([tokens[start:start + length] for start in starts])


def check_crop(rows: Rows, tokenizer: Any, length: int) -> None:
    """Raise DataError where `calibration_tokens` would; reads no more rows than it takes to know."""
    found, first, many = 0, 0, 64
    while found < length:
        if first >= len(rows.rows):
            raise _no_crop(rows, found, length)
        some = slice(first, first + many)
        part = replace(rows, rows=rows.rows[some], places=rows.places[some])
        found, first, many = found + sum(map(len, sequences(part, tokenizer))), first + many, 2 * many


def _no_crop(rows: Rows, tokens: int, length: int) -> DataError:
    return DataError(f"{rows.name}: its {len(rows.rows)} rows have {tokens} tokens, and one calibration crop needs "
                     f"{length}; use more rows (`samples`, or another `split`) or a shorter `length`")


def answer_crops(rows: Rows, tokenizer: Any, *, samples: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(samples, length) ids of rows one after the other in a seeded order, as they are trained on, and where they are
    answers: true at a token after which the next one is an answer's.

    Fewer crops when the rows do not fill so many. Raises DataError for text, which has no answers, and when the rows
    do not fill one crop.
    """
    import torch

    if rows.kind == "text":
        raise DataError(f"{rows.name}: its rows are text, which has no answers; expected messages, or prompt and "
                        "completion")
    examples = list(encode(rows, tokenizer, max_length=10**9, limits=Limits(dropped=1.0, truncated=1.0)).examples)
    random.Random(seed).shuffle(examples)
    ids = [token for example in examples for token in example["input_ids"]]
    labels = [label for example in examples for label in example["labels"]]
    count = min(samples, len(ids) // length)
    if count < 1:
        raise DataError(f"{rows.name}: its {len(rows.rows)} rows have {len(ids)} tokens, and one crop needs {length}; "
                        "use more rows (`samples`, or another `split`) or a shorter `length`")
    crops = torch.tensor(ids[:count * length]).view(count, length)
    learned = torch.tensor(labels[:count * length]).view(count, length) != IGNORED
    return crops, torch.cat([learned[:, 1:], torch.zeros(count, 1, dtype=torch.bool)], dim=1)


def collate(examples: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """Examples to a batch padded on the right: input_ids, attention_mask, labels, each (examples, longest), int64."""
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), longest)
    batch = {"input_ids": torch.full(shape, pad_id), "attention_mask": torch.zeros(shape, dtype=torch.long),
             "labels": torch.full(shape, IGNORED)}
    for number, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["input_ids"][number, :length] = torch.tensor(example["input_ids"])
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, :length] = torch.tensor(example["labels"])
    return batch
