"""Nodes and their registry: what a config may name.

A Node is a frozen, keyword-only dataclass that `type:` in a YAML file chooses within a group. Only installed code
can register one: this package's rooms, or a package with an entry point in the group `lmforge.plugins`.
Values live in YAML; a class says type, unit, range and meaning, and never a second copy of a value.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import operator
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

from lmforge.errors import ConfigError, Problem, did_you_mean

PLUGINS = "lmforge.plugins"


@dataclass(frozen=True)
class Key:
    """What the schema says of one key; `identity=False` marks how and where a step runs, never what it is."""

    meaning: str
    unit: str = ""
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[Any, ...] = ()
    identity: bool = True

    def complaint(self, value: Any) -> str:
        """Why `value` is out of range, or an empty string."""
        if value is None:
            return ""
        if self.choices and value not in self.choices:
            return f"{value!r} is not one of {', '.join(map(str, self.choices))}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                return f"{value} is not a finite number"
            bounds = ((self.gt, operator.gt, ">"), (self.ge, operator.ge, ">="), (self.lt, operator.lt, "<"), (self.le, operator.le, "<="))
            for bound, holds, sign in bounds:
                if bound is not None and not holds(value, bound):
                    return f"{value} must be {sign} {bound:g}"
        return ""


class Node:
    """Base of everything a config can hold. `check` yields what is wrong with this node alone."""

    group: ClassVar[str] = ""
    type: ClassVar[str] = ""
    identity: ClassVar[bool] = True  # False: the whole node is execution (parallel, hardware, track)
    needs: ClassVar[dict[str, str]] = {}  # module -> our extra that installs it; looked for before anything runs
    exactly_one: ClassVar[bool] = False  # True: one key is set and the others are null; a higher layer replaces the choice

    def check(self, where: str) -> Iterator[Problem]:
        """Problems of this node by itself; relations between nodes belong to the compiler's `validate`."""
        yield from ()


N = TypeVar("N", bound=Node)
_NODES: dict[str, dict[str, type[Node]]] = {}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def node(cls: type[N]) -> type[N]:
    """A node that is not chosen by `type:` (a part of another one, such as a budget)."""
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register(group: str, type_: str) -> Callable[[type[N]], type[N]]:
    """Make a class the option that `type: <type_>` names within `group`."""

    def decorate(cls: type[N]) -> type[N]:
        cls = dataclass(frozen=True, kw_only=True)(cls)
        known = _NODES.setdefault(group, {})
        if type_ in known and known[type_].__module__ != cls.__module__:
            raise ConfigError(f"{group}: {type_}", f"registered twice, by {known[type_].__module__} and {cls.__module__}")
        cls.group, cls.type = group, type_
        known[type_] = cls
        return cls

    return decorate


def lookup(group: str, type_: str, where: str) -> type[Node]:
    """The class behind `type:`; ConfigError with the nearest name where there is none."""
    load()
    options = _NODES.get(group, {})
    if type_ not in options:
        raise ConfigError(f"{where}.type", f"unknown {group} type {type_!r}", did_you_mean(str(type_), options))
    return options[type_]


def types(group: str) -> dict[str, type[Node]]:
    """Every registered type of a group."""
    load()
    return dict(_NODES.get(group, {}))


@functools.cache
def load() -> None:
    """Import what declares nodes: `nodes` of every room, then the plugins. Nothing here imports torch."""
    package = importlib.import_module("lmforge")
    for room in pkgutil.iter_modules(package.__path__):
        if room.ispkg and (Path(package.__path__[0]) / room.name / "nodes.py").exists():
            importlib.import_module(f"lmforge.{room.name}.nodes")
    for plugin in plugins():
        plugin.load()


def plugins() -> tuple[importlib.metadata.EntryPoint, ...]:
    """Installed entry points in the group `lmforge.plugins`, by name."""
    return tuple(sorted(importlib.metadata.entry_points(group=PLUGINS), key=lambda point: point.name))
