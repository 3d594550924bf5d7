"""A model's parameters from its config.json, by name and shape, without torch or transformers.

The counts equal `sum(p.numel() for p in model.parameters())` of transformers' own model exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmforge.errors import ConfigError, Problem
from lmforge.model.families import Family, Sizes, Split, Weight, find

Config = Mapping[str, Any]
WHERE = "config.json"


@dataclass(frozen=True)
class ParamCount:
    """Parameters of a model; `total = embedding + head + non_embedding`, tied embeddings counted once.

    Training FLOPs per token by the house convention: `6 * active + 6 * layers * attention_width * seq_len` (causal).
    """

    total: int
    active: int  # used by one token: of the experts, top_k / num_experts
    embedding: int  # token embeddings and learned positions
    head: int  # the output projection; 0 where it is tied to the embedding
    non_embedding: int
    layers: int
    attention_width: int  # num_attention_heads * head_dim


def weights(config: Config) -> tuple[Weight, ...]:
    """Every parameter of the model, repeated layers folded into one entry; ConfigError for what no known family is."""
    family = find(config.get("model_type"), WHERE)
    return tuple(family.weights(_sizes(family, config)))


def count(config: Config) -> ParamCount:
    """How many parameters a config means, and the sizes that FLOPs are computed from."""
    found, shape = weights(config), sizes(config)
    by_role = {role: sum(_numel(weight) for weight in found if weight.role == role) for role in ("embedding", "head", "body")}
    return ParamCount(
        total=sum(by_role.values()),
        active=sum(round(_numel(weight) * weight.active) for weight in found),
        embedding=by_role["embedding"],
        head=by_role["head"],
        non_embedding=by_role["body"],
        layers=shape.num_hidden_layers,
        attention_width=shape.num_attention_heads * shape.head_dim,
    )


def sizes(config: Config) -> Sizes:
    """The config's sizes under transformers' common names, with the family's defaults where it is silent."""
    return _sizes(find(config.get("model_type"), WHERE), config)


def splits(config: Config) -> Mapping[str, Split]:
    """How tensor parallel splits the model's modules, by name; empty where its family has not been tested."""
    return find(config.get("model_type"), WHERE).splits


def vocab_size(config: Config) -> int:
    """Rows of the token embedding."""
    return sizes(config).vocab_size


def max_positions(config: Config) -> int:
    """The longest sequence, in tokens, that the model is made for (GPT-2's `n_positions`)."""
    return sizes(config).max_position_embeddings


def _numel(weight: Weight) -> int:
    return math.prod(weight.shape) * weight.count


def _sizes(family: Family, config: Config) -> Sizes:
    more = _with_defaults(family, config)
    heads = _size(more, "num_attention_heads")
    width = _size(more, "hidden_size")
    if more.get("head_dim") is None and width % heads:
        raise ConfigError(WHERE, f"{heads} attention heads do not divide hidden_size {width}", f"take {nearest_divisors(width, heads)} heads")
    found = Sizes(
        vocab_size=_size(more, "vocab_size"),
        hidden_size=width,
        intermediate_size=_size(more, "intermediate_size", 4 * width),
        num_hidden_layers=_size(more, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_size(more, "num_key_value_heads", heads),
        head_dim=_size(more, "head_dim", width // heads),
        max_position_embeddings=_size(more, "max_position_embeddings"),
        tie_word_embeddings=bool(more["tie_word_embeddings"]),
        more=more,
    )
    if problems := list(_problems(found)):
        raise ConfigError.of(problems)
    return found


def _with_defaults(family: Family, config: Config) -> dict[str, Any]:
    """The config under common names; two names for one size have to agree."""
    given: dict[str, Any] = {}
    for key, value in config.items():
        name = family.aliases.get(key, key)
        if name in given and given[name] != value:
            raise ConfigError(WHERE, f"{key} {value!r} contradicts {name} {given[name]!r}", "keep one of them")
        given[name] = value
    return {**family.defaults, **given}


def _size(config: Config, name: str, where_null: int | None = None) -> int:
    value = config.get(name)
    if value is None and where_null is not None:
        return where_null
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(WHERE, f"{name} must be a whole number above 0, got {value!r}")
    return value


def _problems(found: Sizes) -> list[Problem]:
    problems = []
    heads, groups = found.num_attention_heads, found.num_key_value_heads
    if heads % groups:
        problems.append(
            Problem(WHERE, f"{groups} key-value heads do not divide {heads} attention heads", f"take {nearest_divisors(heads, groups)} key-value heads")
        )
    number, top = found.more.get("num_local_experts"), found.more.get("num_experts_per_tok")
    if number and top and top > number:
        problems.append(Problem(WHERE, f"num_experts_per_tok {top} is more than the {number} experts there are"))
    if found.more.get("per_layer_config"):
        problems.append(Problem(WHERE, "per_layer_config gives layers different shapes, which no family here counts", "remove it"))
    return problems


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` just below and just above `wanted`, as `8 or 16`."""
    divisors = [one for low in range(1, math.isqrt(number) + 1) if number % low == 0 for one in (low, number // low)]
    below = max((one for one in divisors if one <= wanted), default=None)
    above = min((one for one in divisors if one >= wanted), default=None)
    return " or ".join(str(one) for one in dict.fromkeys((below, above)) if one is not None)
