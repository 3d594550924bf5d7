"""Ranking without people: every answer gets a score, and the highest is preferred to the lowest. A method rates under its own name, which has a colon."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmforge.formats.samples import Sampled
from lmforge.inference.checkpoint import open_tokenizer
from lmforge.ranking.pairs import Pair
from lmforge.ranking.ratings import Places, Rating, Ratings
from lmforge.reward.nodes import Episodes, Scorer
from lmforge.tokenizer.chat import Chat
from lmforge.tokenizer.encode import Encoder
from lmforge.tokenizer.shapes import BadRow
from lmforge.tokenizer.templates import Renderer

PROMPTS_PER_CALL = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    """A prompt's scores, one an answer; None where it could not be scored. `doubtful`: pairs of which the scores should not say which is better."""

    values: tuple[float | None, ...]
    doubtful: frozenset[Pair] = frozenset()


@dataclass(frozen=True)
class Account:
    """What a method did: prompts = pairs + ties + unscored. `cut` counts answers."""

    prompts: int
    pairs: int
    ties: int  # the scores are equal, nearer than the margin, or in doubt
    unscored: int  # fewer than two answers have a score
    cut: int  # answers without a score because they did not end by themselves

    def __str__(self) -> str:
        rest = [f"{count:,} {what}" for what, count in (("without a clear difference", self.ties), ("without two scores", self.unscored)) if count]
        said = ", ".join([f"{self.pairs:,} of {self.prompts:,} prompts give a pair", *rest])
        return f"{said}; left out: {self.cut:,} answers that were cut off" if self.cut else said


def rank(samples: Sequence[Sampled], scores: Sequence[Scores], ratings: Ratings, rater: str, min_margin: float) -> Account:
    """Write the method's ratings, those that changed; a second run with the same scores appends nothing."""
    known = ratings.of(rater)
    counted = {"pairs": 0, "ties": 0, "unscored": 0}
    for sample, one in zip(samples, scores, strict=True):
        places = extremes(one, min_margin)
        counted["unscored" if not places else "ties" if len(places) == 1 else "pairs"] += 1
        rating = Rating(sample.id, rater, places, "ranked" if places else "skipped", scores=one.values)
        before = known.get(sample.id)
        if before is None or (before.places, before.state, before.scores) != (rating.places, rating.state, rating.scores):
            ratings.append(rating)
    return Account(len(samples), **counted, cut=sum(not answer.ended for sample in samples for answer in sample.answers))


def extremes(scores: Scores, min_margin: float) -> Places:
    """The best above the worst; both in one place where they are not clearly apart; nothing where fewer than two have a score."""
    scored = [(value, -place) for place, value in enumerate(scores.values) if value is not None]
    if len(scored) < 2:
        return ()
    (high, best), (low, worst) = max(scored), min(scored)
    if high == low:
        return (tuple(-place for _, place in scored),)
    pair = (min(-best, -worst), max(-best, -worst))
    return (pair,) if high - low < min_margin or pair in scores.doubtful else ((-best,), (-worst,))


def by_reward(samples: Sequence[Sampled], scorer: Scorer, tokenizer: Path, progress: Progress) -> list[Scores]:
    """A reward's value of every answer. The ids are those that `tokenizer` gives prompt and answer in training.

    What it cannot write has no score, nor has an answer that was cut off: the ids would hold an end token that it never had.
    """
    found: list[Scores] = []
    with ExitStack() as stack:
        opened = open_tokenizer(tokenizer)
        chat, encoder = Chat(opened, stack.enter_context(Renderer(opened))), Encoder(opened, markers=True)
        for start in range(0, len(samples), PROMPTS_PER_CALL):
            progress(start, len(samples))
            part = samples[start : start + PROMPTS_PER_CALL]
            found.extend(_scored(part, scorer, _encoded(part, chat, encoder), opened))
    return found


def _scored(samples: Sequence[Sampled], scorer: Scorer, encoded: Sequence[tuple[list[int], int] | None], tokenizer: Any) -> Iterator[Scores]:
    flat = [(sample, answer) for sample in samples for answer in sample.answers]
    known = [(sample, answer, *one) for (sample, answer), one in zip(flat, encoded, strict=True) if one is not None]
    episodes = Episodes(
        prompts=[tokenizer.decode(ids[:start], skip_special_tokens=True) for _, _, ids, start in known],
        answers=[answer.text for _, answer, _, _ in known],
        references=[sample.reference for sample, _, _, _ in known],
        ids=[ids for _, _, ids, _ in known],
        starts=[start for _, _, _, start in known],
    )
    values = iter(scorer(episodes) if known else ())
    scores = iter([None if one is None else round(float(next(values)), 6) for one in encoded])
    for sample in samples:
        yield Scores(tuple(itertools.islice(scores, len(sample.answers))))


def _encoded(samples: Sequence[Sampled], chat: Chat, encoder: Encoder) -> list[tuple[list[int], int] | None]:
    """(ids up to the end token, where the answer starts) of every answer, as preference pairs are tokenized; None for one cut off or refused."""
    flat = [(sample, answer) for sample in samples for answer in sample.answers]
    results = iter(chat.many([([*sample.messages, {"role": "assistant", "content": answer.text}], "last") for sample, answer in flat if answer.ended]))
    rendered = [next(results) if answer.ended else None for _, answer in flat]
    whole = iter(encoder.conversations([one for one in rendered if one is not None and not isinstance(one, BadRow)]))
    examples = [None if one is None or isinstance(one, BadRow) else next(whole) for one in rendered]
    return [None if one is None else (one[0][: len(one[1]) - one[1][::-1].index(1)], one[1].index(1)) for one in examples]
