"""Errors a user reads: where, what, and what instead, in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` is a key or a file:line, `instead` is what to type or do."""

    where: str
    what: str
    instead: str = ""

    def __str__(self) -> str:
        tail = f"; {self.instead}" if self.instead else ""
        return " ".join(f"{self.where}: {self.what}{tail}".split())


class LmforgeError(Exception):
    """A refusal with one or more problems; the command line prints each on a line and exits with code 2."""

    kind = "error"

    def __init__(self, where: str, what: str, instead: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(where, what, instead),)
        super().__init__(where, what, instead)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> LmforgeError:
        """One error that carries every problem found, so that a user mends them in one go."""
        found = tuple(dict.fromkeys(problems))
        error = cls(found[0].where, found[0].what, found[0].instead)
        error.problems = found
        return error

    def __reduce__(self) -> tuple[object, ...]:
        # Launchers send errors between processes; every problem has to survive the trip.
        return (_rebuild, (type(self), self.problems))

    def __str__(self) -> str:
        return "\n".join(f"{self.kind}: {problem}" for problem in self.problems)


def _rebuild(kind: type[LmforgeError], problems: tuple[Problem, ...]) -> LmforgeError:
    return kind.of(problems)


class ConfigError(LmforgeError):
    """The config alone shows it."""

    kind = "conf error"


class PlanError(LmforgeError):
    """The config is well formed, but the plan it describes cannot work."""

    kind = "plan error"


class DataError(LmforgeError):
    """A source, a row or a tokenizer that cannot be used."""

    kind = "data error"


class CheckpointError(LmforgeError):
    """Weights or a training state that cannot be read or do not match."""

    kind = "checkpoint error"


class RunError(LmforgeError):
    """Something failed while a step ran: a full disk, a missing extra, a diverged loss."""

    kind = "run error"


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest candidate, or the list of candidates where none is near."""
    names = sorted(set(candidates))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"one of: {', '.join(names)}" if names else ""
