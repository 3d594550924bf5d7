"""What two Python files share: groups of near-duplicates that no split may part, and whether a function stands in what is trained on.

Files are compared as sets of lines, indentation aside. Near-duplicates on both sides of a split make a held-out loss look better than it is
(Lee et al. 2022, https://arxiv.org/abs/2107.06499).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

TELLING_CHARS = 20  # shorter lines (`else:`, `return None`) are everywhere
SHARE = 0.5  # of the smaller file's telling lines: from here on two files are one
FEWEST = 3  # shared lines; below, a common import would chain strangers together


def normal(text: str) -> list[str]:
    """The lines of a text without indentation and blank lines."""
    return [line for raw in text.split("\n") if (line := raw.strip())]


def groups(texts: Sequence[str]) -> list[int]:
    """For each text the index of its group's first one. Two texts are in one group where a chain of near-duplicates joins them."""
    lines = [{line for line in normal(text) if len(line) > TELLING_CHARS} for text in texts]
    first = list(range(len(texts)))

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = first[first[index]]
            index = first[index]
        return index

    holders: defaultdict[str, list[int]] = defaultdict(list)
    for index, mine in enumerate(lines):
        shared = Counter(other for line in mine for other in holders[line])
        for other, count in shared.items():
            if count >= max(FEWEST, SHARE * min(len(mine), len(lines[other]))):
                low, high = sorted((root(index), root(other)))
                first[high] = low
        for line in mine:
            holders[line].append(index)
    return [root(index) for index in range(len(texts))]


class Trained:
    """The training side: its lines in order, and the prompts of its functions, whose docstrings are shortened and so stand in no file."""

    def __init__(self) -> None:
        self.prompts: set[tuple[str, ...]] = set()
        self._lines: list[str] = []
        self._places: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """A training file."""
        for line in normal(text):
            self._places[line].append(len(self._lines))
            self._lines.append(line)
        self._lines.append("")  # nothing runs on from one file into the next

    def add_prompt(self, prompt: str) -> None:
        """The prompt of a training function, one that made no pair too: its file is trained on."""
        self.prompts.add(tuple(normal(prompt)))

    def holds(self, prompt: str, body: str) -> bool:
        """Does either occur, indentation and blank lines aside?"""
        return tuple(normal(prompt)) in self.prompts or self._occurs(prompt) or self._occurs(body)

    def _occurs(self, text: str) -> bool:
        wanted = normal(text)
        counts = [len(self._places.get(line, ())) for line in wanted]
        rarest = counts.index(min(counts))
        starts = (place - rarest for place in self._places.get(wanted[rarest], ()))
        return any(start >= 0 and self._lines[start : start + len(wanted)] == wanted for start in starts)
