"""Wrong versions of a right function body: small edits of its source that still parse and mean something else.

Edits are made on the source text, never through `ast.unparse`, so that style does not give the wrong one away.
"""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmforge.data.split import key

KINDS = ("operator", "comparison", "condition", "constant", "name", "arguments", "statement")
OPERATORS = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "/", "%": "/", "|": "&", "&": "|", "<<": ">>", ">>": "<<"}
OPERATORS |= {f"{old}=": f"{new}=" for old, new in OPERATORS.items()}
COMPARISONS = {"<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",)}
WRAP = "async def _():\n"  # `await` and `return` both parse in here


@dataclass(frozen=True)
class Edit:
    """Replace `text[start:end]` by `new`."""

    kind: str
    start: int
    end: int
    new: str

    @property
    def longer(self) -> int:
        """Characters that the edit adds."""
        return len(self.new) - (self.end - self.start)


def mutate(body: str, names: Sequence[str], kinds: Sequence[str], edits: int, tolerance: float, seed: str) -> str | None:
    """A body after `edits` edits within `tolerance` of its length, or None. `names` are those in scope besides its own; `seed` decides the choices."""
    room, wanted = int(tolerance * len(body)), -1 if int(key(seed, "side"), 16) % 2 else 1
    mutant, meaning = body, {_meaning(body)}
    for turn in range(edits):
        following = _one(mutant, names, kinds, room - abs(len(mutant) - len(body)), wanted, meaning, f"{seed}{turn}")
        if following is None:
            return None
        mutant = following
        meaning.add(_meaning(mutant))
    return mutant


def _one(text: str, names: Sequence[str], kinds: Sequence[str], room: int, wanted: int, meanings: set[str], seed: str) -> str | None:
    """The first edit that parses and means something new; kinds take turns by the seed, and edits on the wanted side of the length come first."""
    groups: dict[tuple[bool, str], list[Edit]] = {}
    for edit in candidates(text, names):
        if edit.kind in kinds and abs(edit.longer) <= room:
            groups.setdefault((edit.longer * wanted < 0, edit.kind), []).append(edit)
    for side, kind in sorted(groups, key=lambda group: (group[0], key(seed, group[1]))):
        edits = groups[side, kind]
        first = int(key(seed, kind, "first"), 16) % len(edits)
        for edit in edits[first:] + edits[:first]:
            mutant = text[: edit.start] + edit.new + text[edit.end :]
            try:
                meaning = _meaning(mutant)
            except SyntaxError:
                continue
            if meaning not in meanings:
                return mutant
    return None


def _meaning(body: str) -> str:
    return ast.dump(ast.parse(WRAP + body))


def candidates(body: str, names: Sequence[str]) -> Iterator[Edit]:
    """Every edit; some do not parse."""
    starts = [0, *itertools.accumulate(len(line) + 1 for line in body.split("\n"))]
    yield from _token_edits(body, names, starts)
    tree = ast.parse(WRAP + body)
    for one in ast.walk(tree):
        if isinstance(one, ast.Call) and len(one.args) > 1:
            yield from _swapped_arguments(one, body, starts)
    function = tree.body[0]
    for one in ast.walk(function):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(one, block, None)
            if isinstance(statements, list):
                yield from _statement_edits(statements, body, starts)


def _token_edits(body: str, names: Sequence[str], starts: list[int]) -> Iterator[Edit]:
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(WRAP + body).readline) if token.start[0] > 1 and token.string.strip()]
    own = {token.string for token, before in zip(tokens, [None, *tokens], strict=False) if _is_name(token) and not (before and before.string == ".")}
    pool = sorted(own | set(names))
    previous = ""
    for token, following in zip(tokens, [*(token.string for token in tokens[1:]), ""], strict=True):
        start, text = starts[token.start[0] - 2] + token.start[1], token.string
        for kind, new, length in _replacements(token, previous, following, pool):
            yield Edit(kind, start, start + (length or len(text)), new)
        previous = text


def _is_name(token: tokenize.TokenInfo) -> bool:
    return token.type == tokenize.NAME and not keyword.iskeyword(token.string)


def _replacements(token: tokenize.TokenInfo, previous: str, following: str, pool: list[str]) -> Iterator[tuple[str, str, int]]:
    """(kind, new text, characters replaced; 0 for the token) at one token."""
    text = token.string
    if token.type == tokenize.OP and text in COMPARISONS:
        yield from (("comparison", new, 0) for new in COMPARISONS[text])
    elif token.type == tokenize.OP and text in OPERATORS and _ends_value(previous):
        yield "operator", OPERATORS[text], 0
    elif token.type == tokenize.NUMBER and text.isdigit():
        yield from (("constant", str(new), 0) for new in (int(text) + 1, int(text) - 1) if new >= 0)
    elif text in ("and", "or", "True", "False"):
        yield "condition", {"and": "or", "or": "and", "True": "False", "False": "True"}[text], 0
    elif text in ("is", "in") and previous != "not" and following != "not":
        yield "comparison", {"is": "is not", "in": "not in"}[text], 0
    elif text in ("if", "while", "elif"):
        yield ("condition", text, len(text) + 4) if following == "not" else ("condition", f"{text} not", 0)
    elif text == "not" and following == "in":
        yield "comparison", "in", 6
    elif text == "not" and previous == "is":
        yield "comparison", "", 4
    elif _is_name(token) and previous != ".":
        yield from (("name", new, 0) for new in pool if new != text)


def _ends_value(text: str) -> bool:
    return text[-1:] in (")", "]", "}", '"', "'") or ((text[-1:].isalnum() or text[-1:] == "_") and not keyword.iskeyword(text))


def _swapped_arguments(call: ast.Call, body: str, starts: list[int]) -> Iterator[Edit]:
    for left, right in itertools.pairwise(call.args):
        (a, b), (c, d) = _span(left, body, starts), _span(right, body, starts)
        yield Edit("arguments", a, d, body[c:d] + body[b:c] + body[a:b])


def _span(one: ast.expr, body: str, starts: list[int]) -> tuple[int, int]:
    """Characters of an expression; ast counts columns in UTF-8 bytes."""
    lines = body.split("\n")
    assert one.end_lineno is not None
    assert one.end_col_offset is not None
    ends = []
    for line, column in ((one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)):
        ends.append(starts[line - 2] + len(lines[line - 2].encode()[:column].decode()))
    return ends[0], ends[1]


def _statement_edits(statements: list[ast.stmt], body: str, starts: list[int]) -> Iterator[Edit]:
    """Drop, double, or swap whole statements of one block."""
    spans = [(starts[one.lineno - 2], starts[(one.end_lineno or one.lineno) - 1]) for one in statements if one.lineno > 1]
    if len(spans) < 2 or any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        return  # a lone statement, or two that share a line
    text = body + "\n"
    for start, end in spans:
        yield Edit("statement", start, min(end, len(body)), "")
        yield Edit("statement", start, start, text[start:end])
    for (a, b), (c, d) in itertools.pairwise(spans):
        yield Edit("statement", a, min(d, len(body)), (text[c:d] + text[b:c] + text[a:b])[: min(d, len(body)) - a])
