"""What the code of a package reads, by type, from its text alone."""

from __future__ import annotations

import ast
import dataclasses
import sys
import types as pytypes
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmforge.compiler.emit  # a class is known to the reader once it is loaded
import lmforge.training.recipe
from lmforge.codec import keys
from lmforge.registry import Node

PACKAGE = Path(lmforge.__file__).parent


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
