"""The codec: strict decoding, exact encoding, and the digest that identity rests on."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

import pytest

from lmforge.codec import canonical, decode, digest, encode, keys
from lmforge.errors import ConfigError
from lmforge.registry import Key, Node, node


@node
class Leaf(Node):
    """A part of a node."""

    exactly: Annotated[int, Key("a count", ge=1)]
    share: Annotated[float | None, Key("a share", ge=0, lt=1)]


@node
class Tree(Node):
    """One key of every kind."""

    count: Annotated[int, Key("a count", gt=0, le=10**12)]
    rate: Annotated[float, Key("a rate", gt=0)]
    name: Annotated[str, Key("a name", identity=False)]
    on: Annotated[bool, Key("a switch")]
    mode: Annotated[Literal["a", "b", 3], Key("a mode")]
    maybe: Annotated[int | None, Key("perhaps a count", ge=0)]
    names: Annotated[tuple[str, ...], Key("names", choices=("x", "y"))]
    sizes: Annotated[tuple[int, ...], Key("sizes", ge=1)]
    weights: Annotated[dict[str, float], Key("weights")]
    leaf: Annotated[Leaf, Key("a leaf")]


@node
class Where(Node):
    """All execution."""

    identity = False
    devices: Annotated[int, Key("devices")]


@node
class Holder(Node):
    """Something, and where it runs."""

    what: Annotated[int, Key("what")]
    where: Annotated[Where, Key("where")]


PLAIN: dict[str, Any] = {
    "count": 3,
    "rate": 0.5,
    "name": "n",
    "on": True,
    "mode": "a",
    "maybe": None,
    "names": ["x"],
    "sizes": [1, 2],
    "weights": {"u": 1.0},
    "leaf": {"exactly": 1, "share": None},
}


def tree(**changed: Any) -> Tree:
    made = decode(Tree, PLAIN | changed, "tree")
    assert isinstance(made, Tree)
    return made


def complaints(**changed: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        tree(**changed)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("hint", "given", "decoded"),
    [
        (int, 200e3, 200_000),
        (int, "200e3", 200_000),
        (int, "1e18", 10**18),
        (int, "010", 10),
        (int, "1_000", 1000),
        (int, -0.0, 0),
        (int, 2**63 - 1, 2**63 - 1),
        (float, 1e300, 1e300),
        (float, 2**70, 2.0**70),
        (float, 1, 1.0),
        (float, "3e-4", 3e-4),
        (float, "1", 1.0),
        (str, "7b", "7b"),
        (str, 7, "7"),
        (str, 1.5, "1.5"),
        (bool, False, False),
        (int | None, None, None),
        (int | str, "auto", "auto"),
        (int | str, "8", 8),
        (tuple[int, ...], [1, 2.0], (1, 2)),
        (tuple[int, ...], [], ()),
        (dict[str, float], {1: 2}, {"1": 2.0}),
        (Literal["a", 3], 3, 3),
    ],
)
def test_what_is_taken(hint: Any, given: Any, decoded: Any) -> None:
    result = decode(hint, given, "key")
    assert result == decoded
    assert type(result) is type(decoded)


@pytest.mark.parametrize(
    ("hint", "given", "said"),
    [
        (int, 200.5, "expected a whole number, got 200.5"),
        (int, "200.5", "expected a whole number, got '200.5'"),
        (int, True, "expected a whole number, got True"),
        (int, None, "must be set"),
        (int, "", "expected a whole number, got ''"),
        (int, "1e", "expected a whole number, got '1e'"),
        (int, [1], "expected a whole number, got [1]"),
        (int, {"a": 1}, "expected a whole number, got {'a': 1}"),
        (int, math.nan, "nan is not a finite number"),
        (int, math.inf, "inf is not a finite number"),
        (int, "-inf", "-inf is not a finite number"),
        (float, "nan", "nan is not a finite number"),
        (float, "NaN", "NaN is not a finite number"),
        (float, "Infinity", "Infinity is not a finite number"),
        (float, False, "expected a number, got False"),
        (float, "abc", "expected a number, got 'abc'"),
        (float, 10**400, "is too large a number"),
        (int, 2**63, "9223372036854775808 is too large a number"),
        (int, 1e30, "1e+30 is too large a number"),
        (int, "9" * 5000, "is not a finite number"),
        (bool, 1, "expected true or false, got 1"),
        (bool, "true", "expected true or false, got 'true'"),
        (str, True, "expected text, got True"),
        (str, ["a"], "expected text, got ['a']"),
        (str, None, "must be set"),
        (Literal["a", 3], "3", "'3' is not valid"),
        (Literal["a", 1], True, "True is not valid"),
        (tuple[int, ...], 3, "expected a list, got 3; write [3]"),
        (tuple[int, ...], "ab", "expected a list, got 'ab'"),
        (dict[str, float], [1], "expected a mapping, got [1]"),
        (int | None, "x", "expected a whole number, got 'x'"),
    ],
)
def test_what_is_refused(hint: Any, given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(hint, given, "key")
    assert [problem.where for problem in caught.value.problems] == ["key"]
    assert said in str(caught.value)


def test_every_problem_is_told_at_once_and_where_it_is() -> None:
    changed = {"count": 0, "rate": "x", "mode": "c", "names": ["x", "z"], "sizes": [1, 0], "leaf": {"exactly": 0.5, "shar": 1}, "extra": 1}
    assert {line.partition(": ")[0] for line in complaints(**changed)} == {
        "tree.count",
        "tree.rate",
        "tree.mode",
        "tree.names",
        "tree.sizes",
        "tree.leaf.exactly",
        "tree.leaf.share",
        "tree.leaf.shar",
        "tree.extra",
    }


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"count": 0}, "tree.count: 0 must be > 0; a count"),
        ({"count": 1e13}, "tree.count: 10000000000000 must be <= 1e+12; a count"),
        ({"leaf": {"exactly": 1, "share": 1}}, "tree.leaf.share: 1.0 must be < 1; a share"),
        ({"leaf": {"exactly": 1, "share": -0.1}}, "tree.leaf.share: -0.1 must be >= 0; a share"),
        ({"names": ["z"]}, "tree.names: 'z' is not one of x, y; names"),
        ({"coutn": 1}, "tree.coutn: unknown key; did you mean 'count'?"),
        ({"leaf": None}, "tree.leaf: expected a mapping, got None"),
        ({"weights": {"u": "nan"}}, "tree.weights.u: nan is not a finite number"),
    ],
)
def test_a_line_says_where_what_and_what_instead(changed: dict[str, Any], line: str) -> None:
    assert complaints(**changed) == [line]


def test_a_missing_key_is_named_with_its_meaning() -> None:
    with pytest.raises(ConfigError, match=r"tree.rate: missing key; give it a value: a rate"):
        decode(Tree, {key: value for key, value in PLAIN.items() if key != "rate"}, "tree")


@pytest.mark.parametrize(
    "changed", [{}, {"maybe": 0, "on": False, "mode": 3, "names": [], "rate": 1e-300, "count": 10**12}, {"name": "ü\n\t🙂", "weights": {}}]
)
def test_the_round_trip_is_exact_also_through_json(changed: dict[str, Any]) -> None:
    made = tree(**changed)
    assert decode(Tree, encode(made), "tree") == made
    assert decode(Tree, json.loads(canonical(made)), "tree") == made
    assert canonical(decode(Tree, json.loads(canonical(made)), "tree")) == canonical(made)


@pytest.mark.parametrize("number", [0.1, 1 / 3, 1e-300, 5e-324, 1.7976931348623157e308, 123456789.123456789])
def test_floats_keep_every_bit(number: float) -> None:
    assert decode(float, json.loads(canonical({"x": number}))["x"], "x") == number


def test_canonical_text_does_not_depend_on_the_order_or_the_spelling_of_what_was_given() -> None:
    backwards = dict(reversed(PLAIN.items()))
    assert canonical(decode(Tree, backwards, "tree")) == canonical(tree())
    assert digest(tree(count="3", rate="5e-1")) == digest(tree(count=3.0, rate=0.5))


def test_canonical_text_is_pinned() -> None:
    """Stored digests name folders on disk: this text may never change by accident."""
    assert canonical({"b": (1, 2.0, None), "a": {"ü": True}}) == '{"a":{"ü":true},"b":[1,2.0,null]}'
    assert digest({"b": (1, 2.0, None), "a": {"ü": True}}) == "bed51e428783c443"


def test_nan_has_no_canonical_text() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"x": math.nan})


@pytest.mark.parametrize("key", [name for name in PLAIN if name != "name"])
def test_each_identity_key_changes_the_digest(key: str) -> None:
    other = {"count": 4, "rate": 0.25, "on": False, "mode": "b", "maybe": 0, "names": ["y"], "sizes": [2, 1], "weights": {"u": 2.0}}
    leaf = {"exactly": 2, "share": None}
    changed = tree(**{key: other.get(key, leaf)})
    assert digest(encode(changed, identity=True)) != digest(encode(tree(), identity=True))


def test_execution_keys_and_execution_nodes_are_no_identity() -> None:
    assert digest(encode(tree(name="other"), identity=True)) == digest(encode(tree(), identity=True))
    assert "name" not in encode(tree(), identity=True)

    assert encode(Holder(what=1, where=Where(devices=2)), identity=True) == {"what": 1}


def test_keys_tells_annotation_and_meaning() -> None:
    hint, about = keys(Tree)["maybe"]
    assert hint == int | None
    assert (about.meaning, about.ge, about.identity) == ("perhaps a count", 0, True)


def test_nodes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree().count = 4  # type: ignore[misc]
