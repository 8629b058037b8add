"""What a build uses together with others, where it lies, and data of a recipe by name, written by a teacher or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmops.build.shared import Reading, Shared
from llmops.build.synthesizing import FILE, synthesize
from llmops.data.locate import named
from llmops.data.options import DataSource
from llmops.data.sources import Rows, load_rows
from llmops.quantity import Quantity
from llmops.recipe.keys import key_of
from llmops.recipe.plan import Stage
from llmops.recipe.schema import Recipe
from llmops.recipe.shared_keys import writer_of
from llmops.store import Store
from llmops.train import Progress

__all__ = ["Shares"]


@dataclass
class Shares:
    """Of one stage. used: data that was written by a teacher and read here; reading: what was spent so far."""

    recipe: Recipe
    store: Store
    stage: Stage
    reading: Callable[[], Reading] = lambda: (0.0, Quantity.null("J", "nothing is metered here"))
    used: dict[str, Shared] = field(default_factory=dict)

    def signals(self) -> Shared | None:
        """Where the teacher's signals lie, or are to lie."""
        parts = self.stage.signals
        if parts is None:
            return None
        cache = self.recipe.variants[self.stage.variant].options.offline.cache
        folder = self.store.signals(key_of(parts)) if cache is None else self.recipe.base_dir / cache
        return Shared(folder, parts, self.stage.key if cache is None else "", self.reading)

    def answers(self, name: str) -> Shared:
        """Where the teacher's answers to the prompts of the data `name` lie, or are to lie."""
        parts = self.stage.answers[name]
        return Shared(self.store.answers(key_of(parts)), parts, self.stage.key, self.reading)

    def rows(self, name: str, open_teacher: Callable[[str], Any], tokenizer: Any, progress: Progress | None) -> Rows:
        """The rows called `name`. Where a variant writes them, they are written if they are not there yet."""
        how = writer_of(name, self.recipe.data)
        if how is None:
            return load_rows(name, self.recipe.data, self.recipe.base_dir, self.recipe.seed)
        parts = self.stage.written.get(name)
        assert parts is not None, f"the plan does not know that {self.stage.variant} reads {name}"
        shared = Shared(self.store.written(key_of(parts)), parts, self.stage.key, self.reading)
        prompts = self.rows(how.prompts, open_teacher, tokenizer, progress)
        kept: list[Any] = []

        def teacher() -> Any:
            if not kept:
                kept.append(open_teacher(how.teacher).eval())
            return kept[0]

        synthesize(shared, prompts, how, teacher, tokenizer, seed=self.recipe.seed, progress=progress)
        self.used[name] = shared
        return load_rows(name, _read_from(name, self.recipe.data, str(shared.folder / FILE)), self.recipe.base_dir,
                         self.recipe.seed)


def _read_from(name: str, data: Mapping[str, DataSource], file: str) -> dict[str, DataSource]:
    """The sources with a file in the place of the rows that a variant writes."""
    root = named(name, data)[-1]
    return {each: source.model_copy(update={"synthesize": None, "source": file}) if source is root else source
            for each, source in data.items()}
