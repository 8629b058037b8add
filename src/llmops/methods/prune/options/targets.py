"""How small a model is to become, as options: a share of what it is or of what it costs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llmops.options import Options

__all__ = ["Share", "Targets"]


def _share(value: Any) -> Any:
    """`0.7x` is 0.7."""
    if isinstance(value, str) and value.endswith("x"):
        try:
            return float(value[:-1])
        except ValueError:
            return value
    return value


_Fraction = Annotated[float, Field(gt=0, lt=1)]
_Times = Annotated[str, Field(pattern=r"^0?\.\d*[1-9]\d*x$")]
Share = Annotated[_Fraction | None, BeforeValidator(_share, json_schema_input_type=_Fraction | _Times | None)]


class Targets(Options):
    """Targets that are searched on measured cost: candidates and the parent decode in turns on this machine."""

    latency: Share = Field(None, description="decode time to reach, as a share of the parent's, measured")
    joules: Share = Field(None, description="energy of decoding to reach, as a share of the parent's, measured")
    prompt_tokens: int = Field(64, ge=1, description="latency, joules: tokens of the prompts that are measured")
    new_tokens: int = Field(32, ge=2, description="latency, joules: tokens decoded after each")
    batch_size: int = Field(1, ge=1, description="latency, joules: prompts decoded together")
    repeats: int = Field(5, ge=3, description="latency, joules: turns of parent and candidate; medians count")
