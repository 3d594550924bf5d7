"""Instruction and preference pairs from Python modules. Every choice is made by content hash, so nothing depends on a random state."""

from __future__ import annotations

import ast
import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lmforge.data.functions import Function, functions
from lmforge.data.mutate import mutate
from lmforge.data.overlap import Trained
from lmforge.data.split import key, unit
from lmforge.formats.corpus import SPLITS, ViewTally, Writer

NEIGHBOURS = 16  # bodies of nearest length on each side that may serve as another function's body


@dataclass(frozen=True)
class Rules:
    """What `pystdlib`'s keys say of pairs; see conf/data/pystdlib.yaml for their meaning."""

    docstring_paragraphs: int
    min_body_chars: int
    max_body_chars: int
    max_pair_chars: int
    mutations: tuple[str, ...]
    mutation_fraction: float
    mutation_edits: int
    length_tolerance: float


@dataclass(frozen=True)
class Pair:
    """A function that became an instruction pair."""

    source: str
    split: str
    prompt: str
    body: str

    @property
    def name(self) -> str:
        """The function's own name, without its file and class."""
        return self.source.rpartition(":")[2].rpartition(".")[2]

    @property
    def key(self) -> str:
        """Its identity by content."""
        return key(self.prompt, self.body)


def instruct(module: str, tree: ast.Module, text: str, split: str, rules: Rules, seen: set[str], trained: Trained, writer: Writer) -> Iterator[Pair]:
    """Write a module's (signature + docstring -> body) rows; yields those kept. `seen` holds the keys of earlier pairs, `trained` the training side."""
    tally = writer.account.view("chat")
    for function in functions(tree, text, rules.docstring_paragraphs):
        tally.entered += 1
        pair = Pair(f"{module}:{function.name}", split, function.prompt, function.body)
        problem = function.problem or _unfit(function, rules)
        if split == "train" and function.prompt:
            trained.add_prompt(function.prompt)
        elif not problem and trained.holds(pair.prompt, pair.body):
            problem = "in_training"
        problem = problem or ("duplicate" if pair.key in seen else "")
        if problem:
            tally.dropped[problem] += 1
            continue
        seen.add(pair.key)
        tally.kept += 1
        messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.body}]
        writer.write("chat", split, {"messages": messages, "source": pair.source})
        yield pair


def _unfit(function: Function, rules: Rules) -> str:
    if len(function.body) < rules.min_body_chars:
        return "body_too_short"
    if len(function.body) > rules.max_body_chars:
        return "body_too_long"
    if len(function.prompt) + len(function.body) > rules.max_pair_chars:
        return "pair_too_long"
    return ""


def contrast(pairs: Sequence[Pair], rules: Rules, writer: Writer, progress: Callable[[int, int], None]) -> None:
    """Write a preference row for each pair: its body against a wrong one of about the same length, from the same split."""
    tally: ViewTally = writer.account.view("preference")
    kinds = {"mutation": 0, "other": 0}
    for split in SPLITS:
        ordered = sorted((pair for pair in pairs if pair.split == split), key=lambda pair: (len(pair.body), pair.key))
        lengths = [len(pair.body) for pair in ordered]
        for place, pair in enumerate(ordered):
            tally.entered += 1
            progress(tally.entered, len(pairs))
            first = ("mutation", "other") if unit(key("kind", pair.key)) < rules.mutation_fraction else ("other", "mutation")
            kind, rejected = next(((kind, body) for kind in first if (body := _wrong(kind, place, ordered, lengths, rules))), ("", ""))
            if not kind:
                tally.dropped["no_wrong_body_of_that_length"] += 1
                continue
            tally.kept += 1
            kinds[kind] += 1
            row = {"prompt": pair.prompt, "chosen": pair.body, "rejected": rejected, "source": pair.source, "kind": kind}
            writer.write("preference", split, row)
    writer.account.more["rejected_kinds"] = kinds


def _wrong(kind: str, place: int, ordered: Sequence[Pair], lengths: Sequence[int], rules: Rules) -> str | None:
    pair = ordered[place]
    if kind == "mutation":
        return mutate(pair.body, _parameters(pair.prompt), rules.mutations, rules.mutation_edits, rules.length_tolerance, pair.key)
    return _other(place, ordered, lengths, rules.length_tolerance)


def _parameters(prompt: str) -> list[str]:
    function = ast.parse(prompt).body[0]
    return [one.arg for one in ast.walk(function) if isinstance(one, ast.arg)]


def _other(place: int, ordered: Sequence[Pair], lengths: Sequence[int], tolerance: float) -> str | None:
    """Another function's body of the nearest length: the pair's hash picks the side, so that neither chosen nor rejected is the longer one."""
    pair = ordered[place]
    room = int(tolerance * len(pair.body))
    low = max(bisect.bisect_left(lengths, len(pair.body) - room), place - NEIGHBOURS)
    high = min(bisect.bisect_right(lengths, len(pair.body) + room), place + NEIGHBOURS + 1)
    fit = [one for one in ordered[low:high] if one.body != pair.body and one.name != pair.name]
    if not fit:
        return None
    side = 1 if int(key("side", pair.key), 16) % 2 else -1
    best = min(fit, key=lambda one: ((len(one.body) - len(pair.body)) * side < 0, abs(len(one.body) - len(pair.body)), key(pair.key, one.key)))
    return best.body
