"""Write a made-up forecast of a grid's carbon intensity, 72 hours from this one, for `llmops tune --green`.

    python examples/forecast.py > forecast.csv
    llmops tune green --green --deadline 12h --forecast forecast.csv --set measure.zone=null

Sun at noon, wind that comes and goes, an evening peak: the shape of many grids, and the figures of none. A real
forecast has the same three columns.
"""

import math
from datetime import UTC, datetime, timedelta

HOURS = 72


def intensity(hour: int, of_day: float) -> float:
    """g/kWh. hour: from the first of the forecast; of_day: 0 to 24, UTC."""
    sun = max(0.0, math.sin(math.pi * (of_day - 7) / 10)) if 7 <= of_day <= 17 else 0.0
    wind = 0.5 + 0.5 * math.cos(2 * math.pi * (hour - 4) / 31)
    evening = math.exp(-(((of_day - 19) / 2.5) ** 2))
    return 420 - 150 * sun - 160 * wind + 90 * evening


def main() -> None:
    first = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    print("utc,zone,g_per_kwh")
    for hour in range(HOURS):
        when = first + timedelta(hours=hour)
        print(f"{when:%Y-%m-%dT%H:%MZ},ZZ-MADEUP,{intensity(hour, when.hour):.0f}")


if __name__ == "__main__":
    main()
