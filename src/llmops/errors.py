"""The error tree. Every message says what was given, what was expected, and what to change.

    LlmopsError            exit 2: the call, the recipe or the data is wrong; nothing was done
    |- RecipeError         a recipe that cannot be run; carries file, line and column
    |- DataError           a data source that cannot be used; carries file and line where there is one
    |- ModelError          a model folder that cannot be loaded, or is not what it says
    |- StoreError          the store or the ledger cannot be read or written
    |- BudgetReached       exit 4: the budget is used up; what was finished is kept
    '- StepError           exit 3: a step ran and failed; its siblings go on
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BudgetReached", "DataError", "LlmopsError", "ModelError", "RecipeError", "StepError", "StoreError",
           "nearest", "unknown"]


class LlmopsError(Exception):
    """Base of every error a user can mend. `exit_code` is what the command line exits with."""

    exit_code = 2


class RecipeError(LlmopsError):
    """A recipe that cannot be run. `problems` holds one line each, `file:line:column: what, expected, cure`."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(LlmopsError):
    """A data source that cannot be used as the recipe wants it."""


class ModelError(LlmopsError):
    """A model that cannot be loaded, or whose folder is not what it says it is."""


class StoreError(LlmopsError):
    """The store or the ledger cannot be read or written."""


class BudgetReached(LlmopsError):
    """The energy or carbon that a recipe allows itself is used up. Ends the run, not only the step."""

    exit_code = 4


class StepError(LlmopsError):
    """A step ran and failed (NaN loss, parity broken, out of memory). The reason goes into the variant's row."""

    exit_code = 3


def nearest(given: str, known: Iterable[str]) -> str:
    """`'; did you mean "x"?'`, or an empty string when nothing known is close."""
    import difflib  # only a wrong name needs it, and every start would pay for it

    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: what was given, all that is known, and the nearest match."""
    names = list(known)
    return f'unknown {what} "{given}"; expected one of {", ".join(names)}{nearest(given, names)}'
