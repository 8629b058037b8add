"""The requests of lm-eval's tasks again, as token ids, without asking a model anything.

lm-eval makes the prompts (few-shot examples, templates, the space before a choice), so lm-eval is asked to make them
again: its own walk over the tasks runs with a runner that writes down what it is asked, in tokens, and answers nothing.
What comes back is known by the same hashes of document, prompt and target that items are kept under. A request is cut
from the left where it is too long for the model, as lm-eval cuts it; of a rolling document that takes several windows
the first one is kept. Left out: tasks whose answers are written (`generate_until`), since they end by lm-eval's rules.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.errors import LlmopsError
from llmops.evaluate.harness import load_tasks, quiet, run_tasks, sample_id
from llmops.evaluate.options import Harness
from llmops.evaluate.replay import Question

__all__ = ["harness_questions"]

Sides = tuple[list[int], list[int]]  # ids of the context, ids of the continuation


def harness_questions(model: Any, tokenizer: Any, options: Harness, id: str) -> dict[str, dict[str, Question]]:
    """Task -> item's id -> what was asked. A task whose answers are written has none. `model` is only looked at.

    Raises LlmopsError when lm-eval is not installed, and as `harness.evaluate`.
    """
    with quiet():
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise LlmopsError(f"{id}: harness tasks need lm-evaluation-harness, which is not installed ({error}); "
                              'install it with: pip install "llmops[harness]"') from error

        class Writer(HFLM):  # type: ignore[misc, no-any-unimported]
            """Writes requests down: `seen` by (context, continuation), or (document,) where that is rolled over."""

            def __init__(self) -> None:
                super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=options.batch_size)
                self.seen: dict[tuple[str, ...], Sides] = {}
                self.document: str | None = None

            def _loglikelihood_tokens(self, requests: Any, *args: Any, **more: Any) -> list[tuple[float, bool]]:
                for texts, context, continuation in requests:
                    key = texts if texts is not None else (self.document or "",)
                    left = max(1, self.max_length + 1 - len(continuation))
                    self.seen.setdefault(key, (list(context)[-left:], list(continuation)))
                return [(0.0, False)] * len(requests)

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
                for request in requests:  # one at a time, so that windows have a document
                    self.document = request.args[0]
                    super().loglikelihood_rolling([request], disable_tqdm=True)
                return [0.0] * len(requests)

            def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
                return [""] * len(requests)

        manager, tasks = load_tasks(options, id)
        writer = Writer()
        found = run_tasks(writer, manager, tasks, options, 0)
    return {name: _questions(found["samples"][name], writer.seen) for name in tasks}


def _questions(samples: Sequence[Mapping[str, Any]], seen: Mapping[tuple[str, ...], Sides]) -> dict[str, Question]:
    found = {}
    for sample in samples:
        asked = [tuple(map(str, arguments)) for arguments in sample["arguments"]]
        if not asked or any(key not in seen for key in asked):
            continue
        names = [key[1].strip() if len(key) > 1 and len(asked) > 1 else "" for key in asked]
        if len(set(names)) < len(names):  # one continuation after several contexts
            names = [f"choice {number + 1}" for number in range(len(asked))]
        sides = {name: seen[key] for name, key in zip(names, asked, strict=True)}
        id = sample_id(sample)
        found[id] = Question(id, asked[0][0], sides[names[0]][0], {name: side[1] for name, side in sides.items()},
                             {name: side[0] for name, side in sides.items()})
    return found
