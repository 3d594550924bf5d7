"""Which layer said what: the command line wins over the experiment, the experiment over an option's YAML.

Hydra merges layers and forgets them; three rules need them back: a choice of exactly one key is replaced whole by a
higher layer, a stage's own changes win over an option chosen for it, and an override no stage would see is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmforge.compose.app import Composed

Tree = dict[str, Any]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`over` on top of `base`, mappings key by key."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        result[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def dig(tree: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for part in path.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def has(tree: Any, path: str) -> bool:
    """Is there something at a dotted path, null included?"""
    head, _, last = path.rpartition(".")
    parent = dig(tree, head) if head else tree
    return isinstance(parent, Mapping) and last in parent


def experiments(composed: Composed) -> list[Tree]:
    """The experiment file and those it builds on, highest first."""
    chain: list[Tree] = []
    pending = [(group, composed.choices[group]) for group in ("sweep", "experiment") if composed.choices.get(group)]
    while pending:
        group, option = pending.pop(0)
        tree = composed.catalog.load(group, option)
        chain.append(tree)
        for entry in tree.get("defaults") or []:
            if isinstance(entry, str) and entry in composed.catalog.options.get(group, {}):
                pending.append((group, entry))
    return chain


def stage_yaml(composed: Composed, type_: str) -> Tree:
    """What the stage's own option file says."""
    known = composed.catalog.options.get("stage", {})
    return composed.catalog.load("stage", type_) if type_ in known else {}


def command_line(composed: Composed, prefix: str) -> set[str]:
    """Dotted keys typed below `prefix`, relative to it."""
    return {key[len(prefix) + 1 :] for one in composed.typed for key in one.keys if key.startswith(prefix + ".")}


def chosen_keys(composed: Composed, path: str, value: Mapping[str, Any]) -> list[str]:
    """Which keys of an exactly-one choice at `path` the highest layer that speaks of it sets."""
    typed = [key for key in value if key in command_line(composed, path) and value[key] is not None]
    if typed:
        return typed
    for tree in experiments(composed):
        said = dig(tree, path)
        if isinstance(said, Mapping) and (keys := [key for key in said if said[key] is not None]):
            return keys
    return [key for key in value if value[key] is not None]


def exactly_one(composed: Composed, path: str, value: Mapping[str, Any]) -> Tree:
    """The choice with everything a lower layer said set to null."""
    kept = chosen_keys(composed, path, value)
    return {key: (inner if key in kept else None) for key, inner in value.items()}


def shadows(stage: Mapping[str, Any], key: str) -> bool:
    """Does a stage have its own value for a root key: the very key, or an option of its own that holds it?"""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        holder = dig(stage, ".".join(parts[:depth]))
        if isinstance(holder, Mapping) and "type" in holder:
            return True
    own = dig(stage, key)
    return has(stage, key) and not (isinstance(own, Mapping) and "type" not in own)
