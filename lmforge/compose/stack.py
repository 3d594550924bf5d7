"""The files that one composition merges and the words typed over them: which of them set a key, and which chose an option."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hydra.core.default_element import ResultDefault

from lmforge.compose.app import App
from lmforge.compose.catalog import Catalog, own
from lmforge.compose.lines import Said, Source
from lmforge.compose.overrides import Typed


@dataclass(frozen=True)
class Layer:
    """One place that sets a key."""

    where: str  # file:line, or `typed`
    says: str
    note: str = ""  # what chose the file, or by which rule it counts


class Entry(NamedTuple):
    """A file of the composition, where it goes, and the names of the group it was chosen from."""

    source: Source
    package: str
    group: str
    option: str  # as a bare entry of a defaults list names it
    names: frozenset[str]  # as an entry `group: option` names the group
    parent: Source | None

    @property
    def inherited(self) -> bool:
        """Whether an option of its own group names it, as h100x8 begins from h100x1; what is typed of the group then chose that one."""
        return self.parent is not None and self.parent.file.parent == self.source.file.parent


class Stack:
    """One composition's files, lowest first, then its typed words. Hydra says which files, where each goes and what chose it."""

    def __init__(self, app: App, implied: str = "") -> None:
        self.typed, self.catalog, self.implied = app.typed, app.catalog, implied
        merged = [one for one in app.defaults().defaults if one.config_path and not one.config_path.startswith("hydra/")]
        self.entries = [self._entry(one) for one in merged]

    def sets(self, key: str) -> Iterator[Layer]:
        """What gives the key a value: options' files with what chose them, then words that are no choice."""
        parts = key.split(".")
        for one in self.entries:
            package = one.package.split(".") if one.package else []
            if parts[: len(package)] == package and (said := one.source.at(parts[len(package) :])):
                yield self._layer(one.source, said, self._chosen(one))
        for word in self.typed:
            if not word.is_choice and (key in word.keys or any(key.startswith(f"{inner}.") for inner in word.keys[1:])):
                yield self._word(word)

    def _chosen(self, entry: Entry) -> str:
        """What chose a file; and for one that another option begins from, what chose that."""
        chooser = list(self._choosers(entry))
        said = f"{entry.group}={entry.option} by {chooser[-1].where}" if chooser else ""
        above = next((one for one in self.entries if entry.inherited and one.source == entry.parent), None)
        return ", ".join(filter(None, (said, self._chosen(above) if above else "")))

    def choices(self, key: str) -> Iterator[Layer]:
        """What chose the option at a place, or the stages at `stage`."""
        for one in self.entries:
            if one.package == key or (key == "stage" and "stage" in one.names):
                yield from self._choosers(one)

    def _choosers(self, entry: Entry) -> Iterator[Layer]:
        """The entries of defaults lists that name its group, its parent's own first, then the words that do."""
        if entry.parent and (said := entry.parent.choice(entry.names, entry.option)):
            yield self._layer(entry.parent, said)
        if entry.inherited:
            return
        for source in dict.fromkeys(one.source for one in self.entries if one.source != entry.parent):
            if (said := source.choice(entry.names)) and said.text.startswith("override "):
                yield self._layer(source, said)
        for word in self.typed:
            if word.is_choice and word.hydra.lstrip("+").partition("=")[0] in entry.names:
                yield self._word(word)

    def _entry(self, one: ResultDefault) -> Entry:
        group, _, option = str(one.config_path).rpartition("/")
        package = one.package or ""
        parent = next((other for other in [one.parent] if other and other != "<root>"), None)
        near = group.removeprefix(f"{parent.rpartition('/')[0]}/") if parent else group  # as `tokenizer` in model/nano.yaml
        inner = package.rpartition(".")[2]
        names = {name for name in (one.override_key, group, near, f"{group}@{package}", f"{group}@{inner}") if name}
        if package != group.replace("/", ".") and group != "stage" and package:
            names -= {group}
        return Entry(self._source(str(one.config_path)), package, group, option, frozenset(names), self._source(parent) if parent else None)

    @functools.cache  # noqa: B019 - a stack lives as long as one answer
    def _source(self, path: str) -> Source:
        return Source(next(file for folder in self.catalog.folders if (file := folder / f"{path}.yaml").is_file()))

    def _layer(self, source: Source, said: Said, note: str = "") -> Layer:
        return Layer(f"{name_of(source.file, self.catalog)}:{said.line}", said.text, note)

    def _word(self, word: Typed) -> Layer:
        text = word.hydra.lstrip("+") if not word.is_choice else f"{word.key}={word.hydra.partition('=')[2]}"
        return Layer("typed", text) if text != self.implied else Layer("default", text, "where neither a stage nor an experiment is typed")


def name_of(file: Path, catalog: Catalog) -> str:
    """A file of conf/ or sweeps/ by that name, wherever they lie; any other from where we are, or in full."""
    for folder in catalog.folders:
        if folder in (own("conf"), own("sweeps")) and file.is_relative_to(folder):
            return f"{folder.name}/{file.relative_to(folder).as_posix()}"
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)
