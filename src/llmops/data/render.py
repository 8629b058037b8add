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
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmops.data.chat import Rendered, conversation_text, has_template, prompt_text, render_chat, terminators
from llmops.data.leak import check_leak
from llmops.data.options import Limits
from llmops.data.sources import Rows
from llmops.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Encoded", "IGNORED", "Prompt", "calibration_tokens", "check_leak", "choice_examples", "collate", "encode",
           "prompts_and_answers", "text_stream"]

IGNORED = -100  # the label that cross entropy leaves out
Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """Training examples and what became of the rows.

    examples: {"input_ids": [...], "labels": [...]}, of equal length. report: rows, examples, dropped (nothing to
    train on), truncated (cut to max_length), tokens, trainable_tokens, turn_by_turn (rows cut into one example a
    turn). origin: for each example the index of its row.
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
    if rows.kind == "choices":
        raise DataError(f"{rows.name}: its rows have question, choices and answer, which can be scored but not "
                        f"trained on; "
                        "expected messages, prompt+completion or text; map them, as "
                        "`columns: {prompt: question, completion: answer}`")
    stops, bos = terminators(tokenizer), _bos(tokenizer)
    pieces: Counter[int] = Counter()
    examples: list[dict[str, list[int]]] = []
    origin: list[int] = []
    longer: dict[int, int] = {}  # row -> its tokens
    for draft, ids, offsets in _tokenized(rows, tokenizer, progress):
        pieces[draft.row] += 1
        place = rows.place(draft.row)
        labels = _plain_labels(draft.rendered.spans, ids, offsets) if draft.plain else _chat_labels(
            draft.rendered, ids, offsets, stops, tokenizer, place)
        if draft.plain:
            ids, labels = _framed(ids, labels, bos, tokenizer, rows.name)
        _refuse_double_bos(ids, tokenizer, place)
        if rows.kind != "text" and len(ids) > max_length:
            longer[draft.row] = len(ids)
        for window in _windows(ids, labels, max_length, every=rows.kind == "text"):
            examples.append(window)
            origin.append(draft.row)
    report = {"rows": len(rows.rows), "examples": len(examples), "dropped": len(rows.rows) - len(set(origin)),
              "truncated": len(longer), "tokens": sum(len(example["input_ids"]) for example in examples),
              "trainable_tokens": sum(label != IGNORED for example in examples for label in example["labels"]),
              "turn_by_turn": sum(count > 1 for count in pieces.values())}
    _enforce(rows, report, limits, max_length, origin, longer)
    return Encoded(examples, report, origin)


def _tokenized(rows: Rows, tokenizer: Any, progress: Callable[[int, int, str], None] | None,
               chunk: int = 512) -> Iterable[tuple[_Draft, list[int], Offsets]]:
    """Rendered and tokenized row by row, in batches of `chunk` rows."""
    for start in range(0, len(rows.rows), chunk):
        stop = min(start + chunk, len(rows.rows))
        drafts = [draft for index in range(start, stop) for draft in _drafts(rows, index, tokenizer)]
        batch = _tokenize([draft.rendered.text for draft in drafts], tokenizer)
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
                for rendered in render_chat(_messages(rows, row, tokenizer), tokenizer, place)]
    prompt, answer = _pair(row)
    text = prompt + answer
    return [_Draft(index, Rendered(text, ((len(prompt), len(text)),)), plain=True)]


def _pair(row: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a row of kind prompt_completion or choices."""
    if "choices" in row and "completion" not in row:
        return row["question"], row["choices"][row["answer"]]
    return row["prompt"], row["completion"]


def _messages(rows: Rows, row: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    if rows.kind != "messages":
        prompt, answer = _pair(row)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if not has_template(tokenizer):
        raise DataError(f"{rows.name}: its rows are conversations, and the model's tokenizer has no chat template; "
                        f"expected "
                        "a chat model; use one, or map the rows to prompt and completion")
    messages: list[dict[str, Any]] = row["messages"]
    return messages


def _tokenize(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], Offsets]]:
    """Ids, and for each the range of characters it stands for, without special tokens of the tokenizer's own."""
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"the tokenizer ({type(tokenizer).__name__}) does not tell which characters a token stands "
                        f"for, so no "
                        "loss mask can be proved; expected a fast one (a tokenizer.json beside the model); convert it")
    out = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                    verbose=False)
    return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def _bos(tokenizer: Any) -> list[int]:
    """[BOS] when the tokenizer begins plain text with it, else []."""
    ids = tokenizer("x", verbose=False)["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def _refuse_double_bos(ids: Sequence[int], tokenizer: Any, place: str) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and bos != tokenizer.eos_token_id and list(ids[:2]) == [bos, bos]:
        raise DataError(f"{place}: the text begins with two {tokenizer.bos_token}; expected one; the template or the "
                        "tokenizer writes it already, so take it out of the data (or out of one of them)")


def _covered(offsets: Offsets, span: tuple[int, int]) -> tuple[int, int]:
    """(first, one past the last) token with a character in `span`; one of no width counts with what is before it."""
    first = bisect_right(offsets, span[0], key=lambda offset: offset[1])
    last = bisect_left(offsets, span[1], lo=first, key=lambda offset: offset[0])
    while last < len(offsets) and offsets[last] == (span[1], span[1]):
        last += 1
    return first, last


def _plain_labels(spans: Iterable[tuple[int, int]], ids: list[int], offsets: Offsets) -> list[int]:
    labels = [IGNORED] * len(ids)
    for span in spans:
        first, last = _covered(offsets, span)
        labels[first:last] = ids[first:last]
    return labels


def _framed(ids: list[int], labels: list[int], bos: list[int], tokenizer: Any,
            name: str) -> tuple[list[int], list[int]]:
    """BOS before (if the tokenizer has that habit), EOS behind. EOS is trained; the first token never is."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(f"{name}: the tokenizer has no end-of-sequence token, so a model could not learn to stop; "
                        f"expected "
                        "`eos_token` in its tokenizer_config.json")
    ids, labels = [*bos, *ids, eos], [*[IGNORED] * len(bos), *labels, eos]
    return ids, [IGNORED, *labels[1:]]  # nothing predicts the first token


def _chat_labels(rendered: Rendered, ids: list[int], offsets: Offsets, stops: frozenset[int], tokenizer: Any,
                 place: str) -> list[int]:
    """Labels on each assistant turn up to its terminator, which must be there."""
    labels = [IGNORED] * len(ids)

    def blank(token: int) -> bool:
        return not rendered.text[slice(*offsets[token])].strip() and ids[token] not in stops

    for span in rendered.spans:
        first, last = _covered(offsets, span)
        if first == last:
            continue
        end = _after_terminator(ids, blank, stops, first, last)
        if end is None:
            raise DataError(
                f"{place}: the chat template ends an assistant turn with "
                f"{rendered.text[max(span[0], span[1] - 24):span[1]]!r} and "
                f"no end-of-turn token, so a model tuned on it would never stop; expected "
                f"{tokenizer.eos_token or 'an eos token'} "
                "or another special token right after the turn; add it to the template")
        labels[first:end] = ids[first:end]
    return labels


def _after_terminator(ids: list[int], blank: Callable[[int], bool], stops: frozenset[int], first: int,
                      last: int) -> int | None:
    """Where the trained part [first, last) ends once it holds its terminator: the index after it, or None without one.

    Blanks behind the terminator (a line break) are not trained. A terminator right after the part (templates whose
    ``{% generation %}`` leaves it out) is taken in, with blanks before it.
    """
    end = last
    while end > first and blank(end - 1):
        end -= 1
    if end > first and ids[end - 1] in stops:
        return end
    end = last
    while end < len(ids) and blank(end):
        end += 1
    return end + 1 if end < len(ids) and ids[end] in stops else None


def _windows(ids: list[int], labels: list[int], max_length: int, every: bool) -> Iterable[dict[str, list[int]]]:
    """The first window, or every one; windows without a trained token are left out."""
    for start in range(0, len(ids) if every else 1, max_length):
        window = {"input_ids": ids[start:start + max_length],
                  "labels": [IGNORED, *labels[start + 1:start + max_length]]}
        if any(label != IGNORED for label in window["labels"]):
            yield window


def _enforce(rows: Rows, report: Mapping[str, int], limits: Limits, max_length: int, origin: Sequence[int],
             longer: Mapping[int, int]) -> None:
    total, kept = report["rows"], set(origin)
    lost = [rows.place(index) for index in range(total) if index not in kept]
    if not kept:
        raise DataError(f"{rows.name}: none of its {total} rows has a token to train on at max_length {max_length}; "
                        f"expected "
                        f"an assistant's text in them ({_first(lost)}); raise max_length, or look with `llmops data "
                        f"show`")
    if len(lost) > limits.dropped * total:
        raise DataError(f"{rows.name}: {len(lost)} of {total} rows have nothing to train on within max_length "
                        f"{max_length} "
                        f"({_first(lost)}); at most {limits.dropped:.1%} may be dropped; raise max_length, mend the "
                        f"rows, "
                        "or raise `limits: {dropped: ...}`")
    if len(longer) > limits.truncated * total:
        raise DataError(f"{rows.name}: {len(longer)} of {total} rows are longer than max_length {max_length} and "
                        f"would be cut "
                        f"({_first([rows.place(index) for index in longer])}; the longest has {max(longer.values())} "
                        f"tokens); at "
                        f"most {limits.truncated:.1%} may be; raise max_length, shorten them, or raise "
                        "`limits: {truncated: ...}`")


def _first(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (" ..." if len(places) > 3 else "")


def prompts_and_answers(rows: Rows, tokenizer: Any) -> list[Prompt]:
    """For every row what a model is asked and what it should say: the last assistant turn, the completion, the right
    choice.

    A conversation's prompt ends with the template's generation prompt. Raises DataError for rows of text, and as
    `encode`.
    """
    if rows.kind == "text":
        raise DataError(f"{rows.name}: its rows are plain text, which holds no question to answer; expected messages, "
                        "prompt+completion or question+choices+answer; score text with `perplexity`")
    chat = rows.kind == "messages" or has_template(tokenizer)
    texts: list[str] = []
    answers: list[str] = []
    for index, row in enumerate(rows.rows):
        if chat:
            *before, last = _messages(rows, row, tokenizer)
            texts.append(prompt_text(before, tokenizer, rows.place(index)))
            answers.append(last["content"])
        else:
            prompt, answer = _pair(row)
            texts.append(prompt)
            answers.append(answer)
    bos = [] if chat else _bos(tokenizer)
    prompts: list[Prompt] = []
    for index, (ids, _) in enumerate(_tokenize(texts, tokenizer)):
        prompts.append(Prompt([*bos, *ids], texts[index], answers[index], index))
        _refuse_double_bos(prompts[-1].input_ids, tokenizer, rows.place(index))
    return prompts


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

    separator: "blank_line", or "eos": the tokenizer's end token between texts, for a model that was pretrained so.
    Raises DataError for "eos" with a tokenizer that has none.
    """
    if rows.kind == "text":
        if separator == "eos" and not tokenizer.eos_token:
            raise DataError(f"{rows.name}: separator eos was asked for, but the tokenizer has no end token; expected "
                            "blank_line")
        joined = ("\n\n" if separator == "blank_line" else tokenizer.eos_token).join(row["text"] for row in rows.rows)
        ids: list[int] = tokenizer(joined, verbose=False)["input_ids"]
        return ids
    return [token for ids in _sequences(rows, tokenizer) for token in ids]


def _sequences(rows: Rows, tokenizer: Any) -> list[list[int]]:
    """Every row as the ids a model meets it in."""
    if rows.kind == "messages" or (rows.kind != "text" and has_template(tokenizer)):
        texts = [conversation_text(_messages(rows, row, tokenizer), tokenizer, rows.place(index))
                 for index, row in enumerate(rows.rows)]
        return [ids for ids, _ in _tokenize(texts, tokenizer)]
    texts = [row["text"] if rows.kind == "text" else "".join(_pair(row)) for row in rows.rows]
    bos = _bos(tokenizer)
    return [_framed(ids, ids, bos, tokenizer, rows.name)[0] for ids, _ in _tokenize(texts, tokenizer)]


def calibration_tokens(rows: Rows, tokenizer: Any, *, samples: int, length: int, seed: int) -> Tensor:
    """(samples, length) ids: seeded random crops of all rows packed one after the other, without padding.

    BOS and EOS stay where the rows have them. Crops do not overlap while there is text enough; with less than
    samples * length tokens they do. Raises DataError when there are fewer than `length` tokens.
    """
    import torch

    stream = [token for ids in _sequences(rows, tokenizer) for token in ids]
    spare = len(stream) - samples * length
    if len(stream) < length:
        raise DataError(f"{rows.name}: its {len(rows.rows)} rows have {len(stream)} tokens, and one calibration crop "
                        f"needs "
                        f"{length}; use more rows (`samples`, or another `split`) or a shorter `length`")
    draw = random.Random(seed)
    if spare >= 0:  # gaps of random size between crops, then the crops in random order
        gaps = sorted(draw.randint(0, spare) for _ in range(samples))
        starts = [gap + number * length for number, gap in enumerate(gaps)]
        draw.shuffle(starts)
    else:
        starts = [draw.randint(0, len(stream) - length) for _ in range(samples)]
    tokens = torch.tensor(stream, dtype=torch.long)
    return torch.stack([tokens[start:start + length] for start in starts])


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
