"""Four kinds of rows, told apart by their columns, and what a row of each must look like.

    messages            {"messages": [{"role": ..., "content": ...}, ...]}   ends with the assistant's turn
    prompt_completion   {"prompt": ..., "completion": ...}
    text                {"text": ...}
    choices             {"question": ..., "choices": [...], "answer": ...}   answer: index, the text, or a letter

A file that names its columns otherwise is mapped by `columns`, as ``{prompt: question, completion: answer}``. Nothing
is guessed: when no kind fits, or more than one, the message says which columns there are and what to write. Further
columns stay on the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from llmops.data.options import COLUMNS
from llmops.data.readers import Table
from llmops.errors import DataError, nearest

__all__ = ["Kind", "ROLES", "kind_of", "standard_row"]

Kind = Literal["messages", "prompt_completion", "text", "choices"]
ROLES = ("system", "developer", "user", "assistant", "tool")
#: What other data sets call these columns; only ever used to suggest a `columns:` line.
_ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("question", "instruction", "input", "query", "request"),
    "completion": ("answer", "response", "output", "reply", "solution", "chosen"),
    "text": ("content", "document", "body", "article", "sentence", "story"),
    "question": ("prompt", "query", "stem"),
    "choices": ("options", "endings", "candidates"),
    "answer": ("label", "answerKey", "target", "gold"),
}


def kind_of(table: Table, mapping: Mapping[str, str], label: str) -> Kind:
    """The kind of a table's rows, after `mapping` (standard column -> column of the file).

    Raises DataError when a mapped column is not there, or when no kind or more than one fits.
    """
    found = table.columns
    for standard, column in mapping.items():
        if column not in found:
            raise DataError(f'{table.named_at}: columns maps {standard} to "{column}", which is not in {label}; found '
                            f"{_listed(found)}{nearest(column, found)}")
    names = {*mapping, *(column for column in found if column not in mapping.values())}
    fitting = [kind for kind, required in COLUMNS.items()
               if set(required) <= names and (not mapping or set(mapping) <= set(required))]
    if len(fitting) == 1:
        return cast(Kind, fitting[0])
    expected = " or ".join("+".join(required) for required in COLUMNS.values())
    if fitting:
        first = COLUMNS[fitting[0]]
        raise DataError(f"{table.named_at}: {label} has the columns {_listed(found)}, which fit "
                        f"{' and '.join('+'.join(COLUMNS[kind]) for kind in fitting)}; say which is meant, as "
                        f"`columns: {_written({name: name for name in first})}`")
    raise DataError(f"{table.named_at}: {label} has the columns {_listed(found)}"
                    f"{f', mapped by {_written(mapping)}' if mapping else ''}; expected {expected}; "
                    f"map them, as `columns: {_written(_suggestion(found))}`")


def _suggestion(found: list[str]) -> dict[str, str]:
    """A `columns:` line that would fit these columns, else an example of one."""
    for required in COLUMNS.values():
        line: dict[str, str] = {}
        for standard in required:
            near = [column for column in found if nearest(column.lower(), [standard])]
            aliases = {standard, *(alias.lower() for alias in _ALIASES[standard])}
            known = [column for column in found if column.lower() in aliases]
            for column in (known or near)[:1]:
                line[standard] = column
        if len(line) == len(required):
            return line
    return {"prompt": found[0], "completion": found[1]} if len(found) > 1 else {"text": found[0] if found else "COLUMN"}


def _listed(names: list[str]) -> str:
    return ", ".join(json.dumps(name, ensure_ascii=False) for name in names) or "none"


def _written(mapping: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{standard}: {column}" for standard, column in mapping.items()) + "}"


def standard_row(row: Mapping[str, Any], kind: Kind, mapping: Mapping[str, str], place: str) -> dict[str, Any] | None:
    """The row with standard column names and checked values; None when there is nothing in it (a blank required text).

    Raises DataError, naming `place`, when a column is missing or a value has the wrong form.
    """
    renamed = {column: value for column, value in row.items() if column not in mapping.values()}
    for standard in COLUMNS[kind]:
        column = mapping.get(standard, standard)
        if column not in row:
            raise DataError(f'{place}: the row has no "{column}"; found {_listed(list(row))}{nearest(column, row)}; '
                            "every row needs the columns of the first")
        renamed[standard] = row[column]
    return renamed if _CHECKS[kind](renamed, place) else None


def _string(value: Any, what: str, place: str) -> str:
    """`value` as text (null is the empty text); refuses other types, and halves of surrogate pairs."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} is {_short(value)} ({type(value).__name__}); expected text; put it in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {what} holds {value[error.start]!a}, half of a surrogate pair; expected Unicode "
                        f"text; "
                        "write the character whole, or take it out") from error
    return value


def _short(value: Any) -> str:
    written = json.dumps(value, ensure_ascii=False, default=str)
    return written if len(written) <= 60 else written[:57] + "..."


def _parsed(value: Any) -> Any:
    """Lists that a csv holds as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _check_messages(row: dict[str, Any], place: str) -> bool:
    messages = _parsed(row["messages"])
    if not isinstance(messages, list):
        raise DataError(f'{place}: messages is {_short(messages)}; expected a list, as [{{"role": "user", "content": '
                        '"..."}, {"role": "assistant", "content": "..."}]')
    if not messages:
        return False
    turns = [_turn(message, number, place) for number, message in enumerate(messages, 1)]
    roles = [turn["role"] for turn in turns]
    opening = 1 if roles[0] in ("system", "developer") else 0
    if "system" in roles[1:] or "developer" in roles[1:]:
        raise DataError(f"{place}: turn {1 + max(i for i, r in enumerate(roles) if r in ROLES[:2])} is the system's; "
                        "expected it first or not at all; move it to the front")
    if roles[opening:opening + 1] != ["user"]:
        raise DataError(f"{place}: the conversation starts with {', '.join(roles[:2])}; expected the user's turn, "
                        f"after "
                        "an optional system turn; add it, or drop the turns before the first question")
    if roles[-1] != "assistant":
        raise DataError(f"{place}: the conversation ends with the turn of \"{roles[-1]}\"; expected the assistant's, "
                        "which is what is trained and scored; add the answer, or drop the turns after the last one")
    row["messages"] = turns
    return all(turn["content"].strip() for turn in turns)


def _turn(message: Any, number: int, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        what = f"has the keys {_listed(list(message))}" if isinstance(message, Mapping) else f"is {_short(message)}"
        raise DataError(f'{place}: turn {number} {what}; expected {{"role": ..., "content": ...}}; rename its keys')
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{place}: turn {number} has the role {_short(role)}; expected one of {', '.join(ROLES)}"
                        f"{nearest(str(role), ROLES)}")
    extra = {key: value for key, value in message.items() if value is not None}  # parquet fills absent keys with null
    return {**extra, "role": role, "content": _string(message["content"], f"the content of turn {number}", place)}


def _check_texts(*columns: str) -> Callable[[dict[str, Any], str], bool]:
    def check(row: dict[str, Any], place: str) -> bool:
        for column in columns:
            row[column] = _string(row[column], column, place)
        return all(row[column].strip() for column in columns)

    return check


def _check_choices(row: dict[str, Any], place: str) -> bool:
    row["question"] = _string(row["question"], "question", place)
    offered, labels = _parsed(row["choices"]), None
    if isinstance(offered, Mapping) and {"text", "label"} <= set(offered):  # two parallel lists
        offered, labels = offered["text"], offered["label"]
    if not isinstance(offered, list) or len(offered) < 2:
        raise DataError(f'{place}: choices is {_short(offered)}; expected a list of at least two texts, as ["a", "b"]')
    texts = [_string(choice, f"choice {number}", place) for number, choice in enumerate(offered, 1)]
    if not all(text.strip() for text in texts) or len(set(texts)) < len(texts):
        raise DataError(f"{place}: choices is {_short(texts)}; expected different, non-empty texts; mend the row")
    row["choices"], row["answer"] = texts, _answer(row["answer"], texts, labels, place)
    return bool(row["question"].strip())


def _answer(answer: Any, choices: list[str], labels: Any, place: str) -> int:
    """The index of the right choice, given as an index from 0, as its text, its label, or a letter from A."""
    if isinstance(answer, str):
        for names in (choices, labels or [], [chr(ord("A") + i) for i in range(len(choices))]):
            if answer.strip() in names:
                return list(names).index(answer.strip())
        if answer.strip().isdecimal():
            answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise DataError(f"{place}: answer is {_short(answer)}; expected the index of the right choice, 0 to "
                    f"{len(choices) - 1}, "
                    f"its text, or a letter A to {chr(ord('A') + len(choices) - 1)}")


_CHECKS: dict[Kind, Callable[[dict[str, Any], str], bool]] = {
    "messages": _check_messages, "prompt_completion": _check_texts("prompt", "completion"),
    "text": _check_texts("text"), "choices": _check_choices}
