"""The `corpus` artifact: rows of one or more views, each split in train and heldout, and an account that adds up.

<view>/{train,heldout}.jsonl   one row a line, each with "source" (file:line of where it came from) and
  text         "text"
  chat         "messages": {"role", "content"}, and where given "tool_calls", "name", "tool_call_id"
  preference   "prompt", "chosen", "rejected", and where given "margin" (a number)
  feedback     "prompt", "completion", "label" (true: desirable)
  prompt       "prompt", "answer" (text, or null where there is none)
  A prompt is a text, one user turn, or a list of messages that ends before the answer.
account.json                   {"in","kept","dropped","views":{view:{"in","kept","dropped","train","heldout","repeated"}}, ...}
quarantine.jsonl               {"file","line","reason"} for every bad row; line 0 is the file as a whole
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lmforge.errors import DataError

VIEWS = ("text", "chat", "preference", "feedback", "prompt")
DERIVED = {"feedback": ("preference",), "prompt": ("chat", "preference", "feedback")}  # a view of tokens -> corpus views it can be made of, best first
SPLITS = ("train", "heldout")


@dataclass
class Tally:
    """Rows by what became of them. `entered` counts at the door and the rest at the decision, so a lost row shows."""

    entered: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def check(self, where: str) -> None:
        """in = kept + dropped, or AssertionError: a reader that loses rows is a bug."""
        if self.entered != self.kept + self.dropped.total():
            raise AssertionError(f"{where}: the account does not add up: in {self.entered}, kept {self.kept}, dropped {dict(self.dropped)}")

    def plain(self) -> dict[str, Any]:
        """JSON-able, with reasons sorted."""
        return {"in": self.entered, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}


@dataclass
class ViewTally(Tally):
    """A view's rows, and the lines written of them: kept + repeated = train + heldout."""

    train: int = 0
    heldout: int = 0
    repeated: int = 0

    def check(self, where: str) -> None:
        """Both sums, or AssertionError."""
        super().check(where)
        if self.kept + self.repeated != self.train + self.heldout:
            raise AssertionError(f"{where}: kept {self.kept} + repeated {self.repeated} != train {self.train} + heldout {self.heldout}")

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return super().plain() | {"train": self.train, "heldout": self.heldout, "repeated": self.repeated}


@dataclass
class Account:
    """What a source gave and what became of it; `rows` counts the source's own units (files, or rows of a file)."""

    rows: Tally = field(default_factory=Tally)
    views: dict[str, ViewTally] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # what one source reports beyond the sums

    def view(self, name: str) -> ViewTally:
        """The tally of a view, made on first use."""
        return self.views.setdefault(name, ViewTally())

    def check(self) -> None:
        """Every sum, or AssertionError."""
        self.rows.check("account")
        for name, tally in self.views.items():
            tally.check(f"account.views.{name}")

    def plain(self) -> dict[str, Any]:
        """The content of account.json."""
        views = {name: self.views[name].plain() for name in VIEWS if name in self.views}
        return self.rows.plain() | {"views": views} | self.more

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Account:
        """Back from account.json."""
        more = {key: value for key, value in plain.items() if key not in ("in", "kept", "dropped", "views")}
        rows = Tally(plain["in"], plain["kept"], Counter(plain["dropped"]))
        views = {
            name: ViewTally(one["in"], one["kept"], Counter(one["dropped"]), one["train"], one["heldout"], one["repeated"])
            for name, one in plain["views"].items()
        }
        return cls(rows, views, more)


class Writer:
    """Writes a corpus beside `out` and renames it into place when the `with` block ends well; a failed one leaves nothing."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.account = Account()
        self._folder = out.parent / f".{out.name}.tmp"
        self._files: dict[str, IO[str]] = {}

    def __enter__(self) -> Writer:
        shutil.rmtree(self._folder, ignore_errors=True)  # what a killed run left
        self._folder.mkdir(parents=True)
        self._open("quarantine.jsonl")
        return self

    def write(self, view: str, split: str, row: Mapping[str, Any]) -> None:
        """Add one row to a view's split. The caller counts it in `account` as entered and kept, or as repeated."""
        if view not in VIEWS or split not in SPLITS:
            raise ValueError(f"no such view or split: {view}/{split}")
        tally = self.account.view(view)
        tally.train += split == "train"
        tally.heldout += split == "heldout"
        for one in SPLITS:  # both files of an offered view exist, even if one stays empty
            self._open(f"{view}/{one}.jsonl")
        self._line(f"{view}/{split}.jsonl", row)

    def quarantine(self, file: str, line: int, reason: str) -> None:
        """Record a bad row by file and line (from 1; 0 for the whole file)."""
        self._line("quarantine.jsonl", {"file": file, "line": line, "reason": reason})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for file in self._files.values():
                file.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self, name: str) -> IO[str]:
        if name not in self._files:
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            self._files[name] = path.open("w", encoding="utf-8", newline="\n")
        return self._files[name]

    def _line(self, name: str, row: Mapping[str, Any]) -> None:
        self._open(name).write(json.dumps(row, ensure_ascii=False) + "\n")

    def _commit(self) -> None:
        self.account.check()
        self._open("account.json").write(json.dumps(self.account.plain(), indent=1, ensure_ascii=False) + "\n")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.out.exists():
            shutil.rmtree(self.out)  # empty, or what an interrupted run left
        os.replace(self._folder, self.out)


def views(folder: Path) -> tuple[str, ...]:
    """The views that a corpus holds."""
    return tuple(view for view in VIEWS if (folder / view).is_dir())


def source_view(view: str, offered: Collection[str]) -> str | None:
    """The corpus view that tokens of `view` are read from: itself where offered, else the first it can be made of; None where there is none."""
    return next((one for one in (view, *DERIVED.get(view, ())) if one in offered), None)


def read(folder: Path, view: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows in their written order, one at a time; DataError where the corpus does not offer the view."""
    path = folder / view / f"{split}.jsonl"
    if not path.is_file():
        also = f"; {view} can also be made of: {', '.join(DERIVED[view])}" if view in DERIVED else ""
        raise DataError(str(folder), f"no {view}/{split} rows in this corpus", f"it offers: {', '.join(views(folder)) or 'nothing'}{also}")
    return _rows(path)


def quarantined(folder: Path) -> Iterator[dict[str, Any]]:
    """The bad rows of a corpus: {"file","line","reason"}."""
    return _rows(folder / "quarantine.jsonl")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            row: dict[str, Any] = json.loads(line)
            yield row


def account(folder: Path) -> Account:
    """The account of a written corpus, checked again; DataError where there is none."""
    path = folder / "account.json"
    if not path.is_file():
        raise DataError(str(folder), "not a corpus: no account.json", "run its data step again")
    found = Account.of(json.loads(path.read_text(encoding="utf-8")))
    found.check()
    return found
