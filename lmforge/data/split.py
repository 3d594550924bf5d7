"""Which rows are held out: decided by content, the same on every machine and in every order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from lmforge.errors import DataError

Row = dict[str, Any]


def key(*parts: str) -> str:
    """SHA-256 (hex) of texts; their borders count."""
    state = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        state.update(len(raw).to_bytes(8, "big") + raw)
    return state.hexdigest()


def unit(hexdigest: str) -> float:
    """A hash as a number in [0, 1)."""
    return int(hexdigest[:13], 16) / 16**13


def heldout(keys: Iterable[str], fraction: float) -> frozenset[str]:
    """The keys below `fraction`, and always the lowest one but never the highest: both splits have rows where there are two keys."""
    ordered = sorted(set(keys))
    return frozenset(one for one in ordered[:-1] if unit(one) < fraction or one == ordered[0])


class Splitter:
    """The same rule over a stream. Only the rows of the lowest and the highest key so far are held in memory."""

    def __init__(self, fraction: float, write: Callable[[str, Row], None]) -> None:
        self.fraction, self.write = fraction, write
        self._held: dict[str, list[Row]] = {}

    def add(self, one: str, row: Row) -> None:
        """Give a row under its key; rows that share a key share a split."""
        self._held.setdefault(one, []).append(row)
        if len(self._held) == 3:
            middle = sorted(self._held)[1]
            self._flush(middle, "heldout" if unit(middle) < self.fraction else "train")

    def close(self, where: str) -> None:
        """Write what is held; DataError where everything shares one key, so that nothing can be held out."""
        if len(self._held) == 1:
            raise DataError(where, "only one distinct document, so none can be held out for evaluation", "give at least two")
        for one, split in zip(sorted(self._held), ("heldout", "train"), strict=False):
            self._flush(one, split)

    def _flush(self, one: str, split: str) -> None:
        for row in self._held.pop(one):
            self.write(split, row)
