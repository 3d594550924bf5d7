"""A finished sample step in a store of its own: four prompts, one of them hostile, one without anything to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lmforge.formats import samples as format_
from lmforge.formats.samples import Answer, Prompt, Sampled
from lmforge.ranking.ratings import Places, Rating, Ratings

STEP = "sample-0123456789abcdef"
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\n  \"quoted\" & 'so' \u2028 end"


def sampled(name: str, prompt: Prompt, *texts: str, reference: str | None = None) -> Sampled:
    return Sampled(name, prompt, tuple(Answer(text, len(text.split()) + 1, True, -1.5) for text in texts), reference)


def halted(sample: Sampled, place: int) -> Sampled:
    """The sample with one answer cut off at the longest length."""
    return replace(sample, answers=tuple(replace(one, ended=one.ended and at != place) for at, one in enumerate(sample.answers)))


SAMPLES = [
    sampled("train-0", "def add(a, b):", "    return a + b\n", "    return a - b\n", "    pass\n", reference="    return a + b\n"),
    sampled("train-3", "Say hello", "Hello!", "Go away", "hello"),
    sampled("train-6", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HOSTILE}], HOSTILE, "a safe one"),
    sampled("train-9", "Only one", "the same every time"),
]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs" / "steps" / STEP
    (folder / "samples").mkdir(parents=True)
    format_.write(folder / "samples", SAMPLES, {"seed": 0})
    (folder / "step.json").write_text("{}")
    return folder


@pytest.fixture
def ratings(tmp_path: Path) -> Ratings:
    return Ratings(tmp_path / "ratings.jsonl", SAMPLES)


@pytest.fixture
def ranked(ratings: Ratings) -> Callable[..., None]:
    """`ranked("ann", "train-0", [[0], [1, 2]])`: a finished ranking."""

    def append(rater: str, name: str, places: list[list[int]]) -> None:
        where: Places = tuple(map(tuple, places))
        ratings.append(Rating(name, rater, where, "ranked"))

    return append
