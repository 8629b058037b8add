"""A sensor that plays what a test wrote down, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Time in seconds that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class ReplaySensor:
    """`trace()` gives the joules by part at each reading."""

    def __init__(self, trace: Callable[[], dict[str, float]], provenance: str = "measured",
                 update_period_s: float | None = None) -> None:
        self.name = "replay"
        self.method = "replayed trace"
        self.provenance = provenance
        self.update_period_s = update_period_s
        self.skipped: dict[str, str] = {}
        self.trace = trace
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def read(self) -> dict[str, float]:
        self.calls.append("read")
        return self.trace()

    def stop(self) -> None:
        self.calls.append("stop")
