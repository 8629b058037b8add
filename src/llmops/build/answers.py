"""A teacher's own answers to the prompts of data, as `answers: teacher` learns them: written once for all students.

They follow from the teacher, the prompts, template and the most tokens of an answer, and lie under `runs/answers/KEY`
in shards (`shared.py`), so a kill loses the shard under way, a student that comes later asks nothing, and what they
cost is split over all who read them. Outside of a run there is no such place: they are written each time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from llmops.build.job import Job
from llmops.build.shared import Shared
from llmops.data.render import prompts_and_answers, with_answers
from llmops.data.sources import Rows
from llmops.errors import StepError, StoreError
from llmops.methods.distill.options import Logits

__all__ = ["SHARD_PROMPTS", "Answered", "kept_answers"]

SHARD_PROMPTS = 512  # what a kill can lose
Write = Callable[[Sequence[Any]], "list[str | None]"]  # prompts (token ids) -> answers, None where one has not ended


class Answered:
    """The data by name with the teacher's answers in place of its own; what became of them is in `events`.

    write: asks the teacher; told how many tokens it read and wrote through `count`. Answers that do not end within
    `max_new_tokens` would teach to break off, empty ones to say nothing: both are left out.
    """

    def __init__(self, job: Job, options: Logits, write: Write, count: Callable[[int], None],
                 events: list[str]) -> None:
        self.job, self.options, self.write, self.count, self.events = job, options, write, count, events
        self.kept: dict[str, Rows] = {}
        self.shared: list[tuple[str, Shared]] = []

    def rows(self, name: str) -> Rows:
        """Raises StepError when no answer is left."""
        if name not in self.kept:
            source = self.job.rows(name)
            prompts = [prompt.input_ids for prompt in prompts_and_answers(source, self.job.tokenizer)]
            answers = self._answers(name, source, prompts)
            good = {row: str(answer) for row, answer in enumerate(answers) if answer and answer.strip()}
            self._tell(name, len(answers), len(good))
            self.kept[name] = with_answers(source, good, self.job.tokenizer)
        return self.kept[name]

    def _answers(self, name: str, source: Rows, prompts: Sequence[Any]) -> list[str | None]:
        """From where they are kept: the signals that were made of them, their own folder, or the teacher now."""
        def write(some: Sequence[Any]) -> list[str | None]:
            said = self.write(some)
            self.count(sum(map(len, some)))
            self.count(sum(map(len, self.job.tokenizer([text for text in said if text] or [""],
                                                       verbose=False)["input_ids"])))
            return said

        offline, place = self.options.offline, self.job.signals
        beside = f"answers-{source.sha256[:16]}"
        shared = self.job.answers(name) if self.job.answers is not None else None
        if offline is not None and place is not None and (place.folder / f"{beside}.json").exists():
            if shared is not None and shared.manifest() is not None:  # the same answers, whose cost is this one's, too
                shared.used()
                self.shared.append((f"answers to {name}", shared))
            return place.remembered(beside, list)  # type: ignore[no-any-return]
        if shared is None:
            return write(prompts)
        answers = kept_answers(shared, source, prompts, write, self.options.teacher, self.events)
        self.shared.append((f"answers to {name}", shared))
        if offline is not None and offline.cache is None and place is not None:
            place.remembered(beside, lambda: answers)  # so that the folder can serve another store by itself
        return answers

    def _tell(self, name: str, asked: int, good: int) -> None:
        teacher, lost, most = self.options.teacher, asked - good, self.options.max_new_tokens
        self.events.append(f"{teacher} answered {good:,} of the {asked:,} prompts of {name}"
                           + (f"; {lost:,} answers were empty or not done after {most} tokens, and are left out"
                              if lost else ""))
        if not good:
            raise StepError(f'data "{name}": {teacher} ended none of its {asked} answers within {most} tokens; '
                            "expected a teacher that answers such prompts, or a larger max_new_tokens")


def kept_answers(shared: Shared, rows: Rows, prompts: Sequence[Any], write: Write, teacher: str,
                 events: list[str]) -> list[str | None]:
    """The answers to `prompts`, those of `rows`, from their shards; shards that are missing are written first.

    Raises StoreError for a damaged shard, naming it.
    """
    starts = range(0, len(prompts), SHARD_PROMPTS)
    names = {f"answers-{rows.sha256[:16]}-{number:05d}.json": first for number, first in enumerate(starts)}
    made = 0
    if not all((shared.folder / name).exists() for name in names):
        with shared.making():
            for name, first in names.items():
                some = prompts[first:first + SHARD_PROMPTS]
                made += len(some) * shared.shard(name, lambda some=some: json.dumps(  # type: ignore[misc]
                    write(some)).encode())
            shared.finish({"answers": len(prompts), "teacher": teacher})
    shared.used()
    if made < len(prompts):
        events.append(f"{len(prompts) - made:,} of the {len(prompts):,} answers were there already")
    found: list[str | None] = []
    for name, first in names.items():
        found += _read(shared, name, len(prompts[first:first + SHARD_PROMPTS]))
    return found


def _read(shared: Shared, name: str, count: int) -> list[str | None]:
    path = shared.folder / name
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(answers, list) or len(answers) != count:
            raise ValueError(f"expected a list of {count} answers")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); remove {shared.folder} and run the same command again: "
                         "the teacher answers anew") from error
    return answers
