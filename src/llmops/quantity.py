"""One measured, estimated or missing figure, with where it came from.

A figure without its provenance is how dashboards lie: 0 J from a machine without a sensor looks like a saving. Here
every number of a row is a `Quantity`; what is not known is `Quantity.null(unit, reason)`, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["PROVENANCES", "Provenance", "Quantity", "weakest"]

Provenance = Literal["measured", "constant", "estimated", "null"]
PROVENANCES: tuple[Provenance, ...] = ("measured", "constant", "estimated", "null")  # strongest first


@dataclass(frozen=True)
class Quantity:
    """value in `unit`; `method` names sensor, formula or, where value is None, the reason why there is none.

    ci95: (low, high), the 95% interval. n: how many observations stand behind the value.
    """

    value: float | None
    unit: str
    provenance: Provenance
    method: str
    ci95: tuple[float, float] | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.provenance == "null"):
            raise ValueError(f"a value of {self.value!r} cannot have provenance {self.provenance!r}")
        if self.provenance not in PROVENANCES:
            raise ValueError(f"provenance {self.provenance!r} is none of {PROVENANCES}")

    @classmethod
    def null(cls, unit: str, reason: str) -> Quantity:
        """A figure that is not known, with the reason."""
        return cls(None, unit, "null", reason)

    @classmethod
    def measured(cls, value: float, unit: str, method: str, ci95: tuple[float, float] | None = None,
                 n: int | None = None) -> Quantity:
        return cls(value, unit, "measured", method, ci95, n)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `Quantity.from_dict` is its inverse."""
        body = asdict(self)
        body["ci95"] = list(self.ci95) if self.ci95 is not None else None
        return body

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Quantity:
        ci95 = body.get("ci95")
        return cls(body["value"], body["unit"], body["provenance"], body["method"],
                   (ci95[0], ci95[1]) if ci95 else None, body.get("n"))


def weakest(provenances: Iterable[Provenance]) -> Provenance:
    """The provenance of a total: that of its weakest part."""
    return max(provenances, key=PROVENANCES.index, default="null")
