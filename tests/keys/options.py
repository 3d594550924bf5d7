"""Every key of every option, and other values of each that are worth trying."""

from __future__ import annotations

import copy
import dataclasses
import types as pytypes
import typing
from collections.abc import Iterator
from typing import Any

from lmforge.codec import keys
from lmforge.compose import layers
from lmforge.compose.catalog import Catalog
from lmforge.registry import Key, Node, types
from lmforge.verbs.list import tree

WHOLE_CONFIGS = ("experiment", "sweep")  # made of other options' keys

CATALOG = Catalog.of()
OPTIONS = [(group, option) for group, options in sorted(CATALOG.options.items()) if group not in WHOLE_CONFIGS for option in sorted(options)]
NAMES = [f"{group}={option}" for group, option in OPTIONS]
CATALOG_GROUPS = {"model/tokenizer": "tokenizer"}  # the folder an option lies in, where it is not its group's name


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One key of an option: its dotted path below the group, and what the schema says of it."""

    path: str
    cls: type[Node]
    name: str
    hint: Any
    about: Key
    identity: bool


def node_of(group: str, option: str) -> type[Node]:
    return types(CATALOG_GROUPS.get(group, group))[tree(CATALOG, group, option)["type"]]


def leaves(cls: type[Node], values: dict[str, Any], prefix: str = "", identity: bool = True) -> Iterator[Leaf]:
    """Every key of a node and of the nodes in it; a stage's root groups are options of their own."""
    for name, (hint, about) in keys(cls).items():
        said = identity and cls.identity and about.identity
        inner = hint if isinstance(hint, type) and issubclass(hint, Node) else None
        if inner is not None and inner.group and cls.group == "stage":
            continue
        if inner is not None:
            chosen = types(inner.group)[values[name]["type"]] if inner.group else inner
            yield from leaves(chosen, values[name], f"{prefix}{name}.", said)
        else:
            yield Leaf(f"{prefix}{name}", cls, name, hint, about, said)


def alternatives(leaf: Leaf, value: Any) -> Iterator[Any]:
    """Other values of the key's type and range; the compiler judges which of them go with the rest."""
    origin, arms = typing.get_origin(leaf.hint), typing.get_args(leaf.hint)
    hints = arms if origin in (typing.Union, pytypes.UnionType) else (leaf.hint,)
    for hint in hints:
        if hint is type(None):
            yield None
        elif typing.get_origin(hint) is typing.Literal:
            yield from typing.get_args(hint)
        elif leaf.about.choices and hint in (int, str):
            yield from leaf.about.choices
        elif hint is bool:
            yield not value
        elif hint in (int, float):
            yield from numbers(leaf.about, value if isinstance(value, (int, float)) else None, hint)
        elif hint is str:
            yield from ("other", f"{value}x")
        elif typing.get_origin(hint) is tuple:
            yield from (list(value[1:]), list(leaf.about.choices[:1]), [*value, "lm_head"])
        elif typing.get_origin(hint) is dict and value and all(isinstance(one, (int, float)) for one in value.values()):
            yield {key: one * (2 + index) for index, (key, one) in enumerate(value.items())}
        elif value is None and isinstance(hint, type) and issubclass(hint, Node):  # a part that is left away, such as a link
            yield {name: next(number for number in numbers(about, None, float)) for name, (_, about) in keys(hint).items()}


def numbers(about: Key, value: float | None, kind: type) -> Iterator[float]:
    low = max(bound for bound in (about.gt, about.ge, -1e12) if bound is not None)
    high = min(bound for bound in (about.lt, about.le, 1e12) if bound is not None)
    start = value if value else 1.0
    near = (start * 2, start / 2, start + 1, start - 1, start * 3, (low + high) / 2, (start + min(high, start * 4)) / 2, 1, 8, 64, 512)
    for number in near:
        if low <= number <= high:
            yield int(number) if kind is int else float(number)


def places(plain: dict[str, Any], group: str, option: str) -> list[dict[str, Any]]:
    """Where an option's keys lie in an encoded experiment: a root group is in every stage that takes it."""
    stages = {one["name"]: one["stage"] for one in plain["stages"]}
    if group == "stage":
        return [stages[option]]
    if group == "reward":
        return [stages["grpo"]["reward"]]
    head, _, rest = group.partition("/")
    found = [one[head] for one in (plain, *stages.values()) if isinstance(one.get(head), dict)]
    return [one[rest] for one in found] if rest else found


def changed(plain: dict[str, Any], group: str, option: str, leaf: Leaf, value: Any) -> dict[str, Any]:
    """The experiment with one key set to another value, wherever that key lies; of a choice of exactly one, the others fall away."""
    other = copy.deepcopy(plain)
    for place in places(other, group, option):
        *parents, last = leaf.path.split(".")
        for name in parents:
            place = place[name]
        if leaf.cls.exactly_one:
            place |= dict.fromkeys(place)
        place[last] = layers.merge(place[last] or {}, value) if isinstance(value, dict) else value
    return other
