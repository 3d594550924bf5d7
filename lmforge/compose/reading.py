"""YAML as OmegaConf reads it (its numbers, no key twice), parsed by libyaml where PyYAML was built with it: an eighth of the time."""

from __future__ import annotations

import functools
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader


def read(text: str) -> dict[str, Any]:
    """A mapping, empty for an empty file; ValueError for another thing."""
    found = yaml.load(text, Loader=_loader())
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"expected a mapping, got {type(found).__name__}")
    return found or {}


@functools.cache
def _loader() -> Any:
    """OmegaConf's rules over libyaml's parser; its own parser where there is no libyaml."""
    theirs = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return theirs
    from yaml._yaml import CParser

    def start(self: Any, stream: str) -> None:
        CParser.__init__(self, stream)
        yaml.constructor.SafeConstructor.__init__(self)
        yaml.resolver.Resolver.__init__(self)

    return type("Loader", (CParser, theirs), {"__init__": start})
