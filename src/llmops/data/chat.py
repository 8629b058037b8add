"""Chat templates: from messages to text, and which characters of it are the assistant's.

A loss in the wrong place is the most reported fault of fine-tuning, because the curves look healthy. So the place is
proved for every row, in one of three ways:

1. The template marks the assistant's part itself (``{% generation %}``): its marks are used.
2. Otherwise the conversation is rendered up to each assistant turn, with the generation prompt, and again with the
   turn. If both are prefixes of the whole, what lies between them is the turn, its terminator included.
3. If they are not (templates that drop the reasoning of earlier turns, or move the system text or the tools), the row
   is cut into one conversation for each assistant turn, ending with it: exactly what the model is going to see when it
   is asked. If even then the prompt is no prefix, the row is refused.

Then the text is held against the row: everything the row says has to stand in it, what the assistant says in a trained
part. A template that never writes tool calls, results, tools or the reasoning would otherwise drop them without a word.
A template that refuses a system turn is given the system's text at the head of the first user turn; that is counted.

The marks are turned into tokens by character offsets in `masks.py`, not by transformers'
`return_assistant_tokens_mask`: that one asks for the token of the very first character, and finds none where a
tokenizer trims spaces off its offsets.

A turn has to end with its terminator, which a model must learn to emit or it never stops. What counts as one is read
off the tokenizer: its eos token, or any special token that neither begins a text nor opens a turn (``<|im_end|>``,
``<|eot_id|>``, ``<end_of_turn>`` ...).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmops.errors import DataError

__all__ = ["Rendered", "begins_with_bos", "conversation_text", "has_template", "prompt_text", "render_chat",
           "template_hash", "terminators"]

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "\u00a7"  # a text that stands in no template
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans` are the character ranges (first, one past the last) of the assistant's turns.

    marked: the template marked them, and may have left the terminator out. folded: the system's text was put into the
    first user turn.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    marked: bool = False
    folded: bool = False


@dataclass(frozen=True)
class _Template:
    """How the conversations of one row are rendered, and the place that errors name."""

    tokenizer: Any
    place: str
    tools: Tools | None

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        tools = list(self.tools) if self.tools else None
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False,
                                                          add_generation_prompt=prompt))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise _refused(self.place, messages, error) from error

    def marks(self, messages: Messages) -> Rendered:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                [list(messages)], tools=list(self.tools) if self.tools else None, chat_template=self.source(),
                return_assistant_tokens_mask=True, add_generation_prompt=False, **self.tokenizer.special_tokens_map)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise _refused(self.place, messages, error) from error
        spans = tuple((int(first), int(last)) for first, last in marks[0] if last > first)
        return Rendered(texts[0], spans, marked=True)

    def source(self) -> str:
        return str(self.tokenizer.get_chat_template(tools=list(self.tools) if self.tools else None))


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_text(messages: Messages, tokenizer: Any, place: str, tools: Tools | None = None) -> str:
    """The conversation as text, up to where the assistant begins to answer. Raises DataError as `render_chat` does."""
    template = _Template(tokenizer, place, tools)
    return template.render(_accepted(messages, template)[0], prompt=True)


def conversation_text(messages: Messages, tokenizer: Any, place: str, tools: Tools | None = None) -> str:
    """The whole conversation as text. Raises DataError as `render_chat` does."""
    template = _Template(tokenizer, place, tools)
    return template.render(_accepted(messages, template)[0])


def render_chat(messages: Messages, tokenizer: Any, place: str, tools: Tools | None = None) -> list[Rendered]:
    """Render a conversation that ends with the assistant: one piece, or one for each of its turns (see above, 3).

    Raises DataError, naming `place`, when the template refuses the conversation, when its turns cannot be told apart,
    or when something the row says does not stand in the text.
    """
    template = _Template(tokenizer, place, tools)
    messages, folded = _accepted(messages, template)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    marked = bool(_MARKED.search(template.source()))
    whole = template.marks(messages) if marked else _between_prefixes(messages, turns, template)
    if whole is not None and _left_out(whole, messages, turns, tools) is None:
        return [replace(whole, folded=folded)]
    pieces = [(_marked_turn if marked else _turn)(messages[:index + 1], template) for index in turns]
    for index, piece in zip(turns, pieces, strict=True):
        lost = _left_out(piece, messages[:index + 1], [index], tools)
        if lost is not None:
            raise DataError(f"{place}: the chat template leaves out {lost}, so it would be lost without a word; "
                            "expected all that the row says in the text, the assistant's part in what is trained; use "
                            "a model whose template knows it, or take it out of the data")
    return [replace(piece, folded=folded) for piece in pieces]


def _accepted(messages: Messages, template: _Template) -> tuple[Messages, bool]:
    """The messages, with the system's text at the head of the first user turn where the template refuses the system.

    A blank line between the two, as the templates have it that do this themselves (Gemma 3, Mistral).
    """
    if len(messages) < 2 or messages[0]["role"] not in ("system", "developer") or messages[1]["role"] != "user":
        return messages, False
    try:
        template.render(messages[:2])
        return messages, False
    except DataError as refused:
        system, user, *rest = messages
        folded = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        try:
            template.render(folded[:1])
        except DataError:
            raise refused from refused.__cause__
        return folded, True


def _between_prefixes(messages: Messages, turns: Sequence[int], template: _Template) -> Rendered | None:
    """The whole conversation with the spans of its assistant turns; None where it is not made of prefixes."""
    whole = template.render(messages)
    spans: list[tuple[int, int]] = []
    for index in turns:
        before = template.render(messages[:index], prompt=True)
        after = whole if index == len(messages) - 1 else template.render(messages[:index + 1])
        if not (whole.startswith(before) and whole.startswith(after)):
            return None
        spans.append((len(before), len(after)))
    return Rendered(whole, tuple(spans))


def _turn(messages: Messages, template: _Template) -> Rendered:
    """The conversation with the span of its last turn."""
    before = template.render(messages[:-1], prompt=True)
    after = template.render(messages)
    if not after.startswith(before):
        at = next(i for i, (a, b) in enumerate(zip(before + "\0", after + "\1", strict=False)) if a != b)
        raise DataError(
            f"{template.place}: the chat template renders the prompt of turn {len(messages)} as "
            f"{before[max(0, at - 20):at + 20]!r} and the same turn with its answer as "
            f"{after[max(0, at - 20):at + 20]!r}; expected the one to begin the other, else the assistant's text "
            "cannot be told from the prompt (a generation prompt that opens a thought needs answers that have one); "
            "mend the rows, or mark the answer in the template with {% generation %} ... {% endgeneration %}")
    return Rendered(after, ((len(before), len(after)),))


def _marked_turn(messages: Messages, template: _Template) -> Rendered:
    rendered = template.marks(messages)
    return replace(rendered, spans=rendered.spans[-1:])


def _left_out(rendered: Rendered, messages: Messages, trained: Sequence[int], tools: Tools | None) -> str | None:
    """What the row says and the text does not, in words; None when it is all there.

    Compared without white space, which templates trim. What is not the assistant's may stand anywhere, and be escaped
    as JSON; what the turns `trained` say has to stand in the spans. Assistant turns that are not trained here are the
    template's to shorten.
    """
    text = _squeezed(rendered.text)
    answers = _squeezed("".join(rendered.text[first:last] for first, last in rendered.spans))
    for index, message in enumerate(messages):
        mine = message["role"] == "assistant"
        if mine and index not in trained:
            continue
        where = answers if mine else text
        texts = [message.get(key) or "" for key in ("content", "reasoning_content", "thinking")]
        if any(not (_in(said, where) or (mine and _opened(said, rendered))) for said in texts):
            return f'the text of turn {index + 1} ("{message["role"]}"), or part of it'
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        if any(where.count(name) < count for name, count in Counter(call["name"] for call in calls).items()):
            return f"the tool calls of turn {index + 1} ({', '.join(call['name'] for call in calls)})"
        said = [part for call in calls for pair in call["arguments"].items() for part in pair if isinstance(part, str)]
        if any(not _in(part, where) for part in said):
            return f"arguments of the tool calls of turn {index + 1}"
    missing = [tool["function"]["name"] for tool in tools or () if tool["function"]["name"] not in text]
    return f"the tools of the row ({', '.join(missing)})" if missing else None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _in(part: str, squeezed: str) -> bool:
    return (_squeezed(part) in squeezed
            or any(_squeezed(json.dumps(part, ensure_ascii=ascii)[1:-1]) in squeezed for ascii in (False, True)))


def _opened(said: str, rendered: Rendered, longest: int = 40) -> bool:
    """Whether the generation prompt wrote the beginning of what is said (``<think>``), and the span the rest."""
    wanted = _squeezed(said)
    for first, last in rendered.spans:
        head, rest = _squeezed(rendered.text[max(0, first - 2 * longest):first]), _squeezed(rendered.text[first:last])
        if any(head.endswith(wanted[:size]) and wanted[size:] in rest for size in range(1, min(longest, len(wanted)))):
            return True
    return False


def _refused(place: str, messages: Messages, error: Exception) -> DataError:
    roles = ", ".join(str(message["role"]) for message in messages)
    return DataError(f"{place}: the chat template refuses the turns {roles} ({error}); expected turns that the "
                     "template knows; reorder or rename them, or use the model's own template")


def terminators(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that can end a turn: eos, and the special tokens that open neither a text nor a turn."""
    special = {int(token) for token in tokenizer.all_special_ids}
    special |= {int(token) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special -= {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special -= _openers(tokenizer)
    if tokenizer.eos_token_id is not None:
        special.add(int(tokenizer.eos_token_id))
    return frozenset(special)


def _openers(tokenizer: Any) -> set[int]:
    """Tokens around a user turn that end no assistant turn: what opens it (``<|im_start|>``), what closes nothing but
    it (``[/INST]``), and the generation prompt. Seen behind an answer they belong to the next turn."""
    if not has_template(tokenizer):
        return set()
    template = _Template(tokenizer, "", None)
    asked = [{"role": "user", "content": _PROBE}]
    try:
        without, prompt = template.render(asked), template.render(asked, prompt=True)
        answered = template.render([*asked, {"role": "assistant", "content": _PROBE}])
    except DataError:  # a template that wants more than one user turn; the eos token still counts
        return set()

    def tokens(text: str) -> set[int]:
        return set(tokenizer(text, add_special_tokens=False)["input_ids"])

    added = prompt[len(without):] if prompt.startswith(without) else ""
    closing = tokens(without.rpartition(_PROBE)[2]) - tokens(answered.rpartition(_PROBE)[2])
    return tokens(added) | tokens(without.partition(_PROBE)[0]) | closing


def begins_with_bos(tokenizer: Any) -> list[int]:
    """[BOS] when the tokenizer begins plain text with it, else []."""
    ids = tokenizer("x", verbose=False)["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def template_hash(tokenizer: Any) -> str:
    """SHA-256 (hexadecimal) of all that decides how a conversation becomes tokens around its words.

    The bytes of the chat template (each, where there are several; none is fine), the tokens that end a turn, and
    whether plain text begins with BOS and with which. Two tokenizers of one hash prompt a model alike, so a child can
    be held against its parent. The vocabulary is not in it.
    """
    template = getattr(tokenizer, "chat_template", None)
    ends = sorted(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(terminators(tokenizer))))
    parts = {"template": template, "ends": ends, "eos": tokenizer.eos_token, "bos": tokenizer.bos_token,
             "adds_bos": bool(begins_with_bos(tokenizer))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
