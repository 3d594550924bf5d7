"""compare RUN...: finished runs side by side: the keys that differ, and the metrics. Without RUN: the latest ten. --json for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmforge.errors import ConfigError
from lmforge.explain import flatten
from lmforge.formats import store

IGNORED = ("digest", "content", "arithmetic", "inputs", "status", "why", "placement", "cost")


def main(argv: Sequence[str]) -> int:
    """Print the comparison."""
    as_json = "--json" in argv
    words = [word for word in argv if word != "--json"]
    if unknown := next((word for word in words if word.startswith("-")), None):
        raise ConfigError(unknown, "unknown flag", "type: compare [RUN...] [--json]")
    folders = [_run(word) for word in words] or latest()
    columns = {folder.name: column(folder) for folder in folders}
    rows = differing(columns)
    if as_json:
        print(json.dumps({"runs": list(columns), "keys": rows["keys"], "metrics": rows["metrics"]}, indent=1, ensure_ascii=False))
        return 0
    console = Console()
    table = Table("key or metric", *columns, title=f"{len(columns)} runs")
    for section in ("keys", "metrics"):
        for key, values in rows[section].items():
            table.add_row(key, *[_cell(values.get(name)) for name in columns])
        table.add_section()
    console.print(table)
    return 0


def latest(count: int = 10) -> list[Path]:
    """The newest finished runs of outputs/."""
    root = store.runs("outputs")
    found = sorted(folder for folder in root.iterdir() if (folder / store.RUN_FILE).is_file()) if root.is_dir() else []
    if not found:
        raise ConfigError("compare", "there is no finished run in outputs/runs", "run something first: python -m lmforge")
    return found[-count:]


def _run(word: str) -> Path:
    return store.find(word, "outputs")


def column(folder: Path) -> dict[str, dict[str, Any]]:
    """The keys and the metrics of a run, or of a single step."""
    if (folder / store.RUN_FILE).is_file():
        plan = store.read_json(folder / "plan.json")
        keys = {step["name"]: step["spec"] for step in plan["steps"]}
        keys["model"] = plan["experiment"]["model"]
        return {"keys": flatten(keys), "metrics": flatten(store.read_json(folder / store.RUN_FILE)["metrics"])}
    record = store.read_json(folder / store.STEP_FILE)
    return {"keys": flatten({record["name"]: record["step"]["spec"]}), "metrics": flatten({record["name"]: record["metrics"]})}


def differing(columns: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Keys whose values differ between runs, and every metric."""
    rows: dict[str, dict[str, dict[str, Any]]] = {"keys": {}, "metrics": {}}
    for section in rows:
        for key in dict.fromkeys(key for column in columns.values() for key in column[section]):
            values = {name: column[section].get(key) for name, column in columns.items()}
            same = len({json.dumps(value, sort_keys=True) for value in values.values()}) == 1
            if not same or (section == "metrics" and isinstance(next(iter(values.values())), (int, float))):
                rows[section][key] = values
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)
