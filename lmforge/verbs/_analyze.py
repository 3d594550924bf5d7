"""`plan --analyze RUN`: what was predicted and what was measured, for each training step of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmforge.errors import ConfigError
from lmforge.explain.analyze import analyze, compared
from lmforge.formats import store

OUTPUT = "output="


def answer(reference: str, words: Sequence[str], as_json: bool) -> str:
    """The tables, or as JSON a list of steps with each figure's predicted, measured and ratio."""
    if other := next((word for word in words if not word.startswith(OUTPUT)), None):
        raise ConfigError(other, "is not read by --analyze, whose run is done", "type: plan --analyze RUN [output=FOLDER] [--json]")
    folder = store.find(reference, next((word.removeprefix(OUTPUT) for word in words), "outputs"))
    records = [one for one in records_of(folder) if one["step"]["cost"].get("params_trainable") is not None]
    if not records:
        raise ConfigError(reference, "trained nothing, so there is nothing to compare", "give a run with a training stage, or such a step")
    if not as_json:
        return "\n\n".join(analyze(one) for one in records)
    plain = [{"name": one["name"], "digest": one["digest"], "figures": {row.key: _figures(row) for row in compared(one)}} for one in records]
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)


def _figures(row: Any) -> dict[str, Any]:
    return {"predicted": row.predicted, "measured": row.measured, "ratio": row.ratio}


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The step.json of each step of a run that is still there, or of the step itself."""
    if (folder / store.STEP_FILE).is_file():
        return [store.read_json(folder / store.STEP_FILE)]
    names = store.read_json(folder / store.RUN_FILE)["steps"] if (folder / store.RUN_FILE).is_file() else None
    if names is None:
        raise ConfigError(folder.name, "has not finished, so nothing is measured", "type the same run again: it goes on where it stopped")
    files = [folder.parent.parent / "steps" / name / store.STEP_FILE for name in names]
    return [store.read_json(file) for file in files if file.is_file()]
