"""What a folder of data is, by content: which files count, and one digest over them that no path enters."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SETTLED_NS = 2_000_000_000  # a file changed less than 2 s ago may change again within the clock's tick: never trust its cached hash
SMALL = 2**18


def walk(root: Path, suffixes: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Files under `root` (or `root` itself, if a file) with one of the suffixes, by relative name; hidden ones and `exclude`d names are left out."""
    if root.is_file():
        return [root] if root.name.endswith(tuple(suffixes)) else []
    found = []
    hidden = re.compile("|".join([r"\..*", *map(fnmatch.translate, exclude)]), re.DOTALL).match
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not hidden(name)]
        found += [os.path.join(folder, name) for name in files if name.endswith(tuple(suffixes)) and not hidden(name)]
    return [Path(name) for name in sorted(found, key=lambda name: name.replace(os.sep, "/"))]


def label(path: Path, root: Path) -> str:
    """A file's name within its root, with forward slashes: what quarantine and `source` show."""
    return path.name if path == root else path.relative_to(root).as_posix()


def digest(paths: Sequence[Path], cache: Path | None = None) -> str:
    """One digest over the files' contents in their order; their names and place do not enter, their format does."""
    known = _load(cache)
    total, changed = hashlib.sha256(), False
    for path in paths:
        if cache is None:
            found = _hash(path)
        else:
            stat = path.stat()
            stamp, name = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns], str(path.absolute())
            entry = known.get(name)
            if entry is None or entry[:3] != stamp:
                entry = [*stamp, _hash(path)]
                if time.time_ns() - max(stamp[1:]) > SETTLED_NS:
                    known[name], changed = entry, True
            found = entry[3]
        form = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        total.update(f"{form}:{found}\n".encode())
    if cache is not None and changed:
        _save(cache, known)
    return total.hexdigest()


def _hash(path: Path) -> str:
    """A small file is read at once: `file_digest` makes a buffer of a quarter MiB for each, which costs more than the hash."""
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size <= SMALL:
            return hashlib.sha256(file.read()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(cache: Path | None) -> dict[str, list[Any]]:
    """The cached manifest {path: [size, mtime_ns, ctime_ns, sha256]}; an unreadable one is as good as none."""
    if cache is None or not cache.is_file():
        return {}
    try:
        known = json.loads(cache.read_bytes())
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _save(cache: Path, known: dict[str, list[Any]]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known, separators=(",", ":")), encoding="utf-8")
    os.replace(temporary, cache)
