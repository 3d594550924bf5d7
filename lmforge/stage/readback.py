"""From the ids of a rendered prompt back to its messages, for any chat template: the template shows, with placeholders, what it writes around them."""

from __future__ import annotations

import re
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
        # A content holds no special token: those belong to the template, and a user's own are refused when prompts are tokenized.
        self._content = rf"((?:(?!{'|'.join(sorted(special, key=len, reverse=True)) or '(?!)'})[\s\S])*)"
        self._patterns: dict[tuple[str, ...], re.Pattern[str] | None] = {}

    def read(self, ids: list[int]) -> Prompt | None:
        """The one user turn as text, or the messages; None where rendering and encoding them would not give these very ids."""
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for turns in range(TURNS):
            for system in ((), ("system",)):
                roles = (*system, *("user", "assistant") * turns, "user")
                found = self._pattern(roles)
                matched = found.fullmatch(text) if found else None
                if matched is None:
                    continue
                messages = [{"role": role, "content": content} for role, content in zip(roles, matched.groups(), strict=True)]
                if self._encoded(messages) == ids:
                    return messages[0]["content"] if len(messages) == 1 else messages
        return None

    def _pattern(self, roles: tuple[str, ...]) -> re.Pattern[str] | None:
        """What a conversation of these roles looks like, each content a group; None where the template refuses or repeats it."""
        if roles not in self._patterns:
            marked = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
            skeleton = self._render(marked)
            in_order = skeleton is not None and [int(place[1]) for place in _PLACE.finditer(skeleton)] == list(range(len(roles)))
            parts = [re.escape(part) for part in _PLACE.sub("\ue000", skeleton).split("\ue000")] if skeleton is not None and in_order else []
            self._patterns[roles] = re.compile(self._content.join(parts)) if parts else None
        return self._patterns[roles]

    def _encoded(self, messages: list[dict[str, str]]) -> list[int] | None:
        text = self._render(messages)
        return None if text is None else self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: list[dict[str, str]]) -> str | None:
        """The text as it is when prompts are tokenized; None where the template refuses these roles."""
        [text] = self._renderer.render([(messages, True)])
        return text if isinstance(text, str) else None
