"""The requests of lm-eval's tasks again, as token ids, without asking a model anything.

lm-eval makes the prompts (few-shot examples, templates, the space before a choice), so lm-eval is asked to make them
again: its own walk over the tasks runs with a runner that writes down what it is asked, in tokens, and answers nothing.
What comes back is known by the same hashes of document, prompt and target that items are kept under. A request is cut
from the left where it is too long for the model, as lm-eval cuts it; of a rolling document that takes several windows
the first one is kept. An answer that is written (`generate_until`) has its prompt, the texts that end it and its most
tokens; `replay.answered` writes it again. Left out: answers that are drawn at random or searched for (beams), which
nobody can write again.
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
Written = tuple[list[int], list[str], int]  # ids of the context, texts that end the answer, its most tokens


def harness_questions(model: Any, tokenizer: Any, options: Harness, id: str) -> dict[str, dict[str, Question]]:
    """Task -> item's id -> what was asked. A task whose answers are drawn has none. `model` is only looked at.

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
                self.written: dict[tuple[str, ...], Written] = {}
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
                for context, asked in (request.args for request in requests):
                    if not _drawn(asked):
                        most = int(asked.get("max_gen_toks", asked.get("max_new_tokens", self.max_gen_toks)))
                        ids = self.tok_batch_encode([context])[0][0].tolist()
                        until = asked.get("until") or []
                        self.written.setdefault((context, str(asked)), (
                            ids[-max(1, self.max_length - most):], [until] if isinstance(until, str) else until, most))
                return [""] * len(requests)

        manager, tasks = load_tasks(options, id)
        writer = Writer()
        found = run_tasks(writer, manager, tasks, options, 0)
    return {name: _questions(found["samples"][name], writer.seen, writer.written) for name in tasks}


def _drawn(asked: Mapping[str, Any]) -> bool:
    """Whether an answer is not the likeliest next token at each place."""
    drawn = asked.get("do_sample", float(asked.get("temperature") or 0) > 0)
    return bool(drawn) or int(asked.get("num_beams") or 1) > 1


def _questions(samples: Sequence[Mapping[str, Any]], seen: Mapping[tuple[str, ...], Sides],
               written: Mapping[tuple[str, ...], Written]) -> dict[str, Question]:
    found = {}
    for sample in samples:
        asked = [tuple(map(str, arguments)) for arguments in sample["arguments"]]
        if len(asked) == 1 and asked[0] in written:
            prompt, until, most = written[asked[0]]
            id = sample_id(sample)
            found[id] = Question(id, asked[0][0], prompt, {}, until=until, most=most)
            continue
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
