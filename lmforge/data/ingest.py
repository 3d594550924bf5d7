"""From raw rows to a corpus: dialects, exact deduplication, the split, the quarantine and the account, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from lmforge.data import dialects
from lmforge.data.files import Raw, read
from lmforge.data.split import Row, Splitter, key
from lmforge.data.turns import BadRow
from lmforge.errors import DataError
from lmforge.formats import corpus
from lmforge.formats.manifest import label

PEEK_ROWS, PEEK_FILES = 16, 64
PROGRESS_ROWS = 1000
Progress = Callable[[int, int, str], None]


class Intake:
    """Takes raw rows one by one into a corpus; memory holds one hash a row."""

    def __init__(self, writer: corpus.Writer, heldout_fraction: float, text_field: str, view: str | None) -> None:
        self.writer, self.heldout_fraction, self.text_field, self.view = writer, heldout_fraction, text_field, view
        self._splitters: dict[str, Splitter] = {}
        self._seen: set[bytes] = set()
        self._first_bad: tuple[str, str] | None = None

    def add(self, raw: Raw) -> None:
        """Count a row, and keep it, drop it as a duplicate, or put it in quarantine."""
        self.writer.account.rows.entered += 1
        try:
            if raw.problem:
                raise BadRow(*raw.problem)
            view, row = dialects.parse(raw.value, self.text_field, self.view)
        except BadRow as bad:
            self.writer.account.rows.dropped[bad.kind] += 1
            self.writer.quarantine(raw.file, raw.line, bad.reason)
            self._first_bad = self._first_bad or (f"{raw.file}:{raw.line}", bad.reason)
            return
        self._keep(view, row, f"{raw.file}:{raw.line}")

    def _keep(self, view: str, row: Row, source: str) -> None:
        rows, tally = self.writer.account.rows, self.writer.account.view(view)
        tally.entered += 1
        content = bytes.fromhex(key(view, *dialects.texts(view, row)))[:16]
        if content in self._seen:
            rows.dropped["duplicate"] += 1
            tally.dropped["duplicate"] += 1
            return
        self._seen.add(content)
        rows.kept += 1
        tally.kept += 1
        self._splitter(view).add(key(*dialects.question(view, row)), row | {"source": source})

    def _splitter(self, view: str) -> Splitter:
        if view not in self._splitters:
            self._splitters[view] = Splitter(self.heldout_fraction, lambda split, row: self.writer.write(view, split, row))
        return self._splitters[view]

    def close(self, where: str) -> None:
        """DataError where nothing was usable, or nothing can be held out."""
        rows = self.writer.account.rows
        if not rows.entered:
            raise DataError(where, "there is no row in it", "give a source with at least two documents")
        if not rows.kept and self._first_bad:
            raise DataError(self._first_bad[0], self._first_bad[1], f"every one of the {rows.entered} rows is bad, and this is the first")
        for view, splitter in self._splitters.items():
            splitter.close(f"{where} ({view})")


def write(source: Iterable[Raw], out: Path, heldout_fraction: float, text_field: str, view: str | None, where: str) -> corpus.Account:
    """A corpus at `out` from raw rows; `where` names the source in errors."""
    with corpus.Writer(out) as writer:
        intake = Intake(writer, heldout_fraction, text_field, view)
        for raw in source:
            intake.add(raw)
        intake.close(where)
    return writer.account


def rows(root: Path, paths: Sequence[Path], txt_document_chars: int, progress: Progress) -> Iterator[Raw]:
    """The rows of all files, in order; progress is in bytes of the files already read."""
    sizes = [path.stat().st_size for path in paths]
    number = 0
    for index, path in enumerate(paths):
        for raw in read(path, label(path, root), txt_document_chars):
            number += 1
            if number % PROGRESS_ROWS == 0:
                progress(sum(sizes[:index]), sum(sizes), f"{number:,} rows")
            yield raw
    progress(sum(sizes), sum(sizes), f"{number:,} rows")


def counted(source: Iterable[Raw], total: int | None, progress: Progress) -> Iterator[Raw]:
    """The same rows; progress is in rows, and without an end in sight where `total` is null."""
    number = 0
    for number, raw in enumerate(source, 1):
        if number % PROGRESS_ROWS == 0:
            progress(number, total or number + 1, f"{number:,} rows")
        yield raw
    progress(number, number, f"{number:,} rows")


def peek(root: Path, paths: Sequence[Path], txt_document_chars: int, text_field: str) -> tuple[str, ...]:
    """The views that the fields of the first rows of the first files speak of; bounded, for a plan. DataError where none of them does.

    A row whose fields are right and whose contents are bad counts too: the run puts it in quarantine, and goes on with those after it.
    """
    found = set()
    first_bad: tuple[str, str] | None = None
    for path in paths[:PEEK_FILES]:
        if path.name.endswith((".txt", ".txt.gz")):
            found.add("text")
            continue
        for raw in islice(read(path, label(path, root), txt_document_chars), PEEK_ROWS):
            try:
                found.add(_view(raw, text_field))
            except BadRow as bad:
                first_bad = first_bad or (f"{raw.file}:{raw.line}", bad.reason)
    if first_bad and not found:
        raise DataError(*first_bad, "none of the first rows can be used, and this is the first")
    return tuple(view for view in corpus.VIEWS if view in found)


def _view(raw: Raw, text_field: str) -> str:
    if raw.problem:
        raise BadRow(*raw.problem)
    return dialects.view_of(dialects.fields(raw.value), text_field)
