"""Six kinds of rows, told apart by their columns, and what a row of each must look like.

    messages            {"messages": [{"role": ..., "content": ...}, ...]}   ends with the assistant's turn; `turns.py`
    prompt_completion   {"prompt": ..., "completion": ...}
    text                {"text": ...}
    choices             {"question": ..., "choices": [...], "answer": ...}   answer: index, the text, or a letter
    preference          {"prompt": ..., "chosen": ..., "rejected": ...}      texts, or turns: the answer's, or the whole
    prompts             {"prompt": ...}                                      text, or turns up to a question; no answer

Conversations may have `tools`, a list of JSON schemas or its text. The sides of a preference become lists of turns
when one of its columns is a list; turns of the prompt that a side repeats at its head are taken off.

A file that names its columns otherwise is mapped by `columns`, as ``{prompt: question, completion: answer}``. Nothing
is guessed: when no kind fits, or more than one, the message says which columns there are and what to write. Further
columns stay on the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from llmops.data.options import COLUMNS, OPTIONAL
from llmops.data.readers import Table
from llmops.data.turns import (
    ROLES,
    check_calls,
    check_opening,
    check_tools,
    check_turns,
    has_words,
    listed,
    parsed,
    short,
    string,
)
from llmops.errors import DataError, nearest

__all__ = ["Kind", "ROLES", "kind_of", "standard_row"]

Kind = Literal["messages", "prompt_completion", "text", "choices", "preference", "prompts"]
#: What other data sets call these columns; only ever used to suggest a `columns:` line.
_ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("question", "instruction", "input", "query", "request"),
    "completion": ("answer", "response", "output", "reply", "solution", "chosen"),
    "text": ("content", "document", "body", "article", "sentence", "story"),
    "question": ("prompt", "query", "stem"),
    "choices": ("options", "endings", "candidates"),
    "answer": ("label", "answerKey", "target", "gold"),
    "chosen": ("preferred", "better", "winner", "accepted", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "rejected_response", "response_rejected"),
}


def kind_of(table: Table, mapping: Mapping[str, str], label: str) -> Kind:
    """The kind of a table's rows, after `mapping` (standard column -> column of the file).

    Raises DataError when a mapped column is not there, or when no kind or more than one fits.
    """
    found = table.columns
    for standard, column in mapping.items():
        if column not in found:
            raise DataError(f'{table.named_at}: columns maps {standard} to "{column}", which is not in {label}; found '
                            f"{listed(found)}{nearest(column, found)}")
    names = {*mapping, *(column for column in found if column not in mapping.values())}
    fitting = [kind for kind, required in COLUMNS.items()
               if set(required) <= names and (not mapping or set(mapping) <= {*required, *OPTIONAL.get(kind, ())})]
    if "prompts" in fitting and (len(fitting) > 1 or any(_answers(column) for column in found)):
        fitting.remove("prompts")  # a prompt alone is what is left when no answer is there
    if len(fitting) == 1:
        return cast(Kind, fitting[0])
    expected = " or ".join("+".join(required) for required in COLUMNS.values())
    if fitting:
        first = COLUMNS[fitting[0]]
        raise DataError(f"{table.named_at}: {label} has the columns {listed(found)}, which fit "
                        f"{' and '.join('+'.join(COLUMNS[kind]) for kind in fitting)}; say which is meant, as "
                        f"`columns: {_written({name: name for name in first})}`")
    if {"chosen", "rejected"} <= names and "prompt" not in names and not _suggestion(found).keys() >= {"rejected"}:
        raise DataError(f"{table.named_at}: {label} has the columns {listed(found)}, two answers and no prompt; "
                        "expected prompt+chosen+rejected; put what both sides begin with into a column prompt")
    raise DataError(f"{table.named_at}: {label} has the columns {listed(found)}"
                    f"{f', mapped by {_written(mapping)}' if mapping else ''}; expected {expected}; "
                    f"map them, as `columns: {_written(_suggestion(found))}`")


def _answers(column: str) -> bool:
    """Whether a column is called as one that holds answers, or nearly so."""
    return column.lower() in _ALIASES["completion"] or bool(nearest(column.lower(), COLUMNS["prompt_completion"][1:]))


def _suggestion(found: list[str]) -> dict[str, str]:
    """A `columns:` line that would fit these columns, else an example of one."""
    for required in (COLUMNS["preference"], *COLUMNS.values()):  # else its prompt and chosen would do for a pair
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
            raise DataError(f'{place}: the row has no "{column}"; found {listed(list(row))}{nearest(column, row)}; '
                            "every row needs the columns of the first")
        renamed[standard] = row[column]
    for standard in OPTIONAL.get(kind, ()):
        renamed[standard] = row.get(mapping.get(standard, standard))
    return renamed if _CHECKS[kind](renamed, place) else None


def _check_messages(row: dict[str, Any], place: str) -> bool:
    messages = parsed(row["messages"])
    if not isinstance(messages, list):
        raise DataError(f'{place}: messages is {short(messages)}; expected a list, as [{{"role": "user", "content": '
                        '"..."}, {"role": "assistant", "content": "..."}]')
    if not messages:
        return False
    turns = check_turns(messages, place)
    check_opening(turns, place)
    _check_ending(turns, "the conversation", place)
    _set_tools(row, turns, place)
    row["messages"] = turns
    return all(has_words(turn) for turn in turns)


def _check_ending(turns: Sequence[Mapping[str, Any]], what: str, place: str) -> None:
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{place}: {what} ends with the turn of \"{turns[-1]['role']}\"; expected the assistant's, "
                        "which is what is trained and scored; add the answer, or drop the turns after the last one")


def _set_tools(row: dict[str, Any], turns: Sequence[Mapping[str, Any]], place: str) -> None:
    """Check the row's tools and its calls of them; a row without tools has no such column."""
    tools = check_tools(row.pop("tools", None), place)
    check_calls(turns, tools, place)
    if tools:
        row["tools"] = tools


def _check_preference(row: dict[str, Any], place: str) -> bool:
    """All texts, or all lists of turns."""
    given = {column: _turns_or_text(row[column]) for column in COLUMNS["preference"]}
    if not any(isinstance(value, list) for value in given.values()):
        if check_tools(row.pop("tools", None), place):
            raise DataError(f"{place}: the row has tools, and its prompt is text; expected a list of turns, as "
                            '[{"role": "user", "content": "..."}]; write the prompt so, or take the tools out')
        return _check_texts(*COLUMNS["preference"])(row, place)
    prompt = _as_turns(given["prompt"], "prompt", "user", place)
    if not prompt:
        return False
    _check_question(prompt, "move the answer into chosen and rejected", place)
    row["prompt"] = prompt
    for side in ("chosen", "rejected"):
        turns = _as_turns(given[side], side, "assistant", place)
        turns = turns[len(prompt):] if turns[:len(prompt)] == prompt else turns
        if not turns:
            return False
        if turns[0]["role"] != "assistant":
            raise DataError(f"{place}: {side} starts with the turn of \"{turns[0]['role']}\"; expected the "
                            "assistant's, right after the prompt; give the answer alone, or repeat the prompt exactly")
        _check_ending(turns, side, place)
        row[side] = turns
    tools = check_tools(row.get("tools"), place)
    check_calls([*prompt, *row["rejected"]], tools, place)
    _set_tools(row, [*prompt, *row["chosen"]], place)
    return all(has_words(turn) for turn in (*prompt, *row["chosen"], *row["rejected"]))


def _check_question(prompt: Sequence[Mapping[str, Any]], cure: str, place: str) -> None:
    check_opening(prompt, place)
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{place}: the prompt ends with the turn of \"assistant\"; expected the user's or a tool's; "
                        f"{cure}")


def _check_prompts(row: dict[str, Any], place: str) -> bool:
    """Text, or a list of turns that ends where the answer would begin."""
    prompt = _turns_or_text(row["prompt"])
    if not isinstance(prompt, list):
        row.pop("tools", None)
        return _check_texts("prompt")(row, place)
    if not prompt:
        return False
    row["prompt"] = check_turns(prompt, f"{place}: prompt")
    _check_question(row["prompt"], "leave it out", place)
    _set_tools(row, row["prompt"], place)
    return all(has_words(turn) for turn in row["prompt"])


def _turns_or_text(value: Any) -> Any:
    """A list of turns, which a csv holds as JSON text; else the value as it is: a prompt may begin with a bracket."""
    found = parsed(value)
    turns = isinstance(found, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in found)
    return found if turns else value


def _as_turns(value: Any, what: str, role: str, place: str) -> list[dict[str, Any]]:
    """The turns of a list, or text as the one turn of `role`; no turn for blank text."""
    if isinstance(value, list):
        return check_turns(value, f"{place}: {what}")
    content = string(value, what, place)
    return [{"role": role, "content": content}] if content.strip() else []


def _check_texts(*columns: str) -> Callable[[dict[str, Any], str], bool]:
    def check(row: dict[str, Any], place: str) -> bool:
        for column in columns:
            row[column] = string(row[column], column, place)
        return all(row[column].strip() for column in columns)

    return check


def _check_choices(row: dict[str, Any], place: str) -> bool:
    row["question"] = string(row["question"], "question", place)
    offered, labels = parsed(row["choices"]), None
    if isinstance(offered, Mapping) and {"text", "label"} <= set(offered):  # two parallel lists
        offered, labels = offered["text"], offered["label"]
    if not isinstance(offered, list) or len(offered) < 2:
        raise DataError(f'{place}: choices is {short(offered)}; expected a list of at least two texts, as ["a", "b"]')
    texts = [string(choice, f"choice {number}", place) for number, choice in enumerate(offered, 1)]
    if not all(text.strip() for text in texts) or len(set(texts)) < len(texts):
        raise DataError(f"{place}: choices is {short(texts)}; expected different, non-empty texts; mend the row")
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
    raise DataError(f"{place}: answer is {short(answer)}; expected the index of the right choice, 0 to "
                    f"{len(choices) - 1}, its text, or a letter A to {chr(ord('A') + len(choices) - 1)}")


_CHECKS: dict[Kind, Callable[[dict[str, Any], str], bool]] = {
    "messages": _check_messages, "prompt_completion": _check_texts("prompt", "completion"),
    "text": _check_texts("text"), "choices": _check_choices, "preference": _check_preference,
    "prompts": _check_prompts}
