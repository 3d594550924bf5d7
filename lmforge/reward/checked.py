"""Scorers around scorers: one that looks at every value, and one that adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lmforge.errors import RunError
from lmforge.reward.nodes import Episodes, Scorer

LARGEST = 1e18  # training takes squares of rewards in float32, which end at 3.4e38
SHOWN_CHARS = 60  # of a prompt in an error


class Checked:
    """A scorer whose every value is looked at. `components` are the parts of the last values by name; empty where there are none."""

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name, self._scorer = name, scorer

    @property
    def components(self) -> Mapping[str, list[float]]:
        return getattr(self._scorer, "components", {})

    def check(self, references: Sequence[str | None], split: str) -> None:
        """Refuse references of a split's prompts that the scorer cannot work with: DataError."""
        if hasattr(self._scorer, "check"):
            self._scorer.check(references, split)

    def __call__(self, episodes: Episodes) -> list[float]:
        """One finite value a row, of a size that training can square; RunError that names this reward and the row otherwise."""
        values = [float(value) for value in self._scorer(episodes)]
        if len(values) != len(episodes.prompts):
            raise RunError(self.name, f"gave {len(values)} values for {len(episodes.prompts)} answers", "a reward gives one value a row")
        for row, value in enumerate(values):
            if not math.isfinite(value) or abs(value) > LARGEST:
                what = f"is {value} for row {row}, the answer {shown(episodes.answers[row])} to {shown(episodes.prompts[row])}"
                raise RunError(self.name, what, f"a reward must be a finite number for every answer, and not beyond {LARGEST:g}")
        return values


class Weighted:
    """The weighted sum of scorers. `components` are their own last values, and those of sums within as outer/inner."""

    def __init__(self, scorers: Mapping[str, Checked], weights: Mapping[str, float]) -> None:
        self._scorers, self._weights = scorers, weights
        self.components: dict[str, list[float]] = {}

    def check(self, references: Sequence[str | None], split: str) -> None:
        """Of every part."""
        for scorer in self._scorers.values():
            scorer.check(references, split)

    def __call__(self, episodes: Episodes) -> list[float]:
        self.components = {}
        total = [0.0] * len(episodes.prompts)
        for name, scorer in self._scorers.items():
            values = scorer(episodes)
            self.components |= {name: values} | {f"{name}/{inner}": one for inner, one in scorer.components.items()}
            total = [so_far + self._weights[name] * value for so_far, value in zip(total, values, strict=True)]
        return total


def shown(text: str) -> str:
    """The beginning of a text, for an error."""
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")
