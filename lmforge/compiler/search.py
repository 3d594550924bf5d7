"""The fastest candidates that fit: a best-first search over what takes more time for less memory. Pure and deterministic."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lmforge.compiler.candidates import Candidate, Key, Space

KEEP = 5
SLOWEST = 2.0  # what takes twice the time of the best is no alternative
LARGER = 2  # ways that would be faster and do not fit, at most
FAR = 2  # times a device's room: what needs more is no news


@dataclass(frozen=True)
class Ranking:
    """Ways that fit, the fastest first and each by its best; the nearest to fitting of ways that would be faster; what needs least of all that were asked."""

    best: tuple[Candidate, ...]
    larger: tuple[Candidate, ...]
    smallest: Candidate
    asked: int  # how many candidates' memory was asked


@dataclass(order=True)
class Entry:
    """A candidate that waits: until nothing that is left can take less than `bound` seconds."""

    bound: float
    order: Key
    one: Candidate = field(compare=False)
    timed: bool = field(compare=False)  # the bound is its time, and not that of what it comes after


class Search:
    """A search of one space.

    What comes after a candidate takes no less time (`Space.after`), so it waits behind it, and is timed only if it may fit. Memory never shrinks with rows,
    and where the least of its kin (`Space.least`) does not fit none of them does: one answer settles many.
    """

    def __init__(self, space: Space, seconds: Callable[[Candidate], float | None], needs: Callable[[Candidate], int], room: Callable[[Candidate], int]) -> None:
        self.space, self.seconds, self.room = space, seconds, room
        self.ask = needs
        self.asked: dict[Candidate, int] = {}
        self.fewest: dict[Key, int] = {}  # of a kind, the rows that are known not to fit

    def ranking(self, roots: Iterable[Candidate], keep: int = KEEP) -> Ranking:
        """The ranking; candidates of equal or unknown time by `Space.order`."""
        heap = [self._timed(one) for one in roots]
        heapq.heapify(heap)
        best: dict[Key, Entry] = {}
        while heap and len(best) < keep:
            entry = heapq.heappop(heap)
            if best and entry.bound > SLOWEST * next(iter(best.values())).bound:
                break
            one = entry.one
            if not entry.timed and one.way not in best and not self._too_large(one):
                heapq.heappush(heap, self._timed(one))
                continue
            if one.way not in best and self._fits(one):
                best[one.way] = entry
            for child in self.space.after(one):
                heapq.heappush(heap, Entry(entry.bound, self.space.order(child), child, timed=False))
        smallest = min(self.asked, key=self._need)
        return Ranking(tuple(one.one for one in best.values()), tuple(self._larger(best)), smallest, len(self.asked))

    def _timed(self, one: Candidate) -> Entry:
        taken = self.seconds(one)
        return Entry(math.inf if taken is None else taken, self.space.order(one), one, timed=True)

    def _need(self, one: Candidate) -> tuple[int, Key]:
        return (self.needs(one), self.space.order(one))

    def _larger(self, best: Mapping[Key, Entry]) -> Iterator[Candidate]:
        if not best:
            return
        first, told = next(iter(best.values())), set(best)
        offloads = self.space.auto.cpu_offload is True  # else it is never what makes a way faster
        near = (one for one, need in self.asked.items() if self.room(one) < need < FAR * self.room(one) and one.offload == offloads)
        for one in sorted(near, key=self._need):
            if len(told) < len(best) + LARGER and one.way not in told and self._timed(one) < first:
                told.add(one.way)
                yield one

    def needs(self, one: Candidate) -> int:
        """Bytes of its fullest device, asked once."""
        if one not in self.asked:
            self.asked[one] = self.ask(one)
        return self.asked[one]

    def _too_large(self, one: Candidate) -> bool:
        """Whether that is known without asking."""
        return one.rows >= self.fewest.get(one.kind, one.rows + 1) or self.asked.get(self.space.least(one), 0) > self.room(one)

    def _fits(self, one: Candidate) -> bool:
        if self._too_large(one):
            return False
        room = self.room(one)
        if self.needs(one) <= room:
            return True
        self.fewest[one.kind] = one.rows
        self.needs(self.space.least(one))
        return False
