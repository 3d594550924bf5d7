"""Mixtures, by bytes of content: what a weight means, and which rows of each source that selects.

Let B_i be the bytes of source i's distinct train rows in one view and w_i its weight, normalised over the sources that
offer the view. The mixture takes T * w_i bytes of each, where T = max_epochs * min(B_i / w_i): the source that its
weight asks most of is read max_epochs times, every other one fewer times. Within a source, rows go in the order of
their content's hash, pass after pass, to the row at which the target is nearest; sources are interleaved so that the
proportions hold in every stretch of the result, to a row. Held-out rows are all taken once, whatever the weights.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lmforge.data import dialects
from lmforge.data.split import key
from lmforge.errors import DataError
from lmforge.formats import corpus


@dataclass
class Share:
    """One source's train rows of one view: (content hash, offset in its file, bytes of content), in hash order."""

    name: str
    weight: float
    rows: list[tuple[bytes, int, int]] = field(default_factory=list)
    target: float = 0.0  # bytes to take
    taken: int = 0  # bytes taken
    lines: int = 0  # rows taken, repetitions included

    @property
    def size(self) -> int:
        """Bytes of its rows, each once."""
        return sum(size for _, _, size in self.rows)

    def stream(self) -> Iterator[tuple[float, str, int]]:
        """(how far its target is met, name, offset) for every row to take, repetitions included."""
        while self.rows:
            for _, offset, size in self.rows:
                if self.taken + size / 2 > self.target and self.lines:
                    return
                yield self.taken / self.target, self.name, offset
                self.taken += size
                self.lines += 1

    def report(self) -> dict[str, Any]:
        """What account.json says of it."""
        return {
            "weight": self.weight,
            "bytes": self.size,
            "target_bytes": round(self.target),
            "taken_bytes": self.taken,
            "epochs": self.taken / self.size,
            "rows": self.lines,
        }


def mix(folders: Mapping[str, Path], weights: Mapping[str, float], max_epochs: float, out: Path) -> corpus.Account:
    """Write the mixture of the corpora in `folders` to `out`."""
    offered = {name: corpus.views(folder) for name, folder in folders.items()}
    with corpus.Writer(out) as writer:
        shares: dict[str, Any] = {name: {"views": {}} for name in folders}
        for view in corpus.VIEWS:
            among = {name: folder for name, folder in folders.items() if view in offered[name]}
            for share in _view(view, among, weights, max_epochs, writer):
                shares[share.name]["views"][view] = share.report()
        total = writer.account.rows
        for tally in writer.account.views.values():
            total.entered += tally.entered
            total.kept += tally.kept
            total.dropped += tally.dropped
        for name, folder in folders.items():
            shares[name]["account"] = corpus.account(folder).plain()
            for row in corpus.quarantined(folder):
                writer.quarantine(f"{name}/{row['file']}", row["line"], row["reason"])
        writer.account.more["sources"] = shares
    return writer.account


def _view(view: str, folders: Mapping[str, Path], weights: Mapping[str, float], max_epochs: float, writer: corpus.Writer) -> list[Share]:
    if not folders:
        return []
    held = _heldout(view, folders, writer)
    total = sum(weights[name] for name in folders)
    shares, seen = [], set[bytes]()
    for name, folder in folders.items():
        share = Share(name, weights[name] / total)
        share.rows = _index(view, folder, held, seen, writer)
        if not share.rows:
            raise DataError(f"data.sources.{name}", f"none of its {view} rows is left: all are in other sources", f"leave {name} out")
        shares.append(share)
    whole = max_epochs * min(share.size / share.weight for share in shares)
    for share in shares:
        share.target = whole * share.weight
    _write(view, folders, shares, writer)
    return shares


def _heldout(view: str, folders: Mapping[str, Path], writer: corpus.Writer) -> set[bytes]:
    """Write every source's held-out rows, each once; returns the hashes of what decided their split, such as a chat's prompt."""
    tally, seen, held = writer.account.view(view), set[bytes](), set[bytes]()
    for name, folder in folders.items():
        for row in corpus.read(folder, view, "heldout"):
            tally.entered += 1
            content = _content(view, row)
            if content in seen:
                tally.dropped["duplicate"] += 1
                continue
            seen.add(content)
            held.add(_question(view, row))
            tally.kept += 1
            writer.write(view, "heldout", row | {"source": f"{name}/{row['source']}"})
    return held


def _index(view: str, folder: Path, held: set[bytes], seen: set[bytes], writer: corpus.Writer) -> list[tuple[bytes, int, int]]:
    """A source's distinct train rows in hash order. A row whose prompt (or text) any source holds out is never trained on."""
    tally, found, offset = writer.account.view(view), [], 0
    with (folder / view / "train.jsonl").open("rb") as file:
        for line in file:
            row = json.loads(line)
            tally.entered += 1
            content = _content(view, row)
            if _question(view, row) in held:
                tally.dropped["held_out_by_a_source"] += 1
            elif content in seen:
                tally.dropped["duplicate"] += 1
            else:
                seen.add(content)
                found.append((content, offset, dialects.size(view, row)))
            offset += len(line)
    return sorted(found)


def _content(view: str, row: Mapping[str, Any]) -> bytes:
    return bytes.fromhex(key(view, *dialects.texts(view, row)))[:16]


def _question(view: str, row: Mapping[str, Any]) -> bytes:
    return bytes.fromhex(key(view, *dialects.question(view, row)))[:16]


def _write(view: str, folders: Mapping[str, Path], shares: list[Share], writer: corpus.Writer) -> None:
    tally = writer.account.view(view)
    files: dict[str, IO[bytes]] = {name: (folder / view / "train.jsonl").open("rb") for name, folder in folders.items()}
    try:
        for _, name, offset in heapq.merge(*(share.stream() for share in shares)):
            files[name].seek(offset)
            row = json.loads(files[name].readline())
            writer.write(view, "train", row | {"source": f"{name}/{row['source']}"})
    finally:
        for file in files.values():
            file.close()
    for share in shares:
        used = min(share.lines, len(share.rows))
        tally.kept += used
        tally.repeated += share.lines - used
        tally.dropped["beyond_its_weight"] += len(share.rows) - used
