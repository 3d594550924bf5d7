"""What was typed, made into what Hydra takes: options by dotted path, no `+` ever needed, near misses named.

optimizer.schedule=wsd        ->  optimizer/schedule=wsd
stage.dpo.optimizer=muon      ->  +optimizer@stage.dpo.optimizer=muon
stage.ppo.reward=length       ->  reward@stage.ppo.reward=length    (its YAML brings a reward already)
stage.dpo.optimizer.lr=1e-6   ->  ++stage.dpo.optimizer.lr=1e-6     (the strict decode judges the key)
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, QuotedString, Sweep, ValueType
from hydra.errors import HydraException

from lmforge.compose.catalog import Catalog
from lmforge.errors import ConfigError, Problem, did_you_mean

ROOT_KEYS = ("seed", "name", "output", "law")
PACKAGED = ("stage",)  # groups whose options live at <group>.<option>
# key=word and key=number as Hydra's lexer splits them; a word that it reads as something else (true, null, inf, nan) is not among them.
PLAINEST = re.compile(
    r"(\+{0,2})([A-Za-z_]\w*(?:(?:\.[A-Za-z_]\w*)*|(?:/[A-Za-z_]\w*)*))="
    r"(?:(-?(?:0|[1-9]\d*))|(-?(?:0|[1-9]\d*)(?:\.\d+(?:[eE][-+]?\d+)?|[eE][-+]?\d+))"
    r"|((?!(?i:true|false|null|inf|nan)$)(?:[A-Za-z_]\w*|[1-9]\d*[A-DF-Za-df-z][A-Za-z0-9]*)))",
    re.ASCII,
)


@dataclass(frozen=True)
class Typed:
    """One override: the dotted key as the user means it, its text for Hydra, and whether it chooses an option."""

    key: str
    hydra: str
    is_choice: bool
    inner: tuple[str, ...] = ()  # keys of a mapping typed as the value

    @property
    def keys(self) -> tuple[str, ...]:
        """The dotted keys it sets."""
        return (self.key, *(f"{self.key}.{name}" for name in self.inner))

    @classmethod
    def of_hydra(cls, text: str) -> Typed:
        """The override again from what Hydra was given, as a sweep's job knows it."""
        head = text.lstrip("+~").partition("=")[0]
        group, _, package = head.partition("@")
        override = parsed(text)
        return cls((package or group).replace("/", "."), text, "++" not in text[:2], _inner(override))


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Override:
    """One override by Hydra's grammar; variants share most of their words. Its parser takes a millisecond for what a pattern can tell of the plainest."""
    if (match := PLAINEST.fullmatch(text)) is None:
        return OverridesParser.create().parse_override(text)
    plus, key, whole, number, word = match.groups()
    value = int(whole) if whole else float(number) if number else word
    return Override({"": OverrideType.CHANGE, "+": OverrideType.ADD, "++": OverrideType.FORCE_ADD}[plus], key, ValueType.ELEMENT, value, input_line=text)


def translate(texts: Iterable[str], catalog: Catalog) -> list[Typed]:
    """Every override for Hydra; ConfigError with all that are wrong."""
    problems: list[Problem] = []
    typed = []
    texts = list(texts)
    for text in texts:
        try:
            typed.append(_one(text, parsed(text), catalog, texts, problems))
        except HydraException as error:
            problems.append(
                Problem(
                    text, f"not an override: {str(error).splitlines()[0][:120]}", "write key=value, and quote it for the shell where it has spaces or brackets"
                )
            )
    if problems:
        raise ConfigError.of(problems)
    return typed


def _one(text: str, override: Override, catalog: Catalog, texts: list[str], problems: list[Problem]) -> Typed:
    key, value = override.key_or_group, text.partition("=")[2]
    if key.split("/")[0].split(".")[0] == "hydra" or key.startswith("hydra@"):
        problems.extend(_hydra_sweep(override))
        return Typed(key, text, "/" in key)
    if override.package is not None or override.is_delete():
        problems.extend(_known_root(key.replace("/", ".").partition(".")[0], override, catalog))
        return Typed(f"{override.package or key}", text, True)
    path = key.replace(".", "/")
    if "_target_" in key.split("."):
        problems.append(Problem(key, "config is data and nothing it names is imported", "choose an option of the group, or install a plugin package"))
        return Typed(key, text, False)
    if not key:
        problems.append(Problem(text, "names no key", "write key=value"))
        return Typed(key, text, False)
    if path.split("/")[0] in catalog.groups - catalog.root_groups:
        problems.append(Problem(key, "is a key of a stage, not of the root", f"type stage.<name>.{text.lstrip('+')}"))
        return Typed(key, text, False)
    if key.endswith(".type"):
        problems.append(Problem(key, "an option brings its own keys, a type does not", f"type {key.removesuffix('.type')}=<option>"))
    if path.split("/")[0] in catalog.groups and path in catalog.options and not isinstance(override.value(), dict):
        problems.extend(_choices(path.replace("/", "."), path, override, catalog))
        return Typed(key.replace("/", "."), f"{path}={value}", True)
    first, _, rest = key.partition(".")
    if first in PACKAGED and rest:
        name, _, inner = rest.partition(".")
        group = inner.replace(".", "/")
        if group in catalog.options and not isinstance(override.value(), dict):
            problems.extend(_choices(key, group, override, catalog))
            plus = "" if _brings(catalog, texts, first, name, group) else "+"
            return Typed(key, f"{plus}{group}@{key}={value}", True)
    problems.extend(_known_root(first, override, catalog))
    return Typed(key, f"++{key}={value}", False, _inner(override))


def _brings(catalog: Catalog, texts: list[str], packaged: str, name: str, group: str) -> bool:
    """Whether the option behind `stage.<name>` (its own name, or an alias in the experiment typed) brings an option of the group itself."""
    options = {name}
    for text in texts:
        head, _, chosen = text.partition("=")
        if head in catalog.options and chosen in catalog.options[head] and head in ("experiment", "sweep"):
            entries = catalog.load(head, chosen).get("defaults") or []
            options |= {str(one[f"/{packaged}@{packaged}.{name}"]) for one in entries if isinstance(one, dict) and f"/{packaged}@{packaged}.{name}" in one}
    files = [catalog.load(packaged, option) for option in options if option in catalog.options.get(packaged, {})]
    return any(f"/{group}@{group}" in entry for tree in files for entry in tree.get("defaults") or [] if isinstance(entry, dict))


def _inner(override: Override) -> tuple[str, ...]:
    value = None if override.is_delete() or override.is_sweep_override() else override.value()
    return tuple(str(_text(key)) for key in value) if isinstance(value, dict) else ()


def _hydra_sweep(override: Override) -> Iterator[Problem]:
    if override.is_sweep_override():
        yield Problem(override.key_or_group, "Hydra's own keys cannot be an axis of a sweep", "give it one value")


def _known_root(first: str, override: Override, catalog: Catalog) -> Iterator[Problem]:
    groups = catalog.groups
    if first in groups or first in ROOT_KEYS:
        return
    near = difflib.get_close_matches(first, [*groups, *ROOT_KEYS], n=1, cutoff=0.6)
    value = override.get_value_element_as_str()
    whole = "" if "." in override.key_or_group or override.is_delete() else f"={value}"
    hint = f"did you mean '{near[0]}{whole}'?" if near else f"the groups are: {', '.join(sorted(groups))}"
    yield Problem(override.key_or_group, "unknown group or key", hint)


def _choices(where: str, group: str, override: Override, catalog: Catalog) -> Iterator[Problem]:
    known = catalog.options[group]
    for one in _flat(override.value()):
        if isinstance(one, list) and group not in PACKAGED:
            axes = "one mesh has several axes: type parallel=fsdp parallel.tp=2" if group == "parallel" else f"choose one of {', '.join(sorted(known))}"
            yield Problem(where, f"[{', '.join(map(_text, one))}] is a list, and there is one {group} at a time", axes)
            continue
        options = [_text(item) for item in one] if isinstance(one, list) else [_text(one)]
        for option in options:
            if option not in known:
                yield Problem(where, f"unknown option {option!r}", did_you_mean(option, known))
        twice = next((option for option in options if options.count(option) > 1), None)
        if twice is not None:
            yield Problem(group, f"{twice!r} is there twice", f"give the second a name of its own in an experiment file: '- /{group}@{group}.again: {twice}'")


def _flat(value: Any) -> list[Any]:
    if isinstance(value, ChoiceSweep):
        return list(value.list)
    return [] if isinstance(value, Sweep) else [value]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value.text) if isinstance(value, QuotedString) else str(value)
