"""Options of the inference workload whose speed, memory and energy are compared, and of the sensors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from llmops.options import Options

__all__ = ["MeasureOptions"]


class MeasureOptions(Options):
    """Fixed prompts, greedy, exactly `new_tokens` new tokens, blocks of base and variant in random order."""

    prompt_tokens: int = Field(256, ge=1)
    new_tokens: int = Field(128, ge=2)
    batch_sizes: list[int] = Field([1, 8], min_length=1)
    repeats: int = Field(5, ge=2, description="interleaved blocks of base and variant")
    window_s: float = Field(0.0, ge=0, description="repeat the workload in a block until it lasts this long")
    sensor: Literal["auto", "nvml", "rapl", "codecarbon", "declared", "none"] = Field(
        "auto", description="auto: NVML counter, RAPL, declared watts where given, then CodeCarbon's estimate")
    watts: float | None = Field(None, gt=0, description="declared power of the machine, for sensor: declared or auto")
    zone: str | None = Field(None, pattern="^[A-Z]{3}$", description="ISO 3166 alpha-3 code of the grid, as FRA")
    idle_s: float = Field(0.0, ge=0, description="seconds of idle power read before and after")

    @field_validator("batch_sizes")
    @classmethod
    def _batches(cls, sizes: list[int]) -> list[int]:
        if any(size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
            raise ValueError(f"batch sizes are different numbers of at least 1, not {sizes}")
        return sizes

    @model_validator(mode="after")
    def _watts(self) -> MeasureOptions:
        if self.sensor == "declared" and self.watts is None:
            raise ValueError("sensor: declared needs watts, the power that the machine draws, as watts: 65")
        if self.watts is not None and self.sensor not in ("declared", "auto"):
            raise ValueError(f"watts are used by sensor: declared (or auto) only, not by sensor: {self.sensor}")
        return self
