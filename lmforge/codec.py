"""Between plain data and nodes: a strict decoder, an exact encoder, and the digest that identity rests on.

Decoding reports every problem at once. `200e3` is a valid integer and `200.5` is not; NaN, an unknown key or a
missing one is refused. `decode(encode(x)) == x` holds for every node, and for JSON in between.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types as pytypes
import typing
from collections.abc import Mapping
from typing import Any

from lmforge.errors import ConfigError, Problem, did_you_mean
from lmforge.registry import Key, Node, lookup

Problems = list[Problem]
_MISSING = object()
LARGEST = {int: 2**63, float: 2**1024}  # integers are 64 bits wide wherever they end up


def keys(cls: Any) -> dict[str, tuple[Any, Key]]:
    """Every key of a dataclass with its annotation and what the schema says of it."""
    return _keys(cls)


@functools.cache
def _keys(cls: Any) -> dict[str, tuple[Any, Key]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        hint, about = hints[field.name], Key("")
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extras = typing.get_args(hint)
            about = next((extra for extra in extras if isinstance(extra, Key)), about)
        found[field.name] = (hint, about)
    return found


def decode(hint: Any, value: Any, where: str = "") -> Any:
    """Plain data to a typed value; ConfigError with all problems."""
    problems: Problems = []
    result = _decode(hint, value, where, problems)
    if problems:
        raise ConfigError.of(problems)
    return result


def _decode(hint: Any, value: Any, where: str, problems: Problems) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, pytypes.UnionType):
        return _decode_union(hint, value, where, problems)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices and type(value) is type(choices[choices.index(value)]):
            return value
        return _complain(problems, where, f"{value!r} is not valid", did_you_mean(str(value), map(str, choices)))
    if origin is tuple:
        return _decode_tuple(hint, value, where, problems)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return _complain(problems, where, f"expected a mapping, got {value!r}")
        item = typing.get_args(hint)[1]
        return {str(key): _decode(item, one, f"{where}.{key}", problems) for key, one in value.items()}
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, Node)):
        return _decode_node(hint, value, where, problems)
    return _decode_scalar(hint, value, where, problems)


def _complain(problems: Problems, where: str, what: str, instead: str = "") -> Any:
    problems.append(Problem(where, what, instead))
    return _MISSING


def _decode_union(hint: Any, value: Any, where: str, problems: Problems) -> Any:
    arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
    if value is None:
        if type(None) in typing.get_args(hint):
            return None
        return _complain(problems, where, "must be set")
    first: Problems = []
    for arm in arms:
        attempt: Problems = []
        result = _decode(arm, value, where, attempt)
        if not attempt:
            return result
        first = first or attempt
    problems.extend(first)
    return _MISSING


def _decode_tuple(hint: Any, value: Any, where: str, problems: Problems) -> Any:
    if not isinstance(value, (list, tuple)):
        return _complain(problems, where, f"expected a list, got {value!r}", f"write [{value}]")
    item = typing.get_args(hint)[0]
    return tuple(_decode(item, one, f"{where}[{index}]", problems) for index, one in enumerate(value))


def _decode_scalar(hint: Any, value: Any, where: str, problems: Problems) -> Any:
    if value is None:
        return _complain(problems, where, "must be set")
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a model or run named 7b is text, one named 7 is too
    if hint in (int, float) and not isinstance(value, (bool, Mapping, list, tuple)):
        number = _number(value)
        if isinstance(number, float) and not math.isfinite(number):
            return _complain(problems, where, f"{value} is not a finite number")
        if number is not None and abs(number) >= LARGEST[hint]:
            return _complain(problems, where, f"{str(value)[:24]} is too large a number")
        if number is not None and hint is float:
            return float(number)
        if number is not None and number == int(number):
            return int(number)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return _complain(problems, where, f"expected {names.get(hint, hint)}, got {value!r}")


def _number(value: Any) -> int | float | None:
    if isinstance(value, (int, float)):
        return value
    try:
        return int(value)
    except (ValueError, TypeError):
        pass
    try:
        return float(value)
    except (ValueError, TypeError):
        return None


def _decode_node(hint: type, value: Any, where: str, problems: Problems) -> Any:
    if isinstance(value, hint):
        return value
    if not isinstance(value, Mapping):
        return _complain(problems, where or "config", f"expected a mapping, got {value!r}")
    given = dict(value)
    cls = hint
    if issubclass(hint, Node) and hint.group:
        try:
            cls = lookup(hint.group, given.pop("type", "(none given)"), where)
        except ConfigError as error:
            problems.extend(error.problems)
            return _MISSING
    found, before = {}, len(problems)
    schema = keys(cls)
    for name in given:
        if name not in schema:
            _complain(problems, f"{where}.{name}" if where else str(name), "unknown key", did_you_mean(str(name), schema))
    for name, (item, about) in schema.items():
        path = f"{where}.{name}" if where else name
        if name not in given:
            _complain(problems, path, "missing key", f"give it a value: {about.meaning}")
            continue
        mark = len(problems)
        found[name] = _decode(item, given[name], path, problems)
        if len(problems) == mark and (complaint := _out_of_range(about, found[name])):
            _complain(problems, path, complaint, about.meaning)
    if len(problems) > before:
        return _MISSING
    made = cls(**found)
    if isinstance(made, Node):
        problems.extend(made.check(where))
    return made


def _out_of_range(about: Key, value: Any) -> str:
    for one in value if isinstance(value, tuple) else (value,):
        if complaint := about.complaint(one):
            return complaint
    return ""


def encode(value: Any, *, identity: bool = False) -> Any:
    """A typed value to plain data; with `identity`, only what decides the result of a step."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain: dict[str, Any] = {}
        if isinstance(value, Node) and value.type:
            plain["type"] = value.type
        for name, (_, about) in keys(type(value)).items():
            one = getattr(value, name)
            if identity and (not about.identity or (isinstance(one, Node) and not one.identity)):
                continue
            plain[name] = encode(one, identity=identity)
        return plain
    if isinstance(value, (list, tuple)):
        return [encode(one, identity=identity) for one in value]
    if isinstance(value, Mapping):
        return {str(key): encode(one, identity=identity) for key, one in value.items()}
    return value


def canonical(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of SHA-256 over the canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]
