"""A corpus from a Python standard library: its files, its documented functions, and wrong bodies beside right ones."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmforge.data.overlap import Trained, groups
from lmforge.data.pairs import Pair, Rules, contrast, instruct
from lmforge.data.split import heldout, key
from lmforge.errors import DataError
from lmforge.formats import corpus, manifest

LAST = "f" * 13  # in front of a key: the end of the order that `heldout` goes by, and above every fraction


@dataclass(frozen=True)
class Module:
    """One readable file; `digest` is the SHA-256 of its text."""

    name: str
    text: str
    tree: ast.Module
    digest: str


def write(folder: Path, paths: Sequence[Path], heldout_fraction: float, rules: Rules, out: Path, progress: Callable[[int, int, str], None]) -> corpus.Account:
    """Write all three views of a library's files (`paths` under `folder`) to `out`.

    Held-out rows of every view come from the same held-out files, near-duplicates share a side, and no held-out pair stands in the training side.
    """
    count = len(paths)
    with corpus.Writer(out) as writer:
        modules = list(_distinct(_modules(paths, folder, writer, lambda done: progress(done, 3 * count, "reading files")), writer))
        if len(modules) < 2:
            raise DataError(str(folder), f"{len(modules)} usable .py files", "a corpus needs at least two, one of them held out")
        held = _held(modules, heldout_fraction, folder)
        pairs: list[Pair] = []
        seen: set[str] = set()
        trained = Trained()
        for done, module in enumerate(sorted(modules, key=lambda one: one.digest in held)):  # training first: held-out pairs are compared with all of it
            split = "heldout" if module.digest in held else "train"
            writer.write("text", split, {"text": module.text, "source": module.name})
            if split == "train":
                trained.add(module.text)
            pairs += instruct(module.name, module.tree, module.text, split, rules, seen, trained, writer)
            progress(count + done, 3 * count, "pairing functions")
        contrast(pairs, rules, writer, lambda done, total: progress(2 * count + count * done // total, 3 * count, "choosing wrong bodies"))
        _refuse_empty(writer.account, folder)
        text = writer.account.view("text")
        writer.account.rows = corpus.Tally(text.entered, text.kept, text.dropped)  # a row of this source is a file
    progress(3 * count, 3 * count, "written")
    return writer.account


def _modules(paths: Sequence[Path], folder: Path, writer: corpus.Writer, progress: Callable[[int], None]) -> Iterator[Module]:
    """Files that are UTF-8 Python; the others go to the quarantine."""
    tally = writer.account.view("text")
    for done, path in enumerate(paths):
        tally.entered += 1
        progress(done)
        name, raw = manifest.label(path, folder), path.read_bytes()
        try:
            text = raw.decode("utf-8-sig").replace("\r\n", "\n")
            tree = _parse(text)
        except UnicodeDecodeError as error:
            tally.dropped["not_utf8"] += 1
            writer.quarantine(name, raw[: error.start].count(b"\n") + 1, f"not UTF-8: {error.reason}")
        except (SyntaxError, ValueError) as error:
            tally.dropped["unparsable"] += 1
            writer.quarantine(name, getattr(error, "lineno", None) or 0, f"not Python: {error.args[0]}")
        else:
            yield Module(name, text, tree, hashlib.sha256(text.encode()).hexdigest())


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in an old file are no news to a user
        return ast.parse(text)


def _distinct(modules: Iterator[Module], writer: corpus.Writer) -> Iterator[Module]:
    seen: set[str] = set()
    tally = writer.account.view("text")
    for module in modules:
        if not module.text.strip():
            tally.dropped["empty"] += 1
        elif module.digest in seen:
            tally.dropped["duplicate"] += 1
        else:
            seen.add(module.digest)
            tally.kept += 1
            yield module


def _held(modules: Sequence[Module], fraction: float, folder: Path) -> set[str]:
    """Digests of the held-out files. Near-duplicates share a side, so `fraction` is of their groups; one larger than that share of all files is trained on."""
    members: dict[int, list[str]] = {}
    for module, group in zip(modules, groups([module.text for module in modules]), strict=True):
        members.setdefault(group, []).append(module.digest)
    if len(members) < 2:
        raise DataError(str(folder), f"its {len(modules)} files are all near-duplicates, so none can be held out", "add files of another kind")
    keyed = {_group_key(digests, large=len(digests) > max(1, fraction * len(modules))): digests for digests in members.values()}
    return {digest for one in heldout(keyed, fraction) for digest in keyed[one]}


def _group_key(digests: Sequence[str], *, large: bool) -> str:
    """What decides a group's side: its smallest digest, hashed again, because the smallest of many is nearly always below a fraction."""
    found = key(min(digests))
    return LAST + found[len(LAST) :] if large else found


def _refuse_empty(account: corpus.Account, folder: Path) -> None:
    for view, tally in account.views.items():
        for split in corpus.SPLITS:
            if not getattr(tally, split):
                instead = "widen data.max_body_chars, data.max_pair_chars or data.heldout_fraction"
                raise DataError(str(folder), f"no {split} rows for the {view} view: {dict(tally.dropped)}", instead)
