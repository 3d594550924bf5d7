"""The row shapes in use, brought to ours: text, chat (messages, prompt/completion, Alpaca, ShareGPT), preference, feedback (KTO) and prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lmforge.data import turns
from lmforge.data.turns import BadRow, Message, text
from lmforge.formats import conversation

Row = dict[str, Any]
ANSWERS = ("answer", "solution", "ground_truth")  # names of a prompt's reference answer


def fields(value: Any) -> Mapping[str, Any]:
    """A row as its fields; BadRow where it is no object."""
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"expected an object, got {type(value).__name__}")
    return value


def view_of(value: Mapping[str, Any], text_field: str) -> str:
    """The view that a row's fields speak of; BadRow where they say nothing."""
    names = value.keys()
    if {"chosen", "rejected"} <= names:
        return "preference"
    if {"prompt", "completion", "label"} <= names:
        return "feedback"
    if "messages" in names or "conversations" in names or {"prompt", "completion"} <= names or {"instruction", "output"} <= names:
        return "chat"
    if text_field in names:
        return "text"
    if "prompt" in names or {"question", "answer"} <= names:
        return "prompt"
    has = ", ".join(sorted(value)) or "none"
    wanted = f"{text_field}; messages; conversations; prompt (+ completion (+ label)); instruction + output; prompt + chosen + rejected; question + answer"
    raise BadRow("missing_field", f"no known fields (has: {has}; wanted one of: {wanted})")


def parse(value: Any, text_field: str, view: str | None) -> tuple[str, Row]:
    """(view, row without source) of one raw row; `view` null goes by the fields. BadRow where a field is missing, of a wrong type or empty."""
    value = fields(value)
    view = view or view_of(value, text_field)
    if view == "text":
        return view, {"text": text(value.get(text_field), text_field)}
    return view, {"chat": _chat, "preference": _preference, "feedback": _feedback, "prompt": _prompt}[view](value)


def _chat(value: Mapping[str, Any]) -> Row:
    if "messages" in value:
        return {"messages": turns.chat(value["messages"], "messages")}
    if "conversations" in value:
        return {"messages": turns.chat(value["conversations"], "conversations", "from", "value")}
    if "completion" in value:
        asked, (before, said) = turns.prompt(value.get("prompt"), "prompt"), turns.answer(value["completion"], "completion")
        if before:
            raise BadRow("wrong_type", "completion is not one assistant turn")
        return {"messages": conversation.of(asked, said)}
    if "instruction" in value:
        asked, extra = text(value["instruction"], "instruction"), text(value.get("input") or "", "input", empty=True)
        return {"messages": conversation.of(f"{asked}\n\n{extra}" if extra.strip() else asked, text(value.get("output"), "output"))}
    raise BadRow("missing_field", "no messages, conversations, prompt + completion, or instruction + output")


def _preference(value: Mapping[str, Any]) -> Row:
    """Prompt, chosen and rejected; a prompt that is not given stands before the last turn of both."""
    (before, chosen), (other, rejected) = (turns.answer(value.get(side), side) for side in ("chosen", "rejected"))
    asked = None if value.get("prompt") is None else turns.prompt(value["prompt"], "prompt")
    row: Row = {"prompt": _common(asked, before, other), "chosen": chosen, "rejected": rejected}
    if chosen == rejected:
        raise BadRow("chosen_is_rejected", "chosen and rejected are the same")
    margin = value.get("margin")
    if margin is None:
        return row
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise BadRow("wrong_type", f"margin is {margin!r}, not a number")
    return row | {"margin": margin}


def _common(asked: str | list[Message] | None, before: list[Message], other: list[Message]) -> str | list[Message]:
    """The prompt that both sides answer: the one given, or the longer one that they repeat and that begins or ends with it."""
    found = [one for one in (before, other) if one]
    if asked is None and len(found) < 2:
        raise BadRow("missing_field", "prompt is missing")
    given = [] if asked is None else conversation.of(asked)
    longest = max([given, *found], key=len)
    if any(one != longest for one in found) or given not in (longest[: len(given)], longest[len(longest) - len(given) :]):
        raise BadRow("different_prompts", "chosen and rejected do not answer the same prompt")
    return turns.prompt(longest, "the prompt")


def _feedback(value: Mapping[str, Any]) -> Row:
    before, said = turns.answer(value.get("completion"), "completion")
    asked = _common(None if value.get("prompt") is None else turns.prompt(value["prompt"], "prompt"), before, before)
    if not isinstance(label := value.get("label"), bool):
        raise BadRow("label_not_boolean", f"label is {'missing' if label is None else repr(label)}, not a boolean")
    return {"prompt": asked, "completion": said, "label": label}


def _prompt(value: Mapping[str, Any]) -> Row:
    name = next((one for one in ("prompt", "question", "messages") if value.get(one) is not None), "prompt")
    found = next((one for one in ANSWERS if value.get(one) is not None), None)
    given = value[found] if found else None
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        given = json.dumps(given)
    return {"prompt": turns.prompt(value.get(name), name), "answer": text(given, str(found)) if found else None}


def texts(view: str, row: Mapping[str, Any]) -> list[str]:
    """The texts of a row in order, roles included for messages: what deduplication goes by."""
    if view == "text":
        return [row["text"]]
    if view == "chat":
        return [part for message in row["messages"] for part in (message["role"], message["content"], *_more(message))]
    prompt = [row["prompt"]] if isinstance(row["prompt"], str) else texts("chat", {"messages": row["prompt"]})
    return [*prompt, *_answers(row), *([str(row["label"])] if view == "feedback" else [])]


def question(view: str, row: Mapping[str, Any]) -> list[str]:
    """What decides a row's split: its text, or its first question alone, so that one prompt never stands on both sides."""
    if view == "text":
        return [row["text"]]
    messages = row["messages"] if view == "chat" else conversation.of(row["prompt"])
    first = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return [message["content"] for message in messages[:first]]


def size(view: str, row: Mapping[str, Any]) -> int:
    """UTF-8 bytes of a row's contents."""
    if view == "text":
        return len(row["text"].encode())
    messages = row["messages"] if view == "chat" else conversation.of(row["prompt"])
    contents = [part for message in messages for part in (message["content"], *_more(message))]
    return sum(len(part.encode()) for part in [*contents, *_answers(row)])


def _answers(row: Mapping[str, Any]) -> list[str]:
    return [row[name] for name in ("chosen", "rejected", "completion", "answer") if row.get(name) is not None]


def _more(message: Message) -> list[str]:
    """What a message holds beside role and content."""
    found = {key: message[key] for key in message if key not in ("role", "content")}
    return [json.dumps(found, sort_keys=True, ensure_ascii=False)] if found else []
