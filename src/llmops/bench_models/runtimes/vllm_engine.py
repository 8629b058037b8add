"""vLLM's offline engine: a batch is one call of `generate`, greedy, exactly so many tokens, no prefix cache.

The engine does not say when a token left it, so decoding is a whole request less the median of prefills timed apart
(requests of one new token); single tokens are not timed. Energy comes from the metered windows as everywhere.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from torch import Tensor

from llmops.bench_models.runtimes import Opened, Wanted
from llmops.errors import ModelError
from llmops.measure.workload import Timing

__all__ = ["open"]

PREFILLS = 5  # timed apart for a shape


def open(wanted: Wanted) -> Opened:  # noqa: A001
    import vllm

    try:
        engine = vllm.LLM(model=wanted.model, max_model_len=wanted.room, enable_prefix_caching=False, seed=0,
                          disable_log_stats=True)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise ModelError(f"{wanted.model}: vLLM cannot open it ({error})") from error
    tokenizer = engine.get_tokenizer()
    return Opened(_Running(engine, vllm.SamplingParams), wanted.device,
                  tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
                  {int(one) for one in tokenizer.all_special_ids}, wanted.room, None, None,
                  ("decoding is a request less the median of prefills timed apart",))


class _Running:
    """See `runtimes.Running`."""

    def __init__(self, engine: Any, parameters: Any) -> None:
        self.engine, self.parameters = engine, parameters
        self.first: dict[tuple[int, int], float] = {}

    def sync(self) -> None:
        """`generate` returns when it is done."""

    def prefill(self, prompt: Tensor) -> None:
        self._generate(prompt, 1)

    def request(self, prompt: Tensor, new_tokens: int) -> Timing:
        shape = (prompt.shape[0], prompt.shape[1])
        if shape not in self.first:  # in the warm-up, which is not metered
            self.first[shape] = median(self._generate(prompt, 1) for _ in range(PREFILLS))
        whole = self._generate(prompt, new_tokens)
        return Timing(self.first[shape], max(whole - self.first[shape], 1e-9), [])

    def _generate(self, prompt: Tensor, new_tokens: int) -> float:
        wanted = self.parameters(temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True,
                                 detokenize=False)
        prompts = [{"prompt_token_ids": row} for row in prompt.tolist()]
        began = time.perf_counter()
        found = self.engine.generate(prompts, wanted, use_tqdm=False)
        spent = time.perf_counter() - began
        short = [len(one.outputs[0].token_ids) for one in found if len(one.outputs[0].token_ids) != new_tokens]
        if short:
            raise ModelError(f"vLLM wrote {short[0]} tokens where {new_tokens} were asked for; expected room for them: "
                             "lower --new-tokens or --context")
        return spent
