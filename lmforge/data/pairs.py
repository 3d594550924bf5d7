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

ATTEMPTS = 8  # seeds tried for one more mutation of a body that has some already
NEIGHBOURS = 16  # bodies of nearest length on each side that may serve as another function's body


@dataclass(frozen=True)
class Rules:
    """What `pystdlib`'s keys say of pairs; see conf/data/pystdlib.yaml for their meaning."""

    docstring_paragraphs: int
    min_body_chars: int
    max_body_chars: int
    max_pair_chars: int
    negatives: int
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
    """Write preference rows: each body against different wrong ones of about the same length, from the same split.

    A training body has `rules.negatives` of them, a held-out one only the first, which no key but those of single pairs changes.
    """
    tally: ViewTally = writer.account.view("preference")
    kinds = {"mutation": 0, "other": 0}
    done = 0
    for split in SPLITS:
        ordered = sorted((pair for pair in pairs if pair.split == split), key=lambda pair: (len(pair.body), pair.key))
        lengths = [len(pair.body) for pair in ordered]
        for place, pair in enumerate(ordered):
            done += 1
            progress(done, len(pairs))
            used = {pair.body}
            for number in range(rules.negatives if split == "train" else 1):
                tally.entered += 1
                kind, rejected = _wrong(number, place, ordered, lengths, rules, used)
                if not kind:
                    tally.dropped["no_wrong_body_of_that_length"] += 1
                    continue
                used.add(rejected)
                tally.kept += 1
                kinds[kind] += 1
                row = {"prompt": pair.prompt, "chosen": pair.body, "rejected": rejected, "source": pair.source, "kind": kind}
                writer.write("preference", split, row)
    writer.account.more["rejected_kinds"] = kinds


def _wrong(number: int, place: int, ordered: Sequence[Pair], lengths: Sequence[int], rules: Rules, used: set[str]) -> tuple[str, str]:
    """(kind, body) of a pair's wrong body of that number, which is none of `used`; two empty texts where there is none."""
    pair = ordered[place]
    seed = pair.key if number == 0 else key(pair.key, str(number))
    first = ("mutation", "other") if unit(key("kind", seed)) < rules.mutation_fraction else ("other", "mutation")
    for kind in first:
        body = _mutation(pair, seed, number, rules, used) if kind == "mutation" else _other(place, ordered, lengths, rules.length_tolerance, seed, used)
        if body is not None:
            return kind, body
    return "", ""


def _mutation(pair: Pair, seed: str, number: int, rules: Rules, used: set[str]) -> str | None:
    """A mutation that is none of `used`: the first body's seed gives one by itself, a later one's may have to be changed."""
    names = _parameters(pair.prompt)
    for attempt in range(ATTEMPTS if number else 1):
        found = mutate(pair.body, names, rules.mutations, rules.mutation_edits, rules.length_tolerance, key(seed, str(attempt)) if attempt else seed)
        if found is None or found not in used:
            return found
    return None


def _parameters(prompt: str) -> list[str]:
    function = ast.parse(prompt).body[0]
    return [one.arg for one in ast.walk(function) if isinstance(one, ast.arg)]


def _other(place: int, ordered: Sequence[Pair], lengths: Sequence[int], tolerance: float, seed: str, used: set[str]) -> str | None:
    """Another function's body of the nearest length: the seed picks the side, so that neither chosen nor rejected is the longer one."""
    pair = ordered[place]
    room = int(tolerance * len(pair.body))
    low = max(bisect.bisect_left(lengths, len(pair.body) - room), place - NEIGHBOURS)
    high = min(bisect.bisect_right(lengths, len(pair.body) + room), place + NEIGHBOURS + 1)
    fit = [one for one in ordered[low:high] if one.body not in used and one.name != pair.name]
    if not fit:
        return None
    side = 1 if int(key("side", seed), 16) % 2 else -1
    best = min(fit, key=lambda one: ((len(one.body) - len(pair.body)) * side < 0, abs(len(one.body) - len(pair.body)), key(seed, one.key)))
    return best.body
