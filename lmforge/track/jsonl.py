"""What a run keeps on disk, one JSON object a line: metrics.jsonl, the truth about it, and samples.jsonl, tables for people.

A line of metrics has `step` and `time` first, then the figures; a line of samples is {"step", "title", "rows"}, its rows as objects by column.
A line is written whole and flushed, so a killed run loses at most the line it was writing; the reader leaves that one
out. JSON knows no NaN: what is not finite is written as the text "nan", "inf" or "-inf", and figures are read back as the number.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmforge.errors import DataError, RunError

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
SAMPLES = "samples.jsonl"


class Lines:
    """Appends to a file of JSON lines that each have a `step`. RunError where the disk is full or the folder cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._write(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        if path.exists() and _torn(path):
            self._replace(read(path))
        self._file = self._write(lambda: path.open("a", encoding="utf-8"))

    def append(self, row: Mapping[str, Any]) -> None:
        """One line, flushed."""
        line = _line(row)

        def write() -> None:
            self._file.write(line)
            self._file.flush()

        self._write(write)

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop every other line."""
        rows = read(self.path)
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            self._file.close()
            self._replace(kept)
            self._file = self._write(lambda: self.path.open("a", encoding="utf-8"))

    def close(self) -> None:
        """Close the file; what was appended is there already."""
        self._file.close()

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        part = self.path.with_suffix(".part")  # in the same folder, so that the swap is atomic

        def swap() -> None:
            part.write_text("".join(map(_line, rows)), encoding="utf-8")
            os.replace(part, self.path)

        self._write(swap)

    def _write(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise RunError(str(self.path), f"cannot be written: {error.strerror or error}", "free some space or choose another output folder") from error


class Metrics:
    """A step's metrics.jsonl, and samples.jsonl beside it once there is a table. RunError where either cannot be written."""

    def __init__(self, path: Path) -> None:
        self.step = 0  # the optimizer step that was logged last
        self._lines = Lines(path)
        beside = path.with_name(SAMPLES)
        self._samples = Lines(beside) if beside.is_file() else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; `step` counts optimizer steps, `time` is in seconds since 1970."""
        self.step = step
        self._lines.append({"step": step, "time": round(time.time(), 3), **metrics})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """One line of samples.jsonl, at the step that was logged last."""
        if self._samples is None:
            self._samples = Lines(self._lines.path.with_name(SAMPLES))
        self._samples.append({"step": self.step, "title": title, "rows": [dict(zip(columns, row, strict=True)) for row in rows]})

    def rewind(self, step: int) -> None:
        """Drop every line past `step`: the state a run resumes from knows nothing of them, and they come again. 0 = it starts afresh."""
        self.step = step
        self._lines.keep(lambda row: row["step"] <= step)
        if self._samples is not None:
            self._samples.keep(lambda row: 0 < step >= row["step"])

    def close(self) -> None:
        """Close the files; what was logged is there already."""
        self._lines.close()
        if self._samples is not None:
            self._samples.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a last one without its end is left out, any other that is broken is a DataError with its number."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({name: NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()} | {"step": int(row["step"])})
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}", "not a line of metrics", "delete the line") from error
    return rows


def _torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), allow_nan=False, ensure_ascii=False) + "\n"


def plain(value: Any) -> Any:
    """A JSON value; numbers of numpy and torch become Python's own, and what is none of these its text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(number)
