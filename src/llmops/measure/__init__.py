"""Energy, speed, memory and carbon of a variant, each figure with its provenance and, where it has one, its interval.

    sensors.py            the protocol of a sensor, declared watts, no sensor, and the probe that chooses
    nvml.py  rapl.py      hardware counters;  zeus_sensor.py  those of AMD, Apple and Jetson, through Zeus
    probing.py            how often a counter changes;  replay.py  traces of counters, recorded and played back
    codecarbon_model.py   CodeCarbon's offline model, an estimate
    meter.py              windows of time and energy
    workload.py           the fixed decoding workload;  decode.py its interleaved blocks;  summary.py their figures
    intervals.py          medians, ratios and their intervals
    natural.py            requests that end by themselves, beside the fixed length
    memory.py             weights, peak memory, bytes on disk
    cost.py  carbon.py    break-even and totals; grams and SCI
    grid.py  budget.py    intensity by hour and its cleanest window; how many joules a budget is
    providers/            intensity by key: Electricity Maps, WattTime (marginal), Great Britain's
    beside.py             who else measures here;  reserve.py  the machine held for a whole run
    environment.py        where it was measured

Nothing is imported here: `decode` needs torch, the options must not.
"""
