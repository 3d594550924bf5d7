"""A composed config into an Experiment: root groups flow into every stage, each stage's own keys win, all of it decoded strictly."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmforge.codec import decode, keys
from lmforge.compose import layers
from lmforge.compose.app import Composed
from lmforge.errors import ConfigError, Problem, did_you_mean
from lmforge.experiment import Experiment, NamedStage
from lmforge.formats.store import checkpoint_of, reward_model_of
from lmforge.model.source import read_config
from lmforge.registry import Node, lookup, types

WEIGHTS = {"init_from": checkpoint_of, "reward_from": reward_model_of}  # keys of a stage that name weights, and what finds their folder
NAME = re.compile(r"\w[\w.-]*")  # a run's folder is called by it, so it may lead nowhere else


def experiment(composed: Composed) -> Experiment:
    """The typed experiment; ConfigError with every problem found."""
    return _Assembly(composed).experiment()


class _Assembly:
    """One composition being read; it gathers problems so that a user mends them all at once."""

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.config = composed.config
        self.problems: list[Problem] = []

    def experiment(self) -> Experiment:
        schema = keys(Experiment)
        roots = {name: hint for name, (hint, _) in schema.items() if isinstance(hint, type) and issubclass(hint, Node)}
        raw_stages = self.raw_stages()
        self.start_from_weights(raw_stages)
        self.targets(self.config, "")
        known = {*schema, "stage", "seed"} | {hint.group for cls in types("stage").values() for hint in groups(cls).values()}
        for name in self.config:
            if name not in known - {"stages"}:
                self.problems.append(Problem(name, "unknown key", did_you_mean(name, known)))
        values: dict[str, Any] = {name: self.decode(hint, self.config.get(name), name) for name, hint in roots.items()}
        for group in sorted(known - {*schema, "stage", "seed", "stages"}):
            if group in self.config:
                self.decode(next(h for cls in types("stage").values() for h in groups(cls).values() if h.group == group), self.config[group], group)
        if self.config.get("seed") is not None:
            self.decode(int, self.config["seed"], "seed")
        stages = [self.stage(name, raw) for name, raw in raw_stages.items()]
        values["name"] = self.decode(str, self.config.get("name") or self.composed.choices.get("experiment") or "-".join(raw_stages), "name")
        values["output"] = self.decode(str, self.config.get("output"), "output")
        values["law"] = self.decode(schema["law"][0], self.config.get("law"), "law")
        if self.config.get("name") == "" or (isinstance(values["name"], str) and not NAME.fullmatch(values["name"])):
            self.problems.append(Problem("name", f"{self.config['name']!r} cannot name a folder", "use letters, digits, '.', '_' and '-'"))
        if values["output"] == "":
            self.problems.append(Problem("output", "is empty", "type output=<folder>; output=. is this one"))
        if not self.problems:
            self.shadowed(raw_stages)
        if self.problems:
            raise ConfigError.of(self.problems)
        return Experiment(**values, stages=tuple(NamedStage(name=name, stage=stage) for name, stage in zip(raw_stages, stages, strict=True)))

    def decode(self, hint: Any, value: Any, where: str) -> Any:
        """`codec.decode`, keeping its problems for later; a mistake in a root group is told once, at the root."""
        try:
            return decode(hint, value, where)
        except ConfigError as error:
            self.problems.extend(map(self.elsewhere, error.problems))
            return None

    def elsewhere(self, problem: Problem) -> Problem:
        """For an unknown key that another option of the group has: what to type for it."""
        path = problem.where.split(".")
        if problem.what != "unknown key" or len(path) < 2:
            return problem
        group, catalog = path[-2], self.composed.catalog
        having = {name for name, cls in types(group).items() if path[-1] in keys(cls)}
        # The option that names a type itself is its plainest one, fsdp of all meshes; one that leaves the key open decides it by itself.
        known = {option: catalog.load(group, option) for option in sorted(catalog.options.get(group, {}))}
        plain = [option for option, tree in known.items() if tree.get("type") in having]
        if not plain:
            return problem
        option = min(plain, key=lambda one: known[one].get(path[-1]) is None)
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        typed = f"type {'.'.join(path[:-1])}={option} {problem.where}={'null' if value is None else value}"
        return Problem(problem.where, problem.what, f"{typed}, or {problem.instead}" if problem.instead else typed)

    def raw_stages(self) -> dict[str, dict[str, Any]]:
        """The chosen stages in order; what an experiment says of stages that were not chosen falls away."""
        chosen: dict[str, dict[str, Any]] = {}
        every = self.config.get("stage")
        if not isinstance(every, Mapping):
            raise ConfigError("stage", f"expected one stage or a list, got {every!r}", f"choose from {', '.join(types('stage'))}")
        for name, raw in every.items():
            if isinstance(raw, Mapping) and "type" in raw:
                chosen[name] = dict(raw)
                continue
            if layers.command_line(self.composed, f"stage.{name}") or not any(layers.has(tree, f"stage.{name}") for tree in layers.experiments(self.composed)):
                here = ", ".join(key for key, one in every.items() if isinstance(one, Mapping) and "type" in one)
                instead = "add it to stage=, or leave its keys out" if name in types("stage") else did_you_mean(str(name), types("stage"))
                self.problems.append(Problem(f"stage.{name}", f"no stage {name!r} in this run ({here})", instead))
        if not chosen:
            self.problems.append(Problem("stage", "no stage is chosen", f"choose from {', '.join(types('stage'))}"))
        return chosen

    def start_from_weights(self, raw_stages: Mapping[str, dict[str, Any]]) -> None:
        """Find the folder that each `init_from` and `reward_from` means; on the first stage it names the model too, unless the user names one."""
        for name, raw in raw_stages.items():
            for key, found in WEIGHTS.items():
                if not isinstance(raw.get(key), str):
                    continue
                try:
                    raw[key] = found(raw[key], str(self.config.get("output")))
                    if Path(raw[key]).is_dir():
                        read_config(raw[key], None, "")
                except ConfigError as error:
                    self.problems.extend(Problem(f"stage.{name}.{key}", one.what, one.instead) for one in error.problems)
                    raw[key] = None
        folder = next(iter(raw_stages.values()), {}).get("init_from")
        if folder is not None and not any(one.key.split(".")[0] == "model" for one in self.composed.typed):
            self.config["model"] = {"type": "hf", "pretrained": folder, "revision": None, "tokenizer": {"type": "own"}}

    def targets(self, tree: Any, where: str) -> None:
        if isinstance(tree, Mapping):
            for key, inner in tree.items():
                if str(key).startswith("_") and str(key).endswith("_"):
                    self.problems.append(
                        Problem(f"{where}{key}", "config is data and nothing it names is imported", "choose an option, or install a plugin package")
                    )
                self.targets(inner, f"{where}{key}.")

    def stage(self, name: str, raw: dict[str, Any]) -> Any:
        """One stage with the root groups it takes; its own keys win."""
        where = f"stage.{name}"
        try:
            cls = lookup("stage", str(raw["type"]), where)
        except ConfigError as error:
            self.problems.extend(error.problems)
            return None
        yaml = layers.stage_yaml(self.composed, cls.type)
        for field, hint in groups(cls).items():
            raw[field] = self.group(name, field, hint.group, raw.get(field), yaml.get(field))
        for field, (hint, _) in keys(cls).items():
            if isinstance(hint, type) and issubclass(hint, Node) and hint.exactly_one and isinstance(raw.get(field), Mapping):
                raw[field] = layers.exactly_one(self.composed, f"{where}.{field}", raw[field])
        before = {problem.where for problem in self.problems}
        try:
            return decode(cls, raw, where)
        except ConfigError as error:
            # A mistake in a root group shows in every stage; it was told at the root already.
            own = (problem for problem in error.problems if problem.where.removeprefix(f"{where}.") not in before)
            self.problems.extend(map(self.elsewhere, own))
            return None

    def group(self, name: str, field: str, group: str, own: Any, yaml: Any) -> Any:
        """The root's option under the stage's own keys; an option chosen for the stage replaces the root's."""
        if own is None:
            return self.config.get(group)
        if not isinstance(own, Mapping):
            return own
        if "type" not in own:
            return layers.merge(self.config.get(group) or {}, own)
        # The stage's YAML (a learning rate for DPO, say) is about the stage, so it outlives a change of option.
        typed = layers.command_line(self.composed, f"stage.{name}.{field}")
        said = {key: value for key, value in (yaml or {}).items() if key not in typed and not isinstance(value, Mapping)}
        return layers.merge(own, said)

    def shadowed(self, raw_stages: Mapping[str, dict[str, Any]]) -> None:
        """Refuse a root override that no stage in this plan would see."""
        before = self.composed.config["stage"]
        for one in self.composed.typed:
            group = one.key.partition(".")[0]
            takers = [name for name, raw in raw_stages.items() if group in groups(lookup("stage", raw["type"], name))]
            own_root = group in keys(Experiment) or group not in {hint.group for cls in types("stage").values() for hint in groups(cls).values()}
            if own_root:
                continue
            if not takers:
                self.problems.append(Problem(one.key, f"no stage of this plan ({', '.join(raw_stages)}) reads it", "leave it out"))
            elif all(layers.shadows(before[name], one.key) for name in takers):
                instead = " ".join(f"stage.{name}.{one.key}=..." for name in takers)
                self.problems.append(Problem(one.key, "every stage of this plan has its own value, so this changes nothing", f"type {instead}"))


def groups(cls: type) -> dict[str, type[Node]]:
    """Fields of a stage that are root groups: field -> base class of the group."""
    return {
        name: hint
        for name, (hint, _) in keys(cls).items()
        if isinstance(hint, type) and issubclass(hint, Node) and hint.group and typing.get_origin(hint) is None
    }
