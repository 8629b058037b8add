"""What a variant's building is charged with: its own part, the chain it stands on, and its teacher's.

The figures come from the manifests in the store, so that a row can be written by whoever finds the build there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmops.quantity import Quantity, weakest
from llmops.recipe.plan import Plan, Stage
from llmops.store import Store

__all__ = ["Charges"]


@dataclass(frozen=True)
class Charges:
    """Costs of the stages of one plan, read from one store."""

    plan: Plan
    store: Store

    def beside_teacher(self, stage: Stage, row: Mapping[str, Any], teacher: Mapping[str, Any]) -> Quantity:
        """After how many tokens a student has paid for itself, its teacher, or who wrote its data, standing there
        anyway."""
        from llmops.measure.cost import break_even_beside

        assert stage.taught_by is not None and self.plan.recipe.measure is not None
        built = self.chain_energy(stage, without=self._line(self.plan.stage(stage.taught_by)))
        batch = str(min(self.plan.recipe.measure.batch_sizes))
        return break_even_beside(built, row["energy"].get(batch) or {}, (teacher.get("energy") or {}).get(batch) or {},
                                 teacher_is_base=stage.taught_by == "base")

    def _line(self, stage: Stage) -> list[str]:
        """Keys of a variant's build and of all that it stands on."""
        keys = [stage.key]
        for name in stage.parents:
            keys += self._line(self.plan.stage(name))
        return keys

    def charged(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Its energy with its part of what it shares, and what of that is the teacher's."""
        if not manifest:
            return {}
        from llmops.measure.sharing import charged, teacher_cost

        found = {"energy_j": charged(manifest, self._users).as_dict()}
        taught = teacher_cost(manifest, self._users)
        if taught is not None:
            found["teacher_energy_j"] = taught.as_dict()
        return found

    def _users(self, key: str) -> int:
        """How many builds share what lies under that key: those of the plan, and others that have used it."""
        users = {stage.key for stage in self.plan.stages if key in stage.shares}
        for folder in (self.store.signals(key), self.store.written(key), self.store.answers(key)):
            users |= {path.name for path in (folder / "users").glob("*")}
        return len(users)

    def chain_energy(self, stage: Stage, without: Sequence[str] = ()) -> Quantity:
        """Energy of building this variant and everything it stands on, each build once, the teacher's included.

        without: keys of builds that are not counted, nor what only they stand on.
        """
        from llmops.measure.sharing import charged

        parts, seen, open_keys = [], set(without), [stage.key] if stage.variant != "base" else []
        while open_keys:
            key = open_keys.pop()
            if key in seen or not (self.store.build(key) / "llmops.json").exists():
                continue
            seen.add(key)
            manifest = self.store.manifest(key)
            parts.append(charged(manifest, self._users))
            open_keys += manifest["parent_keys"]
        if not parts:
            return Quantity(0.0, "J", "constant", "nothing is built: this is the model as it came")
        missing = next((part for part in parts if part.value is None), None)
        if missing is not None:
            return Quantity.null("J", missing.method)
        return Quantity(sum(part.value or 0.0 for part in parts), "J", weakest(part.provenance for part in parts),
                        f"sum over {len(parts)} builds; {parts[0].method}", n=len(parts))
