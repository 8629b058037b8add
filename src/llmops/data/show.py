"""What a model is going to see: samples as they are rendered, the tokens that are trained in colour.

Special tokens are written out and control characters made visible, so that nothing in the data can move the cursor,
set a title or pass for markup: text goes to the terminal as characters with a style, never as markup.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from llmops.data.pairs import EncodedPairs
from llmops.data.render import IGNORED, Encoded
from llmops.data.sources import Rows

__all__ = ["show", "show_json", "visible"]

_STYLES = {(True, False): "green", (True, True): "bold reverse green", (False, False): "dim", (False, True): "bold dim"}


def visible(text: str) -> str:
    """`text` with control and format characters made visible: ESC as ␛, U+202E as \\u202e. Line breaks stay."""
    return "".join(_seen(character) for character in text)


def _seen(character: str) -> str:
    code = ord(character)
    if character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def show(rows: Rows, tokenizer: Any, encoded: Encoded | EncodedPairs | None, count: int) -> RenderableType:
    """The first `count` examples with their loss mask, a legend and the counts, for a rich console.

    Of a preference both sides. `encoded` None (rows that are not trained on, as choices): the rows themselves.
    """
    parts: list[RenderableType] = []
    if encoded is None:
        for index, row in enumerate(rows.rows[:count]):
            body = Text("\n").join(Text.assemble((f"{visible(str(key))}: ", "bold"), visible(str(value)))
                                   for key, value in row.items())
            parts.append(_panel(body, rows.place(index)))
    else:
        for sides, origin in _examples(encoded, count):
            body = Text("\n").join(Text.assemble((f"{side}\n" if side else "", "bold"), _painted(example, tokenizer))
                                   for side, example in sides.items())
            parts.append(_panel(body, rows.place(origin)))
        parts.append(Text.assemble("trained: ", ("like this", _STYLES[True, False]), "   special tokens: ",
                                   ("<trained>", _STYLES[True, True]), " ", ("<not trained>", _STYLES[False, True]),
                                   "   not trained: ", ("like this", _STYLES[False, False])))
    parts.append(Text(visible(f"{rows.name}: {rows.kind}; {_counts(rows.notes)}"
                              + (f"; {_counts(encoded.report)}" if encoded is not None else ""))))
    return Group(*parts)


def show_json(rows: Rows, tokenizer: Any, encoded: Encoded | EncodedPairs | None, count: int) -> dict[str, Any]:
    """The same as plain values: the samples' pieces {text, trained, special, tokens}, counts and special tokens.

    A sample of a preference holds such a sample under `chosen` and one under `rejected`.
    """
    samples: list[dict[str, Any]] = []
    if encoded is None:
        samples = [{"row": index, "place": rows.place(index), "columns": row}
                   for index, row in enumerate(rows.rows[:count])]
    else:
        for sides, origin in _examples(encoded, count):
            told = {side: {**example, "pieces": [
                {"text": text, "trained": trained, "special": special, "tokens": len(ids)}
                for text, trained, special, ids in _pieces(example, tokenizer)]} for side, example in sides.items()}
            samples.append({"row": origin, "place": rows.place(origin), **told.get("", told)})
    return {"name": rows.name, "kind": rows.kind, "sha256": rows.sha256, "notes": dict(rows.notes),
            "report": dict(encoded.report) if encoded is not None else None, "samples": samples,
            "special_tokens": dict(tokenizer.special_tokens_map)}


def _examples(encoded: Encoded | EncodedPairs, count: int) -> list[tuple[dict[str, dict[str, list[int]]], int]]:
    """({side: example}, its row) of the first `count`; a side without a name where there is only one."""
    if isinstance(encoded, EncodedPairs):
        pairs = zip(encoded.chosen, encoded.rejected, encoded.origin, strict=True)
        return [({"chosen": chosen, "rejected": rejected}, row) for chosen, rejected, row in pairs][:count]
    return [({"": example}, row) for example, row in zip(encoded.examples, encoded.origin, strict=True)][:count]


def _panel(body: Text, place: str) -> Panel:
    return Panel(body, title=Text(visible(place)), title_align="left")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items())


def _painted(example: Mapping[str, Sequence[int]], tokenizer: Any) -> Text:
    text = Text()
    for piece, trained, special, _ in _pieces(example, tokenizer):
        text.append(visible(piece), style=_STYLES[trained, special])
    return text


def _pieces(example: Mapping[str, Sequence[int]], tokenizer: Any) -> list[tuple[str, bool, bool, list[int]]]:
    """Neighbouring tokens of one fate, decoded together: a character can be several tokens."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    marked = [(token, label != IGNORED, token in special)
              for token, label in zip(example["input_ids"], example["labels"], strict=True)]
    pieces: list[tuple[str, bool, bool, list[int]]] = []
    for (trained, is_special), group in groupby(marked, key=lambda token: token[1:]):
        ids = [token for token, _, _ in group]
        pieces.append((tokenizer.decode(ids, skip_special_tokens=False), trained, is_special, ids))
    return pieces
