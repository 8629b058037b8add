"""Command lines from a table: `{"recipes copy": (function, argument, ...)}` becomes parsers, help and completion.

A command's help is the docstring of its function, and its arguments reach the function by name. A name of two words is
a command of a group, which has a line in `groups`. Every start pays for what it builds, so only the parser of the
command asked for is made; the whole tree is made for help and when a shell asks for completion. Two habits of argparse
that users stumble over are gone: abbreviated options are refused, and options may stand between other arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from llmops.errors import LlmopsError, unknown

__all__ = ["Argument", "Command", "Program", "at_least"]

Argument = tuple[tuple[str, ...], dict[str, Any]]  # what argparse's `add_argument` takes: names, and the rest by name
Command = tuple[Any, ...]  # the function, then its Arguments
_HELP = ("-h", "--help")


class Program(NamedTuple):
    """A command line. `commands` by name, as "tune" or "recipes copy"; `groups`: what "recipes" is about."""

    name: str
    about: str
    version: str
    commands: Mapping[str, Command]
    groups: Mapping[str, str]

    def run(self, words: Sequence[str]) -> int:
        """Call what `words` ask for; returns the exit code. LlmopsError for a wrong call, SystemExit after help."""
        group = words[0] if words and words[0] in self.groups else ""
        rest = list(words[1:] if group else words)
        if not rest or rest[0] in _HELP:
            self.tree(group).print_help(sys.stdout if rest else sys.stderr)
            return 0 if rest else 2
        if rest[0] == "--version" and not group:
            print(f"{self.name} {self.version}")
            return 0
        name = f"{group} {rest[0]}".strip()
        if name not in self.commands:
            self._refuse(group, rest[0])
        function, *arguments = self.commands[name]
        given = _parsed(_filled(_Parser(prog=f"{self.name} {name}"), self.commands[name]), arguments, rest[1:])
        return function(**given) or 0

    def tree(self, group: str = "") -> argparse.ArgumentParser:
        """The parser of all commands, or of those of a group."""
        parser = _Parser(prog=f"{self.name} {group}".strip())
        self._branch(parser, group)
        return parser

    def complete(self, completers: Mapping[str, Callable[..., Any]]) -> None:
        """Answer a shell that asks for completion, and exit; else return. completers: by the name of an argument."""
        import argcomplete

        tree = self.tree()
        for action in _actions(tree):
            if action.dest in completers:
                action.completer = completers[action.dest]  # type: ignore[attr-defined]
        argcomplete.autocomplete(tree)

    def _branch(self, parser: argparse.ArgumentParser, group: str) -> None:
        parser.usage = f"{parser.prog} COMMAND [OPTIONS] [ARGUMENTS]"
        parser.description = self.groups[group] if group else self.about
        if not group:
            parser.add_argument("--version", action="store_true", help="Print the version and exit.")
        below = parser.add_subparsers(title="commands", metavar="COMMAND", prog=parser.prog, parser_class=_Parser)
        for name, command in self.commands.items():
            head, _, leaf = name.rpartition(" ")
            if head == group:
                _filled(below.add_parser(leaf, help=_about(command).replace("%", "%%")), command)
            elif not group and head not in below.choices:
                self._branch(below.add_parser(head, help=self.groups[head].replace("%", "%%")), head)

    def _refuse(self, group: str, given: str) -> NoReturn:
        if given.startswith("-"):
            raise LlmopsError(unknown("option", given, [*_HELP, *([] if group else ["--version"])]))
        heads = (name.removeprefix(group).split()[0] for name in self.commands if name.startswith(group))
        raise LlmopsError(unknown(f"command of {self.name} {group}".strip(), given, dict.fromkeys(heads)))


def at_least(smallest: int) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number of at least `smallest`."""
    def read(given: str) -> int:
        if not given.isdecimal() or int(given) < smallest:
            raise argparse.ArgumentTypeError(f'given "{given}"; expected a whole number of at least {smallest}')
        return int(given)

    return read


class _Help(argparse.HelpFormatter):
    """argparse's, with commands in the column of the options: indented, the longest name breaks its line."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": _columns() - 2, **options})

    def _iter_indented_subactions(self, action: argparse.Action) -> Generator[argparse.Action, None, None]:
        yield from action._get_subactions() if isinstance(action, argparse._SubParsersAction) else ()


def _columns() -> int:
    """Width of the terminal as `shutil` finds it, which is slow to import: argparse asks for it at every argument."""
    with suppress(KeyError, ValueError):
        if (columns := int(os.environ["COLUMNS"])) > 0:
            return columns
    with suppress(AttributeError, ValueError, OSError):
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    return 80


class _Parser(argparse.ArgumentParser):
    """One that takes no abbreviations, and whose complaints are errors of ours."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, add_help=False, allow_abbrev=False, formatter_class=_Help, **options)
        self.add_argument(*_HELP, action="help", help="Show this message and exit.")

    def error(self, message: str) -> NoReturn:
        raise LlmopsError(f"{message}; `{self.prog} --help` tells what it takes")


def _filled(parser: argparse.ArgumentParser, command: Command) -> argparse.ArgumentParser:
    """The parser with the command's arguments and help."""
    parser.description = _about(command)
    shown = [_usage(argument) for argument in command[1:] if not argument[0][0].startswith("-")]
    parser.usage = " ".join([parser.prog, "[OPTIONS]", *shown])
    for names, options in command[1:]:
        parser.add_argument(*names, **options)
    return parser


def _usage(argument: Argument) -> str:
    (name, *_), options = argument
    shown = str(options.get("metavar", name))
    return {"?": f"[{shown}]", "*": f"[{shown}...]"}.get(options.get("nargs", ""), shown)


def _about(command: Command) -> str:
    return " ".join((command[0].__doc__ or "").split())


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[Argument], words: Sequence[str]) -> dict[str, Any]:
    """The arguments by name. LlmopsError for an unknown option (with the nearest match) or a word too many."""
    options = [name for names, _ in (*arguments, (_HELP, {})) for name in names if name.startswith("-")]
    before = words[:words.index("--")] if "--" in words else words
    for word in before:  # first of all: an option that is misspelt may have taken what something else needs
        if word.startswith("--") and word.partition("=")[0] not in options:
            raise LlmopsError(unknown(f"option of {parser.prog}", word.partition("=")[0], options))
    given, left = parser.parse_known_intermixed_args(words)
    if left:
        if left[0].startswith("-"):
            raise LlmopsError(unknown(f"option of {parser.prog}", left[0], options))
        parser.error(f'one word too many: "{left[0]}"')
    return vars(given)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser and of all below it."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [each for below in action.choices.values() for each in _actions(below)]
    return found
