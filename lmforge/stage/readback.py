"""From the ids of a rendered prompt back to its messages, for any chat template: the template shows, with placeholders, what it writes around them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from lmforge.formats.samples import Prompt
from lmforge.tokenizer.templates import Renderer

_PLACE = re.compile("\ue000(\\d+)\ue001")
TURNS = 16  # user turns in the longest conversation that is looked for


class Reader:
    """Reads prompts that end with the generation prompt."""

    def __init__(self, tokenizer: Any, renderer: Renderer) -> None:
        self._tokenizer, self._renderer = tokenizer, renderer
        special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(sorted(special, key=len, reverse=True)) or "(?!)")
        self._parts: dict[tuple[str, ...], list[str]] = {}

    def read(self, ids: list[int]) -> Prompt | None:
        """The one user turn as text, or the messages; None where rendering and encoding them would not give these very ids."""
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        special = [found.start() for found in self._special.finditer(text)]
        for turns in range(TURNS):
            for system in ((), ("system",)):
                roles = (*system, *("user", "assistant") * turns, "user")
                found = contents(text, self._around(roles), special)
                if found is None:
                    continue
                messages = [{"role": role, "content": content} for role, content in zip(roles, found, strict=True)]
                if self._encoded(messages) == ids:
                    return messages[0]["content"] if len(messages) == 1 else messages
        return None

    def _around(self, roles: tuple[str, ...]) -> list[str]:
        """What the template writes before, between and after the contents of these roles; nothing where it refuses them or repeats a content."""
        if roles not in self._parts:
            marked = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
            skeleton = self._render(marked)
            in_order = skeleton is not None and [int(place[1]) for place in _PLACE.finditer(skeleton)] == list(range(len(roles)))
            self._parts[roles] = _PLACE.sub("\ue000", skeleton).split("\ue000") if skeleton is not None and in_order else []
        return self._parts[roles]

    def _encoded(self, messages: list[dict[str, str]]) -> list[int] | None:
        text = self._render(messages)
        return None if text is None else self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: list[dict[str, str]]) -> str | None:
        """The text as it is when prompts are tokenized; None where the template refuses these roles."""
        [text] = self._renderer.render([(messages, True)])
        return text if isinstance(text, str) else None


def contents(text: str, around: Sequence[str], special: Sequence[int]) -> list[str] | None:
    """What stands between the parts `around` it, which are all of the rest of `text`; None where they do not stand there in this order.

    `special` says where special tokens start. A content holds none: those belong to the template, and a user's own are refused when prompts are
    tokenized. Every part is taken where it first comes: later parts then have the most room, and one with a special token can stand nowhere else. So
    there is nothing to go back to, and the time is linear in the text.
    """
    if not around or not text.startswith(around[0]) or not text.endswith(around[-1]):
        return None
    found, start, end = [], len(around[0]), len(text) - len(around[-1])
    for part in [*around[1:-1], None]:
        stop = end if part is None else text.find(part, start, end)
        first = bisect_left(special, start)
        if stop < start or (first < len(special) and special[first] < stop):
            return None
        found.append(text[start:stop])
        start = stop + len(part or "")
    return found
