"""A corpus row as rows of the view that is tokenized: itself, or made of another view's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


def derive(view: str, source: str, row: Mapping[str, Any]) -> list[Row]:
    """Rows of `view` from one corpus row of the view `source` (see lmforge.formats.corpus.DERIVED)."""
    if view == source:
        return [dict(row)]
    if view == "feedback":  # a pair says of each answer whether it is wanted
        sides = (("chosen", True), ("rejected", False))
        return [{"prompt": row["prompt"], "completion": row[side], "label": label, "source": row["source"]} for side, label in sides]
    prompt, answer = _question(source, row)
    return [{"prompt": prompt, "answer": answer, "source": row["source"]}]


def _question(source: str, row: Mapping[str, Any]) -> tuple[Any, str | None]:
    """A row's prompt, and its answer where it gives a good one."""
    if source == "preference":
        return row["prompt"], row["chosen"]
    if source == "feedback":
        return row["prompt"], row["completion"] if row["label"] else None
    messages = row["messages"]
    last = max((index for index, one in enumerate(messages) if one["role"] == "assistant"), default=len(messages))
    return messages[:last], messages[last]["content"] or None if last < len(messages) else None
