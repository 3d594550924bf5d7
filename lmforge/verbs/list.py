"""list, list GROUP, list GROUP=OPTION: every group, option and key: type, unit, value, meaning."""

from __future__ import annotations

import re
import types as pytypes
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmforge.codec import keys
from lmforge.compiler import capability
from lmforge.compose.catalog import Catalog
from lmforge.compose.layers import merge
from lmforge.errors import ConfigError, did_you_mean
from lmforge.registry import Node, types
from lmforge.verbs._arguments import parse

FILES = ("experiment", "sweep")  # groups of whole configs: no node behind them


def main(argv: Sequence[str]) -> int:
    """Print the table asked for."""
    args = parse(argv)
    catalog = Catalog.of(args.config_dir)
    if broken := list(catalog.broken()):
        raise ConfigError.of(broken)
    if not args.overrides:
        for group in sorted(catalog.options):
            print(f"{group:<20} {'  '.join(sorted(catalog.options[group]))}")
        print("\nlist GROUP tells what each option is, list GROUP=OPTION its keys")
        return 0
    for word in args.overrides:
        group, _, option = word.partition("=")
        group = group.replace(".", "/")
        if group not in catalog.options:
            raise ConfigError(group, "unknown group", did_you_mean(group, catalog.options))
        if option:
            _option(catalog, group, option)
        else:
            _group(catalog, group)
    return 0


def _group(catalog: Catalog, group: str) -> None:
    for option, file in sorted(catalog.options[group].items()):
        print(f"{group}={option:<18} {about(catalog, group, option, file)}")
    if group == "parallel":
        _capabilities()


def _capabilities() -> None:
    """What runs with what; a mesh must be allowed each of its ways."""
    print("\nWhat runs with what (a mesh of several axes: all of its columns; the reason for a no is told when it is asked for):")
    for row in capability.table():
        print(f"  {row[0]:<28}" + "".join(f"{cell:<11}" for cell in row[1:]))


def about(catalog: Catalog, group: str, option: str, file: Path) -> str:
    """The first comment line of the YAML, else the first line of the class's docstring."""
    comments = [line.lstrip("# ").strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0] if comments else _class_line(group, tree(catalog, group, option))


def _class_line(group: str, values: dict[str, Any]) -> str:
    cls = _class_of(group, values)
    return (cls.__doc__ or "").splitlines()[0] if cls else ""


def _class_of(group: str, values: dict[str, Any]) -> type[Node] | None:
    """The node behind an option; model/tokenizer holds options of the group `tokenizer`."""
    return (types(group) or types(group.rpartition("/")[2])).get(str(values.get("type")))


def tree(catalog: Catalog, group: str, option: str) -> dict[str, Any]:
    """An option's values with those its defaults list brings."""
    own = catalog.load(group, option)
    values: dict[str, Any] = {}
    for entry in own.pop("defaults", None) or []:
        if isinstance(entry, str) and entry != "_self_":
            chosen, _, package = entry.partition("@")
            brought = tree(catalog, group, chosen)
            for name in reversed(package.split(".") if package else []):
                brought = {name: brought}
            values = merge(values, brought)
        elif isinstance(entry, dict):
            for inner, chosen in entry.items():
                if f"{group}/{inner}" in catalog.options and isinstance(chosen, str):
                    values = merge(values, {inner: tree(catalog, f"{group}/{inner}", chosen)})
                other, _, package = inner.removeprefix("/").partition("@")  # an option of another group, as in stage/ppo.yaml
                if inner.startswith("/") and other in catalog.options and isinstance(chosen, str):
                    values = merge(values, {package: tree(catalog, other, chosen)})
    return merge(values, own)


def _option(catalog: Catalog, group: str, option: str) -> None:
    if option not in catalog.options[group]:
        raise ConfigError(f"{group}={option}", "unknown option", did_you_mean(option, catalog.options[group]))
    file = catalog.options[group][option]
    if group in FILES:
        print(file.read_text(encoding="utf-8"))
        return
    values = tree(catalog, group, option)
    cls = _class_of(group, values)
    print(f"{group}={option}: {about(catalog, group, option, file)}")
    if cls is None:
        return
    print("  " + " ".join((cls.__doc__ or "").split()))
    prefix = f"stage.{option}" if group == "stage" else group.replace("/", ".")
    rows = list(describe(cls, values, prefix))
    widths = [min(48, max(len(row[column]) for row in rows)) for column in range(3)] if rows else [0, 0, 0]
    for key, value, kind, meaning in rows:
        print(f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {kind:<{widths[2]}}  {meaning}")


def describe(cls: type, values: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows of (key, value, type and unit, meaning) for a node and the nodes in it."""
    for name, (hint, key) in keys(cls).items():
        value = values.get(name) if isinstance(values, dict) else None
        inner = hint if isinstance(hint, type) and issubclass(hint, Node) else None
        if inner is not None and inner.group:
            chosen = types(inner.group).get(str(value.get("type"))) if isinstance(value, dict) and value.get("type") else None
            if chosen is None:
                changed = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
                yield (
                    f"{prefix}.{name}",
                    f"{{{changed}}}" if changed else "(the root's)",
                    inner.group,
                    key.meaning or f"the root's {inner.group}, changed by what is here",
                )
                continue
            yield f"{prefix}.{name}", str(chosen.type), inner.group, key.meaning
            yield from describe(chosen, value, f"{prefix}.{name}")
        elif inner is not None:
            yield f"{prefix}.{name}", "", "", key.meaning
            yield from describe(inner, value, f"{prefix}.{name}")
        elif isinstance(value, dict) and (member := typing.get_args(hint)[-1:]) and hasattr(member[0], "group"):
            yield f"{prefix}.{name}", "", type_name(hint), key.meaning
            for own, one in value.items():
                yield f"{prefix}.{name}.{own}", str(one["type"]), member[0].group, ""
                yield from describe(types(member[0].group)[one["type"]], one, f"{prefix}.{name}.{own}")
        else:
            unit = f", {key.unit}" if key.unit else ""
            bounds = "".join(f" {sign} {bound:g}" for sign, bound in ((">", key.gt), (">=", key.ge), ("<", key.lt), ("<=", key.le)) if bound is not None)
            yield f"{prefix}.{name}", "null" if value is None else str(value), f"{type_name(hint)}{bounds}{unit}", key.meaning


def type_name(hint: Any) -> str:
    """A type as a person writes it: int | null, text, one of a, b."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, pytypes.UnionType):
        return " | ".join("null" if arm is type(None) else type_name(arm) for arm in typing.get_args(hint))
    text = str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
    return re.sub(r"(\w+\.)+", "", text.replace("None", "null").replace("NoneType", "null")).replace("str", "text")
