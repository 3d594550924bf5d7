"""The root config from the files that Hydra's defaults list names, without Hydra's settings for itself, and remembered for equal choices.

Half of what Hydra composes is about Hydra (logging, launchers, sweepers), which one run never reads; and variants that differ in
values differ in no file. So Hydra says which files and where, they are merged once for each set of choices, and typed values are set on that. What cannot go
this way (a word about `hydra`, a deletion, anything wrong) goes Hydra's whole way, which has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmforge.compose.catalog import Catalog, own
from lmforge.compose.overrides import Typed, parsed
from lmforge.compose.reading import read

CONFIG = "config"
KEY = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
SET = re.compile(rf"\+\+({KEY})=")
NAMED = re.compile(rf"\$\{{({KEY})\}}")  # an interpolation of one key by its whole name
WRONG = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError)


@dataclass(frozen=True)
class Merged:
    """A config and the options it was chosen by."""

    config: dict[str, Any]
    choices: dict[str, Any]


class _HydrasWay(Exception):
    """Only Hydra itself composes this."""


def merged(catalog: Catalog, typed: Sequence[Typed]) -> Merged | None:
    """What the words compose to, interpolations resolved; None where Hydra itself has to compose it."""
    values = [(match[1], one.hydra[2:]) for one in typed if not one.is_choice and (match := SET.match(one.hydra))]
    choices = tuple(one.hydra for one in typed if one.is_choice)
    if len(values) + len(choices) < len(typed) or any(one.key.startswith("hydra") or one.hydra.startswith("~") for one in typed):
        return None
    try:
        if choices not in catalog.merged:
            catalog.merged[choices] = _files(catalog.folders, choices)
        found = catalog.merged[choices]
        config = _copy(found.config)
        for key, text in values:
            _set(config, key, text, catalog)
        return Merged(_resolved(config, config), dict(found.choices))
    except (_HydrasWay, *WRONG):
        return None


def _files(folders: Sequence[Path], choices: Sequence[str]) -> Merged:
    """The files that the choices bring, merged; interpolations stay as they are."""
    overrides = [parsed(one) for one in choices]
    if any(one.is_sweep_override() for one in overrides):
        raise _HydrasWay
    repository = CachingConfigRepository(_Folders(folders))
    found = create_defaults_list(repository, CONFIG, overrides, prepend_hydra=False, skip_missing=False)
    trees = {path: tree for source in repository.get_sources() if isinstance(source, _Folder) for path, tree in source.trees.items()}
    config: dict[str, Any] = {}
    for one in found.defaults:
        if one.package is None or one.config_path not in trees:
            raise _HydrasWay
        tree = trees[one.config_path]
        for part in reversed(one.package.split(".") if one.package else ()):
            tree = {part: tree}
        _merge(config, tree)
    if found.config_overrides or "hydra" in config:
        raise _HydrasWay
    return Merged(config, dict(found.overrides.known_choices))


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    """As OmegaConf merges files: mappings key by key, anything else in place of what was there."""
    for key, value in tree.items():
        before = into.get(key)
        if value == "???" or (isinstance(value, dict) and isinstance(before, str) and "${" in before) or not isinstance(key, str):
            raise _HydrasWay
        if isinstance(value, dict):
            into[key] = before if isinstance(before, dict) else {}
            _merge(into[key], value)
        else:
            into[key] = value


class _Folders(ConfigRepository):
    """Folders of options, the first that has one wins. Hydra's own package of configs is not among them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.sources = [*(_Folder("main", f"file://{folder}") for folder in folders), StructuredConfigSource("schema", "structured://")]


class _Folder(FileConfigSource):
    """Hydra's folder of YAML files with a faster reader. Hydra gets the defaults lists; the rest of each file is in `trees`."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.trees: dict[str, dict[str, Any]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        text = file.read_text(encoding="utf-8")
        tree = read(text)
        if file == own("conf") / f"{CONFIG}.yaml":  # a user's root config, if it speaks of Hydra, goes Hydra's way
            tree.pop("hydra")
            tree["defaults"] = [one for one in tree["defaults"] if not (isinstance(one, dict) and any(key.startswith("override hydra/") for key in one))]
        listed = OmegaConf.create({"defaults": tree.pop("defaults", [])})
        self.trees[config_path] = tree
        return ConfigResult(provider=self.provider, path=f"file://{self.path}", config=listed, header=self._get_header_dict(text[:512]))


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _set(config: dict[str, Any], key: str, text: str, catalog: Catalog) -> None:
    """A typed scalar at a key whose mapping is there, as OmegaConf.update sets it."""
    override = parsed(text)
    if key in catalog.groups or override.is_sweep_override():
        raise _HydrasWay
    *path, last = key.split(".")
    node: Any = config
    for part in path:
        node = node.get(part)
        if not isinstance(node, dict):
            raise _HydrasWay
    value = override.value()
    if (value is not None and type(value) not in (bool, int, float, str)) or value == "???":
        raise _HydrasWay
    node[last] = value


def _resolved(node: Any, root: dict[str, Any]) -> Any:
    """The tree with the values that `${key}` names."""
    if isinstance(node, dict):
        return {key: _resolved(value, root) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolved(value, root) for value in node]
    if not isinstance(node, str) or "${" not in node:
        return node
    if (match := NAMED.fullmatch(node)) is None:
        raise _HydrasWay
    value: Any = root
    for part in match[1].split("."):
        if not isinstance(value, dict) or part not in value:
            raise _HydrasWay
        value = value[part]
    if isinstance(value, (dict, list)) or (isinstance(value, str) and ("${" in value or value == "???")):
        raise _HydrasWay
    return value
