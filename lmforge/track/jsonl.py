"""metrics.jsonl, the truth about a run: one JSON object per line, `step` and `time` first, then the metrics.

A line is written whole and flushed, so a killed run loses at most the line it was writing; the reader leaves that one
out. JSON knows no NaN: what is not finite is written as the text "nan", "inf" or "-inf", and read back as the number.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmforge.errors import DataError, RunError

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Metrics:
    """Appends to a metrics.jsonl. RunError where the disk is full or the folder cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._write(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        if path.exists() and _torn(path):
            self._replace(read(path))
        self._file = self._write(lambda: path.open("a", encoding="utf-8"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; `step` counts optimizer steps, `time` is in seconds since 1970."""
        line = _line({"step": step, "time": round(time.time(), 3), **metrics})

        def append() -> None:
            self._file.write(line)
            self._file.flush()

        self._write(append)

    def rewind(self, step: int) -> None:
        """Drop every line past `step`: the state a run resumes from knows nothing of them, and they come again."""
        rows = read(self._path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            self._file.close()
            self._replace(kept)
            self._file = self._write(lambda: self._path.open("a", encoding="utf-8"))

    def close(self) -> None:
        """Close the file; what was logged is there already."""
        self._file.close()

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        part = self._path.with_suffix(".part")  # in the same folder, so that the swap is atomic

        def swap() -> None:
            part.write_text("".join(map(_line, rows)), encoding="utf-8")
            os.replace(part, self._path)

        self._write(swap)

    def _write(self, action: Any) -> Any:
        try:
            return action()
        except OSError as error:
            raise RunError(str(self._path), f"cannot be written: {error.strerror or error}", "free some space or choose another output folder") from error


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
    return json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """A JSON value; numbers of numpy and torch become Python's own."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
