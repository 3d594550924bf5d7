"""Our chat template, and which part of a rendered conversation the model is trained to write, for any template.

Stock templates do not mark the assistant's text. So each shape of conversation (its sequence of roles) is rendered once with
placeholders for the contents, which shows where the template puts them and what it writes around them. A real conversation is
then rendered whole and must equal that skeleton with its contents filled in; where it does not, the row is refused, not guessed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Each marker is one token that BPE never merges with its neighbours, so contents need no newline around them:
# prompt and response have the same ids apart or together, and contents keep every space.
EOS, USER, ASSISTANT, SYSTEM, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
MARKERS = (USER, ASSISTANT, SYSTEM, END)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role: ' ~ message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

ROLES = ("system", "user", "assistant")
Piece = tuple[str, bool]  # a stretch of the rendered text, and whether the model is trained to write it
_PLACE = re.compile("\ue000(\\d+)\ue001")
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)  # what templates do to a content
_DATE = "26 Jul 2024"  # Llama 3's own default; its newer templates would write today's date into every row


class BadRow(Exception):
    """A row that cannot be trained on; its text is the reason, which the account counts."""


def complaint(messages: Any) -> str:
    """Why these are no conversation to train on, or an empty string."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "no messages"
    if any(not isinstance(one, Mapping) or not isinstance(one.get("content"), str) for one in messages):
        return "a content is not text"
    roles = [one.get("role") for one in messages]
    if any(role not in ROLES for role in roles):
        return "unknown role"
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        return "no assistant turn"
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(turns)):
        return "turns do not alternate from user to assistant"
    if any(not one["content"].strip() for one in messages):
        return "an empty turn"
    return ""


class Chat:
    """Renders conversations with a tokenizer's template; `stops` collects the end-of-turn tokens it has met."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = _any_of([token.content for token in tokenizer.added_tokens_decoder.values() if token.special])
        self._shapes: dict[tuple[str, ...], list[Piece]] = {}
        self._trims = list(itertools.product(_TRIMS, repeat=2))
        self.stops: set[str] = set()

    def pieces(self, messages: Any) -> list[Piece]:
        """The rendered text in pieces that alternate between given and supervised; joined, they are exactly the template's output.

        A supervised piece is what follows the generation prompt: the assistant's text and its end-of-turn token. BadRow says why not.
        """
        if reason := complaint(messages):
            raise BadRow(reason)
        plain = [{"role": one["role"], "content": one["content"]} for one in messages]
        if any(self._special.search(one["content"]) for one in plain):
            raise BadRow("a content holds a special token")
        roles = tuple(one["role"] for one in plain)
        if roles not in self._shapes:
            self._shapes[roles] = self._shape(roles)
        rendered = self._render(plain)
        for trims in self._trims:
            contents = [trims[one["role"] == "assistant"](one["content"]) for one in plain]
            filled = [(_PLACE.sub(lambda place, c=contents: c[int(place[1])], text), supervised) for text, supervised in self._shapes[roles]]  # type: ignore[misc]
            if "".join(text for text, _ in filled) == rendered:
                self._trims.remove(trims)
                self._trims.insert(0, trims)  # the next row is trimmed the same way
                return filled
        raise BadRow("the chat template changes or drops the text")

    def _render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, date_string=_DATE)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from error
        return text

    def _shape(self, roles: tuple[str, ...]) -> list[Piece]:
        """The pieces of a conversation of this shape, with a placeholder for each content."""
        marked = [{"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(roles)]
        skeleton = self._render(marked)
        cuts: list[int] = []
        for index, message in enumerate(marked):
            if message["role"] == "assistant":
                start, end = self._span(skeleton, message["content"], self._render(marked[:index], prompt=True))
                if cuts and start < cuts[-1]:
                    raise BadRow("the chat template interleaves turns")
                cuts += [start, end]
        edges = [0, *cuts, len(skeleton)]
        return [(skeleton[a:b], bool(index % 2)) for index, (a, b) in enumerate(itertools.pairwise(edges))]

    def _span(self, skeleton: str, content: str, prompt: str) -> tuple[int, int]:
        """Where an assistant's turn begins and ends: from the generation prompt to the end-of-turn token."""
        if skeleton.count(content) != 1:
            raise BadRow("the chat template changes or drops the text")
        start = skeleton.index(content)
        stop = self._special.match(skeleton, start + len(content)) or self._special.match(skeleton, _skip_space(skeleton, start + len(content)))
        if stop is None:
            raise BadRow("the chat template writes no end-of-turn token after the assistant's text")
        self.stops.add(stop[0])
        # Where a template goes on otherwise than its own prompt says, the text itself is all that is surely the model's.
        begins_there = len(prompt) <= start and skeleton.startswith(prompt)
        return (len(prompt) if begins_there else start), stop.end()


def _any_of(words: list[str]) -> re.Pattern[str]:
    """Matches any of the words, the longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")


def _skip_space(text: str, at: int) -> int:
    return at + len(text[at:]) - len(text[at:].lstrip())
