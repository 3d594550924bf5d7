"""Whether an answer parses as Python where its prompt leaves off. The parser is fed hostile text: it is bounded, and every way it can fail is no."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Iterator

DEFINITION = re.compile(r"(?:async[ \t]+)?def[ \t]|class[ \t]")
# What an expression without any name, call or attribute is made of.
LITERALS = (
    *(ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.JoinedStr, ast.FormattedValue, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare),
    *(ast.unaryop, ast.operator, ast.boolop, ast.cmpop, ast.expr_context),
)
# What ast.parse raises on text: also for null bytes and lone surrogates (ValueError), for nesting too deep (RecursionError, MemoryError) and for
# numbers too large (OverflowError, ValueError).
FAILURES = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


def nodes_of_answer(prompt: str, answer: str, trimmed: bool) -> int:
    """Statements and expressions that the answer adds to the prompt's last definition; 0 where the two do not parse, or it goes beyond the definition.

    What says nothing is not counted: `pass`, and statements of literals alone.
    """
    before, indent = _context(prompt)
    if trimmed:
        answer = indent + answer.lstrip(" \t")
    tree = _parse(before + answer)
    if tree is None or (before and len(tree.body) != 1):
        return 0
    lines = before.split("\n")
    start = (len(lines), len(lines[-1].encode()))
    return sum((node.lineno, node.col_offset) >= start for node in _telling(tree) if isinstance(node, (ast.stmt, ast.expr)))


def _telling(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of statements that say nothing."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and all(isinstance(part, LITERALS) for part in ast.walk(node.value))):
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


@functools.lru_cache(maxsize=1024)  # a prompt has many answers
def _context(prompt: str) -> tuple[str, str]:
    """The prompt's last definition, as text that the answer follows, and the indent of its body; empty where it has none.

    What a chat template wrote after it, such as the next role's name, is left out.
    """
    lines = prompt.split("\n")
    last = next((index for index in reversed(range(len(lines))) if DEFINITION.match(lines[index])), None)
    if last is None:
        return "", ""
    while last > 0 and lines[last - 1].startswith("@"):
        last -= 1
    tree = _parse("\n".join(lines[last:]))
    if tree is None:
        return "\n".join(lines[last:]), ""  # it ends within the definition, and the answer goes on right there
    found = tree.body[0]
    assert isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    return "\n".join(lines[last:][: found.end_lineno]) + "\n", " " * found.body[0].col_offset


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it speaks of odd escapes and of `1 is 1`
            return ast.parse(text)
    except FAILURES:
        return None
