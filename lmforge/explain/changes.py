"""What two pieces of plain data differ in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Plain data as dotted keys."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}


def changes(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """Dotted keys that differ, with both values; a key one side lacks shows as None."""
    left, right = flatten(before), flatten(after)
    return [(key, left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
