"""The row shapes in use, brought to ours: text, chat (messages, prompt/completion, Alpaca, ShareGPT) and preference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant", "tool": "tool"}


class BadRow(Exception):
    """A row that cannot be used: `kind` is counted in the account, `reason` goes to the quarantine."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(kind, reason)


def view_of(value: Mapping[str, Any], text_field: str) -> str:
    """The view that a row's fields speak of; BadRow where they say nothing."""
    if "chosen" in value and "rejected" in value:
        return "preference"
    if "messages" in value or "conversations" in value or {"prompt", "completion"} <= value.keys() or {"instruction", "output"} <= value.keys():
        return "chat"
    if text_field in value:
        return "text"
    names = ", ".join(sorted(value)) or "none"
    wanted = f"{text_field}; messages; conversations; prompt + completion; instruction + output; prompt + chosen + rejected"
    raise BadRow("missing_field", f"no known fields (has: {names}; wanted one of: {wanted})")


def parse(value: Any, text_field: str, view: str | None) -> tuple[str, Row]:
    """(view, row without source) of one raw row; `view` null goes by the fields. BadRow where a field is missing, of a wrong type or empty."""
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"expected an object, got {type(value).__name__}")
    view = view or view_of(value, text_field)
    row = {"text": _text_row, "chat": _chat_row, "preference": _preference_row}[view](value, text_field)
    return view, row


def _string(value: Any, name: str, *, empty: bool = False) -> str:
    if value is None:
        raise BadRow("missing_field", f"{name} is missing")
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{name} is {type(value).__name__}, not text")
    if not empty and not value.strip():
        raise BadRow("empty", f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not_utf8", f"{name} holds half of a surrogate pair") from error
    return value


def _text_row(value: Mapping[str, Any], text_field: str) -> Row:
    return {"text": _string(value.get(text_field), text_field)}


def _chat_row(value: Mapping[str, Any], _: str) -> Row:
    if "messages" in value:
        return {"messages": _messages(value["messages"], "messages", "role", "content")}
    if "conversations" in value:
        return {"messages": _messages(value["conversations"], "conversations", "from", "value")}
    if "completion" in value:
        return {"messages": _turn(_string(value.get("prompt"), "prompt"), _string(value["completion"], "completion"))}
    if "instruction" in value:
        asked, extra = _string(value["instruction"], "instruction"), _string(value.get("input") or "", "input", empty=True)
        return {"messages": _turn(f"{asked}\n\n{extra}" if extra.strip() else asked, _string(value.get("output"), "output"))}
    raise BadRow("missing_field", "no messages, conversations, prompt + completion, or instruction + output")


def _turn(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _messages(value: Any, name: str, role_key: str, content_key: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} is {type(value).__name__}, not a list")
    found = []
    for index, one in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(one, Mapping):
            raise BadRow("wrong_type", f"{where} is {type(one).__name__}, not an object")
        role = _string(one.get(role_key), f"{where}.{role_key}")
        if role not in ROLES:
            raise BadRow("wrong_type", f"{where}.{role_key} is {role!r}, not one of {', '.join(ROLES)}")
        found.append({"role": ROLES[role], "content": _string(one.get(content_key), f"{where}.{content_key}")})
    if not any(one["role"] == "assistant" for one in found):
        raise BadRow("missing_field", f"{name} has no assistant turn to learn from")
    if found[0]["role"] == "assistant":
        raise BadRow("missing_field", f"{name} begins with the assistant, so there is no prompt")
    return found


def _preference_row(value: Mapping[str, Any], _: str) -> Row:
    """Prompt, chosen and rejected as text; a one-turn conversation in `chosen` and `rejected` is unfolded."""
    prompt, chosen = _response(value, "chosen")
    other, rejected = _response(value, "rejected")
    given = value.get("prompt")
    if isinstance(given, list):
        given = _single(given, "prompt")
    found = _string(given if given is not None else prompt, "prompt")
    if any(one is not None and one != found for one in (prompt, other)):
        raise BadRow("wrong_type", "chosen and rejected do not answer the same prompt")
    if chosen == rejected:
        raise BadRow("empty", "chosen and rejected are the same")
    return {"prompt": found, "chosen": chosen, "rejected": rejected}


def _response(value: Mapping[str, Any], name: str) -> tuple[str | None, str]:
    """(prompt or None, response) of one side."""
    side = value.get(name)
    if not isinstance(side, list):
        return None, _string(side, name)
    turns = side if side and isinstance(side[0], Mapping) and side[0].get("role") == "assistant" else _messages(side, name, "role", "content")
    roles = [one.get("role") for one in turns if isinstance(one, Mapping)]
    if roles == ["assistant"]:
        return None, _string(turns[0].get("content"), f"{name}[0].content")
    if roles == ["user", "assistant"]:
        return turns[0]["content"], turns[1]["content"]
    raise BadRow("wrong_type", f"{name} is not one prompt and one answer")


def _single(turns: list[Any], name: str) -> str:
    if len(turns) == 1 and isinstance(turns[0], Mapping) and turns[0].get("role") == "user":
        return _string(turns[0].get("content"), f"{name}[0].content")
    raise BadRow("wrong_type", f"{name} is not a single user turn")


def texts(view: str, row: Mapping[str, Any]) -> list[str]:
    """The texts of a row in order, roles included for a chat: what deduplication and byte counts go by."""
    if view == "text":
        return [row["text"]]
    if view == "chat":
        return [part for message in row["messages"] for part in (message["role"], message["content"])]
    return [row["prompt"], row["chosen"], row["rejected"]]


def question(view: str, row: Mapping[str, Any]) -> list[str]:
    """What decides a row's split: its text, or its prompt alone, so that one prompt never stands on both sides."""
    if view == "text":
        return [row["text"]]
    if view == "chat":
        turns = [message["role"] for message in row["messages"]]
        return [message["content"] for message in row["messages"][: turns.index("assistant")]]
    return [row["prompt"]]


def size(view: str, row: Mapping[str, Any]) -> int:
    """UTF-8 bytes of a row's contents."""
    parts = [message["content"] for message in row["messages"]] if view == "chat" else texts(view, row)
    return sum(len(part.encode()) for part in parts)
