"""What there is to choose from: the folders of options, ours, a plugin's and the user's, in the order Hydra searches them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmforge.compose.reading import read
from lmforge.errors import ConfigError, Problem
from lmforge.registry import plugins

PACKAGE = Path(__file__).resolve().parent.parent


def own(name: str) -> Path:
    """conf/ or sweeps/: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


@dataclass(frozen=True)
class Catalog:
    """Folders of YAML options, nearest first."""

    folders: tuple[Path, ...]
    user: Path | None = None  # the one of `--config-dir`

    @classmethod
    def of(cls, config_dir: str | None = None) -> Catalog:
        """The user's `--config-dir`, then ours, then each plugin's own `conf` folder."""
        folders = [own("conf"), own("sweeps")]
        for plugin in plugins():
            spec = importlib.util.find_spec(plugin.module)
            if spec and spec.origin and (folder := Path(spec.origin).parent / "conf").is_dir():
                folders.append(folder)
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise ConfigError("--config-dir", f"no such folder: {config_dir!r}", "give a folder that holds model/, data/, ... with YAML options")
            folders.insert(0, Path(config_dir).resolve())
        return _unchanged(tuple(folders), config_dir is not None, tuple(tuple(stamps(folder)) for folder in folders))

    @functools.cached_property
    def files(self) -> dict[Path, list[Path]]:
        """Folder -> its option files, by name."""
        return {folder: sorted(Path(stamp[0]) for stamp in stamps(folder)) for folder in self.folders}

    @functools.cached_property
    def merged(self) -> dict[tuple[str, ...], Any]:
        """What `lmforge.compose.merge` made of these files already, by what was chosen."""
        return {}

    @functools.cached_property
    def _loaded(self) -> dict[Path, dict[str, Any]]:
        return {}

    @functools.cached_property
    def groups(self) -> set[str]:
        """The groups there are: a user's folder adds options to them, never a group that nothing reads."""
        return {parts[0] for folder in self.folders if folder != self.user for file in self.files[folder] if len(parts := file.relative_to(folder).parts) > 1}

    @functools.cached_property
    def root_groups(self) -> set[str]:
        """The groups that the root chooses an option of; the others, such as `reward`, are parts of a stage."""
        entries = read((own("conf") / "config.yaml").read_text(encoding="utf-8"))["defaults"]
        return {str(key).removeprefix("optional ") for entry in entries if isinstance(entry, dict) for key in entry}

    @functools.cached_property
    def options(self) -> dict[str, dict[str, Path]]:
        """Group (`optimizer`, `optimizer/schedule`) -> option -> file."""
        found: dict[str, dict[str, Path]] = {}
        for folder in self.folders:
            for file in self.files[folder]:
                group = file.parent.relative_to(folder).as_posix()
                if group != ".":
                    found.setdefault(group, {}).setdefault(file.stem, file)
        return found

    def load(self, group: str, option: str) -> dict[str, Any]:
        """One option's own YAML, without what its defaults list brings."""
        file = self.options[group][option]
        if file not in self._loaded:
            self._loaded[file] = {str(key): value for key, value in read(file.read_text(encoding="utf-8")).items()}
        return dict(self._loaded[file])

    def broken(self) -> Iterator[Problem]:
        """Option files of the user or a plugin that no YAML reader takes; ours are held by the tests."""
        for folder in self.folders:
            if folder in (own("conf"), own("sweeps")):
                continue
            for file in self.files[folder]:
                try:
                    _check_yaml(file)
                except (yaml.YAMLError, OSError, ValueError) as error:
                    yield Problem(str(file), f"not a readable option file: {' '.join(str(error).split())[:160]}", "mend the YAML")


def stamps(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    """Its option files with what changes when one does."""
    for place, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(".yaml"):
                continue
            with contextlib.suppress(FileNotFoundError):  # a link to nowhere
                about = os.stat(file := os.path.join(place, name))
                if stat.S_ISREG(about.st_mode):
                    yield file, about.st_size, about.st_mtime_ns, about.st_ctime_ns


@functools.lru_cache(maxsize=8)
def _unchanged(folders: tuple[Path, ...], is_users: bool, files: tuple[tuple[tuple[str, int, int, int], ...], ...]) -> Catalog:
    """The catalog of these very files, with all it has read of them."""
    return Catalog(folders, folders[0] if is_users else None)


def _check_yaml(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        # Aliases can unfold a few lines into billions of nodes; an option file needs none.
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("YAML aliases (*name) are not read here; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > 50:
            raise ValueError("nested more than 50 deep")
    yaml.load(text, Loader=_Strict)


class _Strict(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} given twice", node.start_mark)
        return super().construct_mapping(node, deep)
