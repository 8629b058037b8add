"""What a conversation must look like: its turns, the tools it may call, the calls and their results.

    {"role": "system" | "user" | "assistant" | "tool", "content": "..."}
    {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "...", "arguments": {...}}}]}
    {"role": "tool", "content": "what the tool gave back"}

A turn of tool calls is brought into the one form that chat templates read: `type`, `function.name`,
`function.arguments` as a mapping. Arguments may be given as JSON text, as the APIs do, and a call or a tool without its
`function` wrapper is wrapped. In parquet write arguments as JSON text: the format itself fills what one row lacks and
another has with nulls, which here would become arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.errors import DataError, nearest

__all__ = ["ROLES", "check_calls", "check_opening", "check_tools", "check_turns", "has_words", "listed", "parsed",
           "short", "string"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_CALL = '{"function": {"name": "...", "arguments": {...}}}'
_TOOL = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'


def string(value: Any, what: str, place: str) -> str:
    """`value` as text (null is the empty text); refuses other types, and halves of surrogate pairs."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} is {short(value)} ({type(value).__name__}); expected text; put it in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {what} holds {value[error.start]!a}, half of a surrogate pair; expected Unicode "
                        "text; write the character whole, or take it out") from error
    return value


def short(value: Any) -> str:
    """A given value as JSON, at most 60 characters of it."""
    written = json.dumps(value, ensure_ascii=False, default=str)
    return written if len(written) <= 60 else written[:57] + "..."


def listed(names: Sequence[str]) -> str:
    """Names in quotes, or "none"."""
    return ", ".join(json.dumps(name, ensure_ascii=False) for name in names) or "none"


def parsed(value: Any) -> Any:
    """Lists and mappings that a csv holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_turns(messages: Sequence[Any], place: str, first: int = 1) -> list[dict[str, Any]]:
    """The turns of a conversation, each checked and in one form; `first` is the number of the first in messages.

    Raises DataError naming the turn.
    """
    return [_turn(message, number, place) for number, message in enumerate(messages, first)]


def _turn(message: Any, number: int, place: str) -> dict[str, Any]:
    calling = isinstance(message, Mapping) and bool(message.get("tool_calls"))
    if not isinstance(message, Mapping) or "role" not in message or ("content" not in message and not calling):
        what = f"has the keys {listed(list(message))}" if isinstance(message, Mapping) else f"is {short(message)}"
        raise DataError(f'{place}: turn {number} {what}; expected {{"role": ..., "content": ...}}; rename its keys')
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{place}: turn {number} has the role {short(role)}; expected one of {', '.join(ROLES)}"
                        f"{nearest(str(role), ROLES)}")
    if calling and role != "assistant":
        raise DataError(f'{place}: turn {number} is the turn of "{role}" and has tool_calls; expected them on turns of '
                        "the assistant only; move them, or take them out")
    # parquet fills absent keys with null, and an empty list of calls is no call
    extra = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    turn = {**extra, "role": role, "content": string(message.get("content"), f"the content of turn {number}", place)}
    return {**turn, "tool_calls": _calls(message["tool_calls"], number, place)} if calling else turn


def _calls(given: Any, number: int, place: str) -> list[dict[str, Any]]:
    calls = parsed(given)
    if not isinstance(calls, list):
        raise DataError(f"{place}: tool_calls of turn {number} is {short(calls)}; expected a list, as [{_CALL}]")
    return [_call(call, f"tool call {index} of turn {number}", place) for index, call in enumerate(calls, 1)]


def _call(call: Any, what: str, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise DataError(f"{place}: {what} is {short(call)}; expected {_CALL}; give the function's name")
    arguments = parsed(function.get("arguments"))
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{place}: the arguments of {what} ({function['name']}) are {short(arguments)}; expected a "
                        'JSON object, or its text, as {"city": "Oslo"}; mend the call')
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def check_tools(given: Any, place: str) -> list[dict[str, Any]]:
    """The tools of a row: JSON schemas of functions, as a list or as JSON text; an empty list where there are none.

    Raises DataError for what is no such list.
    """
    tools = parsed(given)
    if tools is None or tools == "":
        return []
    if not isinstance(tools, list):
        raise DataError(f"{place}: tools is {short(tools)}; expected a list of JSON schemas, or its text, as [{_TOOL}]")
    result: list[dict[str, Any]] = []
    for number, entry in enumerate(tools, 1):
        tool = parsed(entry)
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: tool {number} is {short(tool)}; expected {_TOOL}; give the function's name")
        wrapped = tool if isinstance(tool, Mapping) and "function" in tool else {"type": "function", "function": tool}
        result.append({**wrapped, "function": dict(function)})
    names = [tool["function"]["name"] for tool in result]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{place}: tools has {short(twice)} twice; expected each name once; rename or remove one")
    return result


def check_opening(turns: Sequence[Mapping[str, Any]], place: str) -> None:
    """Raise DataError unless the turns are an optional system turn, the user's, and no system turn after that."""
    roles = [turn["role"] for turn in turns]
    opening = 1 if roles[0] in ("system", "developer") else 0
    if "system" in roles[1:] or "developer" in roles[1:]:
        raise DataError(f"{place}: turn {1 + max(i for i, r in enumerate(roles) if r in ROLES[:2])} is the system's; "
                        "expected it first or not at all; move it to the front")
    if roles[opening:opening + 1] != ["user"]:
        raise DataError(f"{place}: the conversation starts with {', '.join(roles[:2])}; expected the user's turn, "
                        "after an optional system turn; add it, or drop the turns before the first question")


def check_calls(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], place: str) -> None:
    """Raise DataError unless every result follows its call, and every call names a tool (where there are `tools`)."""
    names = [tool["function"]["name"] for tool in tools]
    ids: list[Any] = []  # of the calls that have no result yet
    called = False
    for number, turn in enumerate(turns, 1):
        if turn["role"] != "tool":
            calls = turn.get("tool_calls") or ()
            for call in calls:
                name = call["function"]["name"]
                if names and name not in names:
                    raise DataError(f"{place}: turn {number} calls {short(name)}, which is not among the row's tools; "
                                    f"expected one of {', '.join(names)}{nearest(name, names)}")
            ids, called = [call.get("id") for call in calls], bool(calls)
            continue
        if not ids:
            why = ("more results than calls before it" if called else "no assistant turn with tool_calls before it")
            raise DataError(f'{place}: turn {number} is the result of a tool (role "tool"), with {why}; expected one '
                            "result for each call, right behind the calls; add the call, or drop the result")
        answered = turn.get("tool_call_id")
        known = [each for each in ids if each is not None]
        if answered is not None and known and answered not in known:
            raise DataError(f"{place}: turn {number} answers the tool call {short(answered)}; expected one of the "
                            f"calls before it that has no result yet, {listed([str(each) for each in known])}; mend "
                            "its tool_call_id")
        ids.remove(answered) if answered in ids else ids.pop(0)


def has_words(turn: Mapping[str, Any]) -> bool:
    """Whether a turn says anything: text or tool calls. A tool may give back nothing."""
    return bool(turn["content"].strip()) or turn["role"] == "tool" or bool(turn.get("tool_calls"))
