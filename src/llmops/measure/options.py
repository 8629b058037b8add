"""Options of the inference workload whose speed, memory and energy are compared, and of the sensors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from llmops.options import Options

__all__ = ["Budget", "MeasureOptions"]

ZONE = "^[A-Z][A-Z0-9]+([-_][A-Z0-9]+)*$"


class MeasureOptions(Options):
    """Fixed prompts, greedy, exactly `new_tokens` new tokens, blocks of base and variant in random order."""

    prompt_tokens: int = Field(256, ge=1)
    new_tokens: int = Field(128, ge=2)
    batch_sizes: list[int] = Field([1, 8], min_length=1)
    repeats: int = Field(5, ge=2, description="interleaved blocks of base and variant; with fewer than 5 no "
                                              "difference is said to be shown")
    window_s: float = Field(0.0, ge=0, description="repeat the workload in a block until it lasts this long; at least "
                                                   "200 updates of a hardware counter, whatever is given")
    sensor: Literal["auto", "nvml", "rapl", "zeus", "codecarbon", "declared", "none"] = Field(
        "auto", description="auto: NVML counter, RAPL, Zeus (AMD, Apple, Jetson), declared watts where given, then "
                            "CodeCarbon's estimate")
    watts: float | None = Field(None, gt=0, description="declared power of the machine, for sensor: declared or auto")
    natural_requests: int = Field(0, ge=0, description="questions of the first scored data that are also answered "
                                                       "until a stop token, for joules per request; 0: none")
    natural_tokens: int = Field(256, ge=1, description="most tokens of such an answer")
    zone: str | None = Field(None, pattern=ZONE, description="the grid: ISO 3166 alpha-3 code, as FRA; with "
                                                             "`intensity`, a zone of that file; with `provider`, as it "
                                                             "names its zones")
    intensity: str | None = Field(None, min_length=1, description="CSV of utc,zone,g_per_kwh (beside the recipe, or "
                                                                  "absolute); default: annual averages by country")
    provider: Literal["electricity_maps", "watttime", "uk_carbon_intensity"] | None = Field(
        None, description="ask this one for the hours of the run instead: network, and its key in the environment "
                          "(ELECTRICITY_MAPS_TOKEN; WATTTIME_USER, WATTTIME_PASSWORD; none). Needs `zone`")
    embodied_kg: float | None = Field(None, gt=0, description="kgCO2e of making the hardware that runs the model, for "
                                                              "SCI")
    lifetime_years: float = Field(4.0, gt=0, description="years over which embodied_kg is spread")
    exclusive: bool = Field(False, description="have the machine alone: refuse to start while another llmops is at "
                                               "work on it, or to measure while others use the GPU. Changes no score")
    idle_s: float | None = Field(None, ge=0, description="seconds of idle power read before and after; default: 10 "
                                                         "with a hardware counter, else none")

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


class Budget(Options):
    """What a run may spend over all its tries: refused when the plan is known to need more, stopped when reached."""

    energy_kwh: float | None = Field(None, gt=0, description="kWh of building, scoring and measuring")
    carbon_g: float | None = Field(None, gt=0, description="the same in gCO2e (operational); needs measure.zone or "
                                                           "measure.intensity")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if self.energy_kwh is None and self.carbon_g is None:
            raise ValueError("a budget needs energy_kwh or carbon_g, as budget: {energy_kwh: 0.5}")
        return self
