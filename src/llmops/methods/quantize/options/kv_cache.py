"""Options of a cache in few bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.shared import KvDtype
from llmops.options import Options

__all__ = ["KvCache"]


class KvCache(Options):
    """Keep keys and values in 8 or 4 bits, a scale for every token and head; the weights are left as they are."""

    method: Literal["kv_cache"]
    dtype: KvDtype = Field(description="int8, fp8 (E4M3), or int4 (with a minimum beside the scale)")

    @property
    def kv_cache(self) -> KvDtype:
        """As the option of the other methods is called."""
        return self.dtype
