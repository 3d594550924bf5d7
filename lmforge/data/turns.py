"""The message lists in use, brought to ours: roles by their several names, tool calls and their results, and contents that are text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lmforge.formats import conversation

Message = dict[str, Any]
# ShareGPT's names beside the chat format's; its function_call is an assistant turn whose value is the call itself
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
ROLES |= {"tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant"}


class BadRow(Exception):
    """A row that cannot be used: `kind` is counted in the account, `reason` goes to the quarantine."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(kind, reason)


def text(value: Any, name: str, *, empty: bool = False) -> str:
    """A field that is text; BadRow where it is missing, of another type, or empty."""
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


def messages(value: Any, name: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """A list of messages in our form, whatever their order."""
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} is {type(value).__name__}, not a list")
    if not value:
        raise BadRow("empty_conversation", f"{name} is empty")
    found = [_message(one, f"{name}[{index}]", role_key, content_key) for index, one in enumerate(value) if not _says_nothing(one, role_key, content_key)]
    if not found:
        raise BadRow("empty_conversation", f"{name} is empty")
    return found


def _says_nothing(one: Any, role_key: str, content_key: str) -> bool:
    """A system turn without text, which many data sets carry in every row: the same as none."""
    return isinstance(one, Mapping) and one.get(role_key) == "system" and one.get(content_key) in ("", None, [])


def _joined(content: Any) -> Any:
    """Contents given as a list of text parts as one text; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [one["text"] for one in content if isinstance(one, Mapping) and one.get("type") == "text" and isinstance(one.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content


def check(found: list[Message], name: str) -> None:
    """BadRow where the turns come in an order that is no conversation's."""
    if bad := conversation.complaint(found):
        raise BadRow(bad.kind, f"{name}{'' if bad.at is None else f'[{bad.at}]'}: {bad.reason}")


def chat(value: Any, name: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """A conversation to learn from."""
    found = messages(value, name, role_key, content_key)
    if conversation.unanswered(found):
        raise BadRow("no_assistant_turn", f"{name} has no assistant turn to learn from")
    check(found, name)
    return found


def prompt(value: Any, name: str) -> str | list[Message]:
    """A text, or messages that end before an answer; a single user turn is its text."""
    if not isinstance(value, list):
        return text(value, name)
    found = messages(value, name)
    check(found, name)
    if found[-1]["role"] not in ("user", "tool"):
        raise BadRow("turn_order", f"{name} ends with the {found[-1]['role']}, so there is nothing to answer")
    return single(found)


def single(found: list[Message]) -> str | list[Message]:
    """Messages, or the text of what is but one user turn."""
    return str(found[0]["content"]) if len(found) == 1 and found[0].keys() == {"role", "content"} else found


def answer(value: Any, name: str) -> tuple[list[Message], str]:
    """(the messages before it, the answer) of a text or of messages that end with the assistant's."""
    if not isinstance(value, list):
        return [], text(value, name)
    *before, last = messages(value, name)
    if last["role"] != "assistant":
        raise BadRow("no_assistant_turn", f"{name} does not end with the assistant")
    return before, text(last["content"], f"{name}[{len(before)}].content")


def _message(one: Any, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(one, Mapping):
        raise BadRow("wrong_type", f"{where} is {type(one).__name__}, not an object")
    given = text(one.get(role_key), f"{where}.{role_key}")
    if given not in ROLES:
        raise BadRow("unknown_role", f"{where}.{role_key} is {given!r}, not one of {', '.join(ROLES)}")
    content, calls = _joined(one.get(content_key)), one.get("tool_calls")
    if given == "function_call":
        content, calls = "", [_json(text(content, f"{where}.{content_key}"))]
    found: Message = {"role": ROLES[given], "content": text("" if content is None and calls else content, f"{where}.{content_key}", empty=bool(calls))}
    if calls:
        found["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    return found | {key: text(one[key], f"{where}.{key}") for key in ("name", "tool_call_id") if one.get(key) is not None}


def _calls(calls: Any, where: str) -> list[Message]:
    """Tool calls as the chat format has them: {"type": "function", "function": {"name", "arguments"}}, arguments as an object where they are one."""
    if not isinstance(calls, list):
        raise BadRow("wrong_type", f"{where} is {type(calls).__name__}, not a list")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("wrong_type", f"{where}[{index}] is not a call of a named function")
        arguments = function.get("arguments", {})
        arguments = _json(arguments) if isinstance(arguments, str) else arguments
        made: Message = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append(made if call.get("id") is None else {"id": text(call["id"], f"{where}[{index}].id")} | made)
    return found


def _json(given: str) -> Any:
    """An object written as JSON; any other text stays as it is."""
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return found if isinstance(found, dict) else given
