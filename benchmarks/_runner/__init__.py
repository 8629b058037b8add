"""What every script in this folder shares, so that it holds nothing but its subject.

    machine.py      the record beside every figure: date, machine, load, versions, command
    results.py      the file of a run, written whole after every step;  its option `--json FILE`
    turns.py        contenders in turns, medians, ratios with their intervals
    contender.py    a contender in a Python of its own, seen from here: questions and answers as lines of JSON
    worker.py       the same seen from there, with the clock that a worker has
    tables.py       tables as Markdown

`machine`, `results`, `contender`, `worker` and `tables` need the standard library alone (gpu.py runs where torch and
Triton are all there is, a worker in a peer's Python); `turns` takes its intervals from `llmops.measure.intervals`.
"""
