"""Where a chat template puts the contents of a conversation of one shape, and which of it the model writes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Messages = list[dict[str, Any]]
Piece = tuple[str, bool]  # a stretch of the rendered text, and whether the model is trained to write it
Part = str | int  # a literal of the template, or the number of the content that stands there

_PLACE = re.compile("\ue000(\\d+)\ue001")
_THOUGHT = re.compile(r"(<think>\n*)(.*?)(\n*</think>\n*)(.*)", re.DOTALL)  # templates of thinking models take it apart
CHANGED = "the chat template changes or drops the text"


def as_json(text: str) -> str:
    """The inside of a JSON string: Llama 3.1 writes a tool's result so."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


# what templates do to a content
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip, lambda text: text.lstrip("\n"), lambda text: text.strip("\n"), as_json)


class BadRow(Exception):
    """A row that cannot be trained on; its text is the reason, which the account counts."""


@dataclass(frozen=True)
class Shape:
    """A template's output as literals and numbered contents, cut into given and supervised stretches by turns, given first."""

    stretches: tuple[tuple[Part, ...], ...]

    def fill(self, contents: Sequence[str], text: str) -> list[Piece] | BadRow:
        """`text`, cut as this shape says; BadRow where it is not this shape with these contents in it."""
        pieces: list[Piece] = []
        at = 0
        following = iter(self._following)
        for index, stretch in enumerate(self.stretches):
            start = at
            for part in stretch:
                if not isinstance(part, int):
                    if not text.startswith(part, at):
                        return BadRow(CHANGED)
                    at += len(part)
                    continue
                content, literal = contents[part], next(following)
                found = next((one for trim in _TRIMS if text.startswith((one := trim(content)) + literal, at)), None)
                if found is None:
                    return BadRow(CHANGED)
                at += len(found)
            pieces.append((text[start:at], bool(index % 2)))
        return pieces if at == len(text) else BadRow(CHANGED)

    @cached_property
    def _following(self) -> list[str]:
        """What stands right after each content."""
        parts = [part for stretch in self.stretches for part in stretch if part != ""]
        after = [one if isinstance(one, str) else "" for one in [*parts[1:], ""]]
        return [literal for part, literal in zip(parts, after, strict=True) if isinstance(part, int)]


def shape_key(messages: Messages) -> tuple[Any, ...]:
    """What a shape depends on; its last part is null where other conversations can have the same."""
    thoughts = tuple(found.group(1, 3) if (found := _thought(one)) else None for one in messages)
    more = [{key: one[key] for key in one if key not in ("role", "content")} for one in messages]
    return tuple(one["role"] for one in messages), thoughts, json.dumps(more) if any(more) else None


def _thought(message: dict[str, Any]) -> re.Match[str] | None:
    return _THOUGHT.fullmatch(message["content"]) if message["role"] == "assistant" else None


def parts_of(messages: Messages) -> list[str]:
    """Two contents for each message: its thought (or nothing) and its text."""
    found: list[str] = []
    for one in messages:
        thought = _thought(one)
        found += list(thought.group(2, 4)) if thought else ["", one["content"]]
    return found


def marked(messages: Messages) -> Messages:
    """The messages with a numbered placeholder for each content; an empty one beside tool calls stays empty."""
    return [one | {"content": _places(one, 2 * index)} for index, one in enumerate(messages)]


def _places(one: dict[str, Any], number: int) -> str:
    if not one["content"]:
        return ""
    first, second = (f"\ue000{at}\ue001" for at in (number, number + 1))
    return f"{found[1]}{first}{found[3]}{second}" if (found := _thought(one)) else second


def outline(plan: Messages, skeleton: Any, prompts: Sequence[Any], turns: Sequence[Any], special: re.Pattern[str], stops: set[str]) -> Shape:
    """The shape of marked messages: `skeleton` is all of them rendered, `prompts` and `turns` end before and after each assistant turn.

    Adds the end-of-turn tokens it meets to `stops`. BadRow where the template refuses them, or loses what they hold.
    """
    if not isinstance(skeleton, str):
        raise BadRow(str(skeleton))
    for one in plan:
        if any(skeleton.count(place[0]) < 1 for place in _PLACE.finditer(one["content"])):
            raise BadRow(CHANGED if one["role"] == "assistant" else f"the chat template drops the {one['role']}'s text")
    cuts = [0]
    for one, prompt, turn in zip((one for one in plan if one["role"] == "assistant"), prompts, turns, strict=True):
        if not isinstance(prompt, str):
            raise BadRow(str(prompt))
        start, end = _calls(one, skeleton, prompt, turn, special) if one.get("tool_calls") else _answer(one, skeleton, prompt, special)
        if start < cuts[-1]:
            raise BadRow("the chat template interleaves turns")
        stops.add(next(found[0] for found in special.finditer(skeleton, start) if found.end() == end))
        cuts += [start, end]
    edges = [*cuts, len(skeleton)]
    return Shape(tuple(tuple(_parts(skeleton[a:b])) for a, b in itertools.pairwise(edges)))


def _parts(text: str) -> Iterator[Part]:
    at = 0
    for place in _PLACE.finditer(text):
        yield text[at : place.start()]
        yield int(place[1])
        at = place.end()
    yield text[at:]


def _answer(message: dict[str, Any], skeleton: str, prompt: str, special: re.Pattern[str]) -> tuple[int, int]:
    """Where an assistant's text begins and ends: from the generation prompt to the end-of-turn token."""
    places = [place[0] for place in _PLACE.finditer(message["content"])]
    if any(skeleton.count(place) != 1 for place in places):
        raise BadRow(CHANGED)
    start, end = skeleton.index(places[0]), skeleton.index(places[-1]) + len(places[-1])
    stop = special.match(skeleton, end) or special.match(skeleton, _skip_space(skeleton, end))
    if stop is None:
        raise BadRow("the chat template writes no end-of-turn token after the assistant's text")
    # Where a template goes on otherwise than its own prompt says, the text itself is all that is surely the model's.
    begins_there = len(prompt) <= start and skeleton.startswith(prompt)
    return (len(prompt) if begins_there else start), stop.end()


def _calls(message: dict[str, Any], skeleton: str, prompt: str, turn: Any, special: re.Pattern[str]) -> tuple[int, int]:
    """Where an assistant's turn with tool calls begins and ends: from the generation prompt to what ends a conversation that stops there."""
    if not isinstance(turn, str):
        raise BadRow(str(turn))
    *_, stop = [None, *special.finditer(turn)]
    if stop is None or turn[stop.end() :].strip() or not skeleton.startswith(prompt):
        raise BadRow("the chat template writes no end-of-turn token after the assistant's tool calls")
    end = skeleton.find(stop[0], len(prompt)) + len(stop[0])
    if any(call["function"]["name"] not in skeleton[len(prompt) : end] for call in message["tool_calls"]):
        raise BadRow("the chat template drops the tool calls")
    return len(prompt), end


def any_of(words: list[str]) -> re.Pattern[str]:
    """Matches any of the words, the longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")


def _skip_space(text: str, at: int) -> int:
    return at + len(text[at:]) - len(text[at:].lstrip())
