"""conf/ and classes agree: the same keys, each with a meaning and a comment, each typed as it stands, and no value twice."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from lmforge.codec import encode, keys
from lmforge.compose import App, experiment
from lmforge.registry import Node, types
from lmforge.verbs.list import tree
from tests.keys.options import CATALOG, CATALOG_GROUPS, NAMES, OPTIONS, WHOLE_CONFIGS, leaves, node_of, places
from tests.keys.world import World


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_yaml_and_class_hold_the_same_keys(group: str, option: str) -> None:
    """A YAML holds all keys of its class and none more; what a stage leaves out is a root group's, what is null there must be given."""
    values, cls = tree(CATALOG, group, option), node_of(group, option)
    missing = {name for name, (hint, _) in keys(cls).items() if name not in values}
    if cls.group == "stage":
        missing -= {name for name, (hint, _) in keys(cls).items() if isinstance(hint, type) and issubclass(hint, Node) and hint.group}
    assert values.keys() - {"type"} - keys(cls).keys() == set()
    assert missing == set()


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_every_key_can_be_typed_without_a_plus(group: str, option: str, world: World) -> None:
    """All keys of the option typed at once, at the values they have, give the same experiment."""
    base = world.base(group, option)
    before = experiment(App(base).compose())
    root = {"stage": f"stage.{option}", "reward": "stage.grpo.reward"}.get(group, group.replace("/", "."))
    given = {one.partition("=")[0] for one in base}
    values = {leaf.path: leaf for leaf in leaves(node_of(group, option), places(encode(before), group, option)[0])}
    place = places(encode(before), group, option)[0]
    typed = []
    for path in values:
        value = functools.reduce(lambda at, name: at[name], path.split("."), place)
        if f"{root}.{path}" not in given and not isinstance(value, dict):
            typed.append(f"{root}.{path}={spelled(value)}")
    assert experiment(App([*base, *typed]).compose()) == before


def spelled(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, list):
        return f"[{','.join(spelled(one) for one in value)}]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return (
        {True: "true", False: "false", None: "null"}.get(value, repr(value)) if not isinstance(value, (int, float)) or isinstance(value, bool) else repr(value)
    )


def all_nodes() -> list[type[Node]]:
    """Every class a config can hold, parts included."""
    types("stage")  # loads every room
    found: list[type[Node]] = []
    pending = [Node]
    while pending:
        cls = pending.pop()
        found += [cls] if cls.__module__.startswith("lmforge.") and dataclasses.is_dataclass(cls) else []
        pending += cls.__subclasses__()
    return sorted(set(found), key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


@pytest.mark.parametrize("cls", all_nodes(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_a_class_has_no_second_copy_of_a_value_and_explains_each_key(cls: type[Node]) -> None:
    """Values live in YAML alone; each key has a meaning, and each class a docstring, which `list` prints."""
    for field in dataclasses.fields(cls):
        assert field.default is dataclasses.MISSING, f"{cls.__name__}.{field.name} has a default"
        assert field.default_factory is dataclasses.MISSING, f"{cls.__name__}.{field.name} has a default"
    for name, (hint, about) in keys(cls).items():
        group = isinstance(hint, type) and issubclass(hint, Node)
        assert about.meaning or group, f"{cls.__name__}.{name} has no meaning"
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # not the one that dataclass makes


def test_every_registered_type_has_an_option() -> None:
    """Nothing is registered that a user could not choose; `step` nodes are the compiler's own."""
    from lmforge.registry import _NODES

    types("stage")
    chosen = {(CATALOG_GROUPS.get(group, group), tree(CATALOG, group, option)["type"]) for group, option in OPTIONS}
    registered = {(group, type_) for group, known in _NODES.items() if group != "step" for type_, cls in known.items() if cls.__module__.startswith("lmforge.")}
    assert registered == chosen


def test_every_key_in_yaml_has_a_comment() -> None:
    """`key: value  # meaning`, or a comment line above: conf/ is the face."""
    bare = []
    for folder in CATALOG.folders:
        for file in sorted(folder.rglob("*.yaml")):
            if file.parent.name in WHOLE_CONFIGS:
                continue
            lines = file.read_text(encoding="utf-8").partition("\nhydra:")[0].splitlines()
            head = any(line.startswith("# ") and "@package" not in line for line in lines[:4])
            for number, line in enumerate(lines):
                key, _, rest = line.partition(":")
                if line.startswith(("#", "-", "  -", "defaults", "type:")) or not rest or "#" in line:
                    continue
                above = number > 0 and lines[number - 1].lstrip().startswith("#")
                if not above and not (rest.strip() == "" and head):
                    bare.append(f"{file.relative_to(folder)}:{number + 1} {key.strip()}")
    assert bare == []
