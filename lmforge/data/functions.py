"""Documented functions of a Python file as (signature + docstring -> body), as written there apart from their indentation."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

Definition = ast.FunctionDef | ast.AsyncFunctionDef
INDENT = "    "


@dataclass(frozen=True)
class Function:
    """A function at column 0: `prompt` is its signature and docstring, `body` the rest at one indent; `problem` says why it is none."""

    name: str
    prompt: str
    body: str
    problem: str = ""


def functions(tree: ast.Module, text: str, paragraphs: int) -> Iterator[Function]:
    """Every function and method of a file, nested ones too, in source order."""
    lines = text.split("\n")  # splitlines() would also cut at a form feed, where ast does not
    for name, found in _definitions(tree.body, ""):
        yield _function(name, found, lines, paragraphs)


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    for statement in body:
        inner = prefix
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + statement.name, statement
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{prefix}{statement.name}."
        for block in ("body", "orelse", "finalbody"):
            yield from _definitions(getattr(statement, block, []), inner)
        for handler in getattr(statement, "handlers", []):
            yield from _definitions(handler.body, inner)


def _function(name: str, found: Definition, lines: list[str], paragraphs: int) -> Function:
    docstring = ast.get_docstring(found, clean=False)
    if not docstring or not docstring.strip():
        return Function(name, "", "", "no_docstring")
    first = found.body[0]
    if len(found.body) == 1:
        return Function(name, "", "", "no_body")
    assert first.end_lineno is not None
    assert found.end_lineno is not None
    if first.lineno == found.lineno or found.body[1].lineno == first.end_lineno:
        return Function(name, "", "", "one_line")
    shift = found.body[0].col_offset - len(INDENT)
    fixed = _inside_strings(found.body[1:])
    head = [_dedent(line, found.col_offset) for line in lines[found.lineno - 1 : first.lineno - 1]]
    body = [line if number in fixed else _dedent(line, shift) for number, line in enumerate(lines[first.end_lineno : found.end_lineno], first.end_lineno + 1)]
    while body and not body[0].strip():
        body.pop(0)
    prompt = "\n".join([*head, f'{INDENT}"""{_shown(docstring, paragraphs)}"""'])
    return Function(name, prompt, "\n".join(line.rstrip() if line.isspace() else line for line in body))


def _dedent(line: str, by: int) -> str:
    if by < 0:
        return INDENT[:-by] + line if line.strip() else line
    return line[min(by, len(line) - len(line.lstrip())) :]


def _inside_strings(body: list[ast.stmt]) -> set[int]:
    """Lines that begin inside a string, where an indent is content."""
    found: set[int] = set()
    for statement in body:
        if statement.end_lineno == statement.lineno:
            continue
        for one in ast.walk(statement):
            if isinstance(one, (ast.JoinedStr, ast.Constant)) and isinstance(getattr(one, "value", ""), (str, bytes)):
                found.update(range(one.lineno + 1, (one.end_lineno or one.lineno) + 1))
    return found


def _shown(docstring: str, paragraphs: int) -> str:
    """The docstring's first paragraphs, written so that the prompt still parses."""
    kept = "\n\n".join(inspect.cleandoc(docstring).split("\n\n")[:paragraphs]).strip()
    kept = kept.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    kept = kept.replace("\n", "\n" + INDENT)
    return kept + " " if kept.endswith('"') else kept
