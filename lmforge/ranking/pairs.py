"""From rankings to pairs: a ranking of k answers says which is better in k(k-1)/2 pairs, and a majority of raters makes a preference row."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmforge.formats.samples import Sampled
from lmforge.ranking.ratings import Rating, Ratings

FIRST, TIE, SECOND = "first", "tie", "second"
Pair = tuple[int, int]  # two answers of a prompt, the one that stands earlier in samples.jsonl first


def verdicts(rating: Rating | None) -> dict[Pair, str]:
    """What a finished ranking says of every pair it places; nothing for one that is open or skipped."""
    if rating is None or rating.state != "ranked":
        return {}
    place = {answer: number for number, group in enumerate(rating.places) for answer in group}
    pairs = itertools.combinations(sorted(place), 2)
    return {(one, two): TIE if place[one] == place[two] else FIRST if place[one] < place[two] else SECOND for one, two in pairs}


@dataclass
class Preferences:
    """The rows of a preference data set, and what became of every pair that somebody judged: judged = rows + ties + disagreements + empty + cut."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    judged: int = 0
    ties: int = 0
    disagreements: int = 0  # no verdict has more than half of those who judged the pair
    empty: int = 0  # one side is white space only, which no data set takes
    cut: int = 0  # one side did not end by itself: as a row it would be given an end token after cut text, and that would be learned

    def __str__(self) -> str:
        kinds = (
            ("ties", self.ties),
            ("disagreements", self.disagreements),
            ("with an empty answer", self.empty),
            ("with an answer that was cut off", self.cut),
        )
        left = [f"{count:,} {what}" for what, count in kinds if count]
        return f"{len(self.rows):,} preference rows of {self.judged:,} pairs judged" + (f"; left out: {', '.join(left)}" if left else "")


def heard(ratings: Ratings) -> list[str]:
    """Whose rankings count where nobody says: people's, where any has ranked; else every method's."""
    return [name for name in ratings.raters if ":" not in name] or ratings.raters


def preferences(samples: Sequence[Sampled], ratings: Ratings, raters: Collection[str]) -> Preferences:
    """Rows {"prompt", "chosen", "rejected", "source"} in the samples' order, by the majority of `raters` on each pair."""
    found = Preferences()
    by_rater = [ratings.of(rater) for rater in raters]
    for sample in samples:
        votes: dict[Pair, Counter[str]] = {}
        for mine in by_rater:
            for pair, verdict in verdicts(mine.get(sample.id)).items():
                votes.setdefault(pair, Counter())[verdict] += 1
        for pair, counted in sorted(votes.items()):
            _decide(sample, pair, counted, found)
    return found


def _decide(sample: Sampled, pair: Pair, votes: Counter[str], found: Preferences) -> None:
    verdict, most = votes.most_common(1)[0]
    answers = [sample.answers[one] for one in pair]
    texts = [one.text for one in answers]
    found.judged += 1
    if 2 * most <= votes.total():
        found.disagreements += 1
    elif verdict == TIE:
        found.ties += 1
    elif not all(text.strip() for text in texts):
        found.empty += 1
    elif not all(one.ended for one in answers):
        found.cut += 1
    else:
        chosen, rejected = texts if verdict == FIRST else reversed(texts)
        found.rows.append({"prompt": sample.prompt, "chosen": chosen, "rejected": rejected, "source": f"{sample.id}:{pair[0]}-{pair[1]}"})


def write(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """One row a line, atomically; `data=text data.path=FILE` takes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="\n") as handle:
        handle.write(lines(rows))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """The text of such a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Agreement:
    """How far two raters agree on the pairs both judged: the share of equal verdicts, and Cohen's kappa (1960), which takes chance away.

    `kappa` is None where chance alone explains everything: both gave one and the same verdict throughout.
    """

    first: str
    second: str
    pairs: int
    prompts: int
    raw: float
    kappa: float | None

    def __str__(self) -> str:
        kappa = "undefined: one verdict throughout" if self.kappa is None else f"{self.kappa:.2f}"
        return f"{self.first} and {self.second}: {self.raw:.0%} of {self.pairs:,} pairs ({self.prompts:,} prompts) judged alike, Cohen's kappa {kappa}"


def agreements(samples: Sequence[Sampled], ratings: Ratings) -> Iterator[Agreement]:
    """Every two raters that judged a pair in common. The three verdicts are: the first answer, the second, equally good."""
    for first, second in itertools.combinations(ratings.raters, 2):
        one, two = ratings.of(first), ratings.of(second)
        table: Counter[tuple[str, str]] = Counter()
        prompts = 0
        for sample in samples:
            left, right = verdicts(one.get(sample.id)), verdicts(two.get(sample.id))
            both = left.keys() & right.keys()
            table.update((left[pair], right[pair]) for pair in both)
            prompts += bool(both)
        if table:
            yield Agreement(first, second, table.total(), prompts, *raw_and_kappa(table))


def raw_and_kappa(table: Counter[tuple[str, str]]) -> tuple[float, float | None]:
    """Share of equal verdicts p, and kappa = (p - e) / (1 - e) with e the share that equal habits alone would give (Cohen 1960, eq. 1)."""
    total = table.total()
    raw = sum(count for (left, right), count in table.items() if left == right) / total
    habits = [Counter[str](), Counter[str]()]
    for verdict_pair, count in table.items():
        for habit, verdict in zip(habits, verdict_pair, strict=True):
            habit[verdict] += count
    chance = sum(habits[0][verdict] * habits[1][verdict] for verdict in (FIRST, TIE, SECOND)) / total**2
    return raw, None if chance == 1 else (raw - chance) / (1 - chance)
