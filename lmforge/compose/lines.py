"""A YAML file of conf/ with the line that each of its keys stands on."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

WIDEST = 72  # characters of a value that are shown


@dataclass(frozen=True)
class Said:
    """What a file says at one place."""

    line: int  # from 1
    text: str  # as it is written, on one line; of a mapping its keys


@dataclass(frozen=True)
class Source:
    """One file, read once."""

    file: Path

    @functools.cached_property
    def text(self) -> str:
        """The whole of it."""
        return self.file.read_text(encoding="utf-8")

    @functools.cached_property
    def root(self) -> yaml.Node | None:
        """Its top node; None where it is empty."""
        found: yaml.Node | None = yaml.compose(self.text, Loader=yaml.SafeLoader)
        return found

    def at(self, path: Sequence[str]) -> Said | None:
        """What it says of a path of keys, or of the nearest key above, where that holds no mapping; None where it is silent."""
        node = self.root
        for part in path:
            found = next((pair for pair in _pairs(node) if pair[0].value == part), None)
            if found is None:
                return None
            key, node = found
            if not isinstance(node, yaml.MappingNode):
                return self._said(key, node)
        return self._said(key, node) if path and node is not None else None

    def choice(self, names: Collection[str], option: str = "") -> Said | None:
        """The line of its defaults list that chooses an option of a group, by any of the group's `names`; a bare entry names the option itself."""
        defaults = next((node for key, node in _pairs(self.root) if key.value == "defaults"), None)
        for one in defaults.value if isinstance(defaults, yaml.SequenceNode) else ():
            if isinstance(one, yaml.ScalarNode) and one.value.partition("@")[0] == option:
                return Said(one.start_mark.line + 1, one.value)
            for key, node in _pairs(one):
                if key.value.removeprefix("optional ").removeprefix("override ").removeprefix("/") in names:
                    return self._said(key, node)
        return None

    def _said(self, key: yaml.Node, node: yaml.Node) -> Said:
        if isinstance(node, yaml.MappingNode):
            text = f"{key.value}: {{{', '.join(str(name.value) for name, _ in _pairs(node))}}}"
        else:
            text = " ".join(self.text[key.start_mark.index : node.end_mark.index].split())
        return Said(key.start_mark.line + 1, text if len(text) <= WIDEST else f"{text[: WIDEST - 4]} ...")


def _pairs(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        yield from node.value
