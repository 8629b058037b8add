"""Kill a run with SIGKILL again and again, start the same command each time, and hold the end against a quiet run.

    python benchmarks/kill_test.py --kills 20 [--json FILE]

The recipe tunes `builtin:tiny` (dropout, NEFTune, accumulation, held-out looks, a fractional epoch) and quantizes the
result. Kills come at five kinds of moments, in turn and at random: soon after the start, once the training runs, while
a checkpoint is written, while a finished variant is written, and anywhere. When a run ends before its kill came, the
rest of the kills goes to a fresh store. At the end of every store:

- loss and held-out loss of every step are bitwise those of the quiet run, and so are the weights (SHA-256)
- rows are equal, apart from times, energies, ids, peak memory and the bytes on disk (a manifest holds times as text)
- the energy of a build is the sum over its attempts, and the last note of every killed attempt is among them
- nothing is left over: no scratch, no work under way, no lock
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmops.ledger import Ledger

__all__ = ["RECIPE", "Round", "builds_differ", "differences", "kill_test", "left_over", "quiet_run", "rows_differ"]

RECIPE: dict[str, Any] = {
    "version": 1, "name": "killed", "model": "builtin:tiny",
    "data": {"train": {"source": "builtin:facts", "split": "train", "samples": 160},
             "test": {"source": "builtin:facts", "split": "test", "samples": 16}},
    "evaluate": [{"exact_match": {"data": "test", "max_new_tokens": 4}}],
    "measure": {"sensor": "declared", "watts": 10, "prompt_tokens": 8, "new_tokens": 2, "batch_sizes": [1],
                "repeats": 2},
    "runtime": {"checkpoint_s": 0.01, "device": "cpu"},
    "variants": {
        "tuned": {"finetune": {"method": "lora", "data": "train", "rank": 4, "dropout": 0.1, "neftune_alpha": 5.0,
                               "epochs": 2.4, "batch_size": 4, "accumulate": 2, "learning_rate": 1e-3,
                               "stop": {"every": 8, "patience": 50, "holdout": 0.1}}},
        "w4": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}}}}
WATTS = RECIPE["measure"]["watts"]
#: groups of a row that hold times, energies and what is worked out from them
TIMED = ("environment", "latency", "energy", "carbon", "workload", "verdict")
TIMED_BUILDING = ("wall_s", "energy_j", "chain_energy_j", "evaluate_energy_j", "evaluate_wall_s", "measure_energy_j",
                  "measure_wall_s", "attempts", "trace",
                  "break_even_tokens")
TIMED_SIZE = ("peak_memory_bytes", "disk_bytes")


@dataclass
class Round:
    """What happened in one store until the run was done."""

    runs: Path
    moments: list[str] = field(default_factory=list)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # key/attempt -> last note of a killed attempt
    faults: list[str] = field(default_factory=list)


def kill_test(kills: int, folder: Path, seed: int = 0, say: Callable[[str], None] = lambda text: None,
              keep: Callable[[list[Round]], None] = lambda rounds: None) -> list[Round]:
    """Kill `kills` times, in as many stores as it takes; every fault that was found is in its round. keep: is shown the
    rounds after each."""
    draw = random.Random(seed)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    began = time.monotonic()
    quiet_run(path, folder / "quiet")
    whole_s = time.monotonic() - began
    say(f"quiet run: {whole_s:.1f} s")
    moments = ["training", "checkpoint", "early", "saving", "anywhere"]
    rounds: list[Round] = []
    while sum(len(each.moments) for each in rounds) < kills:
        here = Round(folder / f"killed-{len(rounds)}")
        rounds.append(here)
        ended = False
        while not ended:
            done = sum(len(each.moments) for each in rounds)
            ended = _attempt(path, here, moments[done % len(moments)] if done < kills else None, draw, whole_s, say)
        here.faults = [*here.faults, *differences(folder / "quiet", here)]
        say(f"store {len(rounds)}: {len(here.moments)} kills, {len(here.faults)} faults")
        keep(rounds)
    return rounds


def quiet_run(recipe: Path, runs: Path) -> None:
    """The same command, left alone."""
    subprocess.run(_command(recipe, runs), check=True, stdout=subprocess.DEVNULL)


def _command(recipe: Path, runs: Path) -> list[str]:
    return [sys.executable, "-m", "llmops", "tune", str(recipe), "--runs", str(runs), "--quiet"]


def _attempt(recipe: Path, here: Round, moment: str | None, draw: random.Random, whole_s: float,
             say: Callable[[str], None]) -> bool:
    """Start the command and kill it at `moment`; whether it ended by itself before that."""
    child = subprocess.Popen(_command(recipe, here.runs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    latest = time.monotonic() + {"early": draw.uniform(0, 0.4 * whole_s), "anywhere": draw.uniform(0, 0.6 * whole_s)
                                 }.get(moment or "", 1e9)
    store, began = here.runs / "store", _checkpoints(here.runs / "store")
    extra = draw.uniform(0, 0.5)
    while child.poll() is None:
        if moment == "training" and _checkpoints(store) - began:
            time.sleep(extra)
            break
        if moment == "checkpoint" and list(store.glob("*.work/checkpoints/.step-*")):
            break
        if moment == "saving" and list(store.glob(".*")):
            break
        if time.monotonic() > latest:
            break
        time.sleep(0.001)
    if child.poll() is None and moment is not None:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()  # waits, and closes its pipe
        here.moments.append(moment)
        here.notes |= _notes(store)
        say(f"  killed: {moment}; checkpoints: {', '.join(sorted(_checkpoints(store))) or 'none'}")
        return False
    _, errors = child.communicate()
    if child.returncode != 0:
        here.faults.append(f"exit {child.returncode}: {errors.decode()[-500:]}")
    return True


def _checkpoints(store: Path) -> set[str]:
    return {path.name for path in store.glob("*.work/checkpoints/step-*")}


def _notes(store: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in store.glob("*.work/attempt-*.json"):
        if not (store / path.parent.name.removesuffix(".work")).exists():  # one that is whole has paid already
            found[f"{path.parent.name.removesuffix('.work')}/{path.stem}"] = json.loads(path.read_text())
    return found


# ------------------------------------------------------------------------------------------------------ comparing


def differences(quiet: Path, here: Round) -> list[str]:
    """Every way in which the end of a disturbed run is not that of the quiet one."""
    return [*rows_differ(quiet, here.runs), *builds_differ(quiet, here.runs), *_energy_lost(here),
            *(f"left over: {path.relative_to(here.runs)}" for path in left_over(here.runs))]


def rows_differ(quiet: Path, runs: Path, timed: Sequence[str] = ()) -> Iterator[str]:
    """timed: more parts of `building` that are others each time."""
    expected, found = (Ledger(each / "ledger.db").history() for each in (quiet, runs))
    names = [row["identity"]["variant"] for row in found]
    if sorted(names) != sorted(row["identity"]["variant"] for row in expected):
        yield f"rows of {names}; expected one of each variant"
        return
    by_name = {row["identity"]["variant"]: row for row in found}
    for row in expected:
        name = row["identity"]["variant"]
        one, other = _timeless(row, timed), _timeless(by_name[name], timed)
        for group in one:
            if one[group] != other[group]:
                yield f"{name}: {group} differs: {one[group]} / {other[group]}"[:400]


def _timeless(row: dict[str, Any], timed: Sequence[str]) -> dict[str, Any]:
    row = {group: body for group, body in row.items() if group not in (*TIMED, "row_id")}
    row["identity"] = {name: value for name, value in row["identity"].items() if name not in ("run_id", "utc")}
    row["building"] = {name: value for name, value in row["building"].items()
                       if name not in (*TIMED_BUILDING, *timed)}
    row["size"] = {name: value for name, value in row["size"].items() if name not in TIMED_SIZE}
    events = (row.get("log") or {}).get("events") or []  # one that failed has none
    row["log"] = [event for event in events if not event.startswith(("went on", "signals of")) and " s" not in event
                  and "% of the time" not in event and "there already" not in event]
    return row


def builds_differ(quiet: Path, runs: Path) -> Iterator[str]:
    for manifest in sorted((quiet / "store").glob("[!.]*/llmops.json")):
        other = runs / "store" / manifest.parent.name
        if not other.exists():
            yield f"{manifest.parent.name} was not built"
            continue
        one, two = (json.loads(path.read_text()) for path in (manifest, other / "llmops.json"))
        yield from (f"{one['variant']}: {name} differs" for name in ("loss", "looks", "key_parts", "data_report")
                    if one[name] != two[name])
        for weights in sorted(manifest.parent.glob("*.safetensors")):
            if _sha256(weights) != _sha256(other / weights.name):
                yield f"{one['variant']}: {weights.name} differs"


def _energy_lost(here: Round) -> Iterator[str]:
    for row in Ledger(here.runs / "ledger.db").rows():
        building = row["building"]
        if not building["attempts"]:
            continue
        name, joules = row["identity"]["variant"], building["energy_j"]["value"]
        parts = [each["energy_j"] for each in building["attempts"]]
        declared = WATTS * building["wall_s"]["value"]
        if abs(joules - sum(parts)) > 1e-6 * joules or abs(joules - declared) > 0.01 * joules:
            yield f"{name}: {joules} J where {declared} J were declared, over attempts of {parts}"
        killed = [note for place, note in here.notes.items() if place.startswith(row["identity"]["key"])]
        if not all(any(abs(note["energy_j"]["value"] - part) < 1e-9 for part in parts) for note in killed):
            yield f"{name}: an attempt of {killed} is not among {parts}"


def left_over(runs: Path) -> list[Path]:
    return [path for path in runs.rglob("*") if path.name.startswith(".") or path.suffix in (".work", ".lock", ".beat")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """0 when every store ended as the quiet one."""
    from _runner.machine import about, said
    from _runner.results import Results, parser

    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    record = about(asked, ("torch", "transformers", "peft"))
    results = Results(asked.out, {**record, "seed": asked.seed})
    print(said(record), flush=True)

    def keep(rounds: list[Round]) -> None:
        results.keep(stores=[{"kills": each.moments, "faults": each.faults} for each in rounds])

    with tempfile.TemporaryDirectory() as folder:
        rounds = kill_test(asked.kills, Path(folder), asked.seed, lambda text: print(text, flush=True), keep)
    faults = [fault for each in rounds for fault in each.faults]
    print("\n".join(f"fault: {fault}" for fault in faults))
    moments = [moment for each in rounds for moment in each.moments]
    counts = ", ".join(f"{moments.count(moment)} {moment}" for moment in dict.fromkeys(moments))
    print(f"{len(moments)} kills ({counts}) in {len(rounds)} stores: {len(faults)} faults")
    results.end()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
