"""Whether an answer parses as Python where its prompt leaves off. The parser is fed hostile text: it is bounded, and every way it can fail is no."""

from __future__ import annotations

import ast
import functools
import re
import warnings

DEFINITION = re.compile(r"(?:async[ \t]+)?def[ \t]|class[ \t]")
# What ast.parse raises on text: also for null bytes and lone surrogates (ValueError), for nesting too deep (RecursionError, MemoryError) and for
# numbers too large (OverflowError, ValueError).
FAILURES = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


def nodes_of_answer(prompt: str, answer: str, trimmed: bool) -> int:
    """Statements and expressions that the answer adds to the prompt's last definition; 0 where the two do not parse, or it goes beyond the definition."""
    before, indent = _context(prompt)
    if trimmed:
        answer = indent + answer.lstrip(" \t")
    tree = _parse(before + answer)
    if tree is None or (before and len(tree.body) != 1):
        return 0
    lines = before.split("\n")
    start = (len(lines), len(lines[-1].encode()))
    return sum((node.lineno, node.col_offset) >= start for node in ast.walk(tree) if isinstance(node, (ast.stmt, ast.expr)))


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
