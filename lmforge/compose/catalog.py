"""What there is to choose from: the folders of options, ours, a plugin's and the user's, in the order Hydra searches them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

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
        return cls(tuple(folders), folders[0] if config_dir is not None else None)

    @functools.cached_property
    def groups(self) -> set[str]:
        """The groups there are: a user's folder adds options to them, never a group that nothing reads."""
        return {file.relative_to(folder).parts[0] for folder in self.folders if folder != self.user for file in folder.rglob("*/*.yaml")}

    @functools.cached_property
    def root_groups(self) -> set[str]:
        """The groups that the root chooses an option of; the others, such as `reward`, are parts of a stage."""
        entries = OmegaConf.to_container(OmegaConf.load(own("conf") / "config.yaml"), resolve=False)["defaults"]  # type: ignore[index, call-overload]
        return {str(key).removeprefix("optional ") for entry in entries if isinstance(entry, dict) for key in entry}

    @functools.cached_property
    def options(self) -> dict[str, dict[str, Path]]:
        """Group (`optimizer`, `optimizer/schedule`) -> option -> file."""
        found: dict[str, dict[str, Path]] = {}
        for folder in self.folders:
            for file in sorted(folder.rglob("*.yaml")):
                group = file.parent.relative_to(folder).as_posix()
                if group != "." and file.is_file():
                    found.setdefault(group, {}).setdefault(file.stem, file)
        return found

    def load(self, group: str, option: str) -> dict[str, Any]:
        """One option's own YAML, without what its defaults list brings."""
        loaded = OmegaConf.to_container(OmegaConf.load(self.options[group][option]), resolve=False)
        return {str(key): value for key, value in loaded.items()} if isinstance(loaded, dict) else {}

    def broken(self) -> Iterator[Problem]:
        """Option files of the user or a plugin that no YAML reader takes; ours are held by the tests."""
        for folder in self.folders:
            if folder in (own("conf"), own("sweeps")):
                continue
            for file in sorted(one for one in folder.rglob("*.yaml") if one.is_file()):
                try:
                    _check_yaml(file)
                except (yaml.YAMLError, OSError, ValueError) as error:
                    yield Problem(str(file), f"not a readable option file: {' '.join(str(error).split())[:160]}", "mend the YAML")


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
