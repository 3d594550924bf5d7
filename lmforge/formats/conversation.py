"""What a conversation to learn from is: roles, the order of turns, and contents; said once, for the corpus and for the chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
KEPT = ("role", "content", "tool_calls", "name", "tool_call_id")  # a message's fields that go on to the chat template
FOLLOWS = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


class Complaint(NamedTuple):
    """Why a list of messages is no conversation: a kind to count it by, the reason, and the message it shows at."""

    kind: str
    reason: str
    at: int | None = None


def complaint(messages: Any) -> Complaint | None:
    """The first thing that is wrong with messages whose contents are text, or None. An empty content is right beside tool calls only."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return Complaint("empty_conversation", "no messages")
    before = ""
    for index, one in enumerate(messages):
        if not isinstance(one, Mapping) or not isinstance(one.get("content"), str):
            return Complaint("wrong_type", "a content is not text", index)
        role = one.get("role")
        if role not in ROLES:
            return Complaint("unknown_role", "unknown role", index)
        if not _callable(one.get("tool_calls")):
            return Complaint("wrong_type", "tool_calls is not a list of functions with a name and arguments", index)
        if role not in FOLLOWS[before]:
            return Complaint("turn_order", _out_of_order(before, role), index)
        if not one["content"].strip() and not (role == "assistant" and one.get("tool_calls")):
            return Complaint("empty", "an empty turn", index)
        before = role
    return None


def _callable(calls: Any) -> bool:
    if calls is None:
        return True
    functions = [one.get("function") if isinstance(one, Mapping) else None for one in calls] if isinstance(calls, list) else [None]
    return all(isinstance(one, Mapping) and isinstance(one.get("name"), str) and "arguments" in one for one in functions)


def unanswered(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it has no assistant turn."""
    return all(one["role"] != "assistant" for one in messages)


def _out_of_order(before: str, role: str) -> str:
    if before == role:
        return f"two {role} turns in a row"
    if not before:
        return f"begins with the {role}, so there is no prompt"
    return f"{_a(role)} turn right after {_a(before)} turn"


def _a(role: str) -> str:
    return f"{'an' if role[0] in 'aeiou' else 'a'} {role}"


def of(prompt: str | Sequence[Mapping[str, Any]], answer: str | None = None) -> list[dict[str, Any]]:
    """A prompt (a text is one user turn) as messages, with the answer as an assistant turn where given."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]
