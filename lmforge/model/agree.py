"""Whether two config.json mean one model: a model typed in a config beside weights that already have one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmforge.model.families import find
from lmforge.model.weights import WHERE, sizes

# Who wrote a config.json, when, and how weights were stored: no part of what the model is.
VOLATILE = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"})
ROPE = ("rope_scaling", "rope_parameters")  # transformers 4 and 5


@dataclasses.dataclass(frozen=True)
class Difference:
    """One key, by transformers' common name, on which two configs differ."""

    key: str
    ours: Any
    theirs: Any


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """What two config.json say differently, of the keys that both have; nothing else is compared when the families differ.

    Sizes count as the family's default where a config is silent. One value under two names (n_embd, rope_theta beside
    rope_parameters) is one value; token ids, which are the tokenizer's, and `VOLATILE` do not count. ConfigError for a
    config of no known family, or with sizes that make no model.
    """
    if ours.get("model_type") != theirs.get("model_type"):
        return [Difference("model_type", ours.get("model_type"), theirs.get("model_type"))]
    mine, other = _plain(ours), _plain(theirs)
    return [Difference(key, mine[key], other[key]) for key in mine if key in other and mine[key] != other[key]]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config under one name for each value."""
    aliases = find(config.get("model_type"), WHERE).aliases
    found = {aliases.get(key, key): value for key, value in config.items() if key not in VOLATILE and key not in ROPE and not _is_id(key)}
    shape = sizes(config)
    found.update({field.name: getattr(shape, field.name) for field in dataclasses.fields(shape) if field.name != "more"})
    if isinstance(found.get("architectures"), list):
        found["architectures"] = sorted(map(str, found["architectures"]))
    return found | _rope(config)


def _is_id(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids"))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions as flat keys, however they are nested; empty where the config is silent."""
    nested = {key: value for name in ROPE if isinstance(config.get(name), Mapping) for key, value in config[name].items()}
    if not nested and "rope_theta" not in config:
        return {}
    kind = nested.pop("type", None)
    flat = {"rope_type": kind or "default", **{name: config[name] for name in ("rope_theta",) if name in config}, **nested}
    return {key if key.startswith("rope_") else f"rope_{key}": value for key, value in flat.items()}
