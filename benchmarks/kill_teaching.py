"""Kill a run with SIGKILL while its teacher leaves signals, answers and data for others, and start it again each time.

    python benchmarks/kill_teaching.py --kills 9

The recipe tunes `builtin:tiny` a little, lets it write data (`synthesize`), and teaches two students: one from signals
on the disk, one live from its answers. Shards are made small, so that there are many; whatever else runs is the command
itself. Kills come in turn while signals, answers and written data are made: at once when the first unfinished file is
seen, or some time after a shard. After each kill, and at the end:

- a folder without a manifest is never taken for whole, and with one all of its shards are there
- a finished shard is never made again: its bytes, its time of change and who paid for it stay
- the end is that of a run that nobody disturbed: losses, weights and rows, and every shard byte by byte
- the energy of what is shared is the sum over its shards, each paid once; nothing is left over
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import kill_test
from llmops.ledger import Ledger

__all__ = ["RECIPE", "kill_teaching"]

RECIPE: dict[str, Any] = {
    "version": 1, "name": "killed", "model": "builtin:tiny",
    "data": {"train": {"source": "builtin:facts", "split": "train", "samples": 160},
             "asked": {"from": "train", "samples": 96},
             "written": {"synthesize": {"teacher": "tuned", "prompts": "asked", "answers": 2, "temperature": 0.7,
                                        "max_new_tokens": 24}}},
    "evaluate": [], "measure": {"sensor": "declared", "watts": 10, "prompt_tokens": 8, "new_tokens": 2,
                                "batch_sizes": [1], "repeats": 2},
    "runtime": {"checkpoint_s": 0.01, "device": "cpu"},
    "variants": {
        "tuned": {"finetune": {"method": "lora", "data": "train", "rank": 8, "epochs": 4, "batch_size": 8,
                               "learning_rate": 2e-3}},
        "half": {"from": "tuned", "prune": {"method": "depth", "layers": 4}, "score": False},
        "offline": {"from": "half", "distill": {"method": "logits", "teacher": "tuned", "data": "train",
                                                "offline": {"k": 16}, "max_steps": 4}},
        "live": {"from": "half", "distill": {"method": "logits", "teacher": "tuned", "data": "asked",
                                             "answers": "teacher", "max_new_tokens": 24, "max_steps": 4}},
        "reader": {"from": "half", "finetune": {"method": "full", "data": "written", "max_steps": 2}}}}
KINDS = ("signals", "answers", "written")
#: Parts of a row's building that hold times and energies here, too; what is shared is compared on the disk.
UNTIMED = ("teacher_energy_j", "teaching", "shared", "flops", "break_even_to_teacher_tokens")
#: The command, with shards so small that a kill finds many of them.
LAUNCH = """
import sys
import llmops.build.answers, llmops.build.signals, llmops.build.synthesizing as synthesizing
llmops.build.signals.SHARD_TOKENS, llmops.build.answers.SHARD_PROMPTS, synthesizing.SHARD_PROMPTS = 120, 12, 12
from llmops.cli import main
sys.exit(main(sys.argv[1:]))
"""


def kill_teaching(kills: int, folder: Path, seed: int = 0, say: Callable[[str], None] = lambda text: None
                  ) -> tuple[list[str], list[str]]:
    """(where each kill came, faults)."""
    draw = random.Random(seed)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8")
    quiet, runs = folder / "quiet", folder / "killed"
    subprocess.run(_command(recipe, quiet), check=True, stdout=subprocess.DEVNULL)
    say(f"quiet run: {', '.join(f'{len(_shards(quiet / kind))} shards of {kind}' for kind in KINDS)}")
    moments, faults, known, done, store = [], [], {}, 0, 0
    while done < kills:
        runs, ended, known = folder / f"killed-{store}", False, {}
        store += 1
        so_far = len(faults)
        while not ended:
            kind = KINDS[done % len(KINDS)] if done < kills else None
            ended, told = _attempt(recipe, runs, kind, None if draw.random() < 0.6 else draw.uniform(0, 0.3))
            if not ended:
                done += 1
                moments.append(f"{kind}: {told}")
                say(f"  killed while {kind} were made: {told}")
            elif told:
                faults.append(told)
            faults += _kept(runs, known)
        faults += _ended(quiet, runs)
        say("\n".join([f"store {store}: {len(faults) - so_far} faults", *(fault[:300] for fault in faults[so_far:])]))
    return moments, faults


def _command(recipe: Path, runs: Path) -> list[str]:
    return [sys.executable, "-c", LAUNCH, "tune", str(recipe), "--runs", str(runs), "--quiet"]


def _attempt(recipe: Path, runs: Path, kind: str | None, later: float | None) -> tuple[bool, str]:
    """(whether it ended by itself, what was there when it was killed, or what it said when it failed).

    later: seconds after a shard; None: while a file is being written.
    """
    child = subprocess.Popen(_command(recipe, runs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    before = len(_shards(runs / kind)) if kind else 0
    while child.poll() is None:
        if kind and later is None and list((runs / kind).glob("*/.*")):
            break
        if kind and later is not None and len(_shards(runs / kind)) > before \
                and not list((runs / kind).glob("*/manifest.json")):
            time.sleep(later)
            break
        time.sleep(0.0002)
    if child.poll() is None and kind is not None:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        scratch = len(list((runs / kind).glob("*/.*")))
        return False, f"{len(_shards(runs / kind))} shards, {scratch} half-written"
    _, errors = child.communicate()
    return True, f"exit {child.returncode}: {errors.decode()[-500:]}" if child.returncode else ""


def _shards(folder: Path) -> dict[str, Path]:
    """Whole shards by key and name."""
    return {f"{path.parent.name}/{path.name}": path for path in folder.glob("*/*")
            if path.is_file() and not path.name.startswith(".")
            and path.with_name(f"{path.name}.cost.json").exists()}


def _kept(runs: Path, known: dict[str, tuple[Any, ...]]) -> list[str]:
    """Faults of what is there now, beside what was there after earlier attempts; `known` learns of it."""
    faults = []
    now = {f"{kind}/{name}": path for kind in KINDS for name, path in _shards(runs / kind).items()}
    for name, facts in known.items():
        path = now.get(name)
        if path is None or _facts(path) != facts:
            faults.append(f"{name}: finished, and lost or made again")
    known.update({name: _facts(path) for name, path in now.items()})
    return faults


def _facts(path: Path) -> tuple[Any, ...]:
    return (path.read_bytes(), path.stat().st_mtime_ns, path.with_name(f"{path.name}.cost.json").read_bytes())


def _ended(quiet: Path, runs: Path) -> list[str]:
    """Every way in which the end is not that of the quiet run."""
    faults = [*kill_test.rows_differ(quiet, runs, UNTIMED), *kill_test.builds_differ(quiet, runs),
              *(f"left over: {path.relative_to(runs)}" for path in kill_test.left_over(runs))]
    for kind in KINDS:
        one, two = _shards(quiet / kind), _shards(runs / kind)
        if one.keys() != two.keys() or not one:
            faults.append(f"{kind}: shards {sorted(one.keys() ^ two.keys())} are not in both")
        faults += [f"{kind}/{name} differs" for name in one.keys() & two.keys()
                   if one[name].read_bytes() != two[name].read_bytes()]
        if len(list((runs / kind).glob("*/manifest.json"))) != len(list((quiet / kind).glob("*/manifest.json"))):
            faults.append(f"{kind}: not finished")
    for row in Ledger(runs / "ledger.db").rows():
        faults += _unpaid(row, runs)
    return faults


def _unpaid(row: dict[str, Any], runs: Path) -> list[str]:
    """A row's shared folders, each the sum of what its shards cost."""
    import json

    faults = []
    for entry in row["building"].get("shared") or []:
        kind = entry["what"].partition(" ")[0].replace("data", "written")
        costs = [json.loads(path.read_text())["energy_j"]["value"]
                 for path in (runs / kind / entry["key"]).glob("*.cost.json")]
        if abs(sum(costs) - entry["energy_j"]["value"]) > 1e-6 * sum(costs) or not all(cost >= 0 for cost in costs):
            faults.append(f"{row['identity']['variant']}: {entry['what']} cost {entry['energy_j']['value']} J, its "
                          f"shards {sum(costs)}")
    return faults


def main() -> int:
    """0 when every store ended as the quiet one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where stores are kept, to look at them (default: nowhere)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if given.folder is None else given.folder
        place.mkdir(parents=True, exist_ok=True)
        moments, faults = kill_teaching(given.kills, place, given.seed, lambda text: print(text, flush=True))
    print("\n".join(f"fault: {fault}" for fault in faults))
    counts = ", ".join(f"{sum(each.startswith(kind) for each in moments)} at {kind}" for kind in KINDS)
    print(f"{len(moments)} kills ({counts}): {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
