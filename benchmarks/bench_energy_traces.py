"""How wrong is a reading? Devices whose energy is known because it was computed, read by llmops and by others.

    python benchmarks/bench_energy_traces.py [--each 50] [--zeus PYTHON] [--json FILE]

Each window is work of a shape (steps, ramps, bursts of 50 ms) on a device that idles before and after, seen through a
counter that changes every 100 ms, without and with a tenth of its updates missing. All readers see the same devices on
the same simulated clock, and run their own code:

    llmops        NvmlCounter and Meter, aligned windows, as `measure/decode.py` uses them; the period is probed
    llmops plain  the same without alignment
    zeus          ZeusMonitor in an environment of its own (--zeus: its Python; left out without)
    codecarbon    GPUDevice with the counter, and without one (power sampled once a second, as its thread does)
    naive         a power gauge (mean of a second) read once a second, times the time between

and two lengths: as the protocol sizes windows (200 probed updates), and 60 ms, less than an update, where the right
answer is "not known". Then a RAPL counter that wraps within the window. Printed: median and largest relative error,
and how often a reader said that it does not know.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from _energy_traces import Case, Counter, cases, ramps
from _runner.contender import told_once
from _runner.machine import about, said, versions_there
from _runner.results import Results, parser
from llmops.measure.decode import UPDATES_SIZED
from llmops.measure.meter import Meter
from llmops.measure.nvml import NvmlCounter
from llmops.measure.probing import update_period
from llmops.measure.rapl import open_rapl

SHORT_S = 0.06
Reading = tuple[float | None, str]  # joules or None for "not known", and what was said


class Simulated:
    """NVML and a clock over one device."""

    def __init__(self, counter: Counter, now: float = 0.0) -> None:
        self.counter, self.now = counter, now

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802 - NVML's name
        return int(self.counter.joules(self.now) * 1000)


def probed(case: Case) -> float:
    """The counter's period as the probe finds it, while the device works."""
    device = Simulated(case.counter, case.begin)
    found = update_period(NvmlCounter(device, {"gpu0": 0}), 3.0, device.clock, device.sleep)
    assert found is not None
    return found


def ours(aligned: bool) -> Callable[[Case], Reading]:
    def read(case: Case) -> Reading:
        counter = _changing_at(case) if aligned else case.counter  # work begins at the change that was waited for
        device = Simulated(counter, case.begin - (PERIOD[0] / 2 if aligned else 0.0))
        sensor = NvmlCounter(device, {"gpu0": 0})
        sensor.update_period_s = PERIOD[0]
        with Meter(sensor, clock=device.clock, sleep=device.sleep).window("work", aligned=aligned) as window:
            device.now = case.end
        return window.energy.value, window.energy.method

    return read


def _changing_at(case: Case) -> Counter:
    """The case's counter with an update where the work begins, one that is not missed; the others as they come."""
    seed = case.counter.seed
    while True:
        counter = replace(case.counter, phase_s=1e-6, seed=seed)
        if counter.joules(case.begin - 1e-3) != counter.joules(case.begin + 1e-3):
            return counter
        seed += 1_000


PERIOD = [0.1]


def codecarbon(with_counter: bool) -> Callable[[Case], Reading]:
    import logging

    from codecarbon.core.gpu_device import GPUDevice
    from codecarbon.core.units import Time

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)

    class Device(GPUDevice):
        simulated: Any = None

        def _init_static_details(self) -> None:
            self._gpu_name = self._uuid = "simulated"

        def _get_total_energy_consumption(self) -> int | None:
            return self.handle.nvmlDeviceGetTotalEnergyConsumption(0) if with_counter else None

        def _get_power_usage(self) -> float:
            return float(self.handle.counter.watts(self.handle.now))

    def read(case: Case) -> Reading:
        simulated = Simulated(case.counter, case.begin)
        device = Device(handle=simulated, gpu_index=0)
        device.start()
        joules, last = 0.0, case.begin
        for second in _ticks(case):
            simulated.now = second
            device.sample_power()
            if second == case.end or (second - case.begin) % 15 == 0:  # its default between two measurements
                joules += device.delta(Time(second - last))["delta_energy_consumption"].kWh * 3.6e6
                last = second
        return joules, ""

    return read


def naive(case: Case) -> Reading:
    total, last, watts = 0.0, case.begin, case.counter.watts(case.begin)
    for second in _ticks(case):
        total += watts * (second - last)
        last, watts = second, case.counter.watts(second)
    return total, ""


def _ticks(case: Case) -> list[float]:
    """Every whole second of the window, and its end."""
    return [case.begin + second for second in range(1, math.ceil(case.window_s))] + [case.end]


def zeus(python: str, window_s: float, each: int) -> list[Reading]:
    told = told_once("_energy_zeus.py", [str(window_s), str(each)], python=python,
                     environment={"PATH": "/usr/bin:/bin"})
    return [(found["joules"], "a warning" if found["warned"] else "") for found in told]


def line(reader: str, what: str, found: list[Case], readings: list[Reading]) -> dict[str, Any]:
    errors = [abs(joules / case.true_j - 1) for case, (joules, _) in zip(found, readings, strict=True)
              if joules is not None]
    said = next((text for joules, text in readings if joules is None), "")
    return {"reader": reader, "case": what, "windows": len(found), "not_known": len(found) - len(errors),
            "median_error": median(errors) if errors else None, "largest_error": max(errors, default=None),
            "zero": sum(joules == 0 for joules, _ in readings),
            "warned": sum(text == "a warning" for _, text in readings), "reason": said}


def wrapped(each: int) -> list[dict[str, Any]]:
    """A RAPL counter of 20 kJ that wraps, once or twice in 100 s; the watch of `rapl.py` is called every 30 s."""
    import random

    found, read, plain = [], [], []
    for number in range(each):
        power = ramps(random.Random(f"rapl {number}"), 200.0)
        counter = Counter(power, period_s=0.001, step_j=6.1e-5, wraps_j=20_000.0)
        case = Case("ramps", 0.0, 100.0, counter, 15.0, 115.0)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "intel-rapl:0"
            folder.mkdir()
            (folder / "name").write_text("package-0")
            (folder / "max_energy_range_uj").write_text(str(20_000_000_000))

            def show(second: float, folder: Path = folder, counter: Counter = counter) -> float:
                joules = counter.joules(second)
                (folder / "energy_uj").write_text(str(int(joules * 1e6)))
                return joules

            first, clock = show(case.begin), [case.begin]
            sensor = open_rapl(Path(place), lambda clock=clock: clock[0])
            before = sensor.read()["cpu"]
            for clock[0] in (45.0, 75.0, 105.0):
                show(clock[0])
                sensor._poll()
            last, clock[0] = show(case.end), case.end
            read.append((sensor.read()["cpu"] - before, ""))
        found.append(case)
        plain.append((last - first, ""))
    return [line("llmops", "rapl, wraps", found, read), line("end - begin", "rapl, wraps", found, plain)]


def read(window_s: float, each: int, zeus_python: str | None) -> list[dict[str, Any]]:
    """Every reader on windows of one length: a line a reader and shape."""
    whole = cases(window_s, each)
    readers: dict[str, list[Reading]] = {
        "llmops": list(map(ours(True), whole)), "llmops plain": list(map(ours(False), whole)),
        "codecarbon, counter": list(map(codecarbon(True), whole)),
        "codecarbon, power": list(map(codecarbon(False), whole)), "naive polling": list(map(naive, whole))}
    if zeus_python:
        readers["zeus"] = zeus(zeus_python, window_s, each)
    lines = []
    for reader, readings in readers.items():
        for shape, missed in dict.fromkeys((case.shape, case.missed) for case in whole):
            chosen = [index for index, case in enumerate(whole) if (case.shape, case.missed) == (shape, missed)]
            lines.append(line(reader, f"{window_s:.3g} s, {shape}{', updates missed' if missed else ''}",
                              [whole[index] for index in chosen], [readings[index] for index in chosen]))
    return lines


def told(found: dict[str, Any]) -> str:
    errors = "-" if found["median_error"] is None else f"{found['median_error']:8.3%} {found['largest_error']:8.3%}"
    return (f"{found['case']:34} {found['reader']:20} {errors:20} not known {found['not_known']:3} of "
            f"{found['windows']}{', zero ' + str(found['zero']) if found['zero'] else ''}"
            f"{', warned ' + str(found['warned']) if found['warned'] else ''}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--each", type=int, default=50, help="windows of each shape, without and with missing updates")
    options.add_argument("--zeus", help="a Python that has zeus")
    asked = options.parse_args()
    record = about(asked, ("codecarbon",))
    if asked.zeus:
        record["versions"] |= versions_there(asked.zeus, {"zeus": "zeus"})
    PERIOD[0] = probed(cases(10.0, 1)[0])
    results = Results(asked.out, {**record, "period_s": PERIOD[0], "each": asked.each})
    print(said(record), f"period probed: {PERIOD[0] * 1000:.1f} ms (true: 100)", sep="\n")
    lines = []
    for window_s in (UPDATES_SIZED * PERIOD[0], SHORT_S):
        lines += read(window_s, asked.each, asked.zeus)
        results.keep(lines=lines)
    lines += wrapped(max(5, asked.each // 5))
    print("\n".join(map(told, lines)))
    worst = max(each["largest_error"] for each in lines
                if each["reader"] == "llmops" and not each["case"].startswith(f"{SHORT_S:g} "))
    print(f"llmops, windows as the protocol sizes them: largest error {worst:.3%} (aim: 1 %)")
    results.end(lines=lines)
    sys.exit(worst > 0.01)


if __name__ == "__main__":
    main()
