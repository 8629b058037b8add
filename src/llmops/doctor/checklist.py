"""A check-list: what was looked at, how it stands, and what to do where it does not stand well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llmops.errors import LlmopsError

__all__ = ["Check", "Checklist", "State", "exit_code", "render"]

State = Literal["ok", "note", "fail"]  # a note is no fault, but worth knowing
_MARK = {"ok": ("+", "green"), "note": ("!", "yellow"), "fail": ("x", "red")}


@dataclass(frozen=True)
class Check:
    """One line. `cure`: what to do, where there is something to do."""

    name: str
    state: State
    detail: str
    cure: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Checklist:
    """Checks as they are made; each is told at once to `say`."""

    say: Callable[[Check], None] | None = None
    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, state: State, detail: str, cure: str = "") -> Check:
        check = Check(name, state, detail, cure)
        self.checks.append(check)
        if self.say is not None:
            self.say(check)
        return check

    @contextmanager
    def trying(self, name: str, cure: str = "") -> Iterator[None]:
        """A block whose failure is a failed check, and does not end the list."""
        try:
            yield
        except LlmopsError as error:
            self.add(name, "fail", str(error), cure)
        except Exception as error:  # whatever a library raises is a finding here
            text = str(error).strip().splitlines()
            self.add(name, "fail", f"{type(error).__name__}: {text[0] if text else 'no message'}", cure)


def render(checks: Sequence[Check], colour: bool = False, width: int = 0) -> str:
    """The list as text, one line a check, the cure on a line below. width: columns for the names, at least."""
    width = max(width, *(len(check.name) for check in checks)) if checks else width
    lines = []
    for check in checks:
        mark, tint = _MARK[check.state]
        if colour:
            code = {"green": 32, "yellow": 33, "red": 31}[tint]
            mark = f"\x1b[{code}m{mark}\x1b[0m"
        detail = check.detail.replace("\n", "\n" + " " * (width + 4))
        lines.append(f"{mark} {check.name:{width}}  {detail}")
        if check.cure and check.state != "ok":
            lines.append(" " * (width + 4) + f"-> {check.cure}")
    return "\n".join(lines)


def exit_code(checks: Sequence[Check]) -> int:
    """3 when a check failed, else 0."""
    return 3 if any(check.state == "fail" for check in checks) else 0
