"""`plan --why`: what set a key, lowest first, by the rules of this house over Hydra's: a stage's own keys win over the root's, a stage's YAML
outlives an option chosen for it, exactly-one choices are replaced whole, and weights to start from name the model."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lmforge.codec import encode, keys
from lmforge.compose import layers
from lmforge.compose.app import App
from lmforge.compose.assemble import experiment, groups
from lmforge.compose.stack import Layer, Stack
from lmforge.errors import ConfigError, did_you_mean
from lmforge.experiment import Experiment
from lmforge.registry import Node, lookup

INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")


class Reader(NamedTuple):
    """A stage that takes a root group: its own name for the key, and whether it has a value of its own there."""

    stage: str
    key: str
    owns: bool


@dataclass(frozen=True)
class Why:
    """A key's value before the compiler derives anything, and what set it; the last layer won."""

    key: str
    value: Any
    layers: tuple[Layer, ...]
    meaning: str  # what the schema says of the key
    readers: tuple[Reader, ...]  # of a root group's key
    experiment: Experiment


def why(app: App, key: str, implied: str = "") -> Why:
    """Of one key, as it is typed on the command line; `implied` is an override that nobody typed. ConfigError with the nearest key where there is none."""
    return Origins(app, implied).of(key)


class Origins:
    """One composition, to be asked of any of its keys."""

    def __init__(self, app: App, implied: str = "") -> None:
        self.composed = app.compose()
        self.stage_config = self.composed.config["stage"]
        self.meant = experiment(self.composed)
        self.stages = {one.name: one.stage for one in self.meant.stages}
        self.stack = Stack(app, implied)

    @functools.cached_property
    def tree(self) -> dict[str, Any]:
        """The config as the compiler gets it."""
        plain: dict[str, Any] = {**self.composed.config, **encode(self.meant), "stage": {name: encode(stage) for name, stage in self.stages.items()}}
        del plain["stages"]
        return plain

    def of(self, key: str) -> Why:
        """The value, and the layers below it."""
        if not layers.has(self.tree, key):
            return self._of_the_model(key)
        found = tuple(dict.fromkeys(self._layers(key)))
        return Why(key, layers.dig(self.tree, key), found, self._meaning(key), tuple(self._readers(key)), self.meant)

    def _of_the_model(self, key: str) -> Why:
        """What no key sets but the model makes of its keys: the width that a dial gives, whatever a config.json says."""
        made, name = self.meant.model.config(), key.removeprefix("model.")
        if not key.startswith("model.") or name not in made:
            known = [*_dotted(self.tree), *(f"model.{one}" for one in made)]
            ends = [one for one in known if one.endswith(f".{key}")]
            near = f"did you mean '{ends[0]}'?" if ends else did_you_mean(key, known)
            first = ", ".join(dict.fromkeys(one.partition(".")[0] for one in known))
            raise ConfigError(key, "unknown key", near if near.startswith("did you mean") else f"keys begin with one of: {first}; `list GROUP` shows them")
        last = Layer("config.json", f"{name}: {made[name]}", f"what model.type={self.meant.model.type} makes of its keys")
        return Why(key, made[name], (*self._layers("model"), last), "", (), self.meant)

    def _layers(self, key: str) -> Iterator[Layer]:
        """All of them, lowest first, then those of what the last one interpolates, then the rules that replace a value."""
        first = next(iter(self.stages))
        if key.split(".")[0] == "model" and self._is_of_weights(first):
            yield from (replace(one, note="the weights to start from are the model") for one in self.stack.sets(f"stage.{first}.init_from"))
            return
        root = self._root(key)
        found = [] if root in (None, key) else [replace(one, note=_and("the root's", one.note)) for one in self._here(str(root))]
        mine = list(self._here(key))
        found += self._outliving(key, mine) if root is None else mine
        yield from found
        for name in INTERPOLATION.findall(found[-1].says) if found else ():
            yield from (replace(one, note=_and(f"through ${{{name}}}", one.note)) for one in self.stack.sets(name))
        yield from self._replaced(key)
        if key == "name" and self.composed.config.get("name") is None:
            yield Layer("default", f"name: {self.meant.name}", "the experiment file, or the stages")

    def _here(self, key: str) -> Iterator[Layer]:
        yield from self.stack.choices(key)
        yield from self.stack.sets(key)

    def _root(self, key: str) -> str | None:
        """The root's key that flows into a stage's; `key` itself where nothing of the root does; None under an option of the stage's own."""
        parts = key.split(".")
        fields = groups(type(self.stages[parts[1]])) if parts[0] == "stage" and len(parts) > 2 else {}
        if len(parts) < 3 or parts[2] not in fields:
            return key
        said = self.stage_config[parts[1]].get(parts[2])
        return None if isinstance(said, Mapping) and "type" in said else ".".join([fields[parts[2]].group, *parts[3:]])

    def _outliving(self, key: str, mine: list[Layer]) -> list[Layer]:
        """Under an option of the stage's own: what the stage's YAML says of it is about the stage, so it comes last, unless the key was typed."""
        _, name, field, *rest = key.split(".")
        stage = self.stages[name].type
        said = layers.dig(layers.stage_yaml(self.composed, stage), ".".join([field, *rest]))
        if len(rest) != 1 or said is None or isinstance(said, Mapping) or rest[0] in layers.command_line(self.composed, f"stage.{name}.{field}"):
            return mine
        late = [one for one in mine if f"/stage/{stage}.yaml:" in f"/{one.where}"]
        return [one for one in mine if one not in late] + [replace(one, note=_and(one.note, "it outlives an option chosen for the stage")) for one in late]

    def _replaced(self, key: str) -> Iterator[Layer]:
        """Why a key of an exactly-one choice is null though something sets it."""
        above, _, last = key.rpartition(".")
        said = layers.dig(self.composed.config, above) if above.startswith("stage.") else None
        if isinstance(said, Mapping) and said.get(last) is not None and layers.dig(self.tree, key) is None:
            for kept in layers.chosen_keys(self.composed, above, said):
                yield replace(list(self.stack.sets(f"{above}.{kept}"))[-1], note=f"exactly one of them counts, so {last} is null")

    def _is_of_weights(self, first: str) -> bool:
        """Whether the first stage's `init_from` decided the model."""
        start = getattr(self.stages[first], "init_from", None)
        return start is not None and not any(one.key.split(".")[0] == "model" for one in self.composed.typed)

    def _meaning(self, key: str) -> str:
        """What the schema says of it, with its unit."""
        parts, at = key.split("."), 2 if key.startswith("stage.") else 1
        node: Any = Experiment if len(parts) == 1 else _class_of(None, layers.dig(self.tree, ".".join(parts[:at])), "stage" if at == 2 else parts[0])
        about = None
        for depth in range(at if len(parts) > 1 else 0, len(parts)):
            if node is None or parts[depth] not in keys(node):
                return ""
            hint, about = keys(node)[parts[depth]]
            node = _class_of(hint, layers.dig(self.tree, ".".join(parts[: depth + 1])), getattr(hint, "group", ""))
        unit = f" ({about.unit})" if about and about.unit else ""
        return f"{about.meaning}{unit}" if about else ""

    def _readers(self, key: str) -> Iterator[Reader]:
        """The stages that take a root group's key."""
        head, *rest = key.split(".")
        for name, stage in self.stages.items():
            for field, hint in groups(type(stage)).items():
                if hint.group == head:
                    inner = ".".join([field, *rest])
                    yield Reader(name, f"stage.{name}.{inner}", layers.shadows(self.stage_config[name], inner))


def _class_of(hint: Any, value: Any, group: str) -> type | None:
    """The class of a part of the config: by its `type` in a group, or by its annotation."""
    if group and isinstance(value, Mapping) and "type" in value:
        return lookup(group, value["type"], group)
    return hint if isinstance(hint, type) and issubclass(hint, Node) else None


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def _and(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
