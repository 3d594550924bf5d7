"""The model families whose weights are known by name and shape: one small file each, found by `model_type`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmforge.errors import ConfigError, did_you_mean

Role = Literal["embedding", "head", "body"]
# A matrix by its outputs or its inputs (Shoeybi et al. 2019); `gathered` hands on the whole output, `from_whole` takes whole inputs.
Split = Literal["column", "row", "column_gathered", "row_from_whole", "vocabulary"]


@dataclass(frozen=True)
class Weight:
    """One parameter tensor as transformers names it; `{layer}` in the name stands for `count` layers of one shape."""

    name: str
    shape: tuple[int, ...]
    count: int
    active: float = 1.0  # the share of it that one token uses: top_k / num_experts for experts
    role: Role = "body"


@dataclass(frozen=True)
class Sizes:
    """The sizes every family has, under transformers' common names; `more` is the config with the family's defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    more: Mapping[str, Any]


Layout = Callable[[Sizes], Iterator[Weight]]


@dataclass(frozen=True)
class Family:
    """How one family lays out its weights, and what transformers assumes where its config.json is silent."""

    model_type: str
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str]  # a key of config.json -> the common name it stands for
    weights: Layout
    splits: Mapping[str, Split]  # how tensor parallel splits its modules; empty where nobody has tested it


_FAMILIES: dict[str, Family] = {}


def family(
    model_type: str, defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None, splits: Mapping[str, Split] | None = None
) -> Callable[[Layout], Layout]:
    """Register a generator of weights as the family of `model_type`."""

    def decorate(weights: Layout) -> Layout:
        _FAMILIES[model_type] = Family(model_type, defaults, aliases or {}, weights, splits or {})
        return weights

    return decorate


@functools.cache
def known() -> Mapping[str, Family]:
    """Every family of this folder, by model type."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_FAMILIES.items()))


def find(model_type: object, where: str) -> Family:
    """The family of a model type; ConfigError names the known ones."""
    families = known()
    if not isinstance(model_type, str) or model_type not in families:
        hint = did_you_mean(str(model_type), families)
        near = f"{hint} " if hint.startswith("did") else ""
        raise ConfigError(where, f"model_type {model_type!r} is not a known family", f"{near}known: {', '.join(families)}")
    return families[model_type]
