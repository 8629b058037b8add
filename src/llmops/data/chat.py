"""Chat templates: from messages to text, and which characters of it are the assistant's.

A loss in the wrong place is the most reported fault of fine-tuning, because the curves look healthy. So the place is
proved for every row, in one of three ways:

1. The template marks the assistant's part itself (``{% generation %}``): its marks are used.
2. Otherwise the conversation is rendered up to each assistant turn, with the generation prompt, and again with the
   turn. If both are prefixes of the whole, what lies between them is the turn.
3. If they are not (templates that drop the reasoning of earlier turns, or move the system text), the row is cut into
   one conversation for each assistant turn, ending with it: exactly what the model is going to see when it is asked.
   If even then the prompt is no prefix, the row is refused.

The marks are turned into tokens by character offsets in `render.py`, not by transformers'
`return_assistant_tokens_mask`: that one asks for the token of the very first character, and finds none where a
tokenizer trims spaces off its offsets.

A turn has to end with its terminator, which a model must learn to emit or it never stops. What counts as one is read
off the tokenizer: its eos token, or any special token that neither begins a text nor opens a turn (``<|im_end|>``,
``<|eot_id|>``, ``<end_of_turn>`` ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmops.errors import DataError

__all__ = ["Rendered", "conversation_text", "has_template", "prompt_text", "render_chat", "terminators"]

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans` are the character ranges (first, one past the last) of the assistant's turns."""

    text: str
    spans: tuple[tuple[int, int], ...]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_text(messages: Messages, tokenizer: Any, place: str) -> str:
    """The conversation as text, up to where the assistant begins to answer. Raises DataError as `render_chat` does."""
    return _render(messages, tokenizer, place, prompt=True)


def conversation_text(messages: Messages, tokenizer: Any, place: str) -> str:
    """The whole conversation as text. Raises DataError as `render_chat` does."""
    return _render(messages, tokenizer, place)


def render_chat(messages: Messages, tokenizer: Any, place: str) -> list[Rendered]:
    """Render a conversation that ends with the assistant: one piece, or one for each of its turns (see above, 3).

    Raises DataError, naming `place`, when the template refuses the conversation or its turns cannot be told apart.
    """
    if _MARKED.search(_template(tokenizer)):
        return [_render_marked(messages, tokenizer, place)]
    whole = _render(messages, tokenizer, place)
    spans: list[tuple[int, int]] = []
    for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        before = _render(messages[:index], tokenizer, place, prompt=True)
        last = index == len(messages) - 1
        after = whole if last else _render(messages[:index + 1], tokenizer, place)
        if not (whole.startswith(before) and whole.startswith(after)):
            return _turn_by_turn(messages, tokenizer, place)
        spans.append((len(before), len(after)))
    return [Rendered(whole, tuple(spans))]


def _turn_by_turn(messages: Messages, tokenizer: Any, place: str) -> list[Rendered]:
    pieces: list[Rendered] = []
    for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        before = _render(messages[:index], tokenizer, place, prompt=True)
        after = _render(messages[:index + 1], tokenizer, place)
        if not after.startswith(before):
            at = next(i for i, (a, b) in enumerate(zip(before + "\0", after + "\1", strict=False)) if a != b)
            raise DataError(
                f"{place}: the chat template renders the prompt of turn {index + 1} as "
                f"{before[max(0, at - 20):at + 20]!r} "
                f"and the same turn with its answer as {after[max(0, at - 20):at + 20]!r}; expected the one to begin "
                f"the "
                "other, else the assistant's text cannot be told from the prompt; mark it in the template with "
                "{% generation %} ... {% endgeneration %}")
        pieces.append(Rendered(after, ((len(before), len(after)),)))
    return pieces


def _template(tokenizer: Any) -> str:
    return str(tokenizer.get_chat_template())


def _render(messages: Messages, tokenizer: Any, place: str, prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise _refused(place, messages, error) from error


def _render_marked(messages: Messages, tokenizer: Any, place: str) -> Rendered:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, marks = render_jinja_template([list(messages)], chat_template=_template(tokenizer),
                                             return_assistant_tokens_mask=True, add_generation_prompt=False,
                                             **tokenizer.special_tokens_map)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise _refused(place, messages, error) from error
    return Rendered(texts[0], tuple((int(first), int(last)) for first, last in marks[0] if last > first))


def _refused(place: str, messages: Messages, error: Exception) -> DataError:
    roles = ", ".join(str(message["role"]) for message in messages)
    return DataError(f"{place}: the chat template refuses the turns {roles} ({error}); expected turns that the "
                     f"template "
                     "knows; reorder or rename them, or use the model's own template")


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
    """Tokens of the generation prompt, as ``<|im_start|>``: seen right after a turn they begin the next one."""
    if not has_template(tokenizer):
        return set()
    turn = [{"role": "user", "content": "x"}]
    try:
        without, prompt = _render(turn, tokenizer, ""), _render(turn, tokenizer, "", prompt=True)
    except DataError:  # a template that wants more than one user turn; the eos token still counts
        return set()
    added = prompt[len(without):] if prompt.startswith(without) else ""
    return set(tokenizer(added, add_special_tokens=False)["input_ids"])
