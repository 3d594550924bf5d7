"""ratings.jsonl: what each rater said of each prompt, one line a click, appended under a lock and synced before it counts as saved."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from lmforge.errors import DataError, RunError
from lmforge.formats.samples import Sampled

State = Literal["open", "ranked", "skipped"]
Places = tuple[tuple[int, ...], ...]  # answers by their place in samples.jsonl, best first; those in one group are equally good
LONGEST_NAME = 40


@dataclass(frozen=True)
class Rating:
    """Where one rater stands with one prompt. The last line of a rater and a prompt counts; `undo` marks one that took the one before it back."""

    id: str
    rater: str
    places: Places
    state: State
    undo: bool = False
    scores: tuple[float | None, ...] | None = None  # of every answer, where a method gave them
    at: str = ""

    def plain(self) -> dict[str, Any]:
        """Its JSON object; what says nothing is left out."""
        return {key: value for key, value in asdict(self).items() if value not in (None, False, "")}


def complaint(rating: Rating, answers: int) -> str:
    """Why this is no rating of a prompt with so many answers, or an empty string. People place every answer; a method may place some."""
    placed = [one for group in rating.places for one in group]
    if rating.state not in get_args(State):
        return f"state is {rating.state!r}, not one of {', '.join(get_args(State))}"
    if any(not group for group in rating.places) or len(set(placed)) != len(placed) or not all(0 <= one < answers for one in placed):
        return f"places {list(map(list, rating.places))} do not name answers of {answers} once each"
    if rating.state == "skipped" and placed:
        return "a skipped prompt has no places"
    return ""


def name_complaint(name: str) -> str:
    """Why a person cannot be called so, or an empty string. A colon is for methods, such as reward:length."""
    if not name.strip() or name != name.strip() or len(name) > LONGEST_NAME or not name.isprintable() or ":" in name:
        return f"a rater's name is 1 to {LONGEST_NAME} printable characters, without a colon"
    return ""


class Ratings:
    """The log of one samples step. Safe between threads, and between processes on one machine."""

    def __init__(self, file: Path, samples: Sequence[Sampled]) -> None:
        self.file = file
        self._answers = {one.id: len(one.answers) for one in samples}
        self._guard = threading.RLock()
        self._read, self._lines = 0, 0  # bytes and lines taken in so far
        self.latest: dict[str, dict[str, Rating]] = {}  # rater -> prompt id -> where it stands
        self._before: dict[str, list[Rating]] = defaultdict(list)
        self.refresh()

    def refresh(self) -> None:
        """Take in what this or another process appended; DataError at a line that is no rating."""
        with self._guard:
            if not self.file.exists():
                return
            with self.file.open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH)
                self._take(handle)

    def append(self, rating: Rating) -> None:
        """On disk when this returns. RunError where the disk refuses."""
        if why := complaint(rating, self._answers[rating.id]):
            raise ValueError(why)
        line = json.dumps(replace(rating, at=rating.at or _now()).plain(), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        new = not self.file.exists()
        with self._guard:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a+b") as handle:
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    _mend(handle)
                    handle.write(line)
                    handle.flush()
                    os.fsync(handle.fileno())
                    self._take(handle)
                if new:
                    _sync_folder(self.file.parent)
            except OSError as error:
                raise RunError(str(self.file), f"cannot be written: {error.strerror}", "make room or mend the folder; what was saved before is kept") from error

    def before(self, rater: str) -> list[Rating]:
        """What each of the rater's clicks replaced, the last one last: what undo goes back to."""
        with self._guard:
            return list(self._before[rater])

    def of(self, rater: str) -> Mapping[str, Rating]:
        """Where a rater stands with each prompt touched."""
        with self._guard:
            return dict(self.latest.get(rater, {}))

    @property
    def raters(self) -> list[str]:
        """Those who ranked something, people first."""
        with self._guard:
            ranked = [rater for rater, ratings in self.latest.items() if any(one.state == "ranked" for one in ratings.values())]
        return sorted(ranked, key=lambda name: (":" in name, name))

    def _take(self, handle: BinaryIO) -> None:
        handle.seek(self._read)
        for line in handle.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # a process died while it wrote; the next append cuts this off
            self._lines += 1
            self._read += len(line)
            self._count(self._parsed(line))

    def _count(self, rating: Rating) -> None:
        mine = self.latest.setdefault(rating.rater, {})
        if rating.undo:
            if self._before[rating.rater]:
                self._before[rating.rater].pop()
        else:
            self._before[rating.rater].append(mine.get(rating.id, Rating(rating.id, rating.rater, (), "open")))
        mine[rating.id] = rating

    def _parsed(self, line: bytes) -> Rating:
        try:
            row = json.loads(line)
            places = tuple(tuple(int(one) for one in group) for group in row["places"])
            scores = tuple(row["scores"]) if "scores" in row else None
            rating = Rating(row["id"], row["rater"], places, row["state"], bool(row.get("undo", False)), scores, row["at"])
            why = complaint(rating, self._answers[rating.id]) if rating.id in self._answers else f"no prompt has the id {rating.id!r}"
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            raise DataError(f"{self.file}:{self._lines}", f"is not a rating of these samples ({why})", "delete that line, or move the file away to start anew")
        return rating


def _mend(handle: BinaryIO) -> None:
    """Cut off a last line without its end: it was never acknowledged as saved."""
    size = handle.seek(0, os.SEEK_END)
    if not size:
        return
    handle.seek(size - 1)
    if handle.read(1) == b"\n":
        return
    handle.seek(0)
    handle.truncate(handle.read().rfind(b"\n") + 1)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
