"""One request to a provider, and what may go wrong with it, in words that hold no key.

A redirect is not followed: the key would go along to wherever it leads.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPException
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode

from llmops import __version__
from llmops.errors import LlmopsError

__all__ = ["TIMEOUT_S", "get", "iso", "keys", "number", "seconds_of"]

TIMEOUT_S = 10.0
MOST_BYTES = 8_000_000
EXCERPT = 160
CURE = "or leave it out and give a file of hours (measure.intensity, --forecast FILE)"


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message,
                         newurl: str) -> None:
        return None


def keys(title: str, variables: Sequence[str], *, ascii_only: bool = True) -> list[str]:
    """The values of the environment variables. Raises LlmopsError naming those that are not set, and for values that no
    header can hold."""
    found = [os.environ.get(variable, "").strip() for variable in variables]
    missing = [variable for variable, value in zip(variables, found, strict=True) if not value]
    if missing:
        raise LlmopsError(f"{title}: no key; expected the environment variable{'s' if len(missing) > 1 else ''} "
                          f"{' and '.join(missing)} to be set, {CURE}")
    if any(not value.isprintable() or (ascii_only and not value.isascii()) for value in found):
        raise LlmopsError(f"{title}: the key in {' or '.join(variables)} holds characters that no key has (not shown); "
                          "expected it as the provider gave it")
    return found


def get(title: str, address: str, query: Mapping[str, Any], headers: Mapping[str, str], *, zone: str = "",
        hidden: Sequence[str] = (), variables: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object at the address. zone: what was asked about; hidden: what no message may repeat; variables: where
    the key came from, for messages. Raises LlmopsError."""
    full = f"{address}?{urlencode(query)}" if query else address
    request = urllib.request.Request(full, headers={"Accept": "application/json",
                                                    "User-Agent": f"llmops/{__version__}", **headers})
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=TIMEOUT_S) as answer:
            body = answer.read(MOST_BYTES + 1)
    except HTTPError as error:
        with error:
            told = _excerpt(error.read(10_000), hidden)
        raise LlmopsError(_refused(title, error.code, told, zone, variables)) from None
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise LlmopsError(f"{title}: {address} cannot be reached ({reason}); waited at most {TIMEOUT_S:g} s; expected "
                          f"a network that reaches it, {CURE}") from None
    try:
        found = json.loads(body) if len(body) <= MOST_BYTES else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LlmopsError(f"{title}: {address} answered what is no JSON object ({_excerpt(body, hidden)}); expected "
                          "one: is there a proxy in between?")
    return found


def _refused(title: str, code: int, told: str, zone: str, variables: Sequence[str]) -> str:
    where = " and ".join(variables)
    if code in (401, 403):
        return (f'{title}: refused (HTTP {code}: {told}); expected a valid key in {where or "no variable"}, and a plan '
                f'that has what was asked for' + (f', zone "{zone}" included' if zone else ""))
    if code in (400, 404, 422) and zone:
        return (f'{title}: nothing for zone "{zone}" (HTTP {code}: {told}); expected one of its own names of zones; '
                "another zone is not taken instead")
    if code == 429:
        return f"{title}: too many requests (HTTP 429: {told}); try again later, {CURE}"
    if 300 <= code < 400:
        return f"{title}: answered with a redirect (HTTP {code}), which is not followed, since the key would go along"
    return f"{title}: HTTP {code} ({told}); try again later, {CURE}"


def _excerpt(body: bytes, hidden: Sequence[str]) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    for secret in hidden:
        text = text.replace(secret, "(hidden)")
    return text[:EXCERPT] or "no text"


def seconds_of(title: str, when: Any) -> float:
    """A time as all three write it. Raises LlmopsError for anything else."""
    try:
        time = datetime.fromisoformat(when)
    except (TypeError, ValueError):
        raise LlmopsError(f"{title}: answered with a time of {str(when)[:40]!r}; expected one as 2026-11-24T13:00Z"
                          ) from None
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()


def number(title: str, value: Any) -> float | None:
    """A figure, None for one that is not there. Raises LlmopsError for what is no number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LlmopsError(f"{title}: answered with a figure of {str(value)[:40]!r}; expected a number")
    return float(value)


def iso(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
