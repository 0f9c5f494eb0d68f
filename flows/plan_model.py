"""The model that a registered plan is: ask it what would run in a cluster state.

MLflow stores this file with the plan and runs it on `mlflow.pyfunc.load_model`, so it stands alone.
The serving tier never does: it reads `plan.json`.
"""

import json
from pathlib import Path

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext


class PlanModel(PythonModel):
    """Answers with the plan for a state, such as `{"local-cpu": 5}`, or for the largest state within it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the book from the model's own artifacts."""
        book = json.loads(Path(context.artifacts["plan"]).read_text(encoding="utf-8"))
        self._devices = {kind["name"]: kind["devices"] for kind in book["cluster"]["types"]}
        self._plans = {plan["state"]: plan for plan in book["plans"]}

    def predict(self, model_input: list[dict[str, int]]) -> list[dict[str, object]]:  # type: ignore[override]
        """One plan per state as in `plan.json`: `config` where nothing runs, `transitions` where something does."""
        return [self._plan_for(state) for state in model_input]

    def _plan_for(self, state: dict[str, int]) -> dict[str, object]:
        within = [key for key in self._plans if self._contains(state, _counts(key))]
        if not within:
            return {"config": None, "reason": f"the plan book has no plan for {state} or a part of it"}
        best = max(within, key=lambda key: (self._size(_counts(key)), key))
        return self._plans[best]

    def _contains(self, state: dict[str, int], part: dict[str, int]) -> bool:
        return all(count <= state.get(name, 0) for name, count in part.items())

    def _size(self, counts: dict[str, int]) -> int:
        return sum(self._devices[name] * count for name, count in counts.items())


def _counts(key: str) -> dict[str, int]:
    if key == "empty":
        return {}
    return {name: int(count) for name, count in (part.split("=") for part in key.split(","))}


mlflow.models.set_model(PlanModel())
