"""What a rater is shown: answers in an order of the rater's own, and nothing that says where they come from."""

from __future__ import annotations

import hashlib
from typing import Any

from lmforge.formats.samples import Sampled
from lmforge.ranking.ratings import Places, Rating


def order(sample: Sampled, rater: str) -> list[int]:
    """The answers as this rater sees them, always the same: shown position -> place in samples.jsonl."""
    return sorted(range(len(sample.answers)), key=lambda place: hashlib.sha256(f"{rater}\0{sample.id}\0{place}".encode()).digest())


def shown(places: Places, seen: list[int]) -> list[list[int]]:
    """Places in the samples' order, as positions on the rater's page."""
    return [[seen.index(one) for one in group] for group in places]


def unshown(positions: list[list[int]], seen: list[int]) -> Places:
    """Positions on the rater's page, as places in the samples' order."""
    return tuple(tuple(seen[one] for one in group) for group in positions)


def task(sample: Sampled, rater: str, rating: Rating | None) -> dict[str, Any]:
    """A prompt for the page; `answers` come shuffled, without lengths or log-probabilities."""
    seen = order(sample, rater)
    return {
        "id": sample.id,
        "prompt": [{"role": one["role"], "text": one["content"]} for one in sample.messages],
        "answers": [{"text": sample.answers[one].text, "ended": sample.answers[one].ended} for one in seen],
    } | state(sample, rater, rating)


def state(sample: Sampled, rater: str, rating: Rating | None) -> dict[str, Any]:
    """Where the rater stands with it, in shown positions."""
    if rating is None:
        return {"id": sample.id, "places": [], "state": "open"}
    return {"id": sample.id, "places": shown(rating.places, order(sample, rater)), "state": rating.state}
