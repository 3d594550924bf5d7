"""Our chat template, and which part of a rendered conversation the model is trained to write, for any template.

Stock templates do not mark the assistant's text. So each shape of conversation (its roles, tool calls and thoughts) is rendered once
with placeholders for the contents, which shows where the template puts them and what it writes around them. A real conversation is
then rendered whole and must equal that skeleton with its contents filled in; where it does not, the row is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lmforge.formats import conversation
from lmforge.tokenizer.shapes import BadRow, Messages, Piece, Shape, any_of, as_json, marked, outline, parts_of, shape_key
from lmforge.tokenizer.templates import Refused, Renderer

Mode = Literal["every", "last", "prompt"]  # learn every assistant turn, the last one, or none: the prompt that asks for one
Request = tuple[Any, Mode]
Result = list[Piece] | BadRow


class Chat:
    """Renders conversations with a tokenizer's template; `stops` collects the end-of-turn tokens it has met."""

    def __init__(self, tokenizer: Any, renderer: Renderer) -> None:
        self._renderer = renderer
        self._special = any_of([token.content for token in tokenizer.added_tokens_decoder.values() if token.special])
        self._shapes: dict[tuple[Any, ...], Shape | BadRow] = {}
        self.stops: set[str] = set()

    def pieces(self, messages: Any, mode: Mode = "every") -> list[Piece]:
        """One conversation's pieces; BadRow says why not."""
        [found] = self.many([(messages, mode)])
        if isinstance(found, BadRow):
            raise found
        return found

    def many(self, requests: Sequence[Request]) -> list[Result]:
        """The rendered text of each in pieces, given or supervised; joined, they are exactly the template's output.

        A supervised piece is what follows the generation prompt: the assistant's text and its end-of-turn token. In mode `last` what
        stands before the last one is a single given piece; in mode `prompt` there is one given piece, which ends where an answer begins.
        """
        clean = [self._clean(messages, mode) for messages, mode in requests]
        good = [(messages, mode == "prompt") for messages, (_, mode) in zip(clean, requests, strict=True) if not isinstance(messages, BadRow)]
        texts = iter(self._renderer.render(good))
        return [
            messages if isinstance(messages, BadRow) else self._result(messages, mode, next(texts)) for messages, (_, mode) in zip(clean, requests, strict=True)
        ]

    def ends(self) -> set[str]:
        """The tokens that end an assistant's turn: those met so far and that of the plainest conversation, since prompts alone show none."""
        self._shape([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return self.stops

    def _clean(self, messages: Any, mode: Mode) -> Messages | BadRow:
        if found := conversation.complaint(messages):
            return BadRow(found.reason)
        plain: Messages = [{key: one[key] for key in conversation.KEPT if one.get(key) is not None} for one in messages]
        if mode != "prompt" and conversation.unanswered(plain):
            return BadRow("no assistant turn")
        if mode != "every" and (plain[-1]["role"] == "assistant") is (mode == "prompt"):
            return BadRow("the prompt ends with an assistant turn" if mode == "prompt" else "the last turn is not the assistant's")
        if any(self._special.search(text) for text in _strings(plain)):
            return BadRow("a content holds a special token")
        return plain

    def _result(self, messages: Messages, mode: Mode, text: str | Refused) -> Result:
        if isinstance(text, Refused):
            return BadRow(str(text))
        if mode == "prompt":
            given = [(one["role"], one["content"].strip()) for one in messages if one["role"] != "assistant"]
            lost = next((role for role, content in given if content not in text and as_json(content) not in text), None)
            return BadRow(f"the chat template drops the {lost}'s text") if lost else [(text, False)]
        shape = self._shape(messages)
        if isinstance(shape, BadRow):
            return shape
        pieces = shape.fill(parts_of(messages), text)
        return last_only(pieces) if mode == "last" and not isinstance(pieces, BadRow) else pieces

    def _shape(self, messages: Messages) -> Shape | BadRow:
        """The shape of a conversation, made on first use; one with tool calls is nobody else's."""
        key = shape_key(messages)
        if key in self._shapes:
            return self._shapes[key]
        plan = marked(messages)
        asked = [(plan, False)]
        for index, one in enumerate(plan):
            if one["role"] == "assistant":
                asked += [(plan[:index], True), (plan[: index + 1], False)]
        skeleton, *others = self._renderer.render(asked)
        try:
            shape: Shape | BadRow = outline(plan, skeleton, others[::2], others[1::2], self._special, self.stops)
        except BadRow as bad:
            shape = bad
        if key[-1] is None:
            self._shapes[key] = shape
        return shape


def last_only(pieces: list[Piece]) -> list[Piece]:
    """The same text with the last supervised piece alone, and one given piece before it: the prompt as a generation is given it."""
    last = max(index for index, (_, supervised) in enumerate(pieces) if supervised)
    return [("".join(text for text, _ in pieces[:last]), False), *pieces[last:]]


def _strings(value: Any) -> list[str]:
    """Every text within plain data; keys too, which a template may write."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in _strings(one)]
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []
