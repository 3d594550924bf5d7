"""The step that makes named weights an artifact of the pipeline, and the digest that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from lmforge.errors import CheckpointError
from lmforge.formats import store
from lmforge.model.agree import differences
from lmforge.model.source import local_folder, pinned, read_config, snapshot
from lmforge.registry import Key, register
from lmforge.step import Context, StepNode

# Everything a Hugging Face model folder needs, and nothing that runs: no pickles, no Python.
PATTERNS = ("*.safetensors", "*.json", *store.TOKENIZER_FILES)


@register("step", "weights")
class FetchWeights(StepNode):
    """Weights that a config names, from a local folder or the hub, as a checkpoint. Safetensors only.

    A hub id that is not pinned to a commit is a step by its name alone: once done it stays as it is, whatever the hub has since.
    """

    produces = "checkpoint"

    # What they are is identity; where they lie is not.
    source: Annotated[str, Key("a local folder or a hub id", identity=False)]
    revision: Annotated[str | None, Key("hub commit; null = the newest when the step runs", identity=False)]
    fingerprint: Annotated[str, Key("what the weights are: the folder's digest, or hub id @ commit")]
    expected: Annotated[dict[str, Any] | None, Key("the config the plan was made with, for weights whose own one only comes with them", identity=False)]

    @classmethod
    def of(cls, source: str, revision: str | None, cache: Path | None, config: dict[str, Any] | None = None) -> FetchWeights:
        """The step for a source: a folder is hashed (`cache` remembers it), a hub id counts with its `@<commit>` or `revision`, so pin it.

        A folder with only a config.json will do for a plan; `run` asks for the weights.
        """
        folder = local_folder(source)
        if folder:
            _model_folder(folder)
            return cls(source=str(folder.resolve()), revision=None, fingerprint=folder_digest(folder, cache), expected=None)
        # Not the commit the local cache happens to hold: fetching the weights must not make them other weights.
        name, commit = pinned(source, revision)
        return cls(source=name, revision=commit, fingerprint=f"{name}@{commit or 'main'}", expected=config)

    @property
    def dtype(self) -> str | None:
        """What the weights of a local folder are saved in, by its config.json; None where it does not say, or is elsewhere."""
        folder = local_folder(self.source)
        config = read_config(str(folder), None, "model.pretrained") if folder else {}
        return config.get("dtype") or config.get("torch_dtype")

    def preflight(self) -> None:
        """A folder must hold its weights before anything runs; the hub is asked when it is this step's turn."""
        if folder := local_folder(self.source):
            weight_files(folder)

    def run(self, context: Context) -> dict[str, Any]:
        """Puts every file of the model into `context.out`, where it outlives the source; `commit` in the metrics is the one the hub gave."""
        local = local_folder(self.source)
        folder = local or snapshot(self.source, self.revision, PATTERNS)
        weights = weight_files(folder)
        if self.expected is not None and (found := differences(self.expected, read_config(str(folder), None, "model.pretrained"))):
            what = f"its config.json says {found[0].key}={found[0].theirs!r}, the plan's model {found[0].ours!r}"
            raise CheckpointError(self.source, what, "leave model out, the weights decide")
        if local and folder_digest(local, None) != self.fingerprint:
            raise CheckpointError(self.source, "its files changed after the plan was made", "run again")
        files = list(_files(folder))
        context.out.mkdir(parents=True, exist_ok=True)
        for done, path in enumerate(files, 1):
            _take(path.resolve(), context.out / path.name)
            context.report.progress(done, len(files), path.name)
        made: dict[str, Any] = {"files": len(files), "weight_bytes": sum(path.stat().st_size for path in weights)}
        return made if local else {**made, "commit": folder.name}


def folder_digest(folder: Path, cache: Path | None) -> str:
    """SHA-256 over the names and contents of a model folder's files; `cache` spares those whose path, size and mtime it knows."""
    remembered = _read_cache(cache)
    before = len(remembered)
    lines = []
    for path in _files(folder):
        real, status = path.resolve(), path.stat()
        key = f"{real}:{status.st_size}:{status.st_mtime_ns}"
        if key not in remembered:
            with real.open("rb") as file:
                remembered[key] = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{path.name} {remembered[key]}\n")
    if cache is not None and len(remembered) > before:
        _write_cache(cache, remembered)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a complete model folder; CheckpointError where something is missing."""
    _model_folder(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        raise CheckpointError(str(folder), "has no model.safetensors", "convert the weights to safetensors; other formats are never loaded")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(index), f"is not an index of safetensors ({type(error).__name__})", "restore the file") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(str(index), f"names {name!r}, which is not in the folder", "complete the download")
    return [folder / name for name in names]


def _model_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(str(folder), "there is no such folder", "name a folder with config.json and *.safetensors, or a hub id")
    if not (folder / "config.json").is_file():
        raise CheckpointError(str(folder), "has no config.json", "name a folder in Hugging Face format")
    if (folder / "adapter" / "adapter_config.json").is_file():
        raise CheckpointError(str(folder), "holds a soft prompt, which is no part of the weights", "name the base's folder; generate speaks with this one")


def _take(source: Path, out: Path) -> None:
    """`source`, a real file, as `out`: weights are hard-linked where that is possible, all else is copied. Atomic: linked or copied beside, then renamed.

    Moving, deleting or replacing the source leaves a hard link as it is. Only writing into the very same file would show through; safetensors and
    the hub's cache never do, but writers of small files do, and those cost nothing to copy.
    """
    partial = out.with_name(f".{out.name}.partial")
    partial.unlink(missing_ok=True)  # what an interrupted run left
    if not (source.suffix == ".safetensors" and _hard_linked(source, partial)):
        shutil.copyfile(source, partial)
    out.unlink(missing_ok=True)  # a rename onto another link to the same file does nothing, and would leave both
    os.replace(partial, out)


def _hard_linked(source: Path, link: Path) -> bool:
    try:
        os.link(source, link)
    except OSError:  # another file system, one without links, or a file of another user
        return False
    return True


def _read_cache(cache: Path | None) -> dict[str, str]:
    """What was hashed before; a cache that cannot be read costs one more hashing, and is then written anew."""
    if cache is None or not cache.is_file():
        return {}
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _write_cache(cache: Path, remembered: dict[str, str]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f".{cache.name}.{os.getpid()}")
    partial.write_text(json.dumps(remembered), encoding="utf-8")
    os.replace(partial, cache)
