"""Keys of what several builds share: a teacher's signals on disk, its answers, and data that a teacher writes.

All are known before anything is built, as every key is: they follow from the teacher's key, the data behind them and
the options that change them. So the plan knows which students share one pass of their teacher, and what it cost can be
split among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmops.data.locate import named
from llmops.data.options import DataSource
from llmops.errors import DataError
from llmops.recipe.schema import Recipe, Variant

if TYPE_CHECKING:
    from llmops.data.options import Synthesize

__all__ = ["SIGNAL_PARTS", "answer_parts", "foreign", "signal_parts", "writer_of", "writers_of", "written_names",
           "written_parts", "written_print"]

SIGNALS_VERSION = 2  # raise it when the same teacher would leave other signals
ANSWERS_VERSION = 1  # raise it when the same teacher would give other answers
WRITTEN_VERSION = 1  # raise it when the same teacher would write other data
#: Parts of the key of signals, as messages call them.
SIGNAL_PARTS = {"teacher": "teacher", "data": "data", "template": "chat template", "tokenizer": "tokenizer",
                "held_out": "choice of held-out rows", "answers": "source of answers", "max_length": "max_length",
                "k": "k", "temperature": "temperature", "version": "format"}


def signal_parts(recipe: Recipe, variant: Variant, keys: Mapping[str, str], prints: Mapping[str, str],
                 base: Mapping[str, str]) -> dict[str, str] | None:
    """The parts of the signals that a variant reads; None for one that reads none.

    keys: of variants, by name; prints: of data, by name; base: the parts of the model itself.
    """
    options: Any = variant.options
    if getattr(options, "offline", None) is None:
        return None
    held = "none"
    if options.stop is not None:
        named_rows = options.stop.data
        held = prints[named_rows] if named_rows is not None else f"{options.stop.holdout:g}, seed {recipe.seed}"
    answers = f"{options.max_new_tokens} tokens" if options.answers == "teacher" else "data"
    return {"teacher": keys[options.teacher], "data": json.dumps([prints[name] for name in options.mixed]),
            "template": base.get("template", base["model"]), "tokenizer": base.get("tokenizer", base["model"]),
            "held_out": held, "answers": answers, "max_length": str(options.max_length), "k": str(options.offline.k),
            "temperature": f"{options.temperature:g}", "version": str(SIGNALS_VERSION)}


def foreign(found: Mapping[str, str], wanted: Mapping[str, str], words: Mapping[str, str]) -> str:
    """What of two sets of parts differs, in words; empty where nothing does. words: part -> how it is called."""
    wrong = [f"{words.get(part, part)} ({_short(found.get(part))}, here {_short(wanted.get(part))})"
             for part in dict.fromkeys([*wanted, *found]) if found.get(part) != wanted.get(part)]
    return ", ".join(wrong)


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return " and ".join(str(each)[:12] for each in json.loads(value)) if value.startswith("[") else value[:12]


def answer_parts(recipe: Recipe, variant: Variant, keys: Mapping[str, str], prints: Mapping[str, str],
                 base: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The parts of the teacher's answers that a variant learns, by the name of the data that asks; empty for none."""
    options: Any = variant.options
    if getattr(options, "answers", "data") != "teacher":
        return {}
    held = options.stop.data if options.stop is not None else None
    return {name: {"teacher": keys[options.teacher], "prompts": prints[name],
                   "template": base.get("template", base["model"]),
                   "tokenizer": base.get("tokenizer", base["model"]), "max_new_tokens": str(options.max_new_tokens),
                   "seed": str(recipe.seed), "version": str(ANSWERS_VERSION)}
            for name in dict.fromkeys([*options.mixed, *([held] if held is not None else [])])}


def writer_of(name: str, data: Mapping[str, DataSource]) -> Synthesize | None:
    """How the rows behind a name are written, if a teacher writes them."""
    try:
        return named(name, data)[-1].synthesize
    except DataError:
        return None


def written_names(name: str, data: Mapping[str, DataSource]) -> list[str]:
    """The data that have to be written before `name` can be read: itself, its prompts, theirs, as far as variants write
    them."""
    found: list[str] = []
    while name not in found and (how := writer_of(name, data)) is not None:
        found.append(name)
        name = how.prompts
    return found


def writers_of(name: str, data: Mapping[str, DataSource]) -> list[str]:
    """The variants that have to be there before the data `name` is: who writes it, and who wrote its prompts."""
    return [how.teacher for each in written_names(name, data) if (how := writer_of(each, data)) is not None]


def written_parts(recipe: Recipe, name: str, keys: Mapping[str, str], prints: Mapping[str, str],
                  base: Mapping[str, str]) -> dict[str, str]:
    """The parts of the data behind `name`, which a teacher writes."""
    how = writer_of(name, recipe.data)
    assert how is not None
    if writer_of(how.prompts, recipe.data) is not None:
        inner = written_parts(recipe, how.prompts, keys, prints, base)
        asked = written_print(how.prompts, recipe.data, _hash(inner))
    else:
        from llmops.data.fingerprint import fingerprint

        asked = prints.get(how.prompts) or fingerprint(how.prompts, recipe.data, recipe.base_dir)
    options = how.model_dump(mode="json", exclude={"teacher", "prompts"})
    return {"teacher": keys[how.teacher], "prompts": asked, "template": base.get("template", base["model"]),
            "tokenizer": base.get("tokenizer", base["model"]), "options": json.dumps(options, sort_keys=True),
            "seed": str(recipe.seed), "version": str(WRITTEN_VERSION)}


def written_print(name: str, data: Mapping[str, DataSource], key: str) -> str:
    """The fingerprint of data that a teacher writes: the key of the whole, and what is taken of it."""
    chain = [source.model_dump(mode="json", exclude={"source", "from_", "limits", "synthesize"})
             for source in named(name, data)]
    return hashlib.sha256(json.dumps([chain, key], sort_keys=True).encode()).hexdigest()


def _hash(parts: Mapping[str, str]) -> str:
    from llmops.recipe.keys import key_of

    return key_of(parts)
