"""Rewards that look at the text of an answer: equality with a reference, a pattern, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from lmforge.errors import DataError
from lmforge.reward.checked import shown
from lmforge.reward.nodes import Episodes

NUMBER = re.compile(r"(?:(?<![^\W_])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")  # the sign of 3-5 is none of the 5
WORD = re.compile(r"\w+|[^\w\s]")
BOX = "\\boxed{"


class Matches:
    """1 or 0 a row: whether what is extracted from the answer is what is extracted from the reference."""

    def __init__(self, extract: str, ignore_case: bool, where: str) -> None:
        self.extract, self.ignore_case, self.where = extract, ignore_case, where

    def check(self, references: Sequence[str | None], split: str) -> None:
        """DataError that names the first prompt, by its index in the split, without a reference that holds what is extracted."""
        for index, reference in enumerate(references):
            self._wanted(reference, f"prompt {index} (from 0) of {split}")

    def __call__(self, episodes: Episodes) -> list[float]:
        """DataError as from `check`, that shows the prompt."""
        rows = zip(episodes.prompts, episodes.answers, episodes.references, strict=True)
        return [float(_extracted(answer, self.extract, self.ignore_case) == self._wanted(one, f"the prompt {shown(prompt)}")) for prompt, answer, one in rows]

    def _wanted(self, reference: str | None, whose: str) -> str | Decimal:
        if reference is None:
            raise DataError(self.where, f"{whose} has no reference answer", 'give its row an "answer", or choose a reward that needs none')
        wanted = _extracted(reference, self.extract, self.ignore_case)
        if wanted is None and self.extract == "boxed":
            wanted = _normal(reference, self.ignore_case)  # data often holds the bare answer
        if wanted is None:
            what = f"the reference {shown(reference)} of {whose} has nothing that extract={self.extract} finds"
            raise DataError(self.where, what, "choose another extract, or mend the row")
        return wanted


def _extracted(text: str, extract: str, ignore_case: bool) -> str | Decimal | None:
    if extract == "last_number":
        numbers = NUMBER.findall(text)
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    if extract == "boxed":
        inside = _boxed(text)
        return None if inside is None else _normal(inside, ignore_case)
    if extract == "last_line":
        lines = text.strip().splitlines()
        return _normal(lines[-1], ignore_case) if lines else None
    return _normal(text, ignore_case)


def _normal(text: str, ignore_case: bool) -> str:
    return text.strip().casefold() if ignore_case else text.strip()


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, whose braces may be nested; None where there is none, or it is not closed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None


def complaint(pattern: str) -> str:
    """Why RE2 does not take the pattern, or an empty string."""
    import pyarrow

    try:
        found(pattern, False, [""])
    except pyarrow.ArrowInvalid as error:
        return " ".join(str(error).split())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return ""


def found(pattern: str, ignore_case: bool, texts: Sequence[str]) -> list[float]:
    """1 or 0 a text. RE2 as pyarrow brings it: Python's `re` takes exponential time on some patterns, and cannot be bounded in a process that trains."""
    import pyarrow
    import pyarrow.compute

    whole = pyarrow.array([text.encode("utf-8", "replace") for text in texts], pyarrow.binary())
    # Bytes of valid UTF-8 may be read as text without a copy.
    return [float(one) for one in pyarrow.compute.match_substring_regex(whole.cast(pyarrow.string()), pattern=pattern, ignore_case=ignore_case).to_pylist()]


def distinct(text: str, n: int) -> float:
    """Distinct n-grams as a share of all; a text of fewer words is one n-gram."""
    words = WORD.findall(text)
    if not words:
        return 0.0
    size = min(n, len(words))
    grams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams)
