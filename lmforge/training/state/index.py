"""index.json: the one file that says which others make up the state, and that each of them is the one written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from lmforge.codec import canonical
from lmforge.errors import CheckpointError

INDEX = "index.json"
FORM = 3  # of the index and the files it names
SUFFIX = ".safetensors"


class File(TypedDict):
    bytes: int
    sha256: str


class Index(TypedDict):
    """`check` is the SHA-256 of the rest in canonical JSON."""

    form: int
    step: int
    folder: str
    files: dict[str, File]
    tensors: dict[str, tuple[str, list[int]]]  # name to torch's name of the dtype, and the global shape
    tree: Any  # a `tree.Skeleton`
    check: str


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Replace the index: the state is the new one from the moment this renames it."""
    temporary = folder / (INDEX + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"form": FORM, **index, "check": checksum({"form": FORM, **index})}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / INDEX)
    sync(folder)


def sync(folder: Path) -> None:
    """Flush a folder's entries, such as renames, to the disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({key: value for key, value in index.items() if key != "check"}).encode()).hexdigest()


def read_index(folder: Path) -> Index | None:
    """The index, None where there is none; CheckpointError where it is not what `write_index` wrote."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        good = index["check"] == checksum(index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(path, "is not readable", folder) from error
    if not good:
        raise broken(path, "is damaged: its checksum does not fit", folder)
    if index.get("form") != FORM:
        raise broken(path, "was written by another version of this program", folder)
    if not index["folder"].startswith("step-") or any(Path(name).name != name for name in (index["folder"], *index["files"])):
        raise broken(path, "names a file elsewhere", folder)
    return index  # type: ignore[no-any-return]  # its checksum says it is what `write_index` wrote


def strays(folder: Path, index: Index) -> Iterator[CheckpointError]:
    """Weights among the state's files that the index does not name: the reader takes every file it finds."""
    shards = folder / index["folder"]
    for path in sorted(shards.glob("*" + SUFFIX)) if shards.is_dir() else ():
        if path.name not in index["files"]:
            yield broken(path, "is not a part of this state: index.json does not name it", folder)


def flaw(folder: Path, index: Index, name: str) -> CheckpointError | None:
    """What is wrong with one of the files: missing, cut, changed, or another one in its place."""
    path, said = folder / index["folder"] / name, index["files"][name]
    try:
        size = path.stat().st_size
        if size != said["bytes"]:
            return broken(path, f"has {size:,} bytes of {said['bytes']:,}", folder)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return broken(path, f"cannot be read ({error.strerror})", folder)
    return None if found == said["sha256"] else broken(path, "is damaged: its SHA-256 is not the one in index.json", folder)


def sweep(folder: Path, keep: str) -> None:
    """Remove the files of every state but `keep`."""
    for path in folder.glob("step-*"):
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def broken(path: Path, what: str, folder: Path) -> CheckpointError:
    return CheckpointError(str(path), what, f"remove the folder {folder} to start this step again")
