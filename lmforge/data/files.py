"""Rows of .txt, .jsonl and .parquet files as a stream: a bad row is a row with a problem, and reading goes on."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BATCH_ROWS = 256
BROKEN_FILE = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class Raw:
    """One raw row by file and line (from 1; a parquet row's number), or what is wrong with it: (kind, reason)."""

    file: str
    line: int
    value: Any = None
    problem: tuple[str, str] | None = None


def read(path: Path, name: str, txt_document_chars: int) -> Iterator[Raw]:
    """Every row of one file, named `name` in reports."""
    if path.suffix == ".parquet":
        yield from _parquet(path, name)
        return
    with path.open("rb") as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        if ".jsonl" in path.suffixes[-2:]:
            yield from _jsonl(file, name)
        else:
            yield from _txt(file, name, txt_document_chars)


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str] | Raw]:
    """Numbered lines without their end; a line that is not UTF-8, or where a compressed file breaks off, is a Raw with its problem."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline()
        except BROKEN_FILE as error:
            yield Raw(name, number, problem=("unreadable", f"the compressed file breaks off here: {error}"))
            return
        if not line:
            return
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Raw(name, number, problem=("not_utf8", f"not UTF-8 at byte {error.start + 1} of the line"))


def _jsonl(file: IO[bytes], name: str) -> Iterator[Raw]:
    for one in _lines(file, name):
        if isinstance(one, Raw):
            yield one
            continue
        number, line = one
        if not line.strip():
            continue
        try:
            yield Raw(name, number, json.loads(line))
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield Raw(name, number, problem=("broken_json", f"broken JSON: {what}"))


def _txt(file: IO[bytes], name: str, limit: int) -> Iterator[Raw]:
    """Documents of at most `limit` characters, cut at a blank line once half full, else at a line's end. A bad line spoils its document only."""
    lines: list[str] = []
    start, chars = 1, 0
    problem: Raw | None = None
    for one in _lines(file, name):
        if isinstance(one, Raw):
            problem = problem or one
            continue
        number, line = one
        for piece in (line[at : at + limit] for at in range(0, len(line) or 1, limit)):  # one piece, unless a line alone is too long
            if lines and (chars + len(piece) > limit or (chars > limit // 2 and not piece.strip())):
                yield from _document(lines, name, start, problem)
                lines, start, chars, problem = [], number, 0, None
            lines.append(piece)
            chars += len(piece) + 1
    yield from _document(lines, name, start, problem)


def _document(lines: list[str], name: str, start: int, problem: Raw | None) -> Iterator[Raw]:
    text = "\n".join(lines).strip("\n")
    if problem:
        yield problem
    elif text.strip():
        yield Raw(name, start, {"text": text})


def _parquet(path: Path, name: str) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Raw(name, number, {key: one for key, one in value.items() if one is not None})
    except (pa.ArrowInvalid, OSError) as error:
        yield Raw(name, number and number + 1, problem=("unreadable", f"not a readable parquet file: {str(error).splitlines()[0]}"))
    except UnicodeDecodeError:
        yield Raw(name, number + 1, problem=("not_utf8", f"a text that is not UTF-8 within {BATCH_ROWS} rows from here; the rest of the file is left out"))
