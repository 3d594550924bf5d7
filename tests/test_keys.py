"""No inert key: every key of every option changes what is planned or is read by the code that runs, and YAML and classes agree.

Each key is set to other valid values. A key that says what a step *is* must change a digest; one that says how or where it
runs must not. And each must be seen to matter beyond its own echo: in a placement, a cost, the arithmetic, the strategy's
arguments, the plan's text; or, for what only training sees, by being read in the code (`Reads`), checks not counted.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import math
import sys
import types as pytypes
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lmforge
import lmforge.compiler.emit
import lmforge.training.recipe
from lmforge.codec import decode, encode, keys
from lmforge.compiler import compile
from lmforge.compose import App, experiment, layers
from lmforge.compose.catalog import Catalog
from lmforge.errors import LmforgeError
from lmforge.experiment import Experiment
from lmforge.explain import Status, render
from lmforge.plan import Plan
from lmforge.registry import Key, Node, types
from lmforge.verbs.list import tree

PACKAGE = Path(lmforge.__file__).parent
WHOLE_CONFIGS = ("experiment", "sweep")  # made of other options' keys
STAGE_GROUPS = ("optimizer", "precision", "parallel")  # root groups that live in the stages
COMMITS = ("a" * 40, "b" * 40)

CATALOG = Catalog.of()
OPTIONS = [(group, option) for group, options in sorted(CATALOG.options.items()) if group not in WHOLE_CONFIGS for option in sorted(options)]
NAMES = [f"{group}={option}" for group, option in OPTIONS]

# Keys that say where content lies: moving it changes nothing, other content changes the digest.
NAMES_CONTENT = {
    "model": {"pretrained", "revision"},
    "data": {"path", "exclude", "name", "revision"},
    "stage": {"init_from", "reward_from"},
    "eval": {"include_path"},
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One key of an option: its dotted path below the group, and what the schema says of it."""

    path: str
    cls: type[Node]
    name: str
    hint: Any
    about: Key
    identity: bool


def node_of(group: str, option: str) -> type[Node]:
    return types(CATALOG_GROUPS.get(group, group))[tree(CATALOG, group, option)["type"]]


CATALOG_GROUPS = {"model/tokenizer": "tokenizer"}  # the folder an option lies in, where it is not its group's name


def leaves(cls: type[Node], values: dict[str, Any], prefix: str = "", identity: bool = True) -> Iterator[Leaf]:
    """Every key of a node and of the nodes in it; a stage's root groups are options of their own."""
    for name, (hint, about) in keys(cls).items():
        said = identity and cls.identity and about.identity
        inner = hint if isinstance(hint, type) and issubclass(hint, Node) else None
        if inner is not None and inner.group and cls.group == "stage":
            continue
        if inner is not None:
            chosen = types(inner.group)[values[name]["type"]] if inner.group else inner
            yield from leaves(chosen, values[name], f"{prefix}{name}.", said)
        else:
            yield Leaf(f"{prefix}{name}", cls, name, hint, about, said)


def alternatives(leaf: Leaf, value: Any) -> Iterator[Any]:
    """Other values of the key's type and range; the compiler judges which of them go with the rest."""
    origin, arms = typing.get_origin(leaf.hint), typing.get_args(leaf.hint)
    hints = arms if origin in (typing.Union, pytypes.UnionType) else (leaf.hint,)
    for hint in hints:
        if hint is type(None):
            yield None
        elif typing.get_origin(hint) is typing.Literal:
            yield from typing.get_args(hint)
        elif leaf.about.choices and hint in (int, str):
            yield from leaf.about.choices
        elif hint is bool:
            yield not value
        elif hint in (int, float):
            yield from numbers(leaf.about, value if isinstance(value, (int, float)) else None, hint)
        elif hint is str:
            yield from ("other", f"{value}x")
        elif typing.get_origin(hint) is tuple:
            yield from (list(value[1:]), list(leaf.about.choices[:1]), [*value, "lm_head"])
        elif typing.get_origin(hint) is dict and value and all(isinstance(one, (int, float)) for one in value.values()):
            yield {key: one * (2 + index) for index, (key, one) in enumerate(value.items())}


def numbers(about: Key, value: float | None, kind: type) -> Iterator[float]:
    low = max(bound for bound in (about.gt, about.ge, -1e12) if bound is not None)
    high = min(bound for bound in (about.lt, about.le, 1e12) if bound is not None)
    start = value if value else 1.0
    near = (start * 2, start / 2, start + 1, start - 1, start * 3, (low + high) / 2, (start + min(high, start * 4)) / 2, 1, 8, 64, 512)
    for number in near:
        if low <= number <= high:
            yield int(number) if kind is int else float(number)


@dataclasses.dataclass(frozen=True)
class World:
    """Folders of content for keys that name some."""

    rows: Path
    text: Path
    other_text: Path
    weights: Path
    other_weights: Path
    tasks: Path

    def base(self, group: str, option: str, stages: str = "[pretrain,sft]") -> list[str]:
        """Overrides that make a plan of which the option is a part; a model's weights are read where the first stage is not pretrain."""
        hardware = ["hardware=h200x8", "hardware.memory_bytes=1e16"]
        data = ["data=text", f"data.path={self.rows}"]
        if group == "model":
            source = {"hf": "known/model"}.get(option, "some/model")
            named = [f"model.pretrained={source}", f"model.revision={COMMITS[0]}"] if option not in ("1b", "7b", "13b") else []
            return [f"model={option}", f"stage={stages}", *named, *data, *hardware]
        if group == "model/tokenizer":
            named = [f"model.pretrained={self.weights}"] if option == "own" else []
            return [f"model.tokenizer={option}", "stage=pretrain", *named, *data, *hardware]
        if group == "data":
            chosen = {"text": [f"data.path={self.text}"], "mixture": [f"data.sources.own.path={self.text}"]}
            return [f"data={option}", "stage=pretrain", "eval=none", *chosen.get(option, []), *hardware]
        if group == "stage":
            if option == "grpo":  # with a trained reward, so that reward_from names something
                model = [f"stage.grpo.reward_from={self.weights}", "stage.grpo.reward=model"]
                return ["stage=[pretrain,grpo]", "eval=none", *model, *data, *hardware]
            if option == "ppo":  # a reward model, with a tokenizer that it shares, only comes with a pipeline
                return ["stage=[pretrain,sft,reward,ppo]", "eval=none", *data, *hardware]
            return [f"stage={option}", *([f"stage.{option}.init_from={self.weights}"] if option != "pretrain" else []), *data, *hardware]
        if group == "adapter":
            return [f"adapter={option}", "stage=[pretrain,sft]", "eval=none", *data, *hardware]
        if group == "reward":
            first = {"model": "reward,"}.get(option, "")
            return [f"stage.grpo.reward={option}", f"stage=[pretrain,sft,{first}grpo]", "eval=none", *data, *hardware]
        if group == "hardware":
            return [f"hardware={option}", "stage=pretrain", "parallel=ddp", "parallel.devices=1", *data]
        # Eight of everything, so that any axis may be 2 or 8.
        wide = ["model.num_hidden_layers=8", "model.num_attention_heads=8", "model.hidden_size=64", "model.tie_word_embeddings=false"]
        several = [*wide, *(["parallel.devices=8"] if option != "single" else [])] if group == "parallel" else []
        several += ["optimizer.max_skips=4"] if group == "optimizer" else []  # skip_sigma asks for some
        return [f"{group}={option}", f"stage={stages}", *several, *data, *hardware]

    def special(self, leaf: Leaf) -> list[Any]:
        """Values that must name something real."""
        return {
            "init_from": [str(self.other_weights)],
            "reward_from": [str(self.other_weights)],
            "pretrained": ["other/model", str(self.other_weights)],
            "revision": [COMMITS[1]],
            "path": [str(self.other_text)],
            "include_path": [str(self.tasks)],
            "exclude": [["idlelib"]],
            "tasks": [["heldout_code"]],
            "seq_len": [200],
            "dp_shard": [4],
            "target_modules": [["q_proj"]],
            "pattern": ["another"],
            "rewards": [{"parses": {"min_nodes": 2}}],
            "sources": [{"code": {"heldout_fraction": 0.5}}],
        }.get(leaf.name, [])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[World]:
    """Two of everything that a key may name, and a hub cache with two commits of one model."""
    import json

    root = tmp_path_factory.mktemp("world")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }

    def write(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    for name, layers_ in (("weights", 4), ("other_weights", 3)):
        write(root / name / "config.json", json.dumps(config | {"num_hidden_layers": layers_}))
        write(root / name / "tokenizer.json", json.dumps({"name": name}))
    repository = root / "hub" / "models--known--model"
    for commit, width in zip(COMMITS, (64, 128), strict=True):
        write(repository / "snapshots" / commit / "config.json", json.dumps(config | {"hidden_size": width}))
    write(root / "hub" / "models--other--model" / "snapshots" / COMMITS[0] / "config.json", json.dumps(config | {"hidden_size": 32}))
    write(root / "tasks" / "mine.yaml", "task: mine\n")
    text, other_text = write(root / "text.txt", "A sentence.\n\n" * 30), write(root / "other.txt", "Another sentence.\n\n" * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(root / "hub"))
        patch.chdir(root)
        yield World(rows, text, other_text, root / "weights", root / "other_weights", root / "tasks")


def places(plain: dict[str, Any], group: str, option: str) -> list[dict[str, Any]]:
    """Where an option's keys lie in an encoded experiment: a root group is in every stage that takes it."""
    stages = {one["name"]: one["stage"] for one in plain["stages"]}
    if group == "stage":
        return [stages[option]]
    if group == "reward":
        return [stages["grpo"]["reward"]]
    head, _, rest = group.partition("/")
    found = [one[head] for one in (plain, *stages.values()) if isinstance(one.get(head), dict)]
    return [one[rest] for one in found] if rest else found


def changed(plain: dict[str, Any], group: str, option: str, leaf: Leaf, value: Any) -> dict[str, Any]:
    """The experiment with one key set to another value, wherever that key lies; of a choice of exactly one, the others fall away."""
    other = copy.deepcopy(plain)
    for place in places(other, group, option):
        *parents, last = leaf.path.split(".")
        for name in parents:
            place = place[name]
        if leaf.cls.exactly_one:
            place |= dict.fromkeys(place)
        place[last] = layers.merge(place[last], value) if isinstance(value, dict) else value
    return other


def effects(plan: Plan) -> tuple[Any, ...]:
    """What a plan is beyond the echo of its keys."""
    steps = [
        (step.name, step.stage, step.inputs, step.placement, step.cost, step.content, step.arithmetic, emitted(step.spec, step.group)) for step in plan.steps
    ]
    return (steps, render(plan, {step.name: Status("new") for step in plan.steps}))


def emitted(spec: Any, group: str) -> Any:
    """What the parallel option hands to the back end; a node that the compiler made itself, whole."""
    parallel = getattr(spec, "parallel", None)
    return parallel.strategy_args() if parallel is not None else spec if group == "step" else None


def digests(plan: Plan) -> dict[str, str]:
    return {step.name: step.digest for step in plan.steps}


@functools.cache
def reads() -> Reads:
    return Reads.of(PACKAGE)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_no_key_is_inert(group: str, option: str, world: World) -> None:
    """Every key of the option, set to every other valid value we can think of, changes what it should and nothing else."""
    wrong = []
    for stages, paths in (("[pretrain,sft]", None), ("sft", {"pretrained", "revision"})) if group == "model" else (("[pretrain,sft]", None),):
        plain = encode(experiment(App(world.base(group, option, stages)).compose()))
        before = compile(decode(Experiment, plain))
        for leaf in leaves(node_of(group, option), places(plain, group, option)[0]):
            wanted = leaf.path in paths if paths else group != "model" or leaf.path not in ("pretrained", "revision")
            if wanted and leaf.path not in alone(group, option) and (complaint := complain(leaf, plain, before, group, option, world)):
                wrong.append(complaint)
    assert wrong == []


# Keys that have no other valid value beside the rest of an option: another option of the same type shows that they are live.
ALONE: dict[tuple[str, str], set[str]] = {
    ("precision", "fp32"): {"param_dtype", "loss_scale"},
    ("precision", "bf16"): {"loss_scale"},
    ("precision", "fp16"): {"param_dtype", "compute_dtype"},
    ("parallel", "deepspeed_zero1"): {"offload_parameters"},
    ("parallel", "deepspeed_zero2"): {"offload_parameters"},
    **{("parallel", one): {"pp_schedule"} for one in ("fsdp", "fsdp_zero2", "hsdp", "tp", "fsdp_tp")},  # there are no stages to schedule
}
# Axes that nothing runs on: any other value is refused (tests/test_bad_input.py), with the reason.
REFUSED = {"cp"}
VIEW = ("data", "hf", "view")  # another view is another stage's: see its own test


def alone(group: str, option: str) -> set[str]:
    """Keys of an option that are looked at elsewhere."""
    return ALONE.get((group, option), set()) | (REFUSED if group == "parallel" else set()) | ({VIEW[2]} if (group, option) == VIEW[:2] else set())


def test_what_one_option_cannot_show_another_does() -> None:
    """Every exception of ALONE is covered by an option of the same type that makes none."""
    for (group, option), paths in ALONE.items():
        same = [other for one, other in OPTIONS if one == group and node_of(group, other) is node_of(group, option)]
        for path in paths:
            assert any(path not in ALONE.get((group, other), set()) for other in same), (group, option, path)


def test_the_view_of_a_hub_data_set_decides_which_stage_may_read_it(world: World) -> None:
    """`data.view=chat` makes rows for SFT out of the same data set, and pretraining refuses them."""
    base = ["data=hf", "eval=none", "hardware=h200x8"]
    sft = [*base, "stage=sft", f"stage.sft.init_from={world.weights}"]
    assert attempt(encode(experiment(App([*base, "stage=pretrain"]).compose()))) is not None
    assert attempt(encode(experiment(App([*base, "stage=pretrain", "data.view=chat"]).compose()))) is None
    assert attempt(encode(experiment(App(sft).compose()))) is None
    assert attempt(encode(experiment(App([*sft, "data.view=chat"]).compose()))) is not None


def complain(leaf: Leaf, plain: dict[str, Any], before: Plan, group: str, option: str, world: World) -> str:
    """What is wrong with a key, or an empty string."""
    value = functools.reduce(lambda at, name: at[name], leaf.path.split("."), places(plain, group, option)[0])
    tried = [one for one in (*world.special(leaf), *alternatives(leaf, value)) if one != value or type(one) is not type(value)]
    plans = [plan for one in tried if (plan := attempt(changed(plain, group, option, leaf, one))) is not None]
    if not plans:
        return f"{leaf.path}: no valid alternative among {tried}"
    if all(plan.to_json() == before.to_json() for plan in plans):
        return f"{leaf.path}: no value changes the plan at all"
    named = leaf.name in NAMES_CONTENT.get(group, set())
    moved = [plan for plan in plans if digests(plan) != digests(before)]
    if (leaf.identity or named) and not moved:
        return f"{leaf.path}: is identity, and changes no digest"
    if not leaf.identity and not named and moved:
        return f"{leaf.path}: is no identity, and changes a digest"
    if all(effects(plan) == effects(before) for plan in plans) and not reads().live(leaf.cls, leaf.name):
        return f"{leaf.path}: nothing reads {leaf.cls.__name__}.{leaf.name}"
    return ""


def attempt(plain: dict[str, Any]) -> Plan | None:
    """The plan, or None where the values do not go together."""
    try:
        return compile(decode(Experiment, plain))
    except LmforgeError:
        return None


@dataclasses.dataclass
class Reads:
    """Which keys the code reads, by type: `stage.optimizer.lr` counts for Optimizer.lr, any other `.lr` does not.

    Types come from annotations, as mypy has them: of parameters, fields, returns. A read inside `check` does not count, nor
    one in a method that nothing calls.
    """

    found: dict[str, set[type]]  # key -> classes on which it is read
    called: dict[str, set[type]]  # method or property -> classes on which it is used

    @classmethod
    def of(cls, package: Path) -> Reads:
        """All reads in a package."""
        inside: list[tuple[type, str, type | None, str]] = []  # (class, attribute, class of the method it is in, the method)
        for file in sorted(package.rglob("*.py")):
            module = ".".join(("lmforge", *file.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
            inside.extend(_Module(module, ast.parse(file.read_text(encoding="utf-8"))).reads())
        called: dict[str, set[type]] = {}
        for on, attribute, _, _ in inside:
            called.setdefault(attribute, set()).add(on)
        found: dict[str, set[type]] = {}
        for on, attribute, owner, method in inside:
            known = owner is not None and owner.__module__ in sys.modules and issubclass(owner, Node)
            related = not known or any(_related(owner, one) for one in called.get(method, ()))  # type: ignore[arg-type]
            if method != "check" and related:
                found.setdefault(attribute, set()).add(on)
        return cls(found, called)

    def live(self, cls: type, key: str) -> bool:
        """Is the key read on this class, or on one it inherits the key from?"""
        return any(on in cls.__mro__ for on in self.found.get(key, ()))


def _related(owner: type, on: type) -> bool:
    """Whether a method called on one may be the other's; one called on a protocol may be anybody's."""
    return getattr(on, "_is_protocol", False) or issubclass(owner, on) or issubclass(on, owner)


class _Module:
    """The typed attribute reads of one file."""

    def __init__(self, name: str, parsed: ast.Module) -> None:
        self.name, self.parsed = name, parsed
        self.imported: dict[str, tuple[str, str]] = {
            alias.asname or alias.name: (one.module or "", alias.name) for one in ast.walk(parsed) if isinstance(one, ast.ImportFrom) for alias in one.names
        }

    def reads(self) -> Iterator[tuple[type, str, type | None, str]]:
        for one in self.parsed.body:
            if isinstance(one, ast.ClassDef):
                # What a class puts on `self` is read from its text, whether another test has loaded it or not.
                owner = self.resolve(one.name)
                if owner is None or not (dataclasses.is_dataclass(owner) or issubclass(owner, Node)):
                    owner = self.stand_in(one)
                for inner in one.body:
                    if isinstance(inner, ast.FunctionDef):
                        yield from self.function(inner, owner)
            elif isinstance(one, ast.FunctionDef):
                yield from self.function(one, None)

    def resolve(self, name: str) -> type | None:
        """The class a name stands for in this file, among what is loaded."""
        module, original = self.imported.get(name, (self.name, name))
        found = getattr(sys.modules.get(module), original, None)
        return found if isinstance(found, type) else None

    def annotated(self, annotation: ast.expr | None) -> Any:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            return self.annotated(annotation.left) or self.annotated(annotation.right)
        return self.resolve(annotation.id) if isinstance(annotation, ast.Name) else None

    def stand_in(self, one: ast.ClassDef) -> type:
        """For a class that is not loaded (it needs torch): what its methods put on `self`, by type."""
        put: dict[str, Any] = {}
        made = type(one.name, (), {"put": put})
        for method in (inner for inner in one.body if isinstance(inner, ast.FunctionDef)):
            env = self.environment(method, made)
            for target, value in (pair for inner in ast.walk(method) for pair in _assigned(inner)):
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                    put[target.attr] = put.get(target.attr) or self.type_of(value, env)
        put |= {
            inner.target.id: self.annotated(inner.annotation) for inner in one.body if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
        }
        return made

    def function(self, function: ast.FunctionDef, owner: type | None) -> Iterator[tuple[type, str, type | None, str]]:
        env = self.environment(function, owner)
        for one in ast.walk(function):
            if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Load) and isinstance(on := self.type_of(one.value, env), type):
                yield on, one.attr, owner, function.name
            yield from ((on, name, owner, function.name) for on, name in self.by_name(one, function, env))

    def environment(self, function: ast.FunctionDef, owner: type | None) -> dict[str, Any]:
        """The types of the names in a function, nested functions included."""
        env: dict[str, Any] = {}
        for one in (one for one in ast.walk(function) if isinstance(one, ast.arguments)):
            env |= {argument.arg: self.annotated(argument.annotation) for argument in (*one.posonlyargs, *one.args, *one.kwonlyargs) if argument.annotation}
        if owner is not None and function.args.args:
            env[function.args.args[0].arg] = owner
        for _ in range(3):  # names may be given types by names below them
            for one in ast.walk(function):
                self.learn(one, env)
        return env

    def learn(self, one: ast.AST, env: dict[str, Any]) -> None:
        for target, value in _assigned(one):
            if isinstance(target, ast.Name) and (found := self.type_of(value, env)) is not None:
                env[target.id] = found
        if isinstance(one, (ast.For, ast.comprehension)) and isinstance(one.target, ast.Name):
            found = self.type_of(one.iter, env)
            if typing.get_origin(found) in (tuple, list):
                env[one.target.id] = _instance(typing.get_args(found)[0])

    def type_of(self, one: ast.expr, env: dict[str, Any]) -> Any:
        """The class of an expression's value, a tuple's hint, or None where it is not known."""
        if isinstance(one, ast.Name):
            return env.get(one.id)
        if isinstance(one, ast.Attribute):
            on = self.type_of(one.value, env)
            return _member(on, one.attr) if isinstance(on, type) else None
        if isinstance(one, ast.Call):
            if isinstance(one.func, ast.Attribute) and one.func.attr == "replace" and one.args:
                return self.type_of(one.args[0], env)
            if isinstance(one.func, ast.Name):
                return self.resolve(one.func.id)
            return self.type_of(one.func, env)
        if isinstance(one, ast.BoolOp):
            return next((found for value in one.values if (found := self.type_of(value, env)) is not None), None)
        return None

    def by_name(self, one: ast.AST, function: ast.FunctionDef, env: dict[str, Any]) -> Iterator[tuple[type, str]]:
        """`getattr(self, name)` over names written in the same function, or over the fields of a dataclass named there."""
        if not (isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id == "getattr"):
            return
        on = self.type_of(one.args[0], env)
        if not isinstance(on, type):
            return
        for inner in ast.walk(function):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                yield on, inner.value
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "fields" and isinstance(inner.args[0], ast.Name):
                module, name = self.imported.get(inner.args[0].id, (self.name, inner.args[0].id))
                yield from ((on, field) for field in _fields(module, name))


def _assigned(one: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, side by side where both are tuples."""
    if isinstance(one, (ast.NamedExpr, ast.AnnAssign)) and one.value is not None:
        return [(one.target, one.value)]
    if not isinstance(one, ast.Assign) or len(one.targets) != 1:
        return []
    target, value = one.targets[0], one.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def _fields(module: str, name: str) -> list[str]:
    """A dataclass's fields by its source, for it may be on the torch side."""
    file = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    found = next((one for one in ast.parse(file.read_text()).body if isinstance(one, ast.ClassDef) and one.name == name), None)
    if found is None:
        return []
    return [one.target.id for one in found.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]


def _instance(hint: Any) -> Any:
    """The class in an optional or annotated hint; a tuple's hint stays whole, for its items are asked for."""
    if typing.get_origin(hint) is typing.Annotated:
        return _instance(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, pytypes.UnionType):
        return next((_instance(arm) for arm in typing.get_args(hint) if arm is not type(None)), None)
    return hint if isinstance(hint, type) or typing.get_origin(hint) in (tuple, list) else None


def _member(on: type, name: str) -> Any:
    """The type of a field, of a property's value, or of what a method returns."""
    if isinstance(put := getattr(on, "put", None), dict) and name in put:
        return put[name]
    if dataclasses.is_dataclass(on) and name in (schema := keys(on)):
        return _instance(schema[name][0])
    member = getattr(on, name, None)
    function = member.fget if isinstance(member, property) else member
    try:
        return _instance(typing.get_type_hints(function).get("return")) if callable(function) else None
    except (NameError, TypeError):  # a return type that only the torch side knows
        return None


def test_the_reader_finds_an_unread_key(tmp_path: Path) -> None:
    """The oracle itself: a key only checked, and one in a method nobody calls, are not live; a typed read is."""
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "nodes.py").write_text(
        "class Stated:\n"
        "    def check(self, where): return self.name\n"
        "    def machine(self): return self.devices\n"
        "    def never(self): return self.accelerator\n"
        "def plan(hardware: Stated, other):\n"
        "    other.memory_bytes\n"
        "    return hardware.machine()\n"
    )
    from lmforge.hardware.nodes import Stated

    found = Reads.of(tmp_path)
    assert [found.live(Stated, key) for key in ("devices", "name", "accelerator", "memory_bytes")] == [True, False, False, False]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_yaml_and_class_hold_the_same_keys(group: str, option: str) -> None:
    """A YAML holds all keys of its class and none more; what a stage leaves out is a root group's, what is null there must be given."""
    values, cls = tree(CATALOG, group, option), node_of(group, option)
    missing = {name for name, (hint, _) in keys(cls).items() if name not in values}
    if cls.group == "stage":
        missing -= {name for name, (hint, _) in keys(cls).items() if isinstance(hint, type) and issubclass(hint, Node) and hint.group}
    assert values.keys() - {"type"} - keys(cls).keys() == set()
    assert missing == set()


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_every_key_can_be_typed_without_a_plus(group: str, option: str, world: World) -> None:
    """All keys of the option typed at once, at the values they have, give the same experiment."""
    base = world.base(group, option)
    before = experiment(App(base).compose())
    root = {"stage": f"stage.{option}", "reward": "stage.grpo.reward"}.get(group, group.replace("/", "."))
    given = {one.partition("=")[0] for one in base}
    values = {leaf.path: leaf for leaf in leaves(node_of(group, option), places(encode(before), group, option)[0])}
    place = places(encode(before), group, option)[0]
    typed = []
    for path in values:
        value = functools.reduce(lambda at, name: at[name], path.split("."), place)
        if f"{root}.{path}" not in given and not isinstance(value, dict):
            typed.append(f"{root}.{path}={spelled(value)}")
    assert experiment(App([*base, *typed]).compose()) == before


def spelled(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, list):
        return f"[{','.join(spelled(one) for one in value)}]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return (
        {True: "true", False: "false", None: "null"}.get(value, repr(value)) if not isinstance(value, (int, float)) or isinstance(value, bool) else repr(value)
    )


def all_nodes() -> list[type[Node]]:
    """Every class a config can hold, parts included."""
    types("stage")  # loads every room
    found: list[type[Node]] = []
    pending = [Node]
    while pending:
        cls = pending.pop()
        found += [cls] if cls.__module__.startswith("lmforge.") and dataclasses.is_dataclass(cls) else []
        pending += cls.__subclasses__()
    return sorted(set(found), key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


@pytest.mark.parametrize("cls", all_nodes(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_a_class_has_no_second_copy_of_a_value_and_explains_each_key(cls: type[Node]) -> None:
    """Values live in YAML alone; each key has a meaning, and each class a docstring, which `list` prints."""
    for field in dataclasses.fields(cls):
        assert field.default is dataclasses.MISSING, f"{cls.__name__}.{field.name} has a default"
        assert field.default_factory is dataclasses.MISSING, f"{cls.__name__}.{field.name} has a default"
    for name, (hint, about) in keys(cls).items():
        group = isinstance(hint, type) and issubclass(hint, Node)
        assert about.meaning or group, f"{cls.__name__}.{name} has no meaning"
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # not the one that dataclass makes


def test_every_registered_type_has_an_option() -> None:
    """Nothing is registered that a user could not choose; `step` nodes are the compiler's own."""
    from lmforge.registry import _NODES

    types("stage")
    chosen = {(CATALOG_GROUPS.get(group, group), tree(CATALOG, group, option)["type"]) for group, option in OPTIONS}
    registered = {(group, type_) for group, known in _NODES.items() if group != "step" for type_, cls in known.items() if cls.__module__.startswith("lmforge.")}
    assert registered == chosen


def test_every_key_in_yaml_has_a_comment() -> None:
    """`key: value  # meaning`, or a comment line above: conf/ is the face."""
    bare = []
    for folder in CATALOG.folders:
        for file in sorted(folder.rglob("*.yaml")):
            if file.parent.name in WHOLE_CONFIGS:
                continue
            lines = file.read_text(encoding="utf-8").partition("\nhydra:")[0].splitlines()
            head = any(line.startswith("# ") and "@package" not in line for line in lines[:4])
            for number, line in enumerate(lines):
                key, _, rest = line.partition(":")
                if line.startswith(("#", "-", "  -", "defaults", "type:")) or not rest or "#" in line:
                    continue
                above = number > 0 and lines[number - 1].lstrip().startswith("#")
                if not above and not (rest.strip() == "" and head):
                    bare.append(f"{file.relative_to(folder)}:{number + 1} {key.strip()}")
    assert bare == []


ROOT_KEYS: list[tuple[str, str, bool]] = [("seed", "seed=1", True), ("name", "name=other", False), ("output", "output=elsewhere", False)]


@pytest.mark.parametrize(("key", "override", "identity"), ROOT_KEYS, ids=[row[0] for row in ROOT_KEYS])
def test_root_keys_are_live(key: str, override: str, identity: bool, plan_of: Callable[..., Plan], rows: Path) -> None:
    """The seed is identity; what the run is called and where it is kept are not."""
    base = ["stage=pretrain", "data=text", f"data.path={rows}", "hardware=cpu"]
    before, after = plan_of(*base), plan_of(*base, override)
    assert before.to_json() != after.to_json()
    assert (digests(before) != digests(after)) is identity


def test_numbers_stay_in_range() -> None:
    """The oracle's own candidates respect the bounds and are finite."""
    about = Key("a share", gt=0, lt=1)
    found = list(numbers(about, 0.5, float))
    assert found
    assert all(0 <= one <= 1 and math.isfinite(one) for one in found)
