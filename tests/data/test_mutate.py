"""Mutations: each kind by example, and what holds for all of them."""

from __future__ import annotations

import ast

import pytest

from lmforge.data.mutate import KINDS, candidates, mutate

BODY = """    if not a is b and c in d:
        x = f(a, b + 1)
        return "é", g(c, d)
    y = -1
    return True"""


def results(kind: str) -> set[str]:
    return {BODY[: edit.start] + edit.new + BODY[edit.end :] for edit in candidates(BODY, ["z"]) if edit.kind == kind}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("operator", "b + 1", "b - 1"),
        ("comparison", "a is b", "a is not b"),
        ("comparison", "c in d", "c not in d"),
        ("condition", "if not a", "if a"),
        ("condition", "b and c", "b or c"),
        ("condition", "True", "False"),
        ("constant", "b + 1", "b + 2"),
        ("name", "in d:", "in z:"),
        ("arguments", "f(a, b + 1)", "f(b + 1, a)"),
        ("arguments", "g(c, d)", "g(d, c)"),
        ("statement", "    y = -1\n", ""),
        ("statement", "    y = -1\n", "    y = -1\n    y = -1\n"),
        ("statement", "    y = -1\n    return True", "    return True\n    y = -1"),
    ],
)
def test_each_kind(kind: str, old: str, new: str) -> None:
    assert BODY.count(old) == 1
    assert BODY.replace(old, new) in results(kind)


def test_a_unary_minus_is_no_operator_and_attributes_keep_their_names() -> None:
    found = {edit.new for edit in candidates("    return -a.count", []) if edit.kind in ("operator", "name")}
    assert found == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutant_parses_and_means_something_else(kind: str) -> None:
    for seed in map(str, range(20)):
        mutant = mutate(BODY, ["z"], [kind], 1, 0.5, seed)
        assert mutant is not None
        assert ast.dump(ast.parse(f"def _():\n{mutant}")) != ast.dump(ast.parse(f"def _():\n{BODY}"))
        assert mutant == mutate(BODY, ["z"], [kind], 1, 0.5, seed)


def test_seeds_differ_and_length_is_kept() -> None:
    mutants = {mutate(BODY, ["z"], KINDS, 2, 0.05, str(seed)) for seed in range(30)}
    assert len(mutants) > 10
    assert None not in mutants
    assert all(abs(len(mutant or "") - len(BODY)) <= 0.05 * len(BODY) for mutant in mutants)


def test_two_edits_never_undo_each_other() -> None:
    for seed in map(str, range(50)):
        mutant = mutate("    return True", [], ["condition"], 2, 0.5, seed)
        assert mutant is None  # True -> False -> True is no mutation, and nothing else is there


def test_nothing_to_change() -> None:
    assert mutate("    pass", [], KINDS, 1, 0.1, "s") is None
