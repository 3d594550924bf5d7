"""compare RUN... [output=FOLDER]: finished runs side by side: the keys that differ, the figures, and what each step took beside its prediction.

Without RUN: the latest ten. --json for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmforge.errors import ConfigError
from lmforge.explain import flatten
from lmforge.explain.analyze import SHORT, compared
from lmforge.formats import store
from lmforge.verbs._analyze import records_of

OUTPUT = "output="
SIDE_BY_SIDE = 6  # more runs than these are shown as rows
NARROWEST, WIDEST = 10, 16  # characters of a column of values
Sections = dict[str, dict[str, Any]]


def main(argv: Sequence[str]) -> int:
    """Print the comparison."""
    words = [word for word in argv if word != "--json" and not word.startswith(OUTPUT)]
    if unknown := next((word for word in words if word.startswith("-")), None):
        raise ConfigError(unknown, "unknown flag", "type: compare [RUN...] [output=FOLDER] [--json]")
    output = next((word.removeprefix(OUTPUT) for word in argv if word.startswith(OUTPUT)), "outputs")
    folders = list(dict.fromkeys(store.find(word, output) for word in words)) or latest(output)
    names = [folder.name for folder in folders]
    columns = {folder.name if names.count(folder.name) == 1 else str(folder): column(folder) for folder in folders}
    rows = differing(columns)
    if "--json" in argv:
        print(json.dumps({"runs": list(columns), **rows}, indent=1, ensure_ascii=False))
        return 0
    show(list(columns), rows)
    return 0


def latest(output: str, count: int = 10) -> list[Path]:
    """The newest finished runs of an output folder."""
    root = store.runs(output)
    found = sorted(folder for folder in root.iterdir() if (folder / store.RUN_FILE).is_file()) if root.is_dir() else []
    if not found:
        raise ConfigError("compare", f"there is no finished run in {root}", "run something first: python -m lmforge")
    return found[-count:]


def column(folder: Path) -> Sections:
    """The keys of each step, and the figures, of a run or of a single step."""
    if (folder / store.RUN_FILE).is_file():
        plan = store.read_json(folder / "plan.json")
        keys = {"model": plan["experiment"]["model"]} | {step["name"]: step["spec"] for step in plan["steps"]}
        metrics = store.read_json(folder / store.RUN_FILE)["metrics"]
    elif (folder / store.STEP_FILE).is_file():
        record = store.read_json(folder / store.STEP_FILE)
        keys, metrics = {record["name"]: record["step"]["spec"]}, {record["name"]: record["metrics"]}
    else:
        raise ConfigError(folder.name, "has not finished, so there is nothing to compare", "type the same run again: it goes on where it stopped")
    return {"keys": keys, "metrics": {key: value for key, value in flatten(metrics).items() if _is_number(value)}, "cost": dict(taken(folder))}


def taken(folder: Path) -> Iterator[tuple[str, dict[str, float | None]]]:
    """What each training step took, measured and as predicted, and the one over the other."""
    for record in records_of(folder):
        for one in compared(record):
            if one.key in SHORT and one.measured is not None:
                yield f"{record['name']}.{one.key}", {"predicted": one.predicted, "measured": one.measured, "ratio": one.ratio}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def differing(columns: Mapping[str, Sections]) -> Sections:
    """Keys whose values differ, of the steps that all runs have; and every figure and cost of any."""
    common = [step for step in next(iter(columns.values()))["keys"] if all(step in column["keys"] for column in columns.values())]
    keys = {name: flatten({step: column["keys"][step] for step in common}) for name, column in columns.items()}
    different = {key: values for key, values in _rows(keys).items() if not _same(values)}
    figures = {section: _rows({name: column[section] for name, column in columns.items()}) for section in ("metrics", "cost")}
    return {"keys": {key: values for key, values in different.items() if different.get(key.partition(".")[2]) != values}, **figures}


def _rows(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    order = dict.fromkeys(key for column in columns.values() for key in column)
    return {key: {name: column.get(key) for name, column in columns.items()} for key in order}


def _same(values: Mapping[str, Any]) -> bool:
    first = next(iter(values.values()))
    return all(value == first for value in values.values())


def show(names: Sequence[str], rows: Sections) -> None:
    """Runs as columns, or as rows where there are many. No name is cut: a narrow terminal gets wider lines instead."""
    console = Console()
    if len(names) <= SIDE_BY_SIDE:
        key_width = max((len(key) for section in rows.values() for key in section), default=0)
        console.width = max(console.width, key_width + len(names) * (NARROWEST + 3) + 4)
        console.print(_upright(names, rows))
        return
    different = rows["keys"] | {key: values for section in ("metrics", "cost") for key, values in rows[section].items() if not _same(values)}
    cells = {key: [_cell(values[name]) for name in names] for key, values in different.items()}
    widths = {key: min(WIDEST, max(NARROWEST, *map(len, values))) for key, values in cells.items()}
    name_width = max(map(len, names)) + 4
    console.width = max(console.width, name_width + WIDEST + 3)
    for keys in _packed(widths, console.width - name_width):
        console.print(_across(names, {key: cells[key] for key in keys}, widths))
    same = sum(map(len, rows.values())) - len(different)
    console.print(f"{same} figures that are the same in all {len(names)} runs are left out; --json has them")


def _upright(names: Sequence[str], rows: Sections) -> Table:
    table = Table(title=f"{len(names)} runs")
    table.add_column("key or metric", no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold", min_width=NARROWEST)
    for section in rows.values():
        for key, values in section.items():
            table.add_row(key, *[_cell(values[name]) for name in names])
        table.add_section()
    return table


def _across(names: Sequence[str], cells: Mapping[str, Sequence[str]], widths: Mapping[str, int]) -> Table:
    table = Table()
    table.add_column("run", no_wrap=True)
    for key in cells:
        table.add_column(key, overflow="fold", width=widths[key])
    for index, name in enumerate(names):
        table.add_row(name, *[values[index] for values in cells.values()])
    return table


def _packed(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """The keys in tables as wide as the room there is, one key at least in each."""
    tables: list[list[str]] = [[]]
    for key in widths:
        if tables[-1] and sum(widths[one] + 3 for one in [*tables[-1], key]) > room:
            tables.append([])
        tables[-1].append(key)
    return tables


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # a cost
        beside = "not predicted" if value["ratio"] is None else f"{value['ratio']:.2f} of predicted"
        return f"{value['measured']:.5g} ({beside})"
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)
