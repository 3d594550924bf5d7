"""Nodes and their registry: what a config may name.

A Node is a frozen, keyword-only dataclass that `type:` in a YAML file chooses within a group. Only installed code
can register one: this package's rooms, or a package with an entry point in the group `lmforge.plugins`.
Values live in YAML; a class says type, unit, range and meaning, and never a second copy of a value.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.machinery
import math
import operator
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform

from lmforge.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

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

    # As `dataclass` would write them, once for all nodes: it compiles each method of each class anew, whenever they are imported.
    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, Node) and type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        cls: Any = type(self)
        return f"{cls.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in _names(cls))})"

    def _values(self) -> tuple[Any, ...]:
        cls: Any = type(self)
        return tuple(getattr(self, name) for name in _names(cls))


@functools.cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


N = TypeVar("N", bound=Node)
_NODES: dict[str, dict[str, type[Node]]] = {}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def node(cls: type[N]) -> type[N]:
    """A node that is not chosen by `type:` (a part of another one, such as a budget)."""
    return dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register(group: str, type_: str) -> Callable[[type[N]], type[N]]:
    """Make a class the option that `type: <type_>` names within `group`."""

    def decorate(cls: type[N]) -> type[N]:
        cls = dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
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


@functools.cache
def plugins() -> tuple[EntryPoint, ...]:
    """Installed entry points in the group `lmforge.plugins`, by name."""
    own = any(finder is not importlib.machinery.PathFinder and hasattr(finder, "find_distributions") for finder in sys.meta_path)
    if not own and not any(map(_may_declare, sys.path)):
        return ()
    from importlib import metadata  # to import it and to read every package costs as much as all other planning: only where one may be found

    return tuple(sorted(metadata.entry_points(group=PLUGINS), key=lambda point: point.name))


def _may_declare(place: str) -> bool:
    """Whether a folder of `sys.path` has a package whose entry points name our group; a zip is not looked into, so it may."""
    try:
        names = os.listdir(place or ".")
    except NotADirectoryError:
        return True
    except OSError:
        return False
    for name in names:
        if name.lower().endswith((".dist-info", "egg-info")):
            file = os.path.join(place, name, "entry_points.txt")
            if os.path.isfile(file) and PLUGINS.encode() in Path(file).read_bytes():
                return True
    return False
