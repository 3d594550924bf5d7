"""The options of `data`: sources of rows. What they share is `views`, `content` and a run that writes a corpus."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from lmforge.errors import Problem
from lmforge.formats.corpus import VIEWS, source_view
from lmforge.registry import Key, register
from lmforge.step import Context, StepNode

MUTATIONS = ("operator", "comparison", "condition", "constant", "name", "arguments", "statement")
COMMIT = re.compile(r"[0-9a-f]{40}")


class Data(StepNode):
    """A source of rows that a step turns into a corpus."""

    group = "data"
    produces = "corpus"

    @property
    def views(self) -> tuple[str, ...]:
        """The views whose rows the corpus will hold; cheap enough for a plan."""
        raise RuntimeError(f"{type(self).__name__} has no views")

    def offers(self, view: str) -> str | None:
        """The view of the corpus that `view` is read from: itself, or one that it can be made of (prompts, of chats); None where there is none."""
        return source_view(view, self.views)

    def content(self, cache: Path | None) -> str:
        """A digest of what the source holds, never of where it lies; `cache` is a JSON of hashes already taken."""
        raise RuntimeError(f"{type(self).__name__} has no content()")


@register("data", "pystdlib")
class PyStdlib(Data):
    """The running Python's standard library: files, (signature + docstring -> body) pairs, and right against wrong bodies of the same length."""

    code_revision = 2  # near-duplicates share a side; held-out pairs that stand in training are dropped
    exclude: Annotated[tuple[str, ...], Key("names of folders and files to leave out; * and ? match", identity=False)]  # content() covers what is left
    heldout_fraction: Annotated[float, Key("share of the files held out, the same in every view, chosen by content; near-duplicates count as one", gt=0, lt=1)]
    docstring_paragraphs: Annotated[int, Key("paragraphs of the docstring in a prompt", ge=1)]
    min_body_chars: Annotated[int, Key("shortest body that makes a pair", unit="characters", ge=1)]
    max_body_chars: Annotated[int, Key("longest body that makes a pair", unit="characters", ge=1)]
    max_pair_chars: Annotated[int, Key("longest prompt + body", unit="characters", ge=1)]
    negatives: Annotated[int, Key("wrong bodies that each right one of the training side is paired with; a held-out one has one", ge=1)]
    mutations: Annotated[tuple[str, ...], Key("kinds of edit that make a right body wrong", choices=MUTATIONS)]
    mutation_fraction: Annotated[float, Key("share of rejected bodies that are mutations; the others are another function's body", ge=0, le=1)]
    mutation_edits: Annotated[int, Key("edits in one mutation", ge=1)]
    length_tolerance: Annotated[float, Key("how far a rejected body's length may be from the chosen one's, as a share of it", ge=0, lt=1)]

    @property
    def views(self) -> tuple[str, ...]:
        return ("text", "chat", "preference")

    def check(self, where: str) -> Iterator[Problem]:
        if self.min_body_chars > self.max_body_chars:
            yield Problem(f"{where}.min_body_chars", f"{self.min_body_chars} is above max_body_chars={self.max_body_chars}")
        if self.max_body_chars > self.max_pair_chars:
            yield Problem(f"{where}.max_body_chars", f"{self.max_body_chars} is above max_pair_chars={self.max_pair_chars}, which holds the prompt too")
        if self.mutation_fraction > 0 and not self.mutations:
            yield Problem(f"{where}.mutations", "empty", "name at least one kind, or set mutation_fraction=0")

    def content(self, cache: Path | None) -> str:
        return _library(self._root, self.exclude, cache)

    @property
    def _root(self) -> Path:
        return Path(sysconfig.get_paths()["stdlib"])

    @property
    def _paths(self) -> list[Path]:
        from lmforge.formats.manifest import walk

        return walk(self._root, (".py",), self.exclude)

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.data import stdlib
        from lmforge.data.pairs import Rules

        rules = Rules(**{one.name: getattr(self, one.name) for one in dataclasses.fields(Rules)})
        account = stdlib.write(self._root, self._paths, self.heldout_fraction, rules, context.out, context.report.progress)
        return account.plain()


@functools.cache
def _library(root: Path, exclude: tuple[str, ...], cache: Path | None) -> str:
    """The content of a standard library, read once: a process's own does not change under it."""
    from lmforge.formats.manifest import digest, walk

    return digest(walk(root, (".py",), exclude), cache)


@register("data", "text")
class Text(Data):
    """Your own .txt, .jsonl and .parquet files: text, chats (messages, prompt/completion, Alpaca, ShareGPT) preference pairs, KTO's labels or prompts."""

    code_revision = 2  # turns out of order are bad rows; prompts of several turns; feedback and prompt rows; tool calls
    path: Annotated[str | None, Key("a file, or a folder that is searched for files", identity=False)]
    text_field: Annotated[str, Key("field that holds a plain text row's text")]
    heldout_fraction: Annotated[float, Key("share of the documents held out, chosen by content", gt=0, lt=1)]
    txt_document_chars: Annotated[int, Key("a .txt is cut at blank lines, or else line ends, into documents of at most this length", unit="characters", ge=64)]

    def check(self, where: str) -> Iterator[Problem]:
        from lmforge.data.files import SUFFIXES

        where, wanted = f"{where}.path", f"give a file, or a folder with files that end in {', '.join(SUFFIXES)}"
        if not self.path:
            yield Problem(where, "must be set", wanted)
        elif not self._root.exists():
            yield Problem(where, f"no such file or folder: {self.path!r}", wanted)
        elif not self._paths:
            yield Problem(where, f"no usable file: {self.path!r}", wanted)
        elif not any(path.stat().st_size for path in self._paths):
            yield Problem(where, f"only empty files: {self.path!r}", wanted)

    @property
    def _root(self) -> Path:
        return Path(self.path or "").expanduser()

    @property
    def _paths(self) -> list[Path]:
        from lmforge.data.files import SUFFIXES
        from lmforge.formats.manifest import walk

        return walk(self._root, SUFFIXES)

    @property
    def views(self) -> tuple[str, ...]:
        from lmforge.data.ingest import peek

        return peek(self._root, self._paths, self.txt_document_chars, self.text_field)

    def content(self, cache: Path | None) -> str:
        from lmforge.formats.manifest import digest

        return digest(self._paths, cache)

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.data import ingest

        root, paths = self._root, self._paths
        rows = ingest.rows(root, paths, self.txt_document_chars, context.report.progress)
        return ingest.write(rows, context.out, self.heldout_fraction, self.text_field, None, str(self.path)).plain()


@register("data", "hf")
class HuggingFace(Data):
    """A data set of the Hugging Face hub by name, streamed, or a local data set folder that `datasets.load_dataset` opens. No code of a data set ever runs."""

    code_revision = 2  # turns out of order are bad rows; prompts of several turns; feedback and prompt rows; tool calls
    name: Annotated[str, Key("owner/name on the hub, or a local folder", identity=False)]
    config: Annotated[str | None, Key("the data set's configuration; null where it has only one")]
    revision: Annotated[str | None, Key("commit of the data set on the hub, 40 hex digits; not read for a local folder", identity=False)]
    split: Annotated[str, Key("the data set's split to read")]
    view: Annotated[str, Key("what its rows are; those of another shape are quarantined", choices=VIEWS)]
    text_field: Annotated[str, Key("field that holds a plain text row's text")]
    max_rows: Annotated[int | None, Key("rows to read from the start of the split; null reads all", ge=2)]
    heldout_fraction: Annotated[float, Key("share of the rows held out, chosen by content", gt=0, lt=1)]

    @property
    def _local(self) -> bool:
        return Path(self.name).is_dir()

    def check(self, where: str) -> Iterator[Problem]:
        if self._local:
            return
        if self.name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name):
            yield Problem(f"{where}.name", f"no such folder, and not a name on the hub: {self.name!r}", "give owner/name or a folder")
        elif not COMMIT.fullmatch(self.revision or ""):
            yield Problem(
                f"{where}.revision",
                f"{self.revision} is not a commit",
                f"pin the data so that a digest means the same rows for ever: the 40 hex digits at huggingface.co/datasets/{self.name}/commits/main",
            )

    @property
    def views(self) -> tuple[str, ...]:
        return (self.view,)

    def content(self, cache: Path | None) -> str:
        from lmforge.data.split import key
        from lmforge.formats.manifest import digest, label, walk

        if not self._local:
            return key(self.name, str(self.revision))
        root = Path(self.name)
        paths = walk(root, ("",))
        return key(digest(paths, cache), *(label(path, root) for path in paths))  # load_dataset derives splits from file names

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.data import hub, ingest

        revision = None if self._local else self.revision
        rows = ingest.counted(hub.rows(self.name, self.config, revision, self.split, self.max_rows), self.max_rows, context.report.progress)
        return ingest.write(rows, context.out, self.heldout_fraction, self.text_field, self.view, self.name).plain()


@register("data", "mixture")
class Mixture(Data):
    """Several sources by weight, in bytes of content; the scarcest is read max_epochs times (four are nearly as good as new data, Muennighoff et al. 2023)."""

    code_revision = 2  # a prompt that one source holds out is trained on from none
    sources: Annotated[dict[str, Data], Key("any data options, under names of your own")]
    weights: Annotated[dict[str, float], Key("each source's share of the training bytes; only the ratios matter")]
    max_epochs: Annotated[float, Key("how often the source that its weight asks most of is read", gt=0)]

    def check(self, where: str) -> Iterator[Problem]:
        if len(self.sources) < 2:
            yield Problem(f"{where}.sources", f"{len(self.sources)} given", "a mixture needs at least two; for one, choose it with data=")
        for name in sorted(self.sources.keys() ^ self.weights.keys()):
            instead = f"add weights.{name}" if name in self.sources else f"sources has: {', '.join(self.sources)}"
            yield Problem(f"{where}.weights.{name}", "each source has one weight, and each weight a source", instead)
        for name, weight in self.weights.items():
            if weight <= 0:
                yield Problem(f"{where}.weights.{name}", f"{weight:g} must be > 0", "leave the source out instead")

    @property
    def views(self) -> tuple[str, ...]:
        offered = {view for source in self.sources.values() for view in source.views}
        return tuple(view for view in VIEWS if view in offered)

    def content(self, cache: Path | None) -> str:
        from lmforge.data.split import key

        named = [(name, self.sources[name]) for name in sorted(self.sources)]
        return key(*(part for name, one in named for part in (name, str(one.code_revision), one.content(cache))))

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.data.mix import mix

        work = context.out.parent / f".{context.out.name}.sources"
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left
        try:
            for name in sorted(self.sources):
                self.sources[name].run(dataclasses.replace(context, out=work / name))
            return mix({name: work / name for name in sorted(self.sources)}, self.weights, self.max_epochs, context.out).plain()
        finally:
            shutil.rmtree(work, ignore_errors=True)
